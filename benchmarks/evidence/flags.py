"""Flags, accounted honestly: beside what the same passes buy without them.

For leaving one out the plain answer is first order at 1; for adding one, first order at 0. Flags
cost passes: a screen, and the flagged sites' own runs. The *equal-cost* answer spends as many on
running, at the sites where first order at 0 and at 1 differ most, what is then known exactly.
The screen of add one runs the sites themselves, a measurement of all that is material:
`error_corrected` has its numbers put in. Of leaving out it has those of first order at 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from counted import Counter
from torch import Tensor

import lens_lora as ll
from lens_lora.analyses.first_order import first_order_of
from lens_lora.engine.asked import Asked
from lens_lora.evaluation.reliability import Reliability, reliability_of

# A site that is run costs a pass, or about half where blocks branch; counted in full here.
_PER_SITE = 1.0


def accounted(
    lens: ll.LoraLens, asked: Asked, how: str, parts: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Flags of first order at 0 for one question, their cost, and what it buys otherwise."""

    def flagged() -> Reliability:
        return reliability_of(asked, first_order_of(asked), how, fix=True, progress=False)  # type: ignore[arg-type]

    found, cost = Counter(lens).run(flagged)
    effects = parts[how]
    counts = found.against(effects).loc["all"]
    rows = asked.reading.prompts.tokens.shape[0]
    spent = (cost.forward + 2 * cost.backward) / rows
    ends = {at: parts[f"first_order@{at}"] for at in ("0", "1")}
    plain = ends["1" if how == "leave_one_out" else "0"]
    budget = spent - 3 * len(ends)  # a derivative is a forward and a backward pass
    sites = max(0, min(effects.shape[1], int(budget / _PER_SITE)))
    return {
        "question": how,
        **{name: int(counts[name]) for name in ("sites", "wrong", "flagged", "hit")},
        "error_first_order_at_0": _error(ends["0"], effects),
        "error_corrected": float(counts["error_corrected"]),
        "error_fixed": float(counts["error_fixed"]),
        "error_plain": _error(plain, effects),
        "error_equal_cost": _error(_measured(plain, ends, effects, sites), effects),
        "sites_at_equal_cost": sites,
        "passes": spent,
        "passes_plain": 3.0,
        "is_measurement": how == "add_one",
    }


def _measured(plain: Tensor, ends: Mapping[str, Tensor], effects: Tensor, sites: int) -> Tensor:
    """The plain answer, with the effects of the sites whose two ends differ most put in."""
    apart = (ends["1"] - ends["0"]).abs().mean(0)
    run = torch.zeros(len(apart), dtype=torch.bool)
    run[apart.argsort(descending=True)[:sites]] = True
    return torch.where(run, effects, plain)


def _error(found: Tensor, effects: Tensor) -> float:
    return float((found - effects).abs().sum() / effects.abs().sum())
