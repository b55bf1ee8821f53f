"""A margin, an explanation and the verdicts in plain words: each fact is said by one function.

`margin_story`, `explanation_story` and the `headline` of a page are made of the same sentences.
Every sentence is a number of the result. A difference of at most three noise floors is called
noise, and nothing is compared with it. What was not measured is said not to be. How good first
order is was decided with the result (`analyses/verdict.py`); a guide is called good only by the
thresholds below, on this prompt.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from lens_lora import results
from lens_lora.core import SIGMAS, only_prompt
from lens_lora.core.analyses import verdict as verdicts
from lens_lora.core.results import drawing
from lens_lora.core.results.base import RANDOM
from lens_lora.errors import many, worded
from lens_lora.show import text
from lens_lora.show.text import caution_text, magnitude, percent, share_text, signed, visible

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


def account_of(fact_margin: results.FactMargin, prompt: int | None = None) -> Account:
    """One prompt's account."""
    attribution, curve = fact_margin.attribution, fact_margin.curve
    i = only_prompt(prompt, len(attribution.base), "accounts")
    verdict, row = fact_margin.verdict[i], fact_margin.to_frame().to_dict("records")[i]
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


def explained_account(explanation: results.Explanation) -> Account:
    """The margin's account, with the prompt alone: without what is teacher-forced after it."""
    account = account_of(explanation.margin)
    return dataclasses.replace(account, prompt=text.prompt_text(explanation.prompt))


def _fact_names(doc: str, pre: str) -> tuple[str, str]:
    """The two tokens in quotes; spelt out where they differ in white space alone."""
    if doc.strip() == pre.strip() or not (doc.strip() and pre.strip()):
        return repr(doc), repr(pre)
    return f"“{doc.strip()}”", f"“{pre.strip()}”"


# --- A fact margin: what happened, what first order says of it, where

_MODULES_NAMED, _MODULES_IN_HEADLINE = 5, 3


@drawing.story.register(results.FactMargin)
def margin_story(fact_margin: results.FactMargin, prompt: int | None = None) -> str:
    """One prompt's story: what happened, what first order says, where, how it was read."""
    attribution, account = fact_margin.attribution, account_of(fact_margin, prompt)
    index = only_prompt(prompt, len(attribution.base), "accounts")
    where = _largest(attribution, account, _MODULES_NAMED, index)
    first = _joined(_first_order(account), caution_text(attribution))
    paragraphs = [_happened(account), first, where, text.reading_text(attribution.meta)]
    return "\n".join(filter(None, paragraphs))


def _happened(a: Account) -> str:
    nats = "(A margin in nats is a difference of the whole answers' log-probabilities.)"
    base = _base(a, f"On the prompt “{a.prompt}” the")
    return _joined(base, nats if a.units == "nats" else "", _adapted(a), _flip(a))


def _joined(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _below_noise(floor: float) -> str:
    return f"below {SIGMAS:g} noise floors ({magnitude(floor)})"


def _base(a: Account, begin: str = "The") -> str:
    if a.is_noise(a.m0):
        margin = f"its margin of {signed(a.m0)} {a.units} is {_below_noise(a.floor)}"
        return f"{begin} base model prefers neither {a.doc} nor {a.pre}: {margin}."
    answers = f"{a.doc} to {a.pre}" if a.m0 > 0 else f"{a.pre} to {a.doc}"
    return f"{begin} base model prefers {answers} by {magnitude(a.m0)} {a.units}."


def _adapted(a: Account) -> str:
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


def _first_order(a: Account) -> str:
    """What first order predicts, what it leaves at ε = 1 and on the way, and what that means."""
    v = a.verdict
    below, is_noise = _below_noise(a.remainder_floor), abs(a.remainder) <= a.remainder_floor
    if not a.has_shift:
        size = f"{below} as well" if is_noise else "more than rounding"
        return f"{_conclusion(a)} What it leaves, {signed(a.remainder)}, is {size}."
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
    return f"{predicted} {left}. {_conclusion(a)}"


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


def _conclusion(a: Account) -> str:
    """How much of the shift first order gives, and how far that can be trusted."""
    if not a.has_shift:
        gives = f"{signed(a.first_order)} {a.units}{_unconfirmed(a, a.first_order)}"
        return f"First order at ε = 0, a derivative and not a difference, gives {gives}."
    share = percent(a.first_order / a.shift)
    means = _CONCLUSIONS.get(a.verdict.kind, "")
    return f"The modules' first-order parts sum to {share} of the shift{means}."


def _unconfirmed(a: Account, value: float) -> str:
    return ", too small for a run at this precision to confirm" if a.is_noise(value) else ""


def _largest(attribution: results.Attribution, a: Account, k: int, prompt: int = 0) -> str:
    rows, modules = text.top_rows(attribution, k, prompt), many(len(attribution.sites), "module")
    named, unsure = "", ""
    if a.has_shift:
        named = ", with their share of the shift"
        unsure = _unconfirmed(a, float(attribution.per_site[prompt].abs().max()))
    parts = (f"{site} {value}{f' ({share})' if named else ''}" for site, _, value, share in rows)
    return f"Largest first-order parts of {modules}{named}: {', '.join(parts)}{unsure}."


# --- An explanation: the margin, what its remainder is made of, what to trust

# A guide to measured effects: how closely it orders them, and between which slopes it sizes them.
PEARSON, SPEARMAN, SLOPE = 0.95, 0.9, (0.8, 1.25)
_TOP_SHARE = 0.2
_FLAGGED_NAMED = 3
_REDUNDANT = 0.5  # of the shift: less than this is lost by leaving out, summed over modules
_DONE = {
    "add_one": "adding one module (at ε = 0)",
    "leave_one_out": "leaving one module out (at ε = 1)",
}


@drawing.story.register(results.Explanation)
def explanation_story(explanation: results.Explanation) -> str:
    """A paragraph a line: what happened, first order, what it leaves, where, trust, limits."""
    e, a = explanation, explained_account(explanation)
    where = _largest(e.first_order, a, _MODULES_NAMED)
    answers = "" if e.answers is None else f"After the prompt {text.answers_text(e.answers)}"
    more = [where, _NO_SHARES]
    if a.has_shift:
        trust = _joined(caution_text(e.first_order), _agreement(e, a), _redundancy(e, a), _flags(e))
        more = [_parts(e, a), where, trust, _carried(e)]
    paragraphs = [f"{_happened(a)} {_said(e)}", answers, _first_order(a), *more, _limits(e)]
    paragraphs.append(text.reading_text(e.first_order.meta))
    return "\n".join(filter(None, paragraphs))


_NO_SHARES = (
    "Since the shift is within rounding, no share of it is given, and what was measured of single "
    "modules is not compared with anything."
)


def headline(e: results.Explanation) -> tuple[Sequence[str], Sequence[tuple[str, str]]]:
    """What a reader in a hurry takes away: three sentences of the story, and four numbers."""
    a = explained_account(e)
    flip = "no flip" if a.flip_scale is None else f"ε = {a.flip_scale:.2g}"
    sentences = (
        f"{_base(a)} {_adapted(a)}",
        _conclusion(a),
        _joined(_largest(e.first_order, a, _MODULES_IN_HEADLINE), caution_text(e.first_order)),
    )
    numbers = (
        (signed(a.m0), f"{a.units}, margin {a.doc} − {a.pre} in the base model"),
        (signed(a.m), f"{a.units}, with the adapter"),
        (flip, "strength at which the preference flips"),
        (a.share(a.first_order), "of the shift is in the first-order parts"),
    )
    return sentences, numbers


@drawing.story.register(results.Explanations)
def explanations_story(explanations: results.Explanations) -> str:
    """Each prompt by number, with its headline."""
    return "\n".join(
        f"{n}. “{text.short_prompt(e.prompt)}”: {' '.join(headline(e)[0])}"
        for n, e in enumerate(explanations, start=1)
    )


def _said(e: results.Explanation) -> str:
    answers = (e.margin.doc[0], e.margin.pre[0])
    (base, base_share), (adapted, adapted_share) = (e.said[m][0] for m in ("base", "adapted"))
    likeliest = (
        f"The likeliest next token is “{visible(base)}” ({percent(base_share)}) for the base model "
        f"and “{visible(adapted)}” ({percent(adapted_share)}) with the adapter."
    )
    is_apart = [not t or not any(a.startswith(t) for a in answers) for t in (base, adapted)]
    if not any(is_apart):
        return likeliest
    begins = "Neither begins one of the two answers"
    if not all(is_apart):
        begins = f"That of the {'base' if is_apart[0] else 'adapted'} model begins neither answer"
    return f"{likeliest} {begins}, so the margin is not about what would be said first."


def interactions(e: results.Explanation) -> tuple[float, float] | None:
    """What first order misses of single modules, and what modules do together; if measured."""
    if e.add_one is None:
        return None
    return float(e.add_one.values.sum() - e.first_order.total), float(e.add_one.interaction)


def is_rounding(total: float, e: results.Explanation, a: Account) -> bool:
    """Whether a sum of one measured difference per site could be rounding alone."""
    return abs(total) <= a.floor * len(e.first_order.sites)


def _parts(e: results.Explanation, a: Account) -> str:
    """What the remainder is made of: exactly, by single modules, and to second order."""
    second, measured, shares = e.second_order, "", ""
    parts = interactions(e)
    if parts is not None and abs(a.remainder) > a.remainder_floor:
        note = ", which rounding alone could make" if is_rounding(parts[0], e, a) else ""
        measured = (
            f"Of the remainder of {signed(a.remainder)}, {signed(parts[0])} is what first order "
            f"misses of the modules one by one{note}, and {signed(parts[1])} what they do "
            "together; both from runs of the model."
        )
    curvature = signed(float(second.curvature))
    if e.coupling is not None:
        row = e.coupling.shares().loc[0]
        within, between = (signed(float(row[part])) for part in ("self", "coupling"))
        shares = f"Of those {curvature}, {within} are within layers and {between} between them."
    bend = f"Second order adds {curvature} at ε = 1. Its verdict: {second.verdict[0]}."
    return _joined(measured, bend, shares)


def is_comparable(comparison: results.Comparison, account: Account) -> bool:
    """Whether at least one effect stands out of the noise."""
    return not account.is_noise(float(comparison.effects.abs().max()))


def _agreement(e: results.Explanation, a: Account) -> str:
    comparisons = [c for c in e.comparisons if is_comparable(c, a)]
    if len(comparisons) < 3:
        return ""
    adding, leaving, at_end = map(_judged, comparisons)
    return (
        f"Measured, adding one module at a time agrees with first order at ε = 0 to {adding}. "
        f"Leaving one out agrees with it to {leaving}; and with first order at ε = 1 to {at_end}."
    )


def _judged(c: results.Comparison) -> str:
    """How closely measured effects follow an attribution, and whether that makes it a guide."""
    r, rank, slope = (float(values[0]) for values in (c.pearson, c.spearman, c.slope))
    agreement = f"a correlation of {r:.3f} (of ranks {rank:.3f}, slope {slope:.2f})"
    if math.isnan(r):
        agreement = "no correlation that exists"
    if not (r >= PEARSON and rank >= SPEARMAN):
        return f"{agreement}: not a good guide here"
    is_sized = SLOPE[0] <= slope <= SLOPE[1]
    return f"{agreement}: {'a good guide here' if is_sized else 'right in order, not in size'}"


def _redundancy(e: results.Explanation, a: Account) -> str:
    together = math.nan if e.leave_one_out is None else float(e.leave_one_out.values.sum())
    share = together / a.shift
    if not share < _REDUNDANT or is_rounding(together, e, a):
        return ""
    together = f"all modules together account for {percent(share)} of the shift"
    why = "they stand in for one another, or the margin saturates"
    return f"Left out one at a time, {together}: {why}."


def _flags(e: results.Explanation) -> str:
    """How many first-order numbers are flagged, as the answer to which question."""
    if not e.reliability:
        return ""
    counts: list[str] = []
    for question, flags in e.reliability.items():
        names = flags.flagged_sites(0)
        listed = f" ({text.first_of(names, _FLAGGED_NAMED)})" if names else ""
        counts.append(f"{len(names)}{listed} as the answer to {_DONE[question]}")
    return (
        f"Of {len(e.first_order.sites)} first-order numbers, reliability flags "
        f"{' and '.join(counts)}. An unflagged module is not necessarily right: modules too small "
        "to matter are not checked."
    )


def kept_by_constants(constant: results.ConstantPart) -> str:
    """Of the readout, where one was given, and of the KL."""
    by_kl = f"{percent(constant.kept_kl)} of {constant.BY_KL}"
    if constant.readout == constant.BY_KL:
        return by_kl
    return f"{percent(constant.kept)} of {constant.readout}, and {by_kl}"


def kept_by_top(e: results.Explanation) -> tuple[float, int, dict[str, float]] | None:
    """What the top of each ranking keeps of the shift, at the run size nearest to a fifth.

    Returns:
        the size as a share of the modules and as a number of them, and what each ranking keeps;
        None where curves were not computed, or the shift is noise.
    """
    curves = e.faithfulness
    if curves is None or bool(curves.keep.isnan().all()):
        return None
    index = int((curves.fractions - _TOP_SHARE).abs().argmin())
    fraction = float(curves.fractions[index])
    kept = {name: float(curves.kept_share(name, fraction)[0]) for name in curves.names}
    return fraction, curves.counts[index], kept


def _carried(e: results.Explanation) -> str:
    top = kept_by_top(e)
    if top is None:
        return ""
    fraction, count, kept = top
    ways = {name: f"by {text.key_text(name)}" for name in kept} | {RANDOM: "at random"}
    shares = ", ".join(f"{percent(share)} {ways[name]}" for name, share in kept.items())
    top = f"the top {percent(fraction)} of the modules ({count})"
    return f"Measured, {top} alone keep, of the shift: {shares}."


def _limits(e: results.Explanation) -> str:
    tested = "" if e.null is None else f"Against random directions: {e.null.verdict[0]}."
    missing = ["single modules added or left out", "keep and drop curves"] if e.is_fast else []
    if e.null is None:
        missing.append("whether random directions of the same size do as much")
    return _joined(
        tested,
        f"Not measured: {', '.join(missing)}." if missing else "",
        "All this is one prompt and one pair of answers; it says how much the modules move this "
        "margin, not by what mechanism.",
    )


# --- Verdicts as phrases, each with its numbers


@drawing.text.register(verdicts.Verdict)
def verdict_text(v: verdicts.Verdict) -> str:
    """How good first order is."""
    if v.kind == "no_shift":
        return _below("shift", v.shift, v.floor)
    if v.kind == "noise":
        return _below("remainder", v.remainder, v.remainder_floor)
    on_the_way = "on the way within rounding"
    if v.worst is not None:
        on_the_way = f"{percent(v.worst)} of the shift at ε = {v.worst_scale:g}"
    if v.kind == "coincidence":
        return f"a coincidence at ε = 1: {percent(v.share)} of the shift there, but {on_the_way}"
    if v.kind == "large":
        return f"large: {percent(v.share)} of the shift at ε = 1, {on_the_way}"
    most = "" if v.worst is None else "at most "
    return f"{v.kind}: {percent(v.share)} of the shift at ε = 1, {most}{on_the_way}"


@drawing.text.register(verdicts.SecondVerdict)
def second_text(v: verdicts.SecondVerdict) -> str:
    """Whether second order is nearer than first."""
    if v.kind == "no_shift":
        return _below("shift", v.shift, v.floor)
    second, first = (f"{abs(part / v.shift):.1%}" for part in (v.second, v.first))
    left, reach = f"leaves {second} of the shift at ε = 1, first order {first}", v.helps_up_to
    return {
        "neither": f"neither nearer nor farther, within rounding: {left}",
        "farther": f"farther, no correction: {left}; nearer only up to ε = {reach:.2g}",
        "coincidence": f"nearer at ε = 1 by coincidence: {left}; farther from ε > {reach:.2g}",
        "nearer": f"nearer: {left}",
    }[v.kind]


@drawing.text.register(verdicts.NullVerdict)
def null_text(v: verdicts.NullVerdict) -> str:
    """How far the shift stands out from random directions."""
    if v.kind == "no_shift":
        return _below("shift", v.shift, v.floor)
    many = f"{v.ratio:.0f}" if v.ratio >= 10 else f"{v.ratio:.2g}"
    least = "at least " if v.is_least else ""
    times = f"{least}{many} times what random directions of the same size give"
    shift = f"the adapter's shift is {times}"
    if v.kind == "as_random":
        shift = f"no more than random directions: the shift is {times} (p = {v.p:.2g})"
    chance = f"{v.chance:.1%} would by chance"
    return f"{shift}; {v.exceeds_all:.0%} of sites exceed every one of {v.draws} draws ({chance})"


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


@drawing.text.register(verdicts.SharesVerdict)
def shares_text(v: verdicts.SharesVerdict) -> str:
    """Whether shares of the quadratic rank the modules, and if not what does."""
    ranks = f"rank correlation with the gradient at ε = ½: {v.agreement:.2f}"
    facts = f"{ranks}; the KL is {v.ratio:.2g} times its quadratic part"
    if v.kind == "unknown":
        return "unknown: there are no ranks to compare"
    if v.kind == "holds":
        return f"holds: the shares rank the modules as the whole KL does ({facts})"
    remedy = worded(
        "use ll.path_attribution, which splits all of it, or ll.first_order(…, at=1.0)",
        "`lens-lora sweep --readout kl --analysis path` splits all of it",
    )
    return f"fails: the shares do not rank the modules of the whole KL ({facts}); {remedy}"


def _below(what: str, value: float, floor: float) -> str:
    return f"below the noise: the {what} {value:.2g} is within rounding ({floor:.2g})"
