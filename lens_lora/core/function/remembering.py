"""The evaluator of g with a memory: what it has run already is not run again.

`cache.py` says what is kept. What is not known yet is run in one batch: g(0) and g(1) are evaluated
together with the first corners, or with the first slopes if that costs less than passes of their
own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function import memory, reverse, rounding
from lens_lora.core.function.corners import Points, strengths
from lens_lora.core.function.evaluator import Evaluator
from lens_lora.core.function.slopes_at_points import weighted_slopes
from lens_lora.core.model import LoraLens
from lens_lora.errors import require_finite

# The base model and the adapted one.
ENDS = (0.0, 1.0)
ByPrompt = Float[Tensor, " batch"]


@dataclasses.dataclass
class Known:
    """The numbers of one g that were evaluated already.

    Attributes:
        values: g at each strength ε.
        slopes: ∂g/∂ε_l of whole sites at each strength.
        draws: g at each strength, followed by draws of g with noise at the embedding.
        slope_draws: draws of first order at the base, once they were run.
        str_tokens: the tokens of each prompt, once they were looked up.
    """

    values: dict[float, ByPrompt] = dataclasses.field(default_factory=dict)
    slopes: dict[float, Float[Tensor, "batch site"]] = dataclasses.field(default_factory=dict)
    draws: dict[float, Float[Tensor, "draw batch"]] = dataclasses.field(default_factory=dict)
    slope_draws: rounding.Draws | None = None
    str_tokens: tuple[tuple[str, ...], ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Remembering(Evaluator):
    """Evaluates g(ε) as `Evaluator` does, and remembers its values and whole slopes at strengths.

    Attributes:
        lens, reading, progress: see `Evaluator`.
        known: the numbers that were evaluated already.
    """

    known: Known

    # --- Values

    def along(self, scales: Sequence[float]) -> Float[Tensor, "point batch"]:
        """Evaluate g(ε·1) at the strengths at which it is not known yet."""
        unknown = self._unknown(dict.fromkeys(scales))
        if unknown:
            values = self.run(strengths(self.lens, unknown), "along the path")
            self._know_all(unknown, values)
        values = [self.known.values[scale] for scale in scales]
        return torch.stack([value.to(values[-1]) for value in values])

    def values(self, points: Points, shown_as: str) -> Float[Tensor, "point batch"]:
        """Evaluate g at points; those with the same gate at every site are strengths, and are kept.

        Ends that are not known yet are evaluated in the same batch as the other points.
        """
        is_uniform = (points == points[:, :1]).all(1)
        if bool(is_uniform.all()):
            return self.along(points[:, 0].tolist())
        is_end = torch.stack([(points == scale).all(1) for scale in ENDS])
        is_other = ~is_end.any(0)
        to_run = points[is_other]  # At least one, or all were strengths.
        unknown_ends = self._unknown(ENDS)
        if unknown_ends:
            to_run = torch.cat([strengths(self.lens, unknown_ends).to(to_run), to_run])
        values = self.run(to_run, shown_as)
        self._know_all(unknown_ends, values[: len(unknown_ends)])
        at_points = values.new_empty(len(points), values.shape[1])
        at_points[is_other] = values[len(unknown_ends) :]
        for scale, points_there in zip(ENDS, is_end, strict=True):
            at_points[points_there] = self.known.values[scale].to(at_points)
        return at_points

    # --- Slopes

    def slopes(
        self, points: Points, axes: tuple[str, ...], lens: LoraLens, *, remember: bool = True
    ) -> Float[Tensor, "point batch site *by"]:
        """∂g/∂ε_l at each point; at a single strength, g there is remembered as well.

        Ends that are not known yet ride along with a single strength where that is cheaper.
        """
        if len(points) > 1 or "token" in axes:
            return super().slopes(points, axes, lens)
        # The smallest and the largest gate, in one read from the device.
        at, largest = torch.stack(points[0].aminmax()).tolist()
        if at != largest:
            return super().slopes(points, axes, lens)
        if remember and not axes and at in self.known.slopes:
            return self.known.slopes[at][None]
        scales = [at, *self._riding_ends(at)]
        slopes, values = reverse.slopes_of_first(
            lens, self.reading, strengths(self.lens, scales), axes
        )
        self._know_all(scales, values.T)
        if remember:
            self._remember_slopes(at, slopes)
        return slopes[None]

    def weighted_slopes(
        self,
        points: Points,
        weights: Float[Tensor, "*sum point"],
        axes: tuple[str, ...],
        lens: LoraLens,
    ) -> Float[Tensor, "*sum batch site *by"]:
        """Weighted sums of ∂g/∂ε_l over the points; g at those that are strengths is remembered."""
        sums, values = weighted_slopes(
            lens, self.reading, points, weights, axes, progress=self.progress
        )
        smallest, largest = torch.stack(points.aminmax(dim=1)).tolist()
        for at, most, value in zip(smallest, largest, values, strict=True):
            if at == most and at not in self.known.values:
                self.know(at, value)
        return sums

    def _riding_ends(self, at: float) -> list[float]:
        """The ends that are not known yet and cost less in the pass of the slopes than alone."""
        ends = [scale for scale in self._unknown(ENDS) if scale != at]
        rides = memory.rides_along(self.lens, self.reading, 1 + len(ends))
        return ends if rides else []

    def _remember_slopes(self, at: float, slopes: Float[Tensor, "batch site *by"]) -> None:
        is_split = slopes.ndim > 2
        of_sites = slopes.flatten(2).sum(2) if is_split else slopes
        self.known.slopes[at] = of_sites

    # --- Draws

    def draws(self, scales: Sequence[float]) -> list[Float[Tensor, "draw batch"]]:
        """See `Evaluator.draws`."""
        return self.draw(scales)

    def draws_of_ends(self) -> tuple[Float[Tensor, "draw batch"], Float[Tensor, "draw batch"]]:
        """See `Evaluator.draws_of_ends`. What is not known of the two is run in one batch."""
        base, adapted = self.draw(ENDS)
        return base, adapted

    def draw(
        self, scales: Sequence[float], beside: Sequence[float] = (), *, progress: bool = False
    ) -> list[Float[Tensor, "draw batch"]]:
        """Evaluate g and draws of it at some strengths, and g at `beside` in the same batch."""
        draws_at = self.known.draws
        if self.reading.holds_base and 0.0 in scales and 0.0 not in draws_at:
            draws_at[0.0] = self.draws_of_held_base()
        undrawn = [scale for scale in scales if scale not in draws_at]
        if undrawn:
            unknown = self._unknown(dict.fromkeys([*undrawn, *beside]))
            values, draws = rounding.exact_and_draws(
                self.lens, self.reading, unknown, undrawn, progress=progress
            )
            self._know_all(unknown, values)
            for scale, draws_there in zip(undrawn, draws, strict=True):
                value = self.known.values[scale].to(draws_there)
                draws_at[scale] = torch.cat([value[None], draws_there])
        return [draws_at[scale] for scale in scales]

    def slope_draws(self) -> rounding.Draws:
        """Draws of g(0) and Σ a, which are run at most once."""
        if self.known.slope_draws is None:
            self.known.slope_draws = super().slope_draws()
        return self.known.slope_draws

    def slopes_with_draws(
        self, along: Sequence[float], axes: tuple[str, ...]
    ) -> Float[Tensor, "batch site *by"]:
        """∂g/∂ε_l at the base, from passes that also give draws of Σ a and of both ends."""
        slopes, base, draws = rounding.slopes_and_draws(self.lens, self.reading, axes)
        self.known.slope_draws = draws
        self.know(0.0, base)
        self.draw(ENDS, beside=along, progress=self.progress)
        self.lens.sites.require_finite(slopes)
        self._remember_slopes(0.0, slopes)
        return slopes

    # --- What is known

    def know(self, at: float, value: ByPrompt) -> None:
        """Remember g(ε·1) from a pass that was run for something else."""
        require_finite(value, "the readout")
        self.known.values[at] = value

    def _unknown(self, scales: Iterable[float]) -> list[float]:
        """The strengths at which g is not known yet."""
        return [scale for scale in scales if scale not in self.known.values]

    def _know_all(self, scales: Sequence[float], values: Float[Tensor, "point batch"]) -> None:
        require_finite(values, "the readout")  # All of them in one read of a device.
        self.known.values.update(zip(scales, values, strict=True))
