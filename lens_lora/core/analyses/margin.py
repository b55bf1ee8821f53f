"""The fact margin (note, §5): m = m₀ + Σ_l (u_doc − u_pre)ᵀ J δz_l + R_m.

The document's fact overtakes the pretrained one iff the first-order sum exceeds −m₀ − R_m.

1. First order of the margin, and the margin itself along ε·Δ (`remainder.py`).
2. Where the curve changes sign, the scale is found for all prompts together: g is run on either
   side of the root of a polynomial through the nearest points, until the step is narrow.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.interpolate import BarycentricInterpolator
from scipy.optimize import root_scalar
from torch import Tensor

from lens_lora.core.analyses.remainder import USUAL_SCALES, RemainderCurve, curve_beside
from lens_lora.core.analyses.verdict import FlipVerdict, Verdict
from lens_lora.core.function.cache import Evaluations
from lens_lora.core.function.function import Function
from lens_lora.core.function.many_gates import gated_readout
from lens_lora.core.model import LoraLens, alone, by_axes
from lens_lora.core.readout import extensions
from lens_lora.core.readout.prompts import PromptsLike
from lens_lora.core.readout.responses import AnswerLike
from lens_lora.core.results import drawing
from lens_lora.core.results.attribution import Attribution
from lens_lora.core.results.base import OfMeasured, Reported
from lens_lora.core.results.signs import SIGMAS, changes_sign
from lens_lora.core.results.tables import flat


@final
class FactMargin(OfMeasured, Reported):
    """Does the document's fact overtake the pretrained one, where on the way, because of what?

    `plot` is the margin along ε, its first-order line, and the flip.

    Attributes:
        attribution: the first-order shift of the margin, by site (at ε = 0).
        curve: the margin along ε from 0 to 1, exact, beside its first-order line.
        flip_scale: [batch], the first ε in (0, 1] at which the margin changes sign; NaN where it
            does not. Where rounding hides a sign it may be rounding too.
        doc, pre: the two answers, per prompt.
    """

    attribution: Attribution
    curve: RemainderCurve
    flip_scale: Float[Tensor, " batch"]
    doc: Annotated[tuple[str, ...], "batch"]
    pre: Annotated[tuple[str, ...], "batch"]

    @classmethod
    def of(
        cls, g: Evaluations, doc: AnswerLike, pre: AnswerLike, by: tuple[str, ...] | str = ()
    ) -> FactMargin:
        """`fact_margin` of the margin at hand between these answers.

        Args:
            g: the margin, as a function of the gates.
            doc, pre: the answers that it is between.
            by: also split the attribution by 'position', 'head', 'expert', 'rank'.
        """
        axes = by_axes(by)
        slopes = g.slopes_with_noise(along=USUAL_SCALES, by=axes)
        attribution = Attribution.of(
            g,
            slopes,
            axes,
            method="first_order",
            at=0.0,
            mode="reverse",
            gauge="trained" if "rank" in axes else "",
        )
        curve = curve_beside(g, attribution.per_site)
        return cls(
            attribution=attribution,
            curve=curve,
            flip_scale=flip_scales(g, curve.base, curve.scales, curve.values),
            doc=_texts(g, doc),
            pre=_texts(g, pre),
        )

    @property
    def measured(self) -> Attribution:
        """First order of the margin: `base` is m₀, and `adapted` is m."""
        return self.attribution

    @property
    def m0(self) -> Float[Tensor, " batch"]:
        """The base model's margin, in logits: negative where it prefers the pretrained fact."""
        return self.attribution.base

    @property
    def m(self) -> Float[Tensor, " batch"]:
        """The adapted model's margin, exact."""
        return self.attribution.adapted

    @property
    def first_order(self) -> Float[Tensor, " batch"]:
        """Σ_l (u_doc − u_pre)ᵀ J δz_l."""
        return self.attribution.total

    @property
    def remainder(self) -> Float[Tensor, " batch"]:
        """R_m = m − m₀ − first order."""
        return self.attribution.remainder

    @property
    def noise_floor(self) -> Float[Tensor, " batch"]:
        """The noise floor σ of a difference of two margins, from rounding alone."""
        return self.curve.noise_floor

    @property
    def remainder_floor(self) -> Float[Tensor, " batch"]:
        """The noise floor σ of R_m, from the rounding of the margins and of first order."""
        return self.curve.noise.of_remainder(1.0)

    @property
    def flips(self) -> tuple[bool, ...]:
        """Whether the preferred fact changes between base and adapted model.

        False where rounding hides the sign of a margin; `flip_verdict` tells that from no flip.
        """
        return tuple(changes_sign(self.m0, self.m, self.noise_floor).tolist())

    @property
    def flip_predicted(self) -> tuple[bool, ...]:
        """Whether the preferred fact changes by first order alone, from m₀ to m₀ + Σ a_l.

        False where rounding hides the sign of either.
        """
        predicted = self.m0 + self.first_order
        does_flip = changes_sign(self.m0, predicted, self.noise_floor, self.remainder_floor)
        return tuple(does_flip.tolist())

    @property
    def flip_verdict(self) -> tuple[FlipVerdict, ...]:
        """For each prompt, whether the margin flips, or rounding hides it."""
        columns = torch.stack([self.m0, self.m, self.noise_floor.to(self.m)], 1)
        by_prompt = columns.cpu().double().tolist()
        return tuple(FlipVerdict(m0, m, SIGMAS * floor) for m0, m, floor in by_prompt)

    @property
    def verdict(self) -> tuple[Verdict, ...]:
        """For each prompt, how good first order is at ε = 1 and on the way."""
        return self.curve.verdicts_on(self.attribution)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt: the margin's whole account; `hidden` where rounding hides a sign.

        `base` is m₀, and `adapted` is m.
        """
        numbers = {
            "base": self.m0,
            "first_order": self.first_order,
            "remainder": self.remainder,
            "adapted": self.m,
            "noise_floor": self.noise_floor,
            "remainder_floor": self.remainder_floor,
            "flip_scale": self.flip_scale,
        }
        columns = {"prompt": range(len(self.m)), **flat(numbers)}
        return pd.DataFrame(columns).assign(
            flips=self.flips,
            flip_predicted=self.flip_predicted,
            hidden=[verdict.kind == "hidden" for verdict in self.flip_verdict],
        )

    def story(self, prompt: int | None = None) -> str:
        """The margin's account in plain words, claiming no more than the numbers.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such prompt, or several and none named.
        """
        return drawing.story(self, prompt)


@alone
def fact_margin(
    lens: LoraLens,
    prompts: PromptsLike,
    doc: AnswerLike,
    pre: AnswerLike,
    *,
    by: tuple[str, ...] | str = (),
    progress: bool = True,
) -> FactMargin:
    """The margin m = m₀ + first order + R_m between the document's fact and the pretrained one.

    Cost: five forward and backward passes and 30 forward passes, along the path and for the noise
    floors, in two batches for up to 17 tokens; mostly two or three more, of two points each, if
    any prompt flips.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        doc, pre: a string each (with its leading space), token id or ids, or one of each per
            prompt. Answers of several tokens are teacher-forced and their margin is in nats.
        by: also split the attribution by 'position', 'head', 'expert', 'rank'.
        progress: show a bar.

    Raises:
        TokenError: an answer that is no token of the model, a word that lost its leading space,
            or doc equal to pre.
    """
    f = lens.function(prompts, progress=progress)
    margin = extensions.margin_between(lens.model, doc, pre, f.prompts)
    g = Evaluations(f.bound_to(margin))
    return FactMargin.of(g, doc, pre, by)


def _texts(g: Function, answer: AnswerLike) -> tuple[str, ...]:
    """Each prompt's answer as the model's tokens spell it."""
    ids_of_each = extensions.answer_ids(g.lens.model, answer, g.prompts.batch, g.prompts.texts)
    return tuple("".join(g.lens.decode(ids)) for ids in ids_of_each)


def flip_scales(
    g: Function,
    base: Float[Tensor, " batch"],
    scales: Float[Tensor, " scale"],
    values: Float[Tensor, "batch scale"],
) -> Float[Tensor, " batch"]:
    """The first ε at which each prompt's g changes its sign; NaN where it does not.

    All prompts are refined together, two points of each in a pass: mostly two forward passes.

    Args:
        g: the function.
        base: g(0).
        scales: the ε at which g is known, rising.
        values: g(ε·1) there.
    """
    known_scales = torch.cat([scales.new_zeros(1), scales]).cpu().double()
    known_values = torch.cat([base[:, None], values], 1).cpu().double()
    before = known_values[:, :-1]
    after = known_values[:, 1:]
    crosses = (before != 0) & (before * after <= 0)
    flipping = crosses.any(1).nonzero()[:, 0]
    crossings: list[_Crossing] = []
    for prompt in flipping.tolist():
        low = int(crosses[prompt].int().argmax())
        crossings.append(_Crossing(known_scales.numpy(), known_values[prompt].numpy(), low))

    for _ in range(_MOST_PASSES):
        wide = [i for i, crossing in enumerate(crossings) if not crossing.is_narrow]
        if not wide:
            break
        probes = torch.tensor([crossings[i].probes for i in wide])
        found = _values_at(g, flipping[wide], probes).numpy()
        for i, between in zip(wide, found, strict=True):
            crossings[i] = crossings[i].narrowed(between)

    flips = torch.full((len(known_values),), float("nan"), dtype=torch.float64)
    roots = [crossing.root for crossing in crossings]
    flips[flipping] = torch.tensor(roots, dtype=torch.float64)
    return flips


# The precision of a flip: nearer to it, the rounding of float32 hides a margin's sign.
_PRECISION = 1e-5
# The nodes of the interpolant: with more of them rounding grows.
_NODES = 6
# A smooth margin takes two or three passes; one that jumps, where experts switch, takes many.
_MOST_PASSES = 16


@dataclasses.dataclass(frozen=True)
class _Crossing:
    """Where g changes sign between two neighbours of the points ε at which it is known.

    Attributes:
        scales, values: ε of each point, rising, and g there.
        low: the index of the point before the change.
    """

    scales: NDArray[np.float64]
    values: NDArray[np.float64]
    low: int

    @property
    def step(self) -> tuple[float, float]:
        """The ε of the two neighbours."""
        return float(self.scales[self.low]), float(self.scales[self.low + 1])

    @property
    def is_narrow(self) -> bool:
        """Whether nothing is left to look for; also where g is exactly zero at a neighbour."""
        low, high = self.step
        return high - low <= _PRECISION or not self.values[self.low : self.low + 2].all()

    @property
    def root(self) -> float:
        """The root of the polynomial through the nearest points, the two neighbours among them."""
        low, high = self.step
        nearest = np.abs(self.scales - (low + high) / 2).argsort()[:_NODES]
        # Without `rng` it draws from numpy's global state.
        through = BarycentricInterpolator(self.scales[nearest], self.values[nearest], rng=0)
        return float(root_scalar(through, bracket=(low, high)).root)

    @property
    def probes(self) -> tuple[float, float]:
        """Two ε on either side of that root, by about what it may be off.

        They keep a gap from each other and from the two neighbours.
        """
        low, high = self.step
        root = self.root
        reach = max(0.4 * _PRECISION, (high - low) ** 2 / 8)
        gap = min(reach, high - low) / 8
        left = min(max(root - reach, low + gap), high - 2 * gap)
        right = min(max(root + reach, left + gap), high - gap)
        return left, right

    def narrowed(self, between: NDArray[np.float64]) -> _Crossing:
        """The part of the step with the first change, g being known at the probes as well."""
        scales = np.insert(self.scales, self.low + 1, self.probes)
        values = np.insert(self.values, self.low + 1, between)
        # The old neighbours, with the two probes between them.
        inner = values[self.low : self.low + 4]
        changes = inner[:-1] * inner[1:] <= 0
        return _Crossing(scales, values, self.low + int(changes.argmax()))


def _values_at(
    g: Function, chosen: Int[Tensor, " chosen"], scales: Float[Tensor, "chosen point"]
) -> Float[Tensor, "chosen point"]:
    """Run some prompts, each at its own ε: g(ε·1).

    Args:
        g: the function.
        chosen: indices of prompts.
        scales: the ε of each of them.
    """
    lens = g.lens
    some = g.reading.only(chosen)
    takes_all = some is g.reading  # a user's function reads all prompts together
    if takes_all:
        of_all = scales.new_zeros(some.batch, scales.shape[1])
        scales = of_all.index_copy(0, chosen, scales)
    gates = scales[..., None].expand(-1, -1, len(lens.sites))
    values = gated_readout(lens, some, lens.gates(gates), progress=False).cpu().double()
    return values[chosen] if takes_all else values
