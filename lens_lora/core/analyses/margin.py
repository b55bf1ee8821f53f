"""The fact margin (note, §5): m = m₀ + Σ_l (u_doc − u_pre)ᵀ J δz_l + R_m.

The document's fact overtakes the pretrained one if and only if Σ_l a_l exceeds −m₀ − R_m.

1. g is the margin of the two answers. Its slopes at the base give first order (Prop. 1).
2. The exact margin along ε·Δ, beside its first-order line, is a `RemainderCurve` (`remainder.py`).
3. The strength at which the margin changes its sign is found from that curve (`flips.py`).
"""

from __future__ import annotations

from typing import Annotated, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.analyses.flips import flip_scales
from lens_lora.core.analyses.remainder import USUAL_SCALES, RemainderCurve, curve_beside
from lens_lora.core.analyses.verdict import FlipVerdict, Verdict
from lens_lora.core.function.cache import Evaluations
from lens_lora.core.function.function import Function
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
    """The margin of two answers: whether it changes sign, at which strength, and because of what.

    `plot` shows the margin along ε, its first-order line, and the flip (`views/curves.py`). Its
    words are in `views/words.py`, its page in `views/reports.py`.

    Attributes:
        attribution: the first-order shift of the margin, by site (at ε = 0).
        curve: the exact margin along ε from 0 to 1, beside its first-order line.
        flip_scale: [batch], the first ε in (0, 1] at which the margin changes sign; NaN if it does
            not. If rounding hides a sign, this ε may be rounding as well.
        doc, pre: the two answers for each prompt.
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
        """Explain the margin of two answers, given as a function of the gates.

        Args:
            g: the margin of the two answers.
            doc, pre: the answers.
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
            gauge="trained",
        )
        # With the slopes, g was evaluated at the scales of the curve, and it remembers both. So the
        # curve runs nothing, and the flip is looked for between two points of the curve.
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
        """The base model's margin, in logits: negative if the base prefers the pretrained fact."""
        return self.attribution.base

    @property
    def m(self) -> Float[Tensor, " batch"]:
        """The exact margin of the adapted model."""
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
        """Whether the preferred fact changes between the base and the adapted model.

        False if rounding hides the sign of a margin; `flip_verdict` tells that apart from no flip.
        """
        return tuple(changes_sign(self.m0, self.m, self.noise_floor).tolist())

    @property
    def flip_predicted(self) -> tuple[bool, ...]:
        """Whether the preferred fact would change by first order alone, from m₀ to m₀ + Σ a_l.

        False if rounding hides the sign of either.
        """
        predicted = self.m0 + self.first_order
        does_flip = changes_sign(self.m0, predicted, self.noise_floor, self.remainder_floor)
        return tuple(does_flip.tolist())

    @property
    def flip_verdict(self) -> tuple[FlipVerdict, ...]:
        """For each prompt, whether the margin flips, or whether rounding hides that."""
        columns = torch.stack([self.m0, self.m, self.noise_floor.to(self.m)], 1)
        by_prompt = columns.cpu().double().tolist()
        return tuple(FlipVerdict(m0, m, SIGMAS * floor) for m0, m, floor in by_prompt)

    @property
    def verdict(self) -> tuple[Verdict, ...]:
        """For each prompt, how good first order is at ε = 1 and on the way."""
        return self.curve.verdicts_on(self.attribution)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt with all terms of m = m₀ + first order + R_m, and the flip.

        `base` is m₀, `adapted` is m, and `hidden` says that rounding hides a sign.
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
        """The result in plain words, which claim no more than the numbers do.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such prompt; or there are several, and none is named.
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
    floors, in two batches for up to 17 tokens; mostly one or two more, of two points each, if
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
    g = Evaluations(f.about(margin))
    return FactMargin.of(g, doc, pre, by)


def _texts(g: Function, answer: AnswerLike) -> tuple[str, ...]:
    """The answer to each prompt, as the model's tokens spell it."""
    ids_of_each = extensions.answer_ids(g.lens.model, answer, g.prompts.batch, g.prompts.texts)
    return tuple("".join(g.lens.decode(ids)) for ids in ids_of_each)
