"""Base models of the evidence, by name or folder."""

from __future__ import annotations

from pathlib import Path

from recipes import SECOND, SMOLLM2, Recipe
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lens_lora.demonstration.embedded import EMBEDDED_HUB_ID, EMBEDDED_NAME, load_embedded


def load_base(base: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model by its name, or any causal model that lies in a folder."""
    if base in (EMBEDDED_NAME, EMBEDDED_HUB_ID):
        return load_embedded(quiet=True)
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(base, local_files_only=True)


def recipes_of(base: str) -> tuple[Recipe, ...]:
    """The adapters that are trained on a base: those of the embedded model, or the second base's."""
    return SMOLLM2 if Path(base).name == EMBEDDED_NAME or base == EMBEDDED_HUB_ID else SECOND
