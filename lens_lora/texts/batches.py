"""Many texts in forward passes of a bounded size, where texts of like length go together."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.core import HookFn, LoraLens, Prompts, ScaleInject
from lens_lora.errors import PromptError, require_finite, which_prompt

# The most tokens of a batch whose logits are held for two models at once.
TOKENS_AT_ONCE = 512
# A batch has no more padding than this. A pass of its own takes a small model on a CPU as long as
# some fifty tokens do.
_MOST_PADDING = 64

# A lens, and the gates at which its model is run.
Gated = tuple[LoraLens, Float[Tensor, " site"]]

# Called with the indices of a batch's texts, and the batch.
Visit = Callable[[list[int], Prompts], None]


def by_length(texts: Prompts, most: int) -> Iterator[tuple[list[int], Prompts]]:
    """Batches of texts of like length with their indices, the shortest first. No forward pass.

    A longer text begins a new batch where the shorter ones would need much padding beside it.

    Args:
        texts: all of them.
        most: the most tokens of a batch, with its padding; a longer text has a batch of its own.
    """
    lengths = texts.lengths.tolist()
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(texts.batch), key=lengths.__getitem__):
        padded = (len(batch) + 1) * lengths[index]
        padding = padded - tokens - lengths[index]
        if batch and (padded > most or padding > _MOST_PADDING):
            yield batch, texts.chosen(batch)
            batch = []
            tokens = 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch, texts.chosen(batch)


def batches_of(
    lens: LoraLens, texts: Prompts, most: int, kind: Literal["plain", "graph"] = "plain"
) -> Iterator[tuple[list[int], Prompts]]:
    """Batches of texts of like length with their indices, within the lens' bound of memory.

    Args:
        lens: the adapter over the model, and its bound of memory.
        texts: all of them, read where their logits are needed.
        most: the most tokens of a batch; fewer where the bound of the lens has no room for them.
        kind: 'plain' for forward passes, 'graph' where a batch is differentiated.
    """
    passes = lens.function(texts).of_rows(texts).passes
    return by_length(texts, passes.tokens_at_once(most, kind))


def over_texts(
    lens: LoraLens,
    texts: Prompts,
    most: int,
    visit: Visit,
    what: str,
    progress: bool,
    kind: Literal["plain", "graph"] = "plain",
) -> None:
    """Visit every batch of texts of like length, read at each of their tokens.

    Args:
        lens: the adapter over the model, and its bound of memory.
        texts: all of them.
        most: the most tokens of a batch; fewer where the bound of the lens has no room for them.
        visit: called with the indices of a batch's texts, and the batch.
        what: the title of the bar.
        progress: show a bar.
        kind: 'plain' for forward passes, 'graph' where a batch is differentiated.
    """
    read_everywhere = dataclasses.replace(texts, reads=texts.lengths)
    with tqdm(total=texts.batch, desc=what, leave=False, disable=not progress) as bar:
        for index, batch in batches_of(lens, read_everywhere, most, kind):
            visit(index, batch)
            bar.update(len(index))


def logits_of(
    gated: Gated, rows: Prompts, hooks: Sequence[tuple[str, HookFn]] = ()
) -> Float[Tensor, "row pos vocab"]:
    """The logits of one model where the rows are read. One forward pass.

    Args:
        gated: a lens, and its gates.
        rows: a batch.
        hooks: further hooks for this pass, by the names of their hook points.

    Raises:
        NumericsError: a logit that is not finite.
    """
    lens, gates = gated
    f = lens.function(rows).of_rows(rows)
    logits = f.passes.logits(under=_with_hooks(lens, gates, hooks))
    require_finite(logits.amax(), "a logit")
    return logits


@contextlib.contextmanager
def _with_hooks(
    lens: LoraLens, gates: Float[Tensor, " site"], hooks: Sequence[tuple[str, HookFn]]
) -> Generator[None]:
    """Within the block the model runs at these gates, and under these hooks."""
    with lens.hooked(hooks), lens.injected(ScaleInject(lens.plan, gates)):
        yield


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
    """Refuse a text with which another one begins, as it has no token that the other lacks.

    Args:
        texts: all of them.

    Raises:
        PromptError: a text that equals another one, or with which another one begins.
    """
    # A mark is of a token with all tokens before it, so the last one is that of the whole text.
    marks = texts.marks()
    whole = marks.gather(1, texts.lengths.cpu()[:, None] - 1)
    begins_another = (marks[None] == whole[:, None]).any(2).fill_diagonal_(False)
    pairs = begins_another.nonzero().tolist()
    if pairs:
        text, other = pairs[0]
        raise PromptError(
            f"{_which_text(text, texts)} has no token of its own: text {other} begins with the "
            "same tokens, or is equal, so what is measured on one is not held out from the other",
            remedy="leave it out.",
        )


def _which_text(index: int, texts: Prompts) -> str:
    """Name one of the texts, in words."""
    return which_prompt(index, texts.batch).replace("prompt", "text")
