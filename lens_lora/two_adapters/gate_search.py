"""The search for the gates that a repair keeps.

1. Gates of all ranks or sites start at one. Adam, with each step clamped to 0 ≤ ε ≤ 1,

       minimises   mean left(ε) + price · mean ε + force · Σ max(0, share − kept_q(ε)).

   The price takes out what does nothing on these prompts.
2. Rounding: for each of several thresholds, the gates above it are one and the others zero. Of the
   sets that keep the share of every question, the one that leaves least is taken; where there is
   none, the whole adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import number, whole
from lens_lora.core import LoraLens
from lens_lora.errors import ArgumentError, many, named, setting, worded
from lens_lora.two_adapters.goals import Gates, Goal, values_at

# A missing share costs ten times as much as the same share left.
_FORCE = 10.0
# By how much the optimised gates aim above the share to be kept, as rounding loses some of it.
_SLACK = 0.02
_THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)


@dataclasses.dataclass(frozen=True)
class Search:
    """The settings of a search for gates: the share to keep, and how Adam goes about it.

    Attributes:
        keep_share: how much of each kept question's shift must stay.
        steps: how many steps Adam takes.
        rate: how far a gate moves in a step.
        price: the cost of all gates at one, where leaving all that is to be dropped costs 1.
    """

    keep_share: float
    steps: int
    rate: float
    price: float

    @classmethod
    def checked(cls, *, keep_share: object, steps: object, rate: object, price: object) -> Search:
        """Check the arguments of `repair` by which it searches.

        Raises:
            ArgumentError: a share outside (0, 1], a rate that is not above 0, a price below 0, or
                no step.
        """
        share = number("keep_share", keep_share)
        rate = number("rate", rate)
        price = number("price", price)
        if not 0 < share <= 1:
            raise ArgumentError(
                f"{setting('keep_share', share)}: expected a share above 0, at most 1."
            )
        if rate <= 0 or price < 0:
            raise ArgumentError(f"{rate=:g}, {price=:g}: expected a rate above 0, a price ≥ 0.")
        return cls(share, whole("steps", steps, 1), rate, price)


def optimised_gates(goals: Sequence[Goal], search: Search, *, progress: bool) -> Gates:
    """The gates after the last step of Adam.

    Cost: a forward and a backward pass of every question per step.

    Args:
        goals: the questions that are optimised, of both kinds.
        search: what is searched for, and how.
        progress: whether a bar is shown.

    Raises:
        ArgumentError: the graphs of all questions do not fit within the memory bound of the lens.
    """
    layout = goals[0].layout
    lens = layout.lens
    _require_graphs(lens, goals)
    # The hooks are off by the time of the backward pass, and a block that ran again then would run
    # without them.
    lens.check_backward(once=False)
    alive = layout.alive.to(lens.device)
    gates = alive.to(lens.gate_dtype).requires_grad_()
    adam = torch.optim.Adam([gates], lr=search.rate)
    target = min(1.0, search.keep_share + _SLACK)
    with tqdm(range(search.steps), desc="gates", leave=False, disable=not progress) as bar:
        for _ in bar:
            with torch.enable_grad():
                kept, left = _kept_and_left(goals, gates)
                missing = (target - kept).clamp(min=0)
                cost = search.price * gates.sum() / alive.sum()
                loss = left.mean() + cost + _FORCE * missing.sum()
            (gates.grad,) = torch.autograd.grad(loss, [gates])
            adam.step()
            with torch.no_grad():
                gates.clamp_(0.0, 1.0).mul_(alive)
            least_kept = float(kept.detach().min())
            mean_left = float(left.detach().mean())
            bar.set_postfix(kept=f"{least_kept:.2f}", left=f"{mean_left:.2f}")
    return gates.detach()


@torch.no_grad()
def rounded_gates(goals: Sequence[Goal], gates: Gates, keep_share: float) -> Bool[Tensor, " gate"]:
    """The set of gates that leaves least, of those that keep the share of every question.

    Cost: a forward pass of every question for each threshold.

    Args:
        goals: the questions, of both kinds.
        gates: the gates that were optimised.
        keep_share: how much of each kept question's shift must stay.
    """
    best = goals[0].layout.alive.to(gates.device)
    least_left = 1.0
    tried = {0}
    for threshold in _THRESHOLDS:
        chosen = gates > threshold
        count = int(chosen.sum())
        if count in tried:
            continue
        tried.add(count)
        kept, left = _kept_and_left(goals, chosen.to(gates))
        keeps_enough = float(kept.min()) >= keep_share
        if keeps_enough and float(left.mean()) < least_left:
            best = chosen
            least_left = float(left.mean())
    return best


def _kept_and_left(
    goals: Sequence[Goal], gates: Gates
) -> tuple[Float[Tensor, " kept"], Float[Tensor, " dropped"]]:
    """The shares of questions of both kinds. One forward pass each."""
    values = values_at(goals, gates)
    shares = torch.stack([goal.share(value) for goal, value in zip(goals, values, strict=True)])
    keeps = torch.tensor([goal.keep for goal in goals], device=shares.device)
    return shares[keeps], shares[~keeps]


def _require_graphs(lens: LoraLens, goals: Sequence[Goal]) -> None:
    """Refuse questions whose graphs, all held at once, exceed the memory bound of the lens."""
    if lens.max_memory is None:
        return
    needed = sum(goal.g.passes.graph_bytes for goal in goals)
    if needed > lens.max_memory:
        raise ArgumentError(
            f"{named('max_memory')}{worded('=', ' ')}{lens.max_memory:.3g} bytes, and the graphs "
            f"of {many(len(goals), 'question')}, which are held together, take about "
            f"{needed:.3g}; pass fewer or shorter prompts, or allow more."
        )
