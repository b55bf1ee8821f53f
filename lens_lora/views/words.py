"""A fact margin and the verdicts in plain words: each fact has one function that writes it.

1. `margin_numbers` takes one prompt's numbers out of a fact margin.
2. Each sentence is a function of that numbers. `margin_story` and the story of an explanation are
   made of the same sentences, and each sentence states a number of the result.
3. A difference of at most three noise floors is called noise, and nothing is compared with it.
4. How good first order is has been decided with the result, in `core/analyses/verdict.py`; here the
   verdict is only written.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from lens_lora.core import Attribution, FactMargin, FlipVerdict, Point, Verdict, drawing
from lens_lora.errors import many
from lens_lora.show import text
from lens_lora.show.text import below_noise, below_text, magnitude, percent, share_text, signed
from lens_lora.views.attribution_words import caution_text, top_sites

# --- One prompt of a fact margin as plain numbers


@dataclasses.dataclass(frozen=True)
class ReadoutNumbers:
    """The numbers of one prompt's readout, in its units.

    Attributes:
        prompt: the prompt as one line.
        units: the unit of all numbers.
        m0, first_order, remainder, m: base value, Σ a_l, R, adapted value.
        verdict: how good first order is.
        steps: the curve, by rising ε.
    """

    prompt: str
    units: str
    m0: float
    first_order: float
    remainder: float
    m: float
    verdict: Verdict
    steps: Sequence[Point]

    @property
    def floor(self) -> float:
        """Three noise floors; a difference of at most that cannot be told from rounding."""
        return self.verdict.floor

    @property
    def remainder_floor(self) -> float:
        """Three noise floors of the remainder, which include first order's own rounding."""
        return self.verdict.remainder_floor

    @property
    def shift(self) -> float:
        """The shift of the margin, m − m₀."""
        return self.m - self.m0

    @property
    def has_shift(self) -> bool:
        """Whether the shift stands out of rounding, so that anything can be a share of it."""
        return not self.is_noise(self.shift)

    def is_noise(self, value: float) -> bool:
        """Whether a difference of two readouts could be rounding alone."""
        return abs(value) <= self.floor

    def share(self, value: float, floor: float | None = None) -> str:
        """A value as a share of the shift; 'noise' if the shift or the value is within rounding."""
        is_clear = self.has_shift and (floor is None or abs(value) > floor)
        return percent(value / self.shift) if is_clear else "noise"


@dataclasses.dataclass(frozen=True)
class MarginNumbers(ReadoutNumbers):
    """The numbers of one prompt's margin: the readout is the first fact less the second.

    Attributes:
        doc, pre: the two facts by name.
        flip_scale: the first ε of a sign change, or None.
        flips, flip_predicted: whether the preferred fact changes, and whether first order says so.
        crossings: sign changes at the scales that were run, leaving out margins in the noise.
        prompt, units, m0, first_order, remainder, m, verdict, steps: see `ReadoutNumbers`.
    """

    doc: str
    pre: str
    flip_scale: float | None
    flips: bool
    flip_predicted: bool
    crossings: int


def margin_numbers(fact_margin: FactMargin, prompt: int | None = None) -> MarginNumbers:
    """The numbers of one prompt of a fact margin."""
    attribution = fact_margin.attribution
    curve = fact_margin.curve
    index = attribution.only_prompt(prompt, "stories")
    doc, pre = _fact_names(fact_margin.doc[index], fact_margin.pre[index])
    verdict = fact_margin.verdict[index]
    row = fact_margin.to_frame().to_dict("records")[index]
    flip_scale: float | None = None
    if math.isfinite(row["flip_scale"]):
        flip_scale = row["flip_scale"]
    margins = [float(curve.base[index]), *curve.values[index].tolist()]
    return MarginNumbers(
        prompt=text.prompt_text(attribution.str_tokens[index]),
        doc=doc,
        pre=pre,
        units=attribution.units,
        m0=row["base"],
        first_order=row["first_order"],
        remainder=row["remainder"],
        m=row["adapted"],
        flip_scale=flip_scale,
        flips=row["flips"],
        flip_predicted=row["flip_predicted"],
        verdict=verdict,
        crossings=_sign_changes(margins, verdict.floor),
        steps=curve.points[index],
    )


def _sign_changes(margins: Sequence[float], floor: float) -> int:
    """How often the sign changes from one margin to the next, leaving out those in the noise."""
    signs = [margin > 0 for margin in margins if abs(margin) > floor]
    return sum(before != after for before, after in itertools.pairwise(signs))


def _fact_names(doc: str, pre: str) -> tuple[str, str]:
    """The two tokens in quotes, with escapes if they differ in white space alone."""
    if doc.strip() == pre.strip() or not (doc.strip() and pre.strip()):
        return repr(doc), repr(pre)
    return f"“{doc.strip()}”", f"“{pre.strip()}”"


# --- A fact margin: what happened, what first order says of it, where

MODULES_NAMED = 5


@drawing.story.register(FactMargin)
def margin_story(fact_margin: FactMargin, prompt: int | None = None) -> str:
    """Write one prompt's story: what happened, what first order says of it, and which modules."""
    attribution = fact_margin.attribution
    numbers = margin_numbers(fact_margin, prompt)
    index = attribution.only_prompt(prompt, "stories")
    paragraphs = [
        happened_text(numbers),
        joined(first_order_text(numbers), caution_text(attribution)),
        largest_text(attribution, numbers, MODULES_NAMED, index),
        text.reading_text(attribution.meta),
    ]
    return "\n".join(filter(None, paragraphs))


def happened_text(numbers: MarginNumbers) -> str:
    """State both models' preferences and the strength at which the preference flips."""
    base = base_text(numbers, f"On the prompt “{numbers.prompt}” the")
    unit = ""
    if numbers.units == "nats":
        unit = "(A margin in nats is a difference of the whole answers' log-probabilities.)"
    return joined(base, unit, adapted_text(numbers), flip_sentence(numbers))


def joined(*sentences: str) -> str:
    """A paragraph of the sentences that are not empty."""
    return " ".join(filter(None, sentences))


def base_text(numbers: MarginNumbers, begin: str = "The") -> str:
    """State which of the two facts the base model prefers."""
    if numbers.is_noise(numbers.m0):
        margin = (
            f"its margin of {signed(numbers.m0)} {numbers.units} is {below_noise(numbers.floor)}"
        )
        return f"{begin} base model prefers neither {numbers.doc} nor {numbers.pre}: {margin}."
    answers = (
        f"{numbers.doc} to {numbers.pre}" if numbers.m0 > 0 else f"{numbers.pre} to {numbers.doc}"
    )
    return f"{begin} base model prefers {answers} by {magnitude(numbers.m0)} {numbers.units}."


def adapted_text(numbers: MarginNumbers) -> str:
    """State which of the two facts the adapted model prefers, and how far the margin moved."""
    if not numbers.has_shift:
        return (
            f"The adapter moves this margin by {signed(numbers.shift)} {numbers.units}, "
            f"{below_noise(numbers.floor)}: that cannot be told from rounding, so this run shows "
            "no effect of the adapter."
        )
    towards = numbers.doc if numbers.shift > 0 else numbers.pre
    shift_text = f"a shift of {magnitude(numbers.shift)} towards {towards}"
    if numbers.is_noise(numbers.m):
        margin = f"its margin of {signed(numbers.m)} is {below_noise(numbers.floor)}"
        return f"With the adapter it prefers neither: {margin}, {shift_text}."
    prefers = "prefers"
    if numbers.m * numbers.m0 > 0 and not numbers.is_noise(numbers.m0):
        prefers = "still prefers"
    winner = numbers.doc if numbers.m > 0 else numbers.pre
    return f"With the adapter it {prefers} {winner}, by {magnitude(numbers.m)}: {shift_text}."


def flip_sentence(numbers: MarginNumbers) -> str:
    """State whether and where the preference flips; '' where the shift is within rounding."""
    if numbers.is_noise(numbers.m0) or numbers.is_noise(numbers.m):
        return "Rounding hides whether the preference flips: rerun at a higher precision."
    if not numbers.has_shift:
        return ""
    if numbers.flips:
        return _located_flip(numbers)
    if numbers.flip_scale is None:
        if numbers.crossings:
            return "On the way the preference flips and has flipped back at ε = 1."
        return f"The preference flips at none of the {len(numbers.steps)} strengths that were run."
    if numbers.crossings:
        where = f"at ε = {numbers.flip_scale:.3g}"
        return f"On the way the preference flips {where} and has flipped back at ε = 1."
    return (
        f"On the way, near ε = {numbers.flip_scale:.3g}, the margin comes within rounding of zero."
    )


def _located_flip(numbers: MarginNumbers) -> str:
    """State where the preference flips, given that it differs between the two ends."""
    if numbers.flip_scale is None:
        return "The preference flips, at a strength that was not located."
    strength = f"with the adapter at {percent(numbers.flip_scale)} of its strength"
    sentence = f"The preference flips at ε = {numbers.flip_scale:.3g}, {strength}"
    if numbers.crossings > 1:
        sentence += f", the first of {numbers.crossings} changes on the way"
    return f"{sentence}."


def first_order_text(numbers: MarginNumbers) -> str:
    """State what first order predicts, what it leaves at ε = 1 and on the way, and conclude."""
    margin = f"a margin of {signed(numbers.m0 + numbers.first_order)}{_flip_predicted(numbers)}"
    return predicted_text(numbers, margin)


def predicted_text(numbers: ReadoutNumbers, value: str) -> str:
    """State, for any readout, what first order predicts and what it leaves, and conclude.

    Args:
        numbers: those of one prompt.
        value: the value that first order predicts at ε = 1, in words.
    """
    is_noise = abs(numbers.remainder) <= numbers.remainder_floor
    below = below_noise(numbers.remainder_floor)
    if not numbers.has_shift:
        size = f"{below} as well" if is_noise else "more than rounding"
        return f"{conclusion_text(numbers)} What it leaves, {signed(numbers.remainder)}, is {size}."
    shift = f"a shift of {signed(numbers.first_order)} {numbers.units}"
    predicted = f"First order at ε = 0 predicts {shift}, to {value}."
    remainder = signed(numbers.remainder)
    missed = f"It misses {share_text(numbers.verdict.share)} at full strength ({remainder})"
    if is_noise:
        missed = f"At full strength it is off by {remainder}, {below}"
    on_the_way = _missed_on_the_way(numbers.verdict)
    return f"{predicted} {missed}{on_the_way}. {conclusion_text(numbers)}"


def _missed_on_the_way(v: Verdict) -> str:
    """The clause on what first order misses below ε = 1, to follow what it misses at ε = 1."""
    if v.worst is None:
        return ", and on the way nothing that stands out of the noise"
    where = f"on the way (at ε = {v.worst_scale:.3g})"
    if v.kind == "coincidence":
        return f", but {percent(v.worst)} {where}"
    return f", and at most {percent(v.worst)} {where}"


def _flip_predicted(numbers: MarginNumbers) -> str:
    """Whether first order predicts the flip, to follow its margin; '' where rounding hides it."""
    predicted = numbers.m0 + numbers.first_order
    if (
        numbers.is_noise(numbers.m0)
        or numbers.is_noise(numbers.m)
        or abs(predicted) <= numbers.remainder_floor
    ):
        return ""
    if numbers.flips:
        return ": it predicts the flip" if numbers.flip_predicted else ": it misses the flip"
    says = "predicts a flip" if numbers.flip_predicted else "predicts no flip"
    return f": it {says}, and at ε = 1 there is none"


_CONCLUSIONS = {
    "noise": "; what they leave is within rounding",
    "uneven": ", more or less along the way",
    "small": ": as far as these strengths show, first order describes the whole path",
    "large": ": they do not add up to it",
    "coincidence": ", but that agreement is a coincidence, and no sign that first order holds",
}


def conclusion_text(numbers: ReadoutNumbers) -> str:
    """State how much of the shift first order gives, and how far that can be trusted."""
    if not numbers.has_shift:
        unsure = _unconfirmed(numbers, numbers.first_order)
        gives = f"{signed(numbers.first_order)} {numbers.units}{unsure}"
        return f"First order at ε = 0, a derivative and not a difference, gives {gives}."
    share = percent(numbers.first_order / numbers.shift)
    means = _CONCLUSIONS.get(numbers.verdict.kind, "")
    return f"The modules' first-order parts sum to {share} of the shift{means}."


def _unconfirmed(numbers: ReadoutNumbers, value: float) -> str:
    """A remark on a number within rounding; '' on any other."""
    if not numbers.is_noise(value):
        return ""
    return ", too small for a run at this precision to confirm"


def largest_text(attribution: Attribution, numbers: ReadoutNumbers, k: int, prompt: int = 0) -> str:
    """Name the k modules whose first-order parts are largest."""
    modules = many(len(attribution.sites), "module")
    largest = top_sites(attribution, k, prompt)
    if not numbers.has_shift:
        parts = ", ".join(f"{top.site} {top.value}" for top in largest)
        return f"Largest first-order parts of {modules}: {parts}."
    parts = ", ".join(f"{top.site} {top.value} ({top.share})" for top in largest)
    unsure = _unconfirmed(numbers, float(attribution.per_site[prompt].abs().max()))
    return (
        f"Largest first-order parts of {modules}, with their share of the shift: {parts}{unsure}."
    )


# --- Verdicts as phrases, each with its numbers


@drawing.text.register(Verdict)
def verdict_text(v: Verdict) -> str:
    """Write how good first order is."""
    if v.kind == "no_shift":
        return below_text("shift", v.shift, v.floor)
    if v.kind == "noise":
        return below_text("remainder", v.remainder, v.remainder_floor)
    on_the_way = "on the way within rounding"
    if v.worst is not None:
        on_the_way = f"{percent(v.worst)} of the shift at ε = {v.worst_scale:g}"
    if v.kind == "coincidence":
        return f"a coincidence at ε = 1: {percent(v.share)} of the shift there, but {on_the_way}"
    if v.kind == "large":
        return f"large: {percent(v.share)} of the shift at ε = 1, {on_the_way}"
    most = "" if v.worst is None else "at most "
    return f"{v.kind}: {percent(v.share)} of the shift at ε = 1, {most}{on_the_way}"


@drawing.text.register(FlipVerdict)
def flip_text(v: FlipVerdict) -> str:
    """Write whether a margin flips, or whether rounding hides that."""
    if v.kind != "hidden":
        return f"{v.kind}: from {v.m0:+.3g} to {v.m:+.3g}"
    near_zero: list[str] = []
    for name, value in (("m0", v.m0), ("m", v.m)):
        if abs(value) <= v.floor:
            near_zero.append(f"{name} = {value:+.2g}")
    verb = "is" if len(near_zero) == 1 else "are"
    hidden = f"hidden: {' and '.join(near_zero)} {verb} within rounding ({v.floor:.2g})"
    return f"{hidden}, so the sign is not known; rerun in float32 or float64"
