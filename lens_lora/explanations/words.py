"""An explanation in plain words; `explanation_story` and the `headline` of a page share sentences.

Every sentence is a number of the result. A difference of at most three noise floors is called
noise, and nothing is compared with it. What was not measured is said not to be. A guide is called
good only by the thresholds below, on this prompt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lens_lora.core import drawing
from lens_lora.explanations.explanation import Explanation, Explanations
from lens_lora.judging.compare import Comparison
from lens_lora.judging.rankings import RANDOM
from lens_lora.show import text
from lens_lora.show.text import (
    caution_text,
    percent,
    signed,
    visible,
)
from lens_lora.show.words import (
    MODULES_NAMED,
    Account,
    account_of,
    adapted_text,
    base_text,
    conclusion_text,
    first_order_text,
    happened_text,
    joined,
    largest_text,
)

_MODULES_IN_HEADLINE = 3
# An attribution is called a good guide to measured effects if it orders them at least so closely,
# and the slope between the two is within these bounds.
PEARSON = 0.95
SPEARMAN = 0.9
SLOPE = (0.8, 1.25)
_TOP_SHARE = 0.2  # of the modules: what they keep is told
_FLAGGED_NAMED = 3
_REDUNDANT = 0.5  # of the shift: less than this is lost by leaving out, summed over modules
_DONE = {
    "add_one": "adding one module (at ε = 0)",
    "leave_one_out": "leaving one module out (at ε = 1)",
}


def explained_account(explanation: Explanation) -> Account:
    """The margin's account, with the prompt alone: without what is teacher-forced after it."""
    account = account_of(explanation.margin)
    return dataclasses.replace(account, prompt=text.prompt_text(explanation.prompt))


@drawing.story.register(Explanation)
def explanation_story(explanation: Explanation) -> str:
    """A paragraph a line: what happened, first order, what it leaves, where, trust, limits."""
    e = explanation
    a = explained_account(e)
    paragraphs = [f"{happened_text(a)} {_said(e)}"]
    if e.answers is not None:
        paragraphs.append(f"After the prompt {text.answers_text(e.answers)}")
    paragraphs.append(first_order_text(a))
    where = largest_text(e.first_order, a, MODULES_NAMED)
    if a.has_shift:
        trust = joined(caution_text(e.first_order), _agreement(e, a), _redundancy(e, a), _flags(e))
        paragraphs += [_parts(e, a), where, trust, _carried(e)]
    else:
        paragraphs += [where, _NO_SHARES]
    paragraphs += [_limits(e), text.reading_text(e.first_order.meta)]
    return "\n".join(filter(None, paragraphs))


_NO_SHARES = (
    "Since the shift is within rounding, no share of it is given, and what was measured of single "
    "modules is not compared with anything."
)


def headline(e: Explanation) -> tuple[Sequence[str], Sequence[tuple[str, str]]]:
    """What a reader in a hurry takes away: three sentences of the story, and four numbers."""
    a = explained_account(e)
    flip = "no flip" if a.flip_scale is None else f"ε = {a.flip_scale:.2g}"
    sentences = (
        f"{base_text(a)} {adapted_text(a)}",
        conclusion_text(a),
        joined(largest_text(e.first_order, a, _MODULES_IN_HEADLINE), caution_text(e.first_order)),
    )
    numbers = (
        (signed(a.m0), f"{a.units}, margin {a.doc} − {a.pre} in the base model"),
        (signed(a.m), f"{a.units}, with the adapter"),
        (flip, "strength at which the preference flips"),
        (a.share(a.first_order), "of the shift is in the first-order parts"),
    )
    return sentences, numbers


@drawing.story.register(Explanations)
def explanations_story(explanations: Explanations) -> str:
    """Each prompt by number, with its headline."""
    return "\n".join(
        f"{n}. “{text.short_prompt(e.prompt)}”: {' '.join(headline(e)[0])}"
        for n, e in enumerate(explanations, start=1)
    )


def _said(e: Explanation) -> str:
    answers = (e.margin.doc[0], e.margin.pre[0])
    base, base_share = e.said["base"][0]
    adapted, adapted_share = e.said["adapted"][0]
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


def interactions(e: Explanation) -> tuple[float, float] | None:
    """What first order misses of single modules, and what modules do together; if measured."""
    if e.add_one is None:
        return None
    return float(e.add_one.values.sum() - e.first_order.total), float(e.add_one.interaction)


def is_rounding(total: float, e: Explanation, a: Account) -> bool:
    """Whether a sum of one measured difference per site could be rounding alone."""
    return abs(total) <= a.floor * len(e.first_order.sites)


def _parts(e: Explanation, a: Account) -> str:
    """What the remainder is made of: exactly, by single modules, and to second order."""
    second = e.second_order
    measured = ""
    shares = ""
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
        within = signed(float(row["self"]))
        between = signed(float(row["coupling"]))
        shares = f"Of those {curvature}, {within} are within layers and {between} between them."
    bend = f"Second order adds {curvature} at ε = 1. Its verdict: {second.verdict[0]}."
    return joined(measured, bend, shares)


def is_comparable(comparison: Comparison, account: Account) -> bool:
    """Whether at least one effect stands out of the noise."""
    return not account.is_noise(float(comparison.effects.abs().max()))


def _agreement(e: Explanation, a: Account) -> str:
    comparisons = [c for c in e.comparisons if is_comparable(c, a)]
    if len(comparisons) < 3:
        return ""
    adding, leaving, at_end = map(_judged, comparisons)
    return (
        f"Measured, adding one module at a time agrees with first order at ε = 0 to {adding}. "
        f"Leaving one out agrees with it to {leaving}; and with first order at ε = 1 to {at_end}."
    )


def _judged(c: Comparison) -> str:
    """How closely measured effects follow an attribution, and whether that makes it a guide."""
    r = float(c.pearson[0])
    rank = float(c.spearman[0])
    slope = float(c.slope[0])
    agreement = f"a correlation of {r:.3f} (of ranks {rank:.3f}, slope {slope:.2f})"
    if math.isnan(r):
        agreement = "no correlation that exists"
    if not (r >= PEARSON and rank >= SPEARMAN):
        return f"{agreement}: not a good guide here"
    is_sized = SLOPE[0] <= slope <= SLOPE[1]
    return f"{agreement}: {'a good guide here' if is_sized else 'right in order, not in size'}"


def _redundancy(e: Explanation, a: Account) -> str:
    together = math.nan if e.leave_one_out is None else float(e.leave_one_out.values.sum())
    share = together / a.shift
    if not share < _REDUNDANT or is_rounding(together, e, a):
        return ""
    together = f"all modules together account for {percent(share)} of the shift"
    why = "they stand in for one another, or the margin saturates"
    return f"Left out one at a time, {together}: {why}."


def _flags(e: Explanation) -> str:
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


def kept_by_top(e: Explanation) -> tuple[float, int, dict[str, float]] | None:
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


def _carried(e: Explanation) -> str:
    top = kept_by_top(e)
    if top is None:
        return ""
    fraction, count, kept = top
    ways = {name: f"by {text.key_text(name)}" for name in kept} | {RANDOM: "at random"}
    shares = ", ".join(f"{percent(share)} {ways[name]}" for name, share in kept.items())
    top = f"the top {percent(fraction)} of the modules ({count})"
    return f"Measured, {top} alone keep, of the shift: {shares}."


def _limits(e: Explanation) -> str:
    tested = "" if e.null is None else f"Against random directions: {e.null.verdict[0]}."
    missing = ["single modules added or left out", "keep and drop curves"] if e.is_fast else []
    if e.null is None:
        missing.append("whether random directions of the same size do as much")
    return joined(
        tested,
        f"Not measured: {', '.join(missing)}." if missing else "",
        "All this is one prompt and one pair of answers; it says how much the modules move this "
        "margin, not by what mechanism.",
    )
