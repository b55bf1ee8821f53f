"""Does an attribution stand out from random directions of the same size?

    a_l = ⟨ΔW_l, M_l⟩,  M_l = ∂g/∂W_l at the base. With ΔW′ of the same singular values in random
    directions a′_l has mean 0 and standard deviation ‖ΔW_l‖ ‖M_l‖ / √(out · in).

1. Draw null adapters (`Adapter.null`), which keep the size of each site's ΔW and have random
   directions.
2. Compute first order of each, from the M_l that all of them share, and its exact shift.
3. Per site, and for the shift, z = (a − mean a′) / std a′ and the empirical
   p = (1 + #{|a′| ≥ |a|}) / (1 + draws), which is two-sided and valid for any number of draws.

Many sites are tested at once, and by chance alone a share 1/(1 + draws) of them exceeds every draw.
So q is p after Benjamini and Hochberg. No q is below S / (k (1 + draws)) when k of S sites exceed
every draw, so a list of single sites at q ≤ 0.05 needs draws ≥ 20 S / k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import false_discovery_control
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import whole
from lens_lora.compat import in_float64
from lens_lora.core import (
    Adapter,
    Attribution,
    Function,
    LoraLens,
    OfMeasured,
    ScaleInject,
    analysis,
    tables,
)
from lens_lora.judging.verdict import NullVerdict

# How many null adapters are held over the model at a time: half of the usual number of draws.
_LENSES_AT_ONCE = 10


@final
class NullTest(OfMeasured):
    """An attribution compared with those of random adapters of the same sizes.

    `plot` is |a_l| of every site over the band of the draws, in the order of the forward pass.

    Attributes:
        observed: first order of the real adapter, with its exact shift.
        null: [draw, batch, site], first order of each null adapter, in the readout's units.
        null_shift: [draw, batch], the exact g(1) − g(0) of each; NaN for those that were not run,
            which are the last.
        seed: the seed of the draws. Draw k is that of `adapter.null(seed, k)`, except where a fused
            module holds several sites: there the singular values of each part are kept.
        noise_floor: [batch], σ of a difference of two readouts from rounding alone.
    """

    observed: Attribution
    null: Float[Tensor, "draw batch site"]
    null_shift: Float[Tensor, "draw batch"]
    seed: int
    noise_floor: Float[Tensor, " batch"]

    @property
    def measured(self) -> Attribution:
        """The attribution, with its exact ends."""
        return self.observed

    @property
    def readout(self) -> str:
        """The label of the readout."""
        return self.observed.readout

    @property
    def units(self) -> str:
        """The units of all numbers."""
        return self.observed.units

    @property
    def draws(self) -> int:
        """The number of null adapters."""
        return len(self.null)

    @property
    def z(self) -> Float[Tensor, "batch site"]:
        """Standard deviations of the null between a_l and its mean; NaN where ΔW_l is zero."""
        null = in_float64(self.null)
        observed = in_float64(self.observed.per_site)
        return (observed - null.mean(0)) / null.std(0)

    @property
    def p(self) -> Float[Tensor, "batch site"]:
        """The share of draws, the real adapter counted as one, with |a′_l| ≥ |a_l|."""
        return _p(self.observed.per_site, self.null)

    @property
    def q(self) -> Float[Tensor, "batch site"]:
        """The p-values of each prompt's sites after Benjamini and Hochberg.

        A list of the sites with q ≤ x holds at most a share x of false ones, on average.
        """
        controlled = false_discovery_control(self.p.cpu().numpy(), axis=1)
        return torch.from_numpy(np.asarray(controlled))

    @property
    def shift_p(self) -> Float[Tensor, " batch"]:
        """The p-value of the exact shift, among the draws that were run."""
        return _p(self.observed.shift, self._run_shift)

    @property
    def _run_shift(self) -> Float[Tensor, "run batch"]:
        return self.null_shift[~self.null_shift.isnan().any(1)]

    @property
    def exceeds_all(self) -> Float[Tensor, " batch"]:
        """The share of sites whose |a_l| exceeds that of every draw; 1/(1 + draws) by chance."""
        return in_float64(self.observed.per_site.abs() > self.null.abs().amax(0)).mean(1)

    @property
    def verdict(self) -> tuple[NullVerdict, ...]:
        """How far shift and sites stand out, for each prompt; str() says it in words."""
        shift_of_draws = in_float64(self._run_shift)
        null = shift_of_draws.square().mean(0).sqrt()
        shift_p = self.shift_p
        exceeds_all = self.exceeds_all
        verdicts: list[NullVerdict] = []
        for prompt in range(len(null)):
            verdict = NullVerdict.of(
                shift=float(self.observed.shift[prompt]),
                noise_floor=float(self.noise_floor[prompt]),
                null=float(null[prompt]),
                p=float(shift_p[prompt]),
                exceeds_all=float(exceeds_all[prompt]),
                draws=self.draws,
                run=len(shift_of_draws),
            )
            verdicts.append(verdict)
        return tuple(verdicts)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site: value, share, the null's standard deviation, z, p, q."""
        deviation = in_float64(self.null).std(0)
        numbers = {"null_std": deviation, "z": self.z, "p": self.p, "q": self.q}
        return self.observed.to_frame().assign(**tables.flat(numbers))


@analysis
def null_test(g: Function, *, draws: int = 20, exact: int | None = None, seed: int = 0) -> NullTest:
    """First order and exact shift against `draws` null adapters of the same per-site spectra.

    A null of an embedding spreads over the whole vocabulary, so a trained one stands out wherever
    it was trained on few tokens.

    Cost per draw: drawing it and two thin matrix products a module (`Bank`), but no pass. Each draw
    in `exact` is also laid over the model and takes a forward pass, up to ten draws in one batch.
    Once, whatever the draws: eleven forward passes and one backward.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, the number that is read from the logits.
        draws: how many null adapters; at least 2.
        exact: how many of them are run for their exact shift, at least 2; None for all.
        seed: the seed of the draws, as for `Adapter.null`.
        progress: show a bar.

    Raises:
        ArgumentError: fewer than two draws, or exact ones.
        UnsupportedAdapterError: DoRA or trained biases; names the remedy.
        NumericsError: a readout or derivative that is not finite.
    """
    # A spread needs two draws or more.
    draws = whole("draws", draws, 2)
    seed = whole("seed", seed, 0)
    run = draws if exact is None else min(whole("exact", exact, 2), draws)
    g.require_slope_at_base()
    lens = g.lens
    # This also runs both ends, in the same batch as the draws of the floor.
    noise_floor = g.floor
    base, _ = g.ends
    ends = _ExactEnds(g, run)

    def own_and_nulls() -> Iterator[Adapter]:
        yield lens.adapter
        drawn = lens.null_adapters(seed, draws)
        for null in tqdm(drawn, "null adapters", draws, leave=False, disable=not g.progress):
            yield null
            # This is called for each group of prompts; g(1) is of all prompts, and all draws are
            # run in the first call.
            ends.add(null)

    slopes = g.slopes_of_adapters(own_and_nulls, lens.sites, like=[lens.adapter])
    of_run = torch.stack(ends.values) - base
    of_others = of_run.new_full((draws - len(of_run), of_run.shape[1]), torch.nan)
    return NullTest(
        observed=Attribution.of(g, slopes[0], method="first_order", at=0.0, mode="reverse"),
        null=slopes[1:],
        null_shift=torch.cat([of_run, of_others]),
        seed=seed,
        noise_floor=noise_floor,
    )


class _ExactEnds:
    """The values g(1) of the first null adapters, which are run a few at a time as they are drawn.

    Attributes:
        values: g(1) of each adapter that was run, [batch].
    """

    def __init__(self, g: Function, count: int) -> None:
        self._g = g
        # How many adapters are run; those drawn after them are not.
        self._count = count
        # Laid over the model, and not run yet.
        self._waiting: list[LoraLens] = []
        self.values: list[Float[Tensor, " batch"]] = []

    def add(self, adapter: Adapter) -> None:
        """Run this adapter, or let it wait for others; an adapter beyond the count is left out."""
        if len(self.values) == self._count:
            return
        self._waiting.append(self._g.lens.with_adapter(adapter))
        is_last = len(self.values) + len(self._waiting) == self._count
        if is_last or len(self._waiting) == _LENSES_AT_ONCE:
            self.values.extend(_adapted_values(self._g, self._waiting))
            self._waiting.clear()


def _adapted_values(g: Function, lenses: Sequence[LoraLens]) -> list[Float[Tensor, " batch"]]:
    """The value g(1) of each adapter, with a copy of all rows for each, in as few passes as fit.

    Args:
        g: the function of another adapter over the same model.
        lenses: the adapters over that model.
    """
    values: list[Float[Tensor, " batch"]] = []
    at_once = g.passes.copies_at_once
    if g.lens.plan.activation_rounding:
        at_once = 1  # A kernel that rounds to 8 bit looks at all rows of a batch together.
    for start in range(0, len(lenses), at_once):
        together = lenses[start : start + at_once]
        if len(together) == 1:
            values += _one_by_one(g, together)
            continue
        try:
            values += _in_one_pass(g, together).unbind(1)
        except _NotByRowError:
            values += _one_by_one(g, together)
    return values


def _one_by_one(g: Function, lenses: Sequence[LoraLens]) -> list[Float[Tensor, " batch"]]:
    """The value g(1) of each adapter, each in passes of its own."""
    return [g.over(lens).with_progress(False)(1.0) for lens in lenses]


class _NotByRowError(Exception):
    """A module whose output does not have the rows of the batch, such as an expert's."""


def _in_one_pass(g: Function, lenses: Sequence[LoraLens]) -> Float[Tensor, "batch lens"]:
    """The value g(1) of each adapter, where each row of a batch has its own: r0 r0 … r1 r1 …

    Raises:
        _NotByRowError: the model has a module whose output is not by row.
    """
    copies = len(lenses)
    rows = len(g.rows.tokens)
    injects = [ScaleInject(lens.plan, lens.gates(1.0)) for lens in lenses]

    def write(index: int, out: Tensor, z: Tensor) -> Tensor:
        if out.ndim < 3 or not {len(out), len(z)} <= {1, rows * copies}:
            raise _NotByRowError
        parts: list[Tensor] = []
        for copy, inject in enumerate(injects):
            # What all rows share, such as the embedding of a position, is a single row.
            out_of_copy = out if len(out) == 1 else out[copy::copies]
            z_of_copy = z if len(z) == 1 else z[copy::copies]
            written = inject(index, out_of_copy, z_of_copy)
            part = out_of_copy if written is None else written
            parts.append(part.expand(rows, *part.shape[1:]))
        return torch.stack(parts, 1).flatten(0, 1)

    return g.passes.side_by_side(copies, under=g.lens.injected(write))


def _p(observed: Float[Tensor, "*rest"], null: Float[Tensor, " draw *rest"]) -> Tensor:
    """The share of draws that are at least as large; what was observed counts as one of them."""
    reach = in_float64(null.abs() >= observed.abs()).sum(0)
    return (1 + reach) / (1 + len(null))
