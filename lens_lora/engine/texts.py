"""Many texts in forward passes of a bounded size: those of like length together."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Bool
from torch import Tensor

from lens_lora.errors import PromptError
from lens_lora.readouts.prompts import Prompts, which_prompt

__all__ = [
    "by_length",
    "distinct_tokens",
    "first_occurrences",
    "require_own_tokens",
    "require_second_token",
    "unshared",
]


def by_length(texts: Prompts, most: int) -> Iterator[tuple[list[int], Prompts]]:
    """Batches of texts of like length with the index of each, the shortest first. No forward pass.

    Args:
        texts: of any lengths.
        most: tokens of a batch, padding included; a longer text is a batch by itself.
    """
    order = texts.lengths.argsort(stable=True).tolist()
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * int(texts.lengths[index]) > most:
            yield batch, texts.chosen(batch)
            batch = []
        batch.append(index)
    if batch:
        yield batch, texts.chosen(batch)


def distinct_tokens(texts: Prompts) -> Bool[Tensor, "batch pos"]:
    """The tokens after each text's first, those with the same tokens before them only once.

    Conversations begin alike, and so do many sentences; by causality nothing differs there.

    Args:
        texts: as tokens.
    """
    return first_occurrences(texts) & texts.after_first.cpu()


def first_occurrences(texts: Prompts) -> Bool[Tensor, "batch pos"]:
    """The tokens of each text that no earlier text has after the same tokens.

    Args:
        texts: as tokens.
    """
    found, seen = texts.real.cpu().clone(), set[tuple[int, ...]]()
    for text, beginnings in enumerate(_beginnings(texts)):
        for pos, beginning in enumerate(beginnings):
            found[text, pos] = beginning not in seen
            seen.add(beginning)
    return found


def unshared(texts: Prompts, others: Prompts) -> Bool[Tensor, "batch pos"]:
    """The `distinct_tokens` that none of the other texts has after the same tokens.

    Args:
        texts: as tokens.
        others: as tokens.
    """
    found = distinct_tokens(texts)
    theirs = {beginning for own in _beginnings(others) for beginning in own}
    for text, beginnings in enumerate(_beginnings(texts)):
        for pos, beginning in enumerate(beginnings):
            found[text, pos] &= beginning not in theirs
    return found


def _beginnings(texts: Prompts) -> list[list[tuple[int, ...]]]:
    """Each token of each text with all before it."""
    pairs = zip(texts.tokens.tolist(), texts.lengths.tolist(), strict=True)
    return [[tuple(row[: pos + 1]) for pos in range(length)] for row, length in pairs]


def require_second_token(texts: Prompts, what: str) -> None:
    """Refuse texts of one token: the first is a sink, and left out.

    Args:
        texts: as tokens.
        what: the first token is left out of, for the error.

    Raises:
        PromptError: naming the text.
    """
    short = (texts.lengths < 2).nonzero().flatten().tolist()
    if short:
        which = which_prompt(short[0], texts.batch).replace("prompt", "text")
        raise PromptError(
            f"{which} has one token, and a text's first token is left out of {what} as a sink; "
            "give longer texts."
        )


def require_own_tokens(texts: Prompts) -> None:
    """Refuse texts that another one begins with: nothing in them is held out from it.

    Args:
        texts: as tokens.

    Raises:
        PromptError: naming both texts.
    """
    every = _beginnings(texts)
    for text, beginnings in enumerate(every):
        for other, theirs in enumerate(every):
            if other != text and beginnings[-1] in theirs[len(beginnings) - 1 : len(beginnings)]:
                which = which_prompt(text, texts.batch).replace("prompt", "text")
                raise PromptError(
                    f"{which} has no token of its own: text {other} begins with the same tokens, "
                    "or is equal, so what is measured on one is not held out from the other; leave "
                    "it out."
                )
