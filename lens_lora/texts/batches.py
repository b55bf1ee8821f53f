"""Many texts in forward passes of a bounded size, those of like length together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.core import (
    LoraLens,
    Prompts,
    ScaleInject,
    beginnings,
    which_prompt,
)
from lens_lora.core.function.forward import read_logits, require_finite
from lens_lora.core.function.memory import Pass, tokens_at_once
from lens_lora.errors import PromptError


def by_length(texts: Prompts, most: int) -> Iterator[tuple[list[int], Prompts]]:
    """Batches of texts of like length with their indices, the shortest first. No forward pass."""
    order = texts.lengths.argsort(stable=True).tolist()
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * int(texts.lengths[index]) > most:
            yield batch, texts.chosen(batch)
            batch = []
        batch.append(index)
    if batch:
        yield batch, texts.chosen(batch)


Visit = Callable[[list[int], Prompts], None]


def over_texts(
    lens: LoraLens,
    texts: Prompts,
    most: int,
    visit: Visit,
    what: str,
    progress: bool,
    kind: Pass = "plain",
) -> None:
    """Show every batch of texts of like length, read at each token, with their indices.

    A batch has at most so many tokens, and no more than the bound of the lens has room for.
    """
    at_each = dataclasses.replace(texts, reads=texts.lengths)
    tokens = tokens_at_once(lens, at_each, most, kind)
    with tqdm(total=texts.batch, desc=what, leave=False, disable=not progress) as bar:
        for index, batch in by_length(texts, tokens):
            visit(index, dataclasses.replace(batch, reads=batch.lengths))
            bar.update(len(index))


TOKENS_AT_ONCE = 512  # of a batch, whose logits are held for two models at once
Gated = tuple[LoraLens, Float[Tensor, " site"]]


def logits_of(gated: Gated, rows: Prompts) -> Float[Tensor, "row pos vocab"]:
    """The logits of one model where the rows are read. One forward pass.

    Raises:
        NumericsError: a logit that is not finite.
    """
    lens, gates = gated
    with torch.no_grad(), lens.injected(ScaleInject(lens.plan, gates)):
        logits = read_logits(lens, rows)
    require_finite(logits.amax(), "a logit")
    return logits


def require_second_token(texts: Prompts, what: str) -> None:
    """Refuse texts of one token: the first is a sink, and left out."""
    short = (texts.lengths < 2).nonzero().flatten().tolist()
    if short:
        raise PromptError(
            f"{_which_text(short[0], texts)} has one token, and a text's first token is left out "
            f"of {what} as a sink; give longer texts."
        )


def require_own_tokens(texts: Prompts) -> None:
    """Refuse a text that another one begins with: it has no token that the other lacks."""
    marks = beginnings(texts)
    whole = marks.gather(1, texts.lengths.cpu()[:, None] - 1)
    begins = (marks[None] == whole[:, None]).any(2).fill_diagonal_(False)
    for text, other in begins.nonzero().tolist()[:1]:
        raise PromptError(
            f"{_which_text(text, texts)} has no token of its own: text {other} begins with the "
            "same tokens, or is equal, so what is measured on one is not held out from the other; "
            "leave it out."
        )


def _which_text(index: int, texts: Prompts) -> str:
    return which_prompt(index, texts.batch).replace("prompt", "text")
