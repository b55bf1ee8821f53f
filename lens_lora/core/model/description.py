"""A lens in words: the names of its model, and its prompts with how they were read."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lens_lora.core.adapter.peft_files import name_of
from lens_lora.core.model.passes import OpenBlock
from lens_lora.core.readout.prompts import Prompts, PromptTokens, responses_among

# --- The model

# What the host libraries call a model without a name.
_NO_NAMES = ("model", "custom")


def names_of(model: Any, hf_model: Any) -> list[str]:
    """The names by which the base at hand is known; perhaps none.

    They are the Hugging Face model's own where it has one: a hooked model may have been made from
    another's weights under the name of its architecture.
    """
    own: list[object] = []
    for holder in (hf_model, getattr(model, "original_model", None)):
        own.append(getattr(getattr(holder, "config", None), "name_or_path", None))
    hooked = [getattr(model.cfg, name, None) for name in ("model_name", "tokenizer_name")]
    for names in (own, hooked):
        named = [str(name) for name in names if name and name not in _NO_NAMES]
        if named:
            return list(dict.fromkeys(named))
    return []


# Models of which this package makes folders of its own, by what the hub calls them.
_COPIED_MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct",)


def public_name(folder: str) -> str | None:
    """The hub id of a model that this package made a folder of; None of another folder.

    Args:
        folder: its last part, such as "SmolLM2-135M-Instruct-0.1.2-transformers5".
    """
    for hub_id in _COPIED_MODELS:
        model = re.escape(hub_id.rpartition("/")[2])
        if re.fullmatch(rf"{model}-[\w.]+-transformers\d+", folder):
            return hub_id
    return None


def shown_name(model: Any, hf_model: Any) -> str:
    """The model's name as people know it, and not that of a folder of some cache.

    Args:
        model: the hooked model.
        hf_model: the Hugging Face base beside it; None for none.
    """
    name = str(getattr(model.cfg, "model_name", "") or "unnamed")
    hub_id = public_name(name)
    if hub_id is not None:
        return hub_id.rpartition("/")[2]
    # A folder of the hub's cache is named by a commit, and the folder above it by the model.
    for place in map(Path, names_of(model, hf_model)):
        if place.name == name and name_of(place) != name:
            return name_of(place)
    return name


# --- Prompts


def decoded(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Token ids as strings, one by one; the ids themselves where there is no tokenizer."""
    if tokenizer is None:
        return [str(token) for token in ids]
    return [tokenizer.decode([token]) for token in ids]


def tokens_of_prompts(tokenizer: Any, prompts: Prompts) -> tuple[PromptTokens, ...]:
    """Each prompt's tokens as strings, without padding."""
    shown: list[PromptTokens] = []
    for index, source in enumerate(prompts.sources):
        ids = prompts.row(index).tokens[0].tolist()
        shown.append(PromptTokens(decoded(tokenizer, ids), source.said, source.length))
    return tuple(shown)


def how_read(model: Any, prompts: Sequence[Prompts]) -> dict[str, str]:
    """How prompts were read, whether responses follow them, and what is removed meanwhile.

    Args:
        model: the hooked model.
        prompts: the groups of prompts that a result is of.
    """
    sources = itertools.chain.from_iterable(group.sources for group in prompts)
    origins = dict.fromkeys(source.how for source in sources)
    return {
        "prompts": "; ".join(origins),
        "responses": responses_among(prompts),
        "without": "; ".join(block.says for block in OpenBlock.open_on(model)),
    }
