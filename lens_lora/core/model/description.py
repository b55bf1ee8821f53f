"""Prompts in words: their tokens as strings, and how they were read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from lens_lora.core.model.passes import OpenBlock
from lens_lora.core.readout.prompts import Prompts, PromptTokens, responses_among


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
