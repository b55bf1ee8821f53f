"""An explanation in plain words; `explanation_story` and the `headline` of a page share sentences.

Every sentence states a number of the result. A difference of at most three noise floors is called
noise, and nothing is compared with it. A sentence lists what was not measured. An attribution is
called a good guide by the thresholds below, and on this prompt alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from lens_lora.core import drawing
from lens_lora.curvature.verdict import SecondVerdict
from lens_lora.explanations.explanation import (
    Explanation,
    Explanations,
    ReadoutExplanation,
    SiteExplanation,
)
from lens_lora.judging.compare import Comparison
from lens_lora.judging.rankings import RANDOM
from lens_lora.show import text
from lens_lora.show.tables import Pairs
from lens_lora.show.text import percent, signed, visible
from lens_lora.views.attribution_words import caution_text
from lens_lora.views.words import (
    MODULES_NAMED,
    MarginNumbers,
    ReadoutNumbers,
    adapted_text,
    base_text,
    conclusion_text,
    first_order_text,
    happened_text,
    joined,
    largest_text,
    margin_numbers,
)

# How many modules the headline names.
MODULES_IN_HEADLINE = 3
# An attribution is called a good guide to measured effects if both correlations are at least these
# and the slope between the two is within these bounds.
PEARSON = 0.95
SPEARMAN = 0.9
SLOPE = (0.8, 1.25)
# The story says what the top of each ranking keeps, at this share of the modules.
_TOP_SHARE = 0.2
# How many flagged modules are named.
_FLAGGED_NAMED = 3
# Modules are called redundant if leaving out one at a time takes, summed over all of them, less
# than this share of the shift.
_REDUNDANT = 0.5
_DONE = {
    "add_one": "adding one module (at ε = 0)",
    "leave_one_out": "leaving one module out (at ε = 1)",
}


def explained_numbers(explanation: Explanation) -> MarginNumbers:
    """The margin's numbers, with the prompt alone: without what is teacher-forced after it."""
    numbers = margin_numbers(explanation.margin)
    return dataclasses.replace(numbers, prompt=text.prompt_text(explanation.prompt))


def readout_numbers(e: ReadoutExplanation) -> ReadoutNumbers:
    """The numbers of a readout that is no margin, on one prompt."""
    first = e.first_order
    curve = e.curve
    (verdict,) = curve.verdicts_on(first)
    return ReadoutNumbers(
        prompt=text.prompt_text(e.prompts[0]),
        units=e.units,
        m0=float(first.base[0]),
        first_order=float(first.total[0]),
        remainder=float(first.remainder[0]),
        m=float(first.adapted[0]),
        verdict=verdict,
        steps=curve.points[0],
    )


def numbers_of(e: SiteExplanation) -> ReadoutNumbers:
    """The numbers of a margin, or of another readout, on one prompt."""
    return explained_numbers(e) if isinstance(e, Explanation) else readout_numbers(e)


def noun_of(e: SiteExplanation) -> str:
    """The word for what is read: 'margin', or 'readout'."""
    return "margin" if isinstance(e, Explanation) else "readout"


@drawing.story.register(Explanation)
def explanation_story(explanation: Explanation) -> str:
    """One paragraph per line: what happened, first order, the rest, where, trust, limits."""
    e = explanation
    numbers = explained_numbers(e)
    paragraphs = [f"{happened_text(numbers)} {_said(e)}"]
    if e.answers is not None:
        paragraphs.append(f"After the prompt {text.answers_text(e.answers)}")
    paragraphs.append(first_order_text(numbers))
    paragraphs += where_and_trust(e, numbers)
    reach = (
        "All this is one prompt and one pair of answers; it says how much the modules move this "
        "margin, not by what mechanism."
    )
    paragraphs += [limits(e, reach), text.reading_text(e.first_order.meta)]
    return "\n".join(filter(None, paragraphs))


def where_and_trust(e: SiteExplanation, numbers: ReadoutNumbers) -> list[str]:
    """Paragraphs: the parts of the remainder, the largest modules, trust, what few modules keep.

    Args:
        e: the explanation of one prompt.
        numbers: those of its readout.
    """
    where = largest_text(e.first_order, numbers, MODULES_NAMED)
    if not numbers.has_shift:
        return [where, _NO_SHARES]
    trust = joined(
        caution_text(e.first_order), _agreement(e, numbers), _redundancy(e, numbers), _flags(e)
    )
    return [_parts(e, numbers), where, trust, _carried(e)]


_NO_SHARES = (
    "Since the shift is within rounding, no share of it is given, and what was measured of single "
    "modules is not compared with anything."
)


class Headline(NamedTuple):
    """The sentences and numbers of an explanation for a reader in a hurry.

    Attributes:
        sentences: three sentences of the story.
        numbers: four numbers, each with the words that say what it is.
    """

    sentences: Sequence[str]
    numbers: Pairs


def headline(e: Explanation) -> Headline:
    """Three sentences of the story and four numbers, for a reader in a hurry."""
    numbers = explained_numbers(e)
    flip = "no flip" if numbers.flip_scale is None else f"ε = {numbers.flip_scale:.2g}"
    sentences = (
        f"{base_text(numbers)} {adapted_text(numbers)}",
        conclusion_text(numbers),
        joined(
            largest_text(e.first_order, numbers, MODULES_IN_HEADLINE), caution_text(e.first_order)
        ),
    )
    numbers = (
        (
            signed(numbers.m0),
            f"{numbers.units}, margin {numbers.doc} − {numbers.pre} in the base model",
        ),
        (signed(numbers.m), f"{numbers.units}, with the adapter"),
        (flip, "strength at which the preference flips"),
        (numbers.share(numbers.first_order), "of the shift is in the first-order parts"),
    )
    return Headline(sentences, numbers)


@drawing.story.register(Explanations)
def explanations_story(explanations: Explanations) -> str:
    """Each prompt by number, with its headline."""
    lines: list[str] = []
    for number, e in enumerate(explanations, start=1):
        sentences = " ".join(headline(e).sentences)
        lines.append(f"{number}. “{text.short_prompt(e.prompt)}”: {sentences}")
    return "\n".join(lines)


def _said(e: Explanation) -> str:
    """The likeliest next token of both models, and whether it begins one of the answers."""
    base, base_share = e.said["base"][0]
    adapted, adapted_share = e.said["adapted"][0]
    likeliest = (
        f"The likeliest next token is “{visible(base)}” ({percent(base_share)}) for the base model "
        f"and “{visible(adapted)}” ({percent(adapted_share)}) with the adapter."
    )
    base_begins = _begins_an_answer(base, e)
    adapted_begins = _begins_an_answer(adapted, e)
    if base_begins and adapted_begins:
        return likeliest
    if base_begins:
        begins = "The adapted model's begins neither answer"
    elif adapted_begins:
        begins = "The base model's begins neither answer"
    else:
        begins = "Neither begins one of the two answers"
    return f"{likeliest} {begins}, so the margin is not about what would be said first."


def _begins_an_answer(token: str, e: Explanation) -> bool:
    answers = (e.margin.doc[0], e.margin.pre[0])
    return bool(token) and any(answer.startswith(token) for answer in answers)


def interactions(e: SiteExplanation) -> tuple[float, float] | None:
    """The remainder in two parts: what first order misses of single modules, and what is left.

    The second is what modules do together. None where single modules were not measured.
    """
    if e.add_one is None:
        return None
    single = float(e.add_one.values.sum() - e.first_order.total)
    together = float(e.add_one.interaction)
    return single, together


def is_rounding(total: float, e: SiteExplanation, numbers: ReadoutNumbers) -> bool:
    """Whether a sum of one measured difference per site could be rounding alone."""
    return abs(total) <= numbers.floor * len(e.first_order.sites)


def _parts(e: SiteExplanation, numbers: ReadoutNumbers) -> str:
    """The parts of the remainder: exactly, by single modules, and to second order."""
    second = e.second_order
    measured = ""
    shares = ""
    parts = interactions(e)
    if parts is not None and abs(numbers.remainder) > numbers.remainder_floor:
        single, together = parts
        note = ", which rounding alone could make" if is_rounding(single, e, numbers) else ""
        measured = (
            f"Of the remainder of {signed(numbers.remainder)}, {signed(single)} is what first "
            f"order misses of the modules one by one{note}, and {signed(together)} what they do "
            "together; both from runs of the model."
        )
    curvature = signed(float(second.curvature))
    if e.coupling is not None:
        row = e.coupling.shares().loc[0]
        within = signed(float(row["self"]))
        between = signed(float(row["coupling"]))
        shares = f"Of those {curvature}, {within} are within layers and {between} between them."
    return joined(measured, of_second_order(curvature, second.verdict[0]), shares)


def of_second_order(curvature: str, verdict: SecondVerdict) -> str:
    """A sentence on what second order adds, and whether that brings the estimate nearer.

    Args:
        curvature: what it adds, as the sentence writes it.
        verdict: the verdict on it.
    """
    adds = f"Second order adds {curvature} at ε = 1"
    if verdict.kind == "no_shift":
        return f"{adds}; the shift is within rounding, so nothing is said of the difference."
    second = f"{abs(verdict.second / verdict.shift):.1%}"
    first = f"{abs(verdict.first / verdict.shift):.1%}"
    misses = f"it misses {second} of the shift, first order {first}"
    reach = f"{verdict.helps_up_to:.2g}"
    if verdict.kind == "neither":
        return f"{adds}, which makes no difference beyond rounding: {misses}."
    if verdict.kind == "farther":
        return f"{adds}, which makes the estimate worse: {misses}. It helps only up to ε = {reach}."
    if verdict.kind == "coincidence":
        helps = f"On the way it helps only up to ε = {reach}, so this is a coincidence."
        return f"{adds}, which brings the estimate nearer there: {misses}. {helps}"
    return f"{adds}, which brings the estimate nearer: {misses}."


def is_comparable(comparison: Comparison, numbers: ReadoutNumbers) -> bool:
    """Whether at least one effect stands out of the noise."""
    return not numbers.is_noise(float(comparison.effects.abs().max()))


def _agreement(e: SiteExplanation, numbers: ReadoutNumbers) -> str:
    """How closely effects follow first order; effects that are all noise are passed over."""
    judged: dict[tuple[str, str], str] = {}
    for comparison in e.comparisons:
        if is_comparable(comparison, numbers):
            pair = (comparison.attribution_name, comparison.effects_name)
            judged[pair] = _judged(comparison)
    at_base = e.first_order.key
    sentences: list[str] = []
    if (at_base, "add_one") in judged:
        adding = judged[at_base, "add_one"]
        sentences.append(
            f"Measured, adding one module at a time agrees with first order at ε = 0 to {adding}."
        )
    if (at_base, "leave_one_out") in judged:
        leaving = judged[at_base, "leave_one_out"]
        at_end = judged[e.adapted_end.key, "leave_one_out"]
        begins = "Leaving one out agrees with it"
        if not sentences:
            begins = "Measured, leaving one module out agrees with first order at ε = 0"
        sentences.append(f"{begins} to {leaving}; and with first order at ε = 1 to {at_end}.")
    return " ".join(sentences)


def _judged(c: Comparison) -> str:
    """How closely measured effects follow an attribution, and whether that makes it a guide."""
    r = float(c.pearson[0])
    rank = float(c.spearman[0])
    slope = float(c.slope[0])
    agreement = f"a correlation of {r:.3f} (of ranks {rank:.3f}, slope {slope:.2f})"
    if math.isnan(r):
        agreement = "a correlation that is not defined"
    if not (r >= PEARSON and rank >= SPEARMAN):
        return f"{agreement}: not a good guide here"
    least, most = SLOPE
    verdict = "a good guide here" if least <= slope <= most else "right in order, not in size"
    return f"{agreement}: {verdict}"


def _redundancy(e: SiteExplanation, numbers: ReadoutNumbers) -> str:
    """How little of the shift leaving out one module at a time takes, where the sum is small."""
    if e.leave_one_out is None:
        return ""
    lost = float(e.leave_one_out.values.sum())
    share = lost / numbers.shift
    if not share < _REDUNDANT or is_rounding(lost, e, numbers):
        return ""
    return (
        f"Left out one at a time, all modules together account for {percent(share)} of the shift: "
        f"they stand in for one another, or the {noun_of(e)} saturates."
    )


def _flags(e: SiteExplanation) -> str:
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


class KeptByTop(NamedTuple):
    """The share of the shift that the top of each ranking keeps.

    Attributes:
        share: how many modules the top is, as a share of all.
        modules: how many modules it is.
        kept: the share of the shift that it keeps, by ranking.
    """

    share: float
    modules: int
    kept: dict[str, float]


def kept_by_top(e: SiteExplanation) -> KeptByTop | None:
    """Find what each ranking's top keeps, at the size nearest to a fifth of the sites.

    None where curves were not computed, or the shift is noise.
    """
    curves = e.faithfulness
    if curves is None or bool(curves.keep.isnan().all()):
        return None
    index = int((curves.fractions - _TOP_SHARE).abs().argmin())
    share = float(curves.fractions[index])
    kept = {name: float(curves.kept_share(name, share)[0]) for name in curves.names}
    return KeptByTop(share, curves.counts[index], kept)


def _carried(e: SiteExplanation) -> str:
    """The shares of the shift that the top of each ranking keeps."""
    top = kept_by_top(e)
    if top is None:
        return ""
    shares: list[str] = []
    for name, share in top.kept.items():
        ranking = "at random" if name == RANDOM else f"by {text.key_text(name)}"
        shares.append(f"{percent(share)} {ranking}")
    return (
        f"Measured, the top {percent(top.share)} of the modules ({top.modules}) alone keep, of the "
        f"shift: {', '.join(shares)}."
    )


def limits(e: SiteExplanation, reach: str) -> str:
    """The sentences on what was not measured, and how far the explanation reaches.

    Args:
        e: the explanation of one prompt.
        reach: a sentence on how far it reaches.
    """
    missing: list[str] = []
    if e.is_fast:
        missing += ["single modules added or left out", "keep and drop curves"]
    if e.null is None:
        missing.append("whether random directions of the same size do as much")
    sentences: list[str] = []
    if e.null is not None:
        sentences.append(f"Against random directions: {e.null.verdict[0]}.")
    if missing:
        sentences.append(f"Not measured: {', '.join(missing)}.")
    return joined(*sentences, reach)
