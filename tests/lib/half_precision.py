"""Each analysis in half precision beside a float64 run of the same weights, and what it states.

A work runs one call and gives its numbers by name, with the σ that the result itself states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import models
import torch
from torch import Tensor

import lens_lora as ll
from lens_lora.core import Evaluations

QUIET: dict[str, Any] = {"progress": False}
NAN = float("nan")


class Asked(NamedTuple):
    """What is asked of a lens.

    Attributes:
        prompts: as a call takes them.
        doc, pre: one token each, whose margin is read.
        response: what is said after each prompt.
    """

    prompts: Any
    doc: Any
    pre: Any
    response: Any

    @property
    def margin(self) -> ll.Margin:
        return ll.Margin(self.doc, self.pre)


class Found(NamedTuple):
    """The numbers of one analysis.

    Attributes:
        values: [batch, …].
        floor: σ of each prompt's values, as the result states it; None where it states none.
        shift: [batch], what an error is relative to; None for the largest value.
        says: the result's own words.
    """

    values: Tensor
    floor: Tensor | None = None
    shift: Tensor | None = None
    says: str = ""


Works = dict[str, Callable[[ll.LoraLens, Asked], dict[str, Found]]]


class Compared(NamedTuple):
    """One analysis in half precision, beside float64.

    Attributes:
        error: root mean square, as a share of the shift or of the largest value.
        spearman: over entries, the mean over prompts; NaN for a single number.
        ratio: error over the stated floor, root mean squares; NaN where none is stated.
        clear: the share of entries beyond three floors.
        spearman_clear: over those.
        says: the half-precision result's own words.
    """

    error: float
    spearman: float
    ratio: float
    clear: float
    spearman_clear: float
    says: str


def _remainder(lens: ll.LoraLens, asked: Asked) -> dict[str, Found]:
    found = ll.remainder(lens, asked.prompts, asked.margin, **QUIET)
    kinds = ", ".join(dict.fromkeys(verdict.kind for verdict in found.verdict))
    return {
        "shift": Found(found.shift, found.noise_floor, found.shift),
        "first_order, Σ a": Found(found.first_order, found.noise.slope, found.shift),
        "remainder": Found(found.remainder, found.remainder_floor, found.shift, kinds),
    }


def _second_order(lens: ll.LoraLens, asked: Asked) -> dict[str, Found]:
    found = ll.second_order(lens, asked.prompts, asked.margin, **QUIET)
    return {
        "second_order, ½ 1ᵀH1": Found(found.curvature, found.curvature_noise, found.shift),
        "second_order, what it leaves": Found(found.remainder, found.remainder_floor, found.shift),
        "second_order, ½(H1)_l": Found(found.half_row_sums),
    }


def _log_p(lens: ll.LoraLens, asked: Asked) -> dict[str, Found]:
    found = ll.remainder(lens, asked.prompts, ll.LogProb(asked.doc), **QUIET)
    return {"shift of log p": Found(found.shift, found.noise_floor, found.shift)}


def _effects(
    how: str, of: str, name: str, group: Any = "site"
) -> Callable[[ll.LoraLens, Asked], dict[str, Found]]:
    def run(lens: ll.LoraLens, asked: Asked) -> dict[str, Found]:
        readouts = {"margin": asked.margin, "log p": ll.LogProb(asked.doc), "KL": ll.KL()}
        found = ll.patch_sites(lens, asked.prompts, readouts[of], how, group=group, **QUIET)
        return {name: Found(found.values, found.noise_floor)}

    return run


def _patched(lens: ll.LoraLens, asked: Asked) -> dict[str, Found]:
    names = [lens.plan.host.block_input(layer) for layer in range(1, lens.plan.host.n_layers)]
    found = ll.patch_activations(lens, asked.prompts, asked.margin, names[-8:], **QUIET)
    return {"patch_activations": Found(found.values, found.noise_floor)}


def _features(lens: ll.LoraLens, asked: Asked) -> dict[str, Found]:
    width = lens.model.cfg.d_model
    directions = torch.randn(32, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    name = lens.plan.host.block_input(lens.plan.host.n_layers - 1)
    found = ll.feature_shift(lens, asked.prompts, directions.to(lens.gate_dtype), name)
    return {
        "feature_shift": Found(found.shift, found.noise_floor),
        "feature_shift, first order": Found(found.first_order),
    }


STATED: Works = {
    "remainder": _remainder,
    "second_order": _second_order,
    "log p": _log_p,
    "add one": _effects("add_one", "margin", "patch_sites, add one"),
    "leave one out": _effects("leave_one_out", "margin", "patch_sites, leave one out"),
    "leave one out, by layer": _effects("leave_one_out", "margin", "… by layer", "layer"),
    "leave one out, log p": _effects("leave_one_out", "log p", "… of log p, leave one out"),
    "leave one out, KL": _effects("leave_one_out", "KL", "… of KL, leave one out"),
    "patch_activations": _patched,
    "feature_shift": _features,
}
"""Calls whose result states a noise floor."""


def compared(low: Found, high: Found) -> Compared:
    """Half precision beside float64.

    Args:
        low: the numbers in half precision.
        high: the same numbers in float64.

    Raises:
        AssertionError: an entry is a number in one of the two alone, or infinite.
    """
    found, exact = _same_entries(low.values, high.values)
    error = _rms(found - exact)
    size = float(exact.abs().max()) if high.shift is None else _rms(high.shift)
    of_all = Compared(
        error=error / size,
        spearman=_mean_spearman(found, exact),
        ratio=NAN,
        clear=NAN,
        spearman_clear=NAN,
        says=low.says,
    )
    if low.floor is None:
        return of_all
    floor = low.floor.double()
    is_clear = found.abs() > 3 * floor[:, None]
    return of_all._replace(
        ratio=error / _rms(floor),
        clear=float(is_clear.double().mean()),
        spearman_clear=_mean_spearman(found, exact, among=is_clear),
    )


def errors_in_floors(
    low: ll.LoraLens, high: ll.LoraLens, prompts: Any, readouts: Iterable[ll.Readout]
) -> Tensor:
    """[readout × prompt], how far a shift in half precision is off float64's, in noise floors."""
    ratios: list[Tensor] = []
    for readout in readouts:
        g = Evaluations(low.function(prompts, readout))
        floor = g.floor.double()
        with models.lifted():
            exact = Evaluations(high.function(prompts, readout)).shift
        rounded = g.ends[1].double() - g.ends[0].double()
        error = rounded - exact
        ratios.append(error.abs() / floor)
    return torch.cat(ratios)


def _same_entries(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The values of each prompt in one row, in float64; zero where both are NaN, as at padding."""
    found = low.detach().double().reshape(len(low), -1)
    exact = high.detach().double().reshape(len(high), -1)
    is_left_out = exact.isnan()
    assert torch.equal(found.isnan(), is_left_out), "NaN in one precision alone"
    found = found.masked_fill(is_left_out, 0.0)
    exact = exact.masked_fill(is_left_out, 0.0)
    assert found.isfinite().all() and exact.isfinite().all(), "an infinite value"
    return found, exact


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _mean(values: list[float]) -> float:
    """The mean without NaN; NaN if nothing else is there."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else NAN


def _mean_spearman(found: Tensor, exact: Tensor, among: Tensor | None = None) -> float:
    """The rank correlation of each prompt's entries, or of some of them; the mean over prompts."""
    if among is None:
        among = torch.ones_like(found, dtype=torch.bool)
    correlations: list[float] = []
    for found_row, exact_row, is_chosen in zip(found, exact, among, strict=True):
        correlations.append(_spearman(found_row[is_chosen], exact_row[is_chosen]))
    return _mean(correlations)


def _spearman(found: Tensor, exact: Tensor) -> float:
    """The rank correlation; NaN for fewer than five entries, of which it would say nothing."""
    if len(found) < 5:
        return NAN
    ranks = [values.argsort().argsort().double() for values in (found, exact)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
