"""The analyses that a sweep can run. Most give one number per prompt and site:

    first_order        ∂g/∂ε_l at 0: what adding one site to the base model does, to first order
    first_order_at_1   ∂g/∂ε_l at 1: what removing one site from the adapted model does
    path               ∫₀¹ ∂g/∂ε_l(ε·1) dε: complete, its sum is the shift
    add_one            g(e_l) − g(0), exact
    leave_one_out      g(1) − g(1 − e_l), exact
    second_order       ½(H·1)_l at 0: what curvature and coupling add to first order; for trained
                       adapters at full strength often less accurate than first order alone

and two give `rank` numbers per token and site, streamed into a file of their own:

    activations          u = ΣVᵀx of sBA = UΣVᵀ
    activations_trained  u = Ax of the adapter's file

Only their names and what their columns mean are here, so that a misspelt name is reported without
loading torch; `sweeps/values` computes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lens_lora.sweeps.records import SweepError

__all__ = ["ANALYSES", "BY_TOKEN", "Analysis", "ByToken", "chosen", "options_of"]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What a column of a sweep means.

    Attributes:
        at: the gate value at which it is taken; NaN along a path.
        alone: prompts are run one at a time, because the numbers of each depend on its batch.
        many: takes tens of passes a prompt, so that each prompt is a batch, and kept once it is
            done: what a kill loses is one prompt's work.
        has_remainder: its sum over sites estimates the shift, so the table has shift − sum too.
        options: what it is called with besides lens, prompts and readout.
    """

    at: float = 0.0
    alone: bool = False
    many: bool = False
    has_remainder: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


ANALYSES: dict[str, Analysis] = {
    "first_order": Analysis(),
    "first_order_at_1": Analysis(at=1.0),
    "path": Analysis(
        at=float("nan"), alone=True, many=True, options={"tol": 1e-3, "max_nodes": 64}
    ),
    "add_one": Analysis(many=True, options={"how": "add_one"}),
    "leave_one_out": Analysis(at=1.0, many=True, options={"how": "leave_one_out"}),
    "second_order": Analysis(has_remainder=False),
}

ByToken = Literal["activations", "activations_trained"]
BY_TOKEN: dict[str, Analysis] = {
    "activations": Analysis(at=1.0, options={"gauge": "svd"}),
    "activations_trained": Analysis(at=1.0, options={"gauge": "trained"}),
}


def options_of(name: str) -> Mapping[str, Any]:
    """What an analysis is called with besides lens, prompts and readout.

    Args:
        name: of `ANALYSES` or `BY_TOKEN`.
    """
    return (ANALYSES | BY_TOKEN)[name].options


def chosen(names: str | Iterable[str]) -> tuple[str, ...]:
    """The names, each once, in the order given.

    Args:
        names: of `ANALYSES`, one or several, or one of `BY_TOKEN`.

    Raises:
        SweepError: no name, one that is not in the tables, or one by token beside others.
    """
    found = tuple(dict.fromkeys([names] if isinstance(names, str) else names))
    unknown = [name for name in found if name not in ANALYSES | BY_TOKEN]
    if unknown or not found:
        raise SweepError(
            f"analyses {', '.join(map(repr, unknown)) or 'none'}: expected some of "
            f"{', '.join(ANALYSES | BY_TOKEN)}."
        )
    by_token = [name for name in found if name in BY_TOKEN]
    if by_token and len(found) > 1:
        raise SweepError(
            f"{by_token[0]!r} is written token by token, into a file of its own; run it alone, and "
            f"{', '.join(repr(name) for name in found if name != by_token[0])} with another out."
        )
    return found
