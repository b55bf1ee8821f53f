"""Many texts in forward passes of a bounded size; texts of similar length run together."""

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

# The largest number of tokens in a batch whose logits are kept for two models at once.
TOKENS_AT_ONCE = 512
# A batch has no more padding than this. A pass of its own takes a small model on a CPU as long as
# some fifty tokens do.
_MOST_PADDING = 64

# A lens, and the gates at which its model is run.
Gated = tuple[LoraLens, Float[Tensor, " site"]]

# Called with the indices of a batch's texts, and the batch.
Visit = Callable[[list[int], Prompts], None]


def by_length(texts: Prompts, most: int) -> Iterator[tuple[list[int], Prompts]]:
    """Batches of texts of similar length, with their indices, the shortest first.

    It takes no forward pass.

    A longer text begins a new batch where the shorter ones would need much padding beside it.

    Args:
        texts: all texts.
        most: the largest number of tokens in a batch, including padding; a longer text is a batch
            of its own.
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
    """Batches of texts of similar length, with their indices, within the lens's memory bound.

    Args:
        lens: the adapter over the model, with its memory bound.
        texts: all texts, read at the tokens whose logits are needed.
        most: the largest number of tokens in a batch; the memory bound may make it smaller.
        kind: 'plain' for forward passes, 'graph' if the batches are differentiated.
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
    """Visit every batch of texts of similar length, read at each of their tokens.

    Args:
        lens: the adapter over the model, with its memory bound.
        texts: all texts.
        most: the largest number of tokens in a batch; the memory bound may make it smaller.
        visit: called with the indices of a batch's texts, and the batch.
        what: the title of the progress bar.
        progress: show a bar.
        kind: 'plain' for forward passes, 'graph' if the batches are differentiated.
    """
    read_everywhere = dataclasses.replace(texts, reads=texts.lengths)
    with tqdm(total=texts.batch, desc=what, leave=False, disable=not progress) as bar:
        for index, batch in batches_of(lens, read_everywhere, most, kind):
            visit(index, batch)
            bar.update(len(index))


def logits_of(
    gated: Gated, rows: Prompts, hooks: Sequence[tuple[str, HookFn]] = ()
) -> Float[Tensor, "row pos vocab"]:
    """The logits of one model at the tokens where the rows are read, from one forward pass.

    Args:
        gated: a lens, and its gates.
        rows: a batch.
        hooks: further hooks for this pass, by the names of their hook points.

    Raises:
        NumericsError: a logit is not finite.
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
    """Within the block, the model runs at these gates and with these hooks."""
    with lens.hooked(hooks), lens.injected(ScaleInject(lens.plan, gates)):
        yield


def require_second_token(texts: Prompts, what: str) -> None:
    """Refuse texts of one token, because the first token is a sink and is left out.

    Args:
        texts: all texts.
        what: the name of the number that leaves out first tokens, for the message.

    Raises:
        PromptError: a text has only one token.
    """
    short = (texts.lengths < 2).nonzero().flatten().tolist()
    if short:
        raise PromptError(
            f"{_which_text(short[0], texts)} has one token, and a text's first token is left out "
            f"of {what} as a sink",
            remedy="give longer texts.",
        )


def require_own_tokens(texts: Prompts) -> None:
    """Refuse a text that is the beginning of another one: it has no token that the other lacks.

    Args:
        texts: all texts.

    Raises:
        PromptError: a text is equal to another one, or to its beginning.
    """
    # A mark identifies a token together with all tokens before it, so the last mark identifies the
    # whole text.
    marks = texts.marks()
    last_marks = marks.gather(1, texts.lengths.cpu()[:, None] - 1)
    begins_another = (marks[None] == last_marks[:, None]).any(2).fill_diagonal_(False)
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
