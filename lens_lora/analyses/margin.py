"""The fact margin (note, §5): m = m₀ + Σ_l (u_doc − u_pre)ᵀ J δz_l + R_m.

The document's fact overtakes the pretrained one iff the first-order sum exceeds −m₀ − R_m.

1. First order of the margin, and the margin itself along ε·Δ (`analyses/remainder.py`).
2. Where the curve changes sign, a root finder on exact forward passes finds the scale, for all
   prompts together.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.optimize import elementwise
from torch import Tensor

from lens_lora.analyses.first_order import first_order_of
from lens_lora.analyses.remainder import RemainderCurve, remainder_curve_of
from lens_lora.analyses.verdict import FlipVerdict, Verdict, flip_verdict, points_at_end, verdict_of
from lens_lora.engine.asked import Asked, ask_prompts
from lens_lora.engine.read import read_value
from lens_lora.model.gates import ScaleInject
from lens_lora.model.hooks import alone
from lens_lora.model.lens import LoraLens
from lens_lora.readouts.answers import AnswerLike, answer_ids, margin_between
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.results import drawing
from lens_lora.results.attribution import Attribution
from lens_lora.results.base import Result, changes_sign, per_prompt

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FactMargin(Result):
    """Does the document's fact overtake the pretrained one, where on the way, because of what?

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
    doc: tuple[str, ...]
    pre: tuple[str, ...]

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
        """σ of a difference of two margins from rounding alone."""
        return self.curve.noise_floor

    @property
    def remainder_floor(self) -> Float[Tensor, " batch"]:
        """σ of R_m from rounding alone: of the margins' and of first order's."""
        return self.curve.noise.of_remainder(1.0)

    @property
    def flips(self) -> tuple[bool, ...]:
        """Whether the preferred fact changes between base and adapted model.

        False where rounding hides the sign of a margin; `flip_verdict` tells that from no flip.
        """
        return tuple(changes_sign(self.m0, self.m, self.noise_floor).tolist())

    @property
    def flip_predicted(self) -> tuple[bool, ...]:
        """Whether first order alone, m₀ + Σ a_l, says so; False where rounding hides a sign."""
        floors = self.noise_floor, self.remainder_floor
        return tuple(changes_sign(self.m0, self.m0 + self.first_order, *floors).tolist())

    @property
    def flip_verdict(self) -> tuple[FlipVerdict, ...]:
        """For each prompt, whether the margin flips, or rounding hides it."""
        rows = torch.stack([self.m0, self.m, self.noise_floor.to(self.m)], 1).cpu().double()
        return tuple(flip_verdict(*row) for row in rows.tolist())

    @property
    def verdict(self) -> tuple[Verdict, ...]:
        """For each prompt, how good first order is at ε = 1 and on the way."""
        ends = points_at_end(self.remainder, self.attribution.shift, self.curve.noise)
        return tuple(verdict_of(end, self.curve.way_of(i)) for i, end in enumerate(ends))

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt: the margin's whole account; `hidden` where rounding hides a sign."""
        floors = ("noise_floor", "remainder_floor")
        names = ("m0", "first_order", "remainder", "m", *floors, "flip_scale")
        columns = per_prompt({name: getattr(self, name) for name in names})
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

    def plot(self, prompt: int | None = None) -> Figure:
        """The margin along ε, its first-order line, and the flip.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such prompt, or several and none named.
        """
        return drawing.figure(self, prompt)


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
    """m = m₀ + first order + R_m between the document's fact and the pretrained one.

    Cost: five forward and backward passes and 31 forward passes, along the path and for the noise
    floors, batched, and about ten forward more if any prompt flips.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        doc, pre: a string each (with its leading space), token id or ids, or one of each per
            prompt. Answers of several tokens are teacher-forced and their margin is in nats.
        by: also split the attribution by 'position', 'head', 'rank'.
        progress: show a bar.

    Raises:
        TokenError: an answer that is no token of the model, a word that lost its leading space,
            or doc equal to pre.
    """
    asked = ask_prompts(lens, prompts)
    margin = margin_between(lens.model, doc, pre, asked.prompts)
    return fact_margin_of(asked.about(margin), doc, pre, by, progress)


def fact_margin_of(
    asked: Asked, doc: AnswerLike, pre: AnswerLike, by: tuple[str, ...] | str, progress: bool
) -> FactMargin:
    """The margin that `asked` reads, between these answers."""
    lens = asked.lens
    attribution = first_order_of(asked, by=by, floors=True)
    curve = remainder_curve_of(asked, attribution, progress=progress)
    batch, texts = asked.prompts.batch, asked.prompts.texts
    docs, pres = (answer_ids(lens.model, answer, batch, texts) for answer in (doc, pre))
    return FactMargin(
        attribution=attribution,
        curve=curve,
        flip_scale=flip_scales(asked, curve.base, curve.scales, curve.values),
        doc=tuple("".join(lens.decode(ids)) for ids in docs),
        pre=tuple("".join(lens.decode(ids)) for ids in pres),
    )


def flip_scales(
    asked: Asked,
    base: Float[Tensor, " batch"],
    scales: Float[Tensor, " scale"],
    values: Float[Tensor, "batch scale"],
) -> Float[Tensor, " batch"]:
    """Each prompt's first sign change along ε, refined; NaN without one.

    All prompts are refined together: about ten forward passes of the batch.
    """
    steps = torch.cat([scales.new_zeros(1), scales]).cpu().double()
    values = torch.cat([base[:, None], values], 1).cpu()
    crosses = (values[:, :-1] != 0) & (values[:, :-1] * values[:, 1:] <= 0)
    flips = torch.full((len(values),), float("nan"), dtype=torch.float64)
    flipping = crosses.any(1).nonzero()[:, 0]
    if len(flipping):
        first = crosses[flipping].int().argmax(1)
        flips[flipping] = _roots(asked, flipping, steps[first], steps[first + 1])
    return flips


def _roots(
    asked: Asked,
    flipping: Int[Tensor, " flipping"],
    low: Float[Tensor, " flipping"],
    high: Float[Tensor, " flipping"],
) -> Float[Tensor, " flipping"]:
    """Where g(ε·1) is zero between the two scales, which it is not if rounding hid its sign."""
    lens, reading = asked.lens, asked.reading
    latest = torch.zeros(reading.batch, dtype=lens.gate_dtype)

    def value(scale: NDArray[Any], prompt: NDArray[Any]) -> NDArray[Any]:
        index = torch.from_numpy(prompt)
        latest[index] = torch.from_numpy(scale).to(latest)
        asked_for, place = index.unique(return_inverse=True)
        rows = reading.only(asked_for)
        # A user's function reads all prompts; those not asked for stay at their latest scale.
        scales, place = (latest, index) if rows is reading else (latest[asked_for], place)
        gates = scales[rows.owner.cpu(), None].expand(-1, len(lens.sites))
        with torch.no_grad(), lens.injected(ScaleInject(lens.plan, lens.gates(gates))):
            return read_value(lens, rows).cpu().double()[place].numpy()

    bracket = low.numpy(), high.numpy()
    root = elementwise.find_root(
        value, bracket, args=(flipping.numpy(),), tolerances={"xatol": 1e-6}
    )
    nearer = np.abs(root.f_bracket).argmin(0)
    hidden = np.stack(bracket)[nearer, np.arange(len(nearer))]
    return torch.from_numpy(np.where(root.success, root.x, hidden))
