"""The analyses that a sweep may run, by their names. Read without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lens_lora.errors import SweepError


@dataclasses.dataclass(frozen=True)
class Analysis:
    """An analysis of a sweep, which becomes a column of its table.

    Attributes:
        at: the gate value at which it is taken; NaN along a path.
        alone: whether prompts are run one at a time, because the numbers of each would depend on
            its batch.
        many: whether it takes tens of passes a prompt. Then each prompt is a batch, which is kept
            once it is done, so that a kill loses one prompt's work.
        has_remainder: whether its sum over sites estimates the shift. Then the table also has
            shift − sum.
        options: arguments that it is called with besides lens, prompts and readout.
    """

    at: float = 0.0
    alone: bool = False
    many: bool = False
    has_remainder: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


# One number per prompt and site:
ANALYSES: dict[str, Analysis] = {
    # ∂g/∂ε_l at 0: what adding one site to the base model does, to first order
    "first_order": Analysis(),
    # ∂g/∂ε_l at 1: what removing one site from the adapted model does
    "first_order_at_1": Analysis(at=1.0),
    # ∫₀¹ ∂g/∂ε_l(ε·1) dε: complete, its sum is the shift
    "path": Analysis(
        at=float("nan"), alone=True, many=True, options={"tol": 1e-3, "max_nodes": 65}
    ),
    # g(e_l) − g(0), exact
    "add_one": Analysis(many=True, options={"how": "add_one"}),
    # g(1) − g(1 − e_l), exact
    "leave_one_out": Analysis(at=1.0, many=True, options={"how": "leave_one_out"}),
    # ½(H·1)_l at 0: what curvature and coupling add to first order; for trained adapters at full
    # strength often less accurate than first order alone
    "second_order": Analysis(has_remainder=False),
}
# The analyses that are derivatives at one point.
_SLOPES = {"first_order", "first_order_at_1", "second_order"}

ByToken = Literal["activations", "activations_trained"]
# `rank` numbers per token and site, streamed into a file of their own:
BY_TOKEN: dict[str, Analysis] = {
    # u = ΣVᵀx of sBA = UΣVᵀ
    "activations": Analysis(at=1.0, options={"gauge": "svd"}),
    # u = Ax of the adapter's file
    "activations_trained": Analysis(at=1.0, options={"gauge": "trained"}),
}


def chosen(analyses: str | Iterable[str]) -> tuple[str, ...]:
    """Check the names of analyses, and return each once, in the order given.

    Raises:
        SweepError: an unknown name, no name, or an analysis by token beside another one.
    """
    with_repeats = [analyses] if isinstance(analyses, str) else analyses
    names = tuple(dict.fromkeys(with_repeats))
    known = ANALYSES | BY_TOKEN
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SweepError(
            f"analyses {', '.join(map(repr, unknown)) or 'none'}: expected some of "
            f"{', '.join(known)}."
        )
    by_token = [name for name in names if name in BY_TOKEN]
    if by_token and len(names) > 1:
        others = [name for name in names if name != by_token[0]]
        raise SweepError(
            f"{by_token[0]!r} is written token by token, into a file of its own; run it alone, and "
            f"{', '.join(map(repr, others))} with another out."
        )
    return names


def require_no_slopes(analyses: Iterable[str], readout: str) -> None:
    """Refuse the derivatives of a KL in a sweep.

    A KL has no slope at ε = 0, and for slopes elsewhere a sweep lacks the base's distributions.

    Args:
        analyses: the names of the analyses.
        readout: the KL, as the message calls it.

    Raises:
        SweepError: naming an analysis that needs them.
    """
    slopes = sorted(_SLOPES.intersection(analyses))
    if slopes:
        raise SweepError(
            f"{readout} is not read by {slopes[0]!r} in a sweep; use 'path', 'add_one' or "
            "'leave_one_out'."
        )


def options_of(analyses: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """Return the options of each of these analyses, which decide its numbers."""
    known = ANALYSES | BY_TOKEN
    return {name: known[name].options for name in analyses}
