"""The function g(ε) with a memory: the cache of one public call.

Several analyses ask the same of one g: both ends, g along the path, what rounding does. Within one
public call the model and its hooks stay as they are, so what is asked for most is kept:

1. g at strengths, ε·1, the base and the adapted model among them, with draws of its rounding;
2. ∂g/∂ε_l of whole sites at strengths, with draws of the sum.

These are a few numbers for each prompt and site. Everything else is run each time that it is asked
for: corners, points with a gate of each site's own, and slopes by position, head, expert, rank or
token, which may be large. What is not known yet goes in one batch: the ends ride along with the
first corners, or with the first slopes.

A public call makes g in two lines, whatever its arguments are (`@analysis` writes them for most):

    f = lens.function(prompts)  # tokenises the prompts, and checks the model
    g = Evaluations(f.about(readout))  # looks up the readout's tokens, and begins with no number
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function import forward, memory, reverse, rounding
from lens_lora.core.function.corners import Points, strengths
from lens_lora.core.function.function import Function
from lens_lora.core.function.slopes_at_points import weighted_slopes
from lens_lora.core.model import LoraLens, by_axes
from lens_lora.core.readout import PromptsLike, Readout
from lens_lora.core.readout.readout import require_readout

# The base model and the adapted one.
_ENDS = (0.0, 1.0)
_ByPrompt = Float[Tensor, " batch"]


@dataclasses.dataclass
class _Memory:
    """The numbers of one g that were evaluated already.

    Attributes:
        values: g at strengths ε.
        slopes: ∂g/∂ε_l of whole sites at strengths; their parts, which may be large, are not kept.
        draws: at strengths, g and then draws of it with noise at the embedding.
        slope_draws: draws of first order at the base, once there are any.
        str_tokens: each prompt's tokens, once they were looked up.
    """

    values: dict[float, _ByPrompt] = dataclasses.field(default_factory=dict)
    slopes: dict[float, Float[Tensor, "batch site"]] = dataclasses.field(default_factory=dict)
    draws: dict[float, Float[Tensor, "draw batch"]] = dataclasses.field(default_factory=dict)
    slope_draws: rounding.Draws | None = None
    str_tokens: tuple[tuple[str, ...], ...] | None = None


class Evaluations(Function):
    """The function g with a memory of its values and whole slopes at strengths ε·1, for one call.

    Corners and split slopes are not kept, and are run again when they are asked for again.

    Hooks that you put on the model, or take off it, in the meantime are not seen in what it has
    run already. `lens_lora.analysis` makes one for each call; a `Function` of your own becomes one
    by `Evaluations.of(g)`. Slopes under a context of yours are not remembered.

    Attributes:
        lens, prompts, rows, readout, progress: see `Function`.
    """

    def __init__(self, g: Function) -> None:
        """Remember what is evaluated of g from now on.

        Args:
            g: a function with a readout, of a model that is as it was when the lens was made.
        """
        super().__init__(g.lens, g.prompts, g.rows, g.readout, g.reading, g.progress)
        self._memory = _Memory()
        base = self._named_readout().base_value
        if base is not None:
            self.know(0.0, g.lens.gates(0.0).new_full((g.reading.batch,), base))

    @classmethod
    def of(cls, g: Function) -> Evaluations:
        """The function with an empty memory; or itself, if it has a memory already.

        Args:
            g: a function with a readout.
        """
        if isinstance(g, Evaluations):
            return g
        g.require_same_model()
        return cls(g)

    def know(self, at: float, value: _ByPrompt) -> None:
        """Take g(ε·1) at a strength ε from a pass that was run anyway.

        Args:
            at: the strength.
            value: g there.

        Raises:
            NumericsError: a value that is not finite.
        """
        forward.require_finite(value, "the readout")
        self._memory.values[at] = value

    def slopes_with_noise(
        self, along: Sequence[float] = (), by: tuple[str, ...] | str = ()
    ) -> Float[Tensor, "batch site *by"]:
        """∂g/∂ε_l at the base; the same passes give the draws for `noise` and `remainder_noise`.

        Five forward and backward passes, and ten forward ones, batched; and one for each strength.
        Where the slopes of whole sites are known and asked for, they are not run again.

        Args:
            along: strengths at which g is to be known as well.
            by: any of 'position', 'head', 'expert' and 'rank', as in `slopes`.

        Raises:
            NumericsError: a derivative that is not finite, naming the site.
        """
        axes = by_axes(by)
        if not axes and 0.0 in self._memory.slopes:
            return self._memory.slopes[0.0]
        slopes, base, draws = rounding.slopes_and_draws(self.lens, self.reading, axes)
        self._memory.slope_draws = draws
        self.know(0.0, base)
        self._draw(_ENDS, beside=along, progress=self.progress)
        reverse.require_finite_slopes(self.lens, slopes)
        self._remember_slopes(0.0, slopes)
        return slopes

    @property
    def str_tokens(self) -> tuple[tuple[str, ...], ...]:
        """See `Function.str_tokens`."""
        if self._memory.str_tokens is None:
            self._memory.str_tokens = super().str_tokens
        return self._memory.str_tokens

    def with_progress(self, shown: bool) -> Evaluations:
        """The same function and memory, with or without bars.

        Args:
            shown: whether long calls show a bar.
        """
        other = Evaluations(super().with_progress(shown))
        other._memory = self._memory
        return other

    # --- What `Function` evaluates anew, from memory

    def require_same_model(self) -> None:
        """Nothing: the model was checked when this was made, and stays as it is within the call."""

    def _along(self, scales: Sequence[float]) -> Float[Tensor, "point batch"]:
        unknown = self._unknown(dict.fromkeys(scales))
        if unknown:
            values = self._run(strengths(self.lens, unknown), "along the path", self.progress)
            self._know_all(unknown, values)
        values = [self._memory.values[scale] for scale in scales]
        return torch.stack([value.to(values[-1]) for value in values])

    def _values(self, points: Points, shown_as: str) -> Float[Tensor, "point batch"]:
        """Evaluate g at points; those with the same gate at every site are strengths, remembered.

        Ends that are not known yet are evaluated in the same batch as the other points.
        """
        is_uniform = (points == points[:, :1]).all(1)
        if bool(is_uniform.all()):
            return self._along(points[:, 0].tolist())
        is_end = torch.stack([(points == scale).all(1) for scale in _ENDS])
        is_other = ~is_end.any(0)
        to_run = points[is_other]  # At least one, or all were strengths.
        unknown_ends = self._unknown(_ENDS)
        if unknown_ends:
            to_run = torch.cat([strengths(self.lens, unknown_ends).to(to_run), to_run])
        values = self._run(to_run, shown_as, self.progress)
        self._know_all(unknown_ends, values[: len(unknown_ends)])
        at_points = values.new_empty(len(points), values.shape[1])
        at_points[is_other] = values[len(unknown_ends) :]
        for scale, points_there in zip(_ENDS, is_end, strict=True):
            at_points[points_there] = self._memory.values[scale].to(at_points)
        return at_points

    def _slopes(
        self, points: Points, axes: tuple[str, ...], lens: LoraLens, *, remember: bool = True
    ) -> Float[Tensor, "point batch site *by"]:
        """At one strength g is seen on the way, and both ends ride along where that is cheaper."""
        if len(points) > 1 or "token" in axes:
            return super()._slopes(points, axes, lens)
        # One read of what may lie on a device: the smallest and the largest gate.
        at, largest = torch.stack(points[0].aminmax()).tolist()
        if at != largest:
            return super()._slopes(points, axes, lens)
        if remember and not axes and at in self._memory.slopes:
            return self._memory.slopes[at][None]
        scales = [at, *self._riding_ends(at)]
        slopes, values = reverse.slopes_of_first(
            lens, self.reading, strengths(self.lens, scales), axes
        )
        self._know_all(scales, values.T)
        if remember:
            self._remember_slopes(at, slopes)
        return slopes[None]

    def _weighted_slopes(
        self,
        points: Points,
        weights: Float[Tensor, "*sum point"],
        axes: tuple[str, ...],
        lens: LoraLens,
    ) -> Float[Tensor, "*sum batch site *by"]:
        """At points with one strength for all sites g is seen on the way, and remembered."""
        sums, values = weighted_slopes(
            lens, self.reading, points, weights, axes, progress=self.progress
        )
        smallest, largest = torch.stack(points.aminmax(dim=1)).tolist()
        for at, most, value in zip(smallest, largest, values, strict=True):
            if at == most and at not in self._memory.values:
                self.know(at, value)
        return sums

    def _riding_ends(self, at: float) -> list[float]:
        """The ends that are not known yet and cost less in the pass of the slopes than alone."""
        ends = [scale for scale in self._unknown(_ENDS) if scale != at]
        rides = memory.rides_along(self.lens, self.reading, 1 + len(ends))
        return ends if rides else []

    def _remember_slopes(self, at: float, slopes: Float[Tensor, "batch site *by"]) -> None:
        of_sites = slopes if slopes.ndim == 2 else slopes.flatten(2).sum(2)
        self._memory.slopes[at] = of_sites

    def _draws(self, scales: Sequence[float]) -> list[Float[Tensor, "draw batch"]]:
        return self._draw(scales)

    def _draws_of_ends(self) -> tuple[Float[Tensor, "draw batch"], Float[Tensor, "draw batch"]]:
        base, adapted = self._draw(_ENDS)
        return base, adapted

    def _draw(
        self, scales: Sequence[float], beside: Sequence[float] = (), *, progress: bool = False
    ) -> list[Float[Tensor, "draw batch"]]:
        """Evaluate g and draws of it at these strengths, and in the same batch g at `beside`."""
        known = self._memory.draws
        if self.reading.holds_base and 0.0 in scales and 0.0 not in known:
            known[0.0] = self._draws_of_held_base()
        new = [scale for scale in scales if scale not in known]
        if new:
            exact = self._unknown(dict.fromkeys([*new, *beside]))
            values, draws = rounding.exact_and_draws(
                self.lens, self.reading, exact, new, progress=progress
            )
            self._know_all(exact, values)
            for scale, drawn in zip(new, draws, strict=True):
                value = self._memory.values[scale].to(drawn)
                known[scale] = torch.cat([value[None], drawn])
        return [known[scale] for scale in scales]

    def _slope_draws(self) -> rounding.Draws:
        if self._memory.slope_draws is None:
            self._memory.slope_draws = super()._slope_draws()
        return self._memory.slope_draws

    def _unknown(self, scales: Iterable[float]) -> list[float]:
        """The strengths at which g is not known yet."""
        return [scale for scale in scales if scale not in self._memory.values]

    def _know_all(self, scales: Sequence[float], values: Float[Tensor, "point batch"]) -> None:
        forward.require_finite(values, "the readout")  # All of them in one read of a device.
        self._memory.values.update(zip(scales, values, strict=True))


def evaluations(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    max_memory: float | None = None,
    progress: bool = True,
) -> Evaluations:
    """Bind g to these prompts, with a memory for one public call.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: what is read of the logits.
        max_memory: bytes beside the model, in place of the bound of the lens.
        progress: whether long calls show a bar.

    Raises:
        ArgumentError: something that is no lens, or no readout.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        ModelStateError: the model is not as it was when the lens was made.
    """
    bounded = lens if max_memory is None else lens.within(max_memory)
    f = bounded.function(prompts, progress=progress)
    return Evaluations(f.about(require_readout(readout)))
