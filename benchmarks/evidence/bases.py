"""Base models of the evidence, by name or folder."""

from __future__ import annotations

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.evidence.recipes import SECOND, SMOLLM2, Recipe
from lens_lora.demonstration.embedded import EMBEDDED_HUB_ID, EMBEDDED_NAME, load_embedded


def load_base(base: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model by its name, or any causal model that lies in a folder."""
    if is_embedded(base):
        return load_embedded(quiet=True)
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(base, local_files_only=True)


def is_embedded(base: str) -> bool:
    """Whether a name is that of the model that the package embeds."""
    return base in (EMBEDDED_NAME, EMBEDDED_HUB_ID)


def recipes_of(base: str) -> tuple[Recipe, ...]:
    """The adapters that are trained on a base: the embedded model's, or the second base's."""
    return SMOLLM2 if is_embedded(base) else SECOND
