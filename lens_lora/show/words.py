"""A margin and the verdicts in plain words: each fact is said by one function.

`margin_story` and the story of an explanation are made of the same sentences. Every sentence is a
number of the result. A difference of at most three noise floors is called noise, and nothing is
compared with it. How good first order is was decided with the result, in
`core/analyses/verdict.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from lens_lora.core import SIGMAS, Attribution, FactMargin, drawing, only_prompt
from lens_lora.core.analyses import verdict as verdicts
from lens_lora.errors import many
from lens_lora.show import text
from lens_lora.show.text import caution_text, magnitude, percent, share_text, signed

# --- One prompt of a fact margin as plain numbers


@dataclasses.dataclass(frozen=True)
class Account:
    """The numbers of one prompt's margin, in the units of the readout.

    Attributes:
        prompt: one line.
        doc, pre: the two facts by name.
        units: those of all numbers.
        m0, first_order, remainder, m: base margin, Σ a_l, R_m, adapted margin.
        flip_scale: the first ε of a sign change, or None.
        flips, flip_predicted: whether the preferred fact changes, and whether first order says so.
        verdict: how good first order is, decided with the result.
        crossings: sign changes seen at the scales that were run, leaving out margins in the noise.
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
    flip_scale: float | None
    flips: bool
    flip_predicted: bool
    verdict: verdicts.Verdict
    crossings: int
    steps: Sequence[verdicts.Point]

    @property
    def floor(self) -> float:
        """Three noise floors; a difference of at most that cannot be told from rounding."""
        return self.verdict.floor

    @property
    def remainder_floor(self) -> float:
        """Three of the remainder's, in which first order's own rounding is."""
        return self.verdict.remainder_floor

    @property
    def shift(self) -> float:
        """m − m₀."""
        return self.m - self.m0

    @property
    def has_shift(self) -> bool:
        """Whether the shift stands out of rounding, so that anything can be a share of it."""
        return not self.is_noise(self.shift)

    def is_noise(self, value: float) -> bool:
        """Whether a difference of two margins could be rounding alone."""
        return abs(value) <= self.floor

    def share(self, value: float, floor: float | None = None) -> str:
        """A share of the shift; 'noise' where the shift, or the value, is within rounding."""
        is_clear = self.has_shift and (floor is None or abs(value) > floor)
        return percent(value / self.shift) if is_clear else "noise"


_FROM_THE_TABLE = ("m0", "first_order", "remainder", "m", "flips", "flip_predicted")


def account_of(fact_margin: FactMargin, prompt: int | None = None) -> Account:
    """One prompt's account."""
    attribution = fact_margin.attribution
    curve = fact_margin.curve
    i = only_prompt(prompt, len(attribution.base), "accounts")
    verdict = fact_margin.verdict[i]
    row = fact_margin.to_frame().to_dict("records")[i]
    margins = [float(curve.base[i]), *curve.values[i].tolist()]
    signs = [m > 0 for m in margins if abs(m) > verdict.floor]
    return Account(
        text.prompt_text(attribution.str_tokens[i]),
        *_fact_names(fact_margin.doc[i], fact_margin.pre[i]),
        units=attribution.units,
        **{name: row[name] for name in _FROM_THE_TABLE},
        flip_scale=row["flip_scale"] if math.isfinite(row["flip_scale"]) else None,
        verdict=verdict,
        crossings=sum(a != b for a, b in itertools.pairwise(signs)),
        steps=curve.points[i],
    )


def _fact_names(doc: str, pre: str) -> tuple[str, str]:
    """The two tokens in quotes; spelt out where they differ in white space alone."""
    if doc.strip() == pre.strip() or not (doc.strip() and pre.strip()):
        return repr(doc), repr(pre)
    return f"“{doc.strip()}”", f"“{pre.strip()}”"


# --- A fact margin: what happened, what first order says of it, where

MODULES_NAMED = 5


@drawing.story.register(FactMargin)
def margin_story(fact_margin: FactMargin, prompt: int | None = None) -> str:
    """One prompt's story: what happened, what first order says, where, how it was read."""
    attribution, account = fact_margin.attribution, account_of(fact_margin, prompt)
    index = only_prompt(prompt, len(attribution.base), "accounts")
    where = largest_text(attribution, account, MODULES_NAMED, index)
    first = joined(first_order_text(account), caution_text(attribution))
    paragraphs = [happened_text(account), first, where, text.reading_text(attribution.meta)]
    return "\n".join(filter(None, paragraphs))


def happened_text(a: Account) -> str:
    """What the base model prefers, what the adapter does to that, and where it flips."""
    nats = "(A margin in nats is a difference of the whole answers' log-probabilities.)"
    base = base_text(a, f"On the prompt “{a.prompt}” the")
    return joined(base, nats if a.units == "nats" else "", adapted_text(a), _flip(a))


def joined(*sentences: str) -> str:
    """A paragraph of the sentences that are not empty."""
    return " ".join(filter(None, sentences))


def _below_noise(floor: float) -> str:
    return f"below {SIGMAS:g} noise floors ({magnitude(floor)})"


def base_text(a: Account, begin: str = "The") -> str:
    """Which of the two facts the base model prefers."""
    if a.is_noise(a.m0):
        margin = f"its margin of {signed(a.m0)} {a.units} is {_below_noise(a.floor)}"
        return f"{begin} base model prefers neither {a.doc} nor {a.pre}: {margin}."
    answers = f"{a.doc} to {a.pre}" if a.m0 > 0 else f"{a.pre} to {a.doc}"
    return f"{begin} base model prefers {answers} by {magnitude(a.m0)} {a.units}."


def adapted_text(a: Account) -> str:
    """Which of the two facts the adapted model prefers, and how far that is from the base."""
    if not a.has_shift:
        return (
            f"The adapter moves this margin by {signed(a.shift)} {a.units}, "
            f"{_below_noise(a.floor)}: that cannot be told from rounding, so this run shows no "
            "effect of the adapter."
        )
    moved = f"a shift of {magnitude(a.shift)} towards {a.doc if a.shift > 0 else a.pre}"
    if a.is_noise(a.m):
        margin = f"its margin of {signed(a.m)} is {_below_noise(a.floor)}"
        return f"With the adapter it prefers neither: {margin}, {moved}."
    still = "still " if a.m * a.m0 > 0 and not a.is_noise(a.m0) else ""
    winner = a.doc if a.m > 0 else a.pre
    return f"With the adapter it {still}prefers {winner}, by {magnitude(a.m)}: {moved}."


def _flip(a: Account) -> str:
    if a.is_noise(a.m0) or a.is_noise(a.m):
        return "Rounding hides whether the preference flips: rerun at a higher precision."
    if not a.has_shift:
        return ""
    scale = None if a.flip_scale is None else f"ε = {a.flip_scale:.3g}"
    if a.flips and a.flip_scale is None:
        return "The preference flips, at a strength that was not located."
    if a.flips:
        more = f", the first of {a.crossings} changes on the way" if a.crossings > 1 else ""
        strength = f"with the adapter at {percent(a.flip_scale or 0.0)} of its strength"
        return f"The preference flips at {scale}, {strength}{more}."
    if a.crossings:
        where = "" if scale is None else f" at {scale}"
        return f"On the way the preference flips{where} and has flipped back at ε = 1."
    if scale is not None:
        return f"On the way, near {scale}, the margin comes within rounding of zero."
    return f"The preference flips at none of the {len(a.steps)} strengths that were run."


def first_order_text(a: Account) -> str:
    """What first order predicts, what it leaves at ε = 1 and on the way, and what that means."""
    v = a.verdict
    below = _below_noise(a.remainder_floor)
    is_noise = abs(a.remainder) <= a.remainder_floor
    if not a.has_shift:
        size = f"{below} as well" if is_noise else "more than rounding"
        return f"{conclusion_text(a)} What it leaves, {signed(a.remainder)}, is {size}."
    margin = f"a margin of {signed(a.m0 + a.first_order)}{_flip_predicted(a)}"
    shift = f"a shift of {signed(a.first_order)} {a.units}"
    predicted = f"First order at ε = 0 predicts {shift}, to {margin}."
    left = f"It leaves {signed(a.remainder)} at ε = 1, {below if is_noise else share_text(v.share)}"
    steps = "at a quarter, half and three quarters of the strength"
    if v.worst is None:
        left += f"; {steps} no share of it stands out of the noise"
    elif v.kind == "coincidence":
        left += f", but at ε = {v.worst_scale:.3g} it leaves {share_text(v.worst)} so far"
    else:
        worst = f"{share_text(v.worst)} so far (at ε = {v.worst_scale:.3g})"
        left += f", and {steps} at most {worst}"
    return f"{predicted} {left}. {conclusion_text(a)}"


def _flip_predicted(a: Account) -> str:
    predicted = a.m0 + a.first_order
    if a.is_noise(a.m0) or a.is_noise(a.m) or abs(predicted) <= a.remainder_floor:
        return ""
    none = "and at ε = 1 there is none"
    if a.flip_predicted:
        return ": it predicts the flip" if a.flips else f": it predicts a flip, {none}"
    return ": it misses the flip" if a.flips else f": it predicts no flip, {none}"


_CONCLUSIONS = {
    "noise": "; what they leave is within rounding",
    "uneven": ", more or less along the way",
    "small": ": as far as these strengths show, first order describes the whole path",
    "large": ": they do not add up to it",
    "coincidence": ", but that agreement is a coincidence, and no sign that first order holds",
}


def conclusion_text(a: Account) -> str:
    """How much of the shift first order gives, and how far that can be trusted."""
    if not a.has_shift:
        gives = f"{signed(a.first_order)} {a.units}{_unconfirmed(a, a.first_order)}"
        return f"First order at ε = 0, a derivative and not a difference, gives {gives}."
    share = percent(a.first_order / a.shift)
    means = _CONCLUSIONS.get(a.verdict.kind, "")
    return f"The modules' first-order parts sum to {share} of the shift{means}."


def _unconfirmed(a: Account, value: float) -> str:
    return ", too small for a run at this precision to confirm" if a.is_noise(value) else ""


def largest_text(attribution: Attribution, a: Account, k: int, prompt: int = 0) -> str:
    """The k modules whose first-order parts are largest."""
    modules = many(len(attribution.sites), "module")
    rows = text.top_rows(attribution, k, prompt)
    if not a.has_shift:
        parts = ", ".join(f"{site} {value}" for site, _, value, _ in rows)
        return f"Largest first-order parts of {modules}: {parts}."
    parts = ", ".join(f"{site} {value} ({share})" for site, _, value, share in rows)
    unsure = _unconfirmed(a, float(attribution.per_site[prompt].abs().max()))
    return (
        f"Largest first-order parts of {modules}, with their share of the shift: {parts}{unsure}."
    )


# --- Verdicts as phrases, each with its numbers


@drawing.text.register(verdicts.Verdict)
def verdict_text(v: verdicts.Verdict) -> str:
    """How good first order is."""
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


@drawing.text.register(verdicts.FlipVerdict)
def flip_text(v: verdicts.FlipVerdict) -> str:
    """Whether a margin flips, or rounding hides it."""
    if v.kind != "hidden":
        return f"{v.kind}: from {v.m0:+.3g} to {v.m:+.3g}"
    margins = {"m0": v.m0, "m": v.m}.items()
    near = [f"{name} = {value:+.2g}" for name, value in margins if abs(value) <= v.floor]
    verb = "is" if len(near) == 1 else "are"
    hidden = f"hidden: {' and '.join(near)} {verb} within rounding ({v.floor:.2g})"
    return f"{hidden}, so the sign is not known; rerun in float32 or float64"


def below_text(what: str, value: float, floor: float) -> str:
    """'below the noise: the shift 0.01 is within rounding (0.02)'."""
    return f"below the noise: the {what} {value:.2g} is within rounding ({floor:.2g})"
