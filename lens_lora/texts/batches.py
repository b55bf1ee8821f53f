"""Many texts in forward passes of a bounded size, where texts of like length go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.core import LoraLens, Prompts, ScaleInject, beginnings, require_finite, which_prompt
from lens_lora.core.function.forward import read_logits
from lens_lora.core.function.memory import Pass, tokens_at_once
from lens_lora.errors import PromptError

# The most tokens of a batch whose logits are held for two models at once.
TOKENS_AT_ONCE = 512

# A lens, and the gates at which it is run.
Gated = tuple[LoraLens, Float[Tensor, " site"]]

# Called with the indices of a batch's texts, and the batch.
Visit = Callable[[list[int], Prompts], None]


def by_length(texts: Prompts, most: int) -> Iterator[tuple[list[int], Prompts]]:
    """Batches of texts of like length with their indices, the shortest first. No forward pass.

    Args:
        texts: all of them.
        most: the most tokens of a batch, padding counted; a longer text has a batch of its own.
    """
    order = texts.lengths.argsort(stable=True).tolist()
    batch: list[int] = []
    for index in order:
        padded = (len(batch) + 1) * int(texts.lengths[index])
        if batch and padded > most:
            yield batch, texts.chosen(batch)
            batch = []
        batch.append(index)
    if batch:
        yield batch, texts.chosen(batch)


def batches_of(
    lens: LoraLens, texts: Prompts, most: int, kind: Pass = "plain"
) -> Iterator[tuple[list[int], Prompts]]:
    """Batches of texts of like length with their indices, within the lens' bound of memory.

    Args:
        lens: the adapter over the model, and its bound of memory.
        texts: all of them, read where their logits are needed.
        most: the most tokens of a batch; fewer where the bound of the lens has no room for them.
        kind: 'plain' for forward passes, 'graph' where a batch is differentiated.
    """
    return by_length(texts, tokens_at_once(lens, texts, most, kind))


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

    Args:
        lens: the adapter over the model, and its bound of memory.
        texts: all of them.
        most: the most tokens of a batch; fewer where the bound of the lens has no room for them.
        visit: called with the indices of a batch's texts, and the batch.
        what: how a bar calls it.
        progress: show a bar.
        kind: 'plain' for forward passes, 'graph' where a batch is differentiated.
    """
    read_everywhere = dataclasses.replace(texts, reads=texts.lengths)
    with tqdm(total=texts.batch, desc=what, leave=False, disable=not progress) as bar:
        for index, batch in batches_of(lens, read_everywhere, most, kind):
            visit(index, batch)
            bar.update(len(index))


def logits_of(gated: Gated, rows: Prompts) -> Float[Tensor, "row pos vocab"]:
    """The logits of one model where the rows are read. One forward pass.

    Args:
        gated: a lens, and its gates.
        rows: a batch.

    Raises:
        NumericsError: a logit that is not finite.
    """
    lens, gates = gated
    with torch.no_grad(), lens.injected(ScaleInject(lens.plan, gates)):
        logits = read_logits(lens, rows)
    require_finite(logits.amax(), "a logit")
    return logits


def require_second_token(texts: Prompts, what: str) -> None:
    """Refuse texts of one token: the first is a sink, and left out.

    Args:
        texts: all of them.
        what: the number that leaves out first tokens, for the message.

    Raises:
        PromptError: a text of one token.
    """
    short = (texts.lengths < 2).nonzero().flatten().tolist()
    if short:
        raise PromptError(
            f"{_which_text(short[0], texts)} has one token, and a text's first token is left out "
            f"of {what} as a sink",
            remedy="give longer texts.",
        )


def require_own_tokens(texts: Prompts) -> None:
    """Refuse a text with which another one begins: it has no token that the other lacks.

    Args:
        texts: all of them.

    Raises:
        PromptError: a text that equals another one, or with which another one begins.
    """
    marks = beginnings(texts)
    whole = marks.gather(1, texts.lengths.cpu()[:, None] - 1)
    begins = (marks[None] == whole[:, None]).any(2).fill_diagonal_(False)
    pairs = begins.nonzero().tolist()
    if pairs:
        text, other = pairs[0]
        raise PromptError(
            f"{_which_text(text, texts)} has no token of its own: text {other} begins with the "
            "same tokens, or is equal, so what is measured on one is not held out from the other",
            remedy="leave it out.",
        )


def _which_text(index: int, texts: Prompts) -> str:
    return which_prompt(index, texts.batch).replace("prompt", "text")
