"""One prompt of a fact margin as plain numbers, with what is noise told apart from what is not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lens_lora.analyses.margin import FactMargin
from lens_lora.analyses.verdict import Verdict
from lens_lora.results.choosing import only_prompt
from lens_lora.show.text import prompt_text

__all__ = ["Account", "Step", "account_of", "fact_names"]

QUARTERS = (0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Step:
    """One ε on the way.

    Attributes:
        scale: ε.
        remainder: R(ε).
        share: |R(ε)| / |g(ε) − g(0)|; None where it is noise.
    """

    scale: float
    remainder: float
    share: float | None


@dataclasses.dataclass(frozen=True)
class Account:
    """The numbers of one prompt's margin, in the units of the readout.

    Attributes:
        prompt: as one line.
        doc, pre: the two facts by name.
        units: of all numbers.
        m0, first_order, remainder, m: base margin, Σ a_l, R_m, adapted margin.
        verdict: how good first order is, decided with the result; `floor` is its floor.
        flip_scale: the first ε of a sign change, or None.
        crossings: sign changes seen at the scales that were run, leaving out margins in the noise.
        flips, flip_predicted: whether the preferred fact changes, and whether first order says so.
        steps: the curve, by rising ε.
    """

    prompt: str
    doc: str
    pre: str
    units: str
    m0: float
    first_order: float
    remainder: float
    m: float
    verdict: Verdict
    flip_scale: float | None
    crossings: int
    flips: bool
    flip_predicted: bool
    steps: tuple[Step, ...]

    @property
    def floor(self) -> float:
        """Three noise floors; a difference of at most that cannot be told from rounding."""
        return self.verdict.floor

    @property
    def remainder_floor(self) -> float:
        """Three of the remainder's, in which first order's own rounding is."""
        return self.verdict.remainder_floor

    @property
    def remainder_is_noise(self) -> bool:
        """Whether the remainder at ε = 1 could be rounding alone."""
        return abs(self.remainder) <= self.remainder_floor

    @property
    def shift(self) -> float:
        """m − m₀."""
        return self.m - self.m0

    @property
    def predicted(self) -> float:
        """m₀ + Σ a_l."""
        return self.m0 + self.first_order

    def is_noise(self, value: float) -> bool:
        """Whether a difference of two margins could be rounding alone.

        Args:
            value: the difference.
        """
        return abs(value) <= self.floor

    @property
    def quarters(self) -> list[Step]:
        """The steps that were run nearest to ε = 0.25, 0.5, 0.75 and 1."""
        nearest = [min(self.steps, key=lambda s: abs(s.scale - q)) for q in QUARTERS]
        return list(dict.fromkeys(nearest))


def account_of(fact_margin: FactMargin, prompt: int | None = None) -> Account:
    """One prompt's account.

    Args:
        fact_margin: of one prompt or several.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: no such prompt, or several and none named.
    """
    attribution, curve = fact_margin.attribution, fact_margin.curve
    i = only_prompt(prompt, len(attribution.base), "accounts")
    verdict = fact_margin.verdict[i]
    floor = verdict.floor
    flip_scale = float(fact_margin.flip_scale[i])
    doc, pre = fact_names(fact_margin.doc[i], fact_margin.pre[i])
    return Account(
        prompt=prompt_text(attribution.str_tokens[i]),
        doc=doc,
        pre=pre,
        units=attribution.units,
        m0=float(fact_margin.m0[i]),
        first_order=float(fact_margin.first_order[i]),
        remainder=float(fact_margin.remainder[i]),
        m=float(fact_margin.m[i]),
        verdict=verdict,
        flip_scale=flip_scale if math.isfinite(flip_scale) else None,
        crossings=_crossings([float(curve.base[i]), *curve.values[i].tolist()], floor),
        flips=fact_margin.flips[i],
        flip_predicted=fact_margin.flip_predicted[i],
        steps=tuple(Step(p.scale, p.remainder, p.share) for p in curve.points[i]),
    )


def _crossings(margins: Sequence[float], floor: float) -> int:
    signs = [m > 0 for m in margins if abs(m) > floor]
    return sum(a != b for a, b in zip(signs, signs[1:], strict=False))


def fact_names(doc: str, pre: str) -> tuple[str, str]:
    """The two tokens in quotes; spelt out where they differ in white space alone.

    Args:
        doc, pre: as decoded.
    """
    if doc.strip() == pre.strip() or not (doc.strip() and pre.strip()):
        return repr(doc), repr(pre)
    return f"“{doc.strip()}”", f"“{pre.strip()}”"
