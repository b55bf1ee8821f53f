"""The questions of a repair: prompts with a readout, to be kept or to be dropped.

    kept   Σ_p s_p (g_p(ε) − g_p(0)) / Σ_p |g_p(1) − g_p(0)|,   s_p the sign of prompt p's shift
    left   Σ_p |g_p(ε) − g_p(0)| / Σ_p |g_p(1) − g_p(0)|

The number of a question is the share of the whole adapter's effect that the gates keep, or leave. A
question that the adapter does not move has no share, and is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import SIGMAS, Evaluations, Prompts, PromptsLike, Readout
from lens_lora.errors import ArgumentError
from lens_lora.responses.kl import KL
from lens_lora.two_adapters.rank_gates import GateLayout

Question = tuple[PromptsLike, Readout]
Gates = Float[Tensor, " gate"]


@dataclasses.dataclass(frozen=True, eq=False)
class Goal:
    """One question bound to the lens.

    Attributes:
        layout: the gates.
        g: the readout of the question's prompts.
        tokens: how many tokens a KL is read at, 1 for other readouts.
        keep: whether it is to be kept, or dropped.
        held_out: whether it only judges.
    """

    layout: GateLayout
    g: Evaluations
    tokens: int
    keep: bool
    held_out: bool

    @property
    def label(self) -> str:
        """The readout's label, with 'per token' where the number is."""
        assert self.g.readout is not None
        each = ", per token" if self.tokens > 1 else ""
        return f"{self.g.readout.label}{each}"

    def values(self, gates: Gates) -> Float[Tensor, " batch"]:
        """The readout of each prompt at these gates. One forward pass."""
        return self.layout.value(self.g, gates)

    def share(self, values: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The share that values of g keep, or leave, of what the whole adapter does."""
        base, adapted = self.g.ends
        shift = adapted - base
        shift_at_gates = values - base.to(values)
        counted = shift_at_gates * shift.sign() if self.keep else shift_at_gates.abs()
        return counted.sum() / shift.abs().sum()

    def mean(self, values: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The mean of g over prompts; for a KL over texts, the mean over their tokens."""
        if self.tokens > 1:
            return values.sum() / self.tokens
        return values.mean()


def shares_of(goals: Sequence[Goal], values: Sequence[Tensor]) -> Float[Tensor, " question"]:
    """The share of each question, in float64 on the CPU.

    Args:
        goals: the questions.
        values: g of each.
    """
    pairs = zip(goals, values, strict=True)
    return torch.stack([goal.share(value).cpu().double() for goal, value in pairs])


def values_at(goals: Sequence[Goal], gates: Gates) -> list[Float[Tensor, " batch"]]:
    """The value g of each question at these gates. One forward pass each.

    Args:
        goals: the questions.
        gates: ε, one vector.
    """
    return [goal.values(gates) for goal in goals]


def goals_of(
    layout: GateLayout,
    questions: Sequence[Question],
    name: str,
    *,
    keep: bool,
    held_out: bool = False,
) -> list[Goal]:
    """The questions of one argument of `repair`.

    Args:
        layout: the gates.
        questions: pairs of prompts and a readout.
        name: the name of the argument, for errors.
        keep: whether they are to be kept, or dropped.
        held_out: whether they only judge. There may be none of these.

    Raises:
        ArgumentError: no questions where some are needed, something that is no pair of prompts and
            a readout, or a question that the adapter does not move.
    """
    if not isinstance(questions, list | tuple) or not (questions or held_out):
        raise ArgumentError(
            f"{name}={questions!r}: expected [(prompts, readout), …], at least one pair."
        )
    goals: list[Goal] = []
    for i, question in enumerate(questions):
        label = f"{name}[{i}]"
        g = _function_of(layout, question, label)
        _require_moved(g, label, keep)
        goals.append(Goal(layout, g, _token_count(g), keep, held_out))
    return goals


def _function_of(layout: GateLayout, question: Any, label: str) -> Evaluations:
    is_pair = isinstance(question, list | tuple) and len(question) == 2
    if not is_pair or not isinstance(question[1], Readout):
        raise ArgumentError(
            f"{label} is a {type(question).__name__}; expected a pair: prompts, and a readout, "
            "such as ll.Margin(' Lyon', ' Paris') or ll.KL()."
        )
    prompts = layout.lens.prompts(question[0])
    readout = question[1]
    if isinstance(readout, KL) and readout.response is None:
        readout = _of_whole_texts(readout, prompts)
    return Evaluations(layout.lens.function(prompts, readout, progress=False))


def _of_whole_texts(kl: KL, prompts: Prompts) -> KL:
    """The KL; one that names no tokens reads whole texts, or their responses if they have some."""
    if kl.tokens is not None or prompts.reads is not None:
        return kl.on(prompts)
    return dataclasses.replace(kl, tokens="prompt")


def _token_count(g: Evaluations) -> int:
    """The number of tokens at which a KL of texts or responses is read; 1 for any other readout."""
    if isinstance(g.readout, KL) and g.readout.tokens in ("prompt", "response"):
        return int(g.rows.read_mask.sum())
    return 1


def _require_moved(g: Evaluations, label: str, keep: bool) -> None:
    """Refuse a question that the adapter does not move, beyond rounding."""
    size = float(g.shift.abs().sum())
    if size <= SIGMAS * _rounding(g, keep):
        assert g.readout is not None
        role = "keep" if keep else "drop"
        raise ArgumentError(
            f"{label}, {g.readout.label}: the adapter moves it by {size:.2g} in all, which "
            f"rounding alone may do; there is nothing to {role}."
        )


def _rounding(g: Evaluations, keep: bool) -> float:
    """How large rounding alone may make Σ|shift|, whose terms do not cancel.

    For what is to be kept it is the sum of the noise floors; for what is to be dropped, one
    rounding step of the dtype on each prompt.
    """
    if keep:
        return float(g.floor.double().sum())
    sizes = 1 + g.ends.double().abs()
    return torch.finfo(g.ends.dtype).eps * float(sizes.sum())
