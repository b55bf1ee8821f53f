"""Which ranks or sites to keep: gates in [0, 1], optimised and rounded.

    minimise   mean left(ε) + price · mean ε + force · Σ max(0, share − kept_q(ε)),   0 ≤ ε ≤ 1

1. All gates start at one, the whole adapter. Adam steps on the gates themselves, and each step ends
   with them put back into [0, 1]. The price takes out what does nothing on these prompts.
2. Rounding: the gates above each of some thresholds are kept whole. Of the sets that keep the share
   asked for of every question, the one that leaves least; the whole adapter where none does.

Cost: a forward and a backward pass of every question a step, and at most a dozen forward passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.analyses.repair_questions import Part
from lens_lora.engine.rank_gates import GateLayout, value_at

__all__ = ["Search", "optimised", "rounded"]

_FORCE = 10.0
_SLACK = 0.02  # of the share, for what rounding takes
_THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)


@dataclasses.dataclass(frozen=True)
class Search:
    """How gates are looked for.

    Attributes:
        keep_share: of each question that is to be kept.
        steps: of Adam.
        rate: how far a gate moves in a step.
        price: of all gates at one, in shares of what is to be dropped.
    """

    keep_share: float
    steps: int
    rate: float
    price: float


def optimised(
    layout: GateLayout, parts: Sequence[Part], search: Search, *, progress: bool
) -> Float[Tensor, "gate"]:
    """The gates after the last step.

    Args:
        layout: of the gates.
        parts: questions, of both kinds.
        search: how.
        progress: show a bar.

    Raises:
        NumericsError: a non-finite readout.
    """
    lens = layout.lens
    alive = layout.alive.to(lens.device)
    gates = alive.to(lens.gate_dtype).requires_grad_()
    adam = torch.optim.Adam([gates], lr=search.rate)
    target = min(1.0, search.keep_share + _SLACK)
    with tqdm(range(search.steps), desc="gates", leave=False, disable=not progress) as bar:
        for _ in bar:
            with torch.enable_grad():
                shares = [
                    (p.keep, p.share(value_at(layout, p.asked.reading, gates))) for p in parts
                ]
                left = torch.stack([share for keep, share in shares if not keep]).mean()
                kept = torch.stack([share for keep, share in shares if keep])
                price = search.price * gates.sum() / alive.sum()
                loss = left + price + _FORCE * (target - kept).clamp(min=0).sum()
            (gates.grad,) = torch.autograd.grad(loss, [gates])
            adam.step()
            with torch.no_grad():
                gates.clamp_(0.0, 1.0).mul_(alive)
            bar.set_postfix(
                kept=f"{float(kept.detach().min()):.2f}", left=f"{float(left.detach()):.2f}"
            )
    return gates.detach()


def rounded(
    layout: GateLayout, parts: Sequence[Part], gates: Float[Tensor, "gate"], keep_share: float
) -> Bool[Tensor, "gate"]:
    """The set of gates that leaves least, of those that keep the share of every question.

    Args:
        layout: of the gates.
        parts: questions, of both kinds.
        gates: optimised.
        keep_share: of each question that is to be kept.

    Raises:
        NumericsError: a non-finite readout.
    """
    best, least = layout.alive.to(gates.device), 1.0
    tried: set[int] = set()
    for threshold in _THRESHOLDS:
        kept = gates > threshold
        if int(kept.sum()) in tried or not bool(kept.any()):
            continue
        tried.add(int(kept.sum()))
        keeps = all(share >= keep_share for share in _shares(layout, parts, kept, keep=True))
        if keeps:
            left = _shares(layout, parts, kept, keep=False)
            mean = sum(left) / len(left)
            best, least = (kept, mean) if mean < least else (best, least)
    return best


def _shares(layout: GateLayout, parts: Sequence[Part], kept: Tensor, *, keep: bool) -> list[float]:
    gates = kept.to(layout.lens.gate_dtype)
    with torch.no_grad():
        return [
            float(part.share(value_at(layout, part.asked.reading, gates)))
            for part in parts
            if part.keep == keep
        ]
