"""How the columns of a sweep are computed; `sweeps/analyses` says what they mean."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from lens_lora.analyses.patch_sites import patch_sites
from lens_lora.analyses.path import path_attribution
from lens_lora.engine.gate_graph import hessian_product
from lens_lora.engine.reverse import require_finite_sites, site_slopes
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.readout import Readout
from lens_lora.sweeps.analyses import ANALYSES

__all__ = ["VALUES", "Values"]

# (lens, prompts, readout) → one number per prompt and site, in the readout's units.
Values = Callable[[LoraLens, Prompts, Readout], Float[Tensor, "batch site"]]


def _slopes(at: float) -> Values:
    def values(lens: LoraLens, prompts: Prompts, readout: Readout) -> Float[Tensor, "batch site"]:
        found = site_slopes(lens, readout.over(lens.model, prompts), lens.gates(at))
        require_finite_sites(lens, found)
        return found

    return values


def _path(lens: LoraLens, prompts: Prompts, readout: Readout) -> Float[Tensor, "batch site"]:
    options = ANALYSES["path"].options
    return path_attribution(lens, prompts, readout, **options, progress=False).values


def _interventions(name: str) -> Values:
    def values(lens: LoraLens, prompts: Prompts, readout: Readout) -> Float[Tensor, "batch site"]:
        options = ANALYSES[name].options
        return patch_sites(lens, prompts, readout, **options, progress=False).values

    return values


def _second_order(
    lens: LoraLens, prompts: Prompts, readout: Readout
) -> Float[Tensor, "batch site"]:
    """½(H·1)_l."""
    reading = readout.over(lens.model, prompts)
    return 0.5 * hessian_product(lens, reading, lens.gates(0.0), lens.gates(1.0))


VALUES: dict[str, Values] = {
    "first_order": _slopes(ANALYSES["first_order"].at),
    "first_order_at_1": _slopes(ANALYSES["first_order_at_1"].at),
    "path": _path,
    "add_one": _interventions("add_one"),
    "leave_one_out": _interventions("leave_one_out"),
    "second_order": _second_order,
}
