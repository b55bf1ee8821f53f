"""The analyses that a sweep can run: one number per prompt and site each. A row of a table each.

    first_order        ∂g/∂ε_l at 0: what adding one site to the base model does, to first order
    first_order_at_1   ∂g/∂ε_l at 1: what taking one site from the adapted model does
    path               ∫₀¹ ∂g/∂ε_l(ε·1) dε: complete, its sum is the shift
    add_one            g(e_l) − g(0), exact
    leave_one_out      g(1) − g(1 − e_l), exact
    second_order       ½(H·1)_l at 0: what curvature and coupling add to first order; at the full
                       strength of trained adapters often farther from the truth than first order

Each analysis is imported when it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.readout import Readout
from lens_lora.sweeps.records import SweepError

__all__ = ["ANALYSES", "Analysis", "chosen"]

Values = Callable[[LoraLens, Prompts, Readout], Float[Tensor, "batch site"]]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """How a column of a sweep is computed.

    Attributes:
        values: (lens, prompts, readout) → [batch, site], in the readout's units.
        at: the gate value it is taken at; NaN along a path.
        alone: prompts are given one at a time, since each prompt's numbers depend on its batch.
        has_remainder: its sum over sites stands for the shift, so that what it leaves is told.
    """

    values: Values
    at: float = 0.0
    alone: bool = False
    has_remainder: bool = True


def _slopes(at: float) -> Values:
    def values(lens: LoraLens, prompts: Prompts, readout: Readout) -> Tensor:
        from lens_lora.engine.reverse import require_finite_sites, site_slopes

        found = site_slopes(lens, readout.over(lens.model, prompts), lens.gates(at))
        require_finite_sites(lens, found)
        return found

    return values


def _path(lens: LoraLens, prompts: Prompts, readout: Readout) -> Tensor:
    from lens_lora.analyses.path import path_attribution

    return path_attribution(lens, prompts, readout, progress=False).values


def _interventions(how: Literal["add_one", "leave_one_out"]) -> Values:
    def values(lens: LoraLens, prompts: Prompts, readout: Readout) -> Tensor:
        from lens_lora.analyses.patch_sites import patch_sites

        return patch_sites(lens, prompts, readout, how=how, progress=False).values

    return values


def _second_order(lens: LoraLens, prompts: Prompts, readout: Readout) -> Tensor:
    from lens_lora.engine.gate_graph import hessian_product

    reading = readout.over(lens.model, prompts)
    return 0.5 * hessian_product(lens, reading, lens.gates(0.0), lens.gates(1.0))


ANALYSES: dict[str, Analysis] = {
    "first_order": Analysis(_slopes(0.0)),
    "first_order_at_1": Analysis(_slopes(1.0), at=1.0),
    "path": Analysis(_path, at=float("nan"), alone=True),
    "add_one": Analysis(_interventions("add_one")),
    "leave_one_out": Analysis(_interventions("leave_one_out"), at=1.0),
    "second_order": Analysis(_second_order, has_remainder=False),
}


def chosen(names: str | Iterable[str]) -> tuple[str, ...]:
    """The names, each once, in the order given.

    Raises:
        SweepError: none, or one that is not in the table.
    """
    found = tuple(dict.fromkeys([names] if isinstance(names, str) else names))
    unknown = [name for name in found if name not in ANALYSES]
    if unknown or not found:
        raise SweepError(
            f"analyses {', '.join(map(repr, unknown)) or 'none'}: expected some of "
            f"{', '.join(ANALYSES)}."
        )
    return found
