"""What a repair keeps and drops: questions, and shares of what the whole adapter does to them.

    kept   Σ_p s_p (g_p(ε) − g_p(0)) / Σ_p |g_p(1) − g_p(0)|,   s_p the sign of prompt p's shift
    left   Σ_p |g_p(ε) − g_p(0)| / Σ_p |g_p(1) − g_p(0)|

1. A question is prompts with a readout. A `KL()` without a response is read at every token of its
   texts but the first, as a text has no position of its own that is read.
2. A question that the adapter does not move has no share, and is refused.

Cost: two forward passes of each question for its ends; eight more of what is to be kept, for its
noise floor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.asked import Asked, ask
from lens_lora.errors import ArgumentError
from lens_lora.lens import LoraLens
from lens_lora.readouts.divergence import KL
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results.measured import SIGMAS

__all__ = ["Part", "parts_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One question, and what the adapter does to it.

    Attributes:
        asked: bound to the lens.
        keep: whether it is to be kept, or dropped.
        held_out: whether it only judges.
        tokens: how many tokens a KL is read at, 1 for other readouts.
    """

    asked: Asked
    keep: bool
    held_out: bool
    tokens: int

    @property
    def label(self) -> str:
        """The readout's, and that it is per token where it is."""
        return self.asked.readout.label + (" per token" if self.tokens > 1 else "")

    def share(self, values: Float[Tensor, "*point batch"]) -> Float[Tensor, "*point"]:
        """What is kept, or left, of what the adapter does.

        Args:
            values: g of each prompt.
        """
        base, adapted = self.asked.ends
        shift = adapted - base
        moved = values - base.to(values)
        moved = moved * shift.sign() if self.keep else moved.abs()
        return moved.sum(-1) / shift.abs().sum()

    def mean(self, values: Float[Tensor, "*point batch"]) -> Float[Tensor, "*point"]:
        """The mean of g over prompts; of a KL over texts, over their tokens.

        Args:
            values: g of each prompt.
        """
        return values.sum(-1) / self.tokens if self.tokens > 1 else values.mean(-1)


def parts_of(
    lens: LoraLens,
    questions: Sequence[tuple[PromptsLike, Readout]],
    name: str,
    *,
    may_lack: bool = False,
) -> tuple[Part, ...]:
    """The questions of one argument, bound to the lens.

    Args:
        lens: the adapter over the model.
        questions: pairs of prompts and a readout.
        name: of the argument: 'keep', 'drop', 'test_keep' or 'test_drop'.
        may_lack: whether there may be none.

    Raises:
        ArgumentError: no questions, something that is no pair, or a question that the adapter does
            not move.
    """
    if not isinstance(questions, list | tuple) or (not questions and not may_lack):
        raise ArgumentError(
            f"{name}={questions!r}: expected [(prompts, readout), …], at least one pair."
        )
    return tuple(_part(lens, question, name, i) for i, question in enumerate(questions))


def _part(lens: LoraLens, question: Any, name: str, index: int) -> Part:
    is_pair = isinstance(question, list | tuple) and len(question) == 2
    if not is_pair or not isinstance(question[1], Readout):
        raise ArgumentError(
            f"{name}[{index}] is a {type(question).__name__}; expected a pair: prompts, and "
            "a readout, such as ll.Margin(' Lyon', ' Paris') or ll.KL()."
        )
    prompts, readout = lens.prompts(question[0]), question[1]
    tokens = 1
    if isinstance(readout, KL) and readout.response is None:
        prompts = prompts.at_each_token()
        tokens = int(prompts.read_mask.sum())
    asked = ask(lens, prompts, readout)
    size = float((asked.ends[1] - asked.ends[0]).abs().sum())
    if size <= SIGMAS * _rounding(asked, name.endswith("keep")):
        raise ArgumentError(
            f"{name}[{index}], {readout.label}: the adapter moves it by {size:.2g} in all, which "
            f"rounding alone may do; there is nothing to {name.removeprefix('test_')}."
        )
    return Part(asked, name.endswith("keep"), name.startswith("test"), tokens)


def _rounding(asked: Asked, keep: bool) -> float:
    """Of Σ|shift|, whose terms do not cancel: Σσ for what is kept, else a step of the dtype."""
    if keep:
        return float(asked.noise_floor.double().sum())
    ends = asked.ends.double()
    return torch.finfo(asked.ends.dtype).eps * float((1 + ends.abs()).sum())
