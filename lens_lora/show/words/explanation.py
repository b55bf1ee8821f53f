"""An explanation in plain words: what happened, what first order says and leaves, what to trust.

Every sentence is a number of the result. Where the shift is within rounding, nothing is compared
with it; what was not measured is said not to be. A guide is called good only by the thresholds
below, on this prompt.
"""

from __future__ import annotations

import dataclasses

from lens_lora.analyses.compare import Comparison
from lens_lora.analyses.explain_margin import Explanation
from lens_lora.analyses.faithfulness import Faithfulness
from lens_lora.results import drawing
from lens_lora.results.keys import RANDOM
from lens_lora.show.text import key_text, percent, prompt_text, signed, visible
from lens_lora.show.words.account import Account, account_of
from lens_lora.show.words.margin import paragraphs_of

__all__ = [
    "explained_account",
    "explanation_story",
    "is_comparable",
    "is_rounding",
    "top_of",
]

PEARSON, SPEARMAN, SLOPE = 0.95, 0.9, (0.8, 1.25)
TOP_SHARE = 0.2
_NAMED = 3
_DONE = {
    "add_one": "adding one module (by running it)",
    "leave_one_out": "leaving one module out (by an estimate)",
}


@drawing.story.register(Explanation)
def explanation_story(explanation: Explanation) -> str:
    """A paragraph a line: what happened, first order, what it leaves, where, trust, limits.

    Args:
        explanation: to be told.
    """
    a = explained_account(explanation)
    happened, first, where = paragraphs_of(explanation.margin, a)
    paragraphs = [f"{happened} {_said(explanation)}", first]
    if a.is_noise(a.shift):
        paragraphs += [
            where,
            "Since the shift is within rounding, no share of it is given, and what was measured of "
            "single modules is not compared with anything.",
        ]
    else:
        paragraphs += [_parts(explanation, a), where, _trust(explanation, a), _carried(explanation)]
    return "\n".join(filter(None, [*paragraphs, _limits(explanation, a)]))


def explained_account(explanation: Explanation) -> Account:
    """The margin's account, with the prompt alone: without what is teacher-forced after it.

    Args:
        explanation: whose margin it is.
    """
    account = account_of(explanation.margin)
    return dataclasses.replace(account, prompt=prompt_text(explanation.prompt))


def is_comparable(comparison: Comparison, account: Account) -> bool:
    """Whether at least one effect stands out of the noise.

    Args:
        comparison: of an attribution with effects.
        account: of their margin.
    """
    return not account.is_noise(float(comparison.effects.abs().max()))


def is_rounding(total: float, e: Explanation, a: Account) -> bool:
    """Whether a sum of one measured difference per site could be rounding alone.

    Args:
        total: the sum.
        e: the explanation that it is of.
        a: its account.
    """
    return abs(total) <= a.floor * len(e.first_order.sites)


def _said(e: Explanation) -> str:
    answers = (e.margin.doc[0], e.margin.pre[0])
    said = {model: tokens[0] for model, tokens in e.said.items()}
    text = (
        f"The likeliest next token is {_token(said['base'])} for the base model and "
        f"{_token(said['adapted'])} with the adapter"
    )
    apart = [m for m, (token, _) in said.items() if not any(_begins(x, token) for x in answers)]
    if not apart:
        return f"{text}."
    which = "Neither" if len(apart) == 2 else f"That of the {apart[0]} model"
    verb = "begins one of the two answers" if len(apart) == 2 else "begins neither answer"
    return f"{text}. {which} {verb}, so the margin is not about what would be said first."


def _begins(answer: str, token: str) -> bool:
    return bool(token) and answer.startswith(token)


def _token(said: tuple[str, float]) -> str:
    return f"“{visible(said[0])}” ({percent(said[1])})"


def _parts(e: Explanation, a: Account) -> str:
    """What the remainder is made of: exactly, by single modules, and to second order."""
    second, sentences = e.second_order, []
    if e.add_one is not None and not a.remainder_is_noise:
        own = float(e.add_one.values.sum() - e.first_order.total)
        note = ", which rounding alone could make" if is_rounding(own, e, a) else ""
        together = signed(float(e.add_one.interaction))
        sentences.append(
            f"Of the remainder of {signed(a.remainder)}, {signed(own)} is what first order misses "
            f"of the modules one by one{note}, and {together} what they do together; both from "
            "runs of the model."
        )
    sentences.append(
        f"Second order adds {signed(float(second.curvature))} at ε = 1. Its verdict: "
        f"{second.verdict[0]}."
    )
    if e.coupling is not None:
        shares = e.coupling.shares().loc[0]
        sentences.append(
            f"Of those {signed(float(second.curvature))}, {signed(float(shares['self']))} are "
            f"within layers and {signed(float(shares['coupling']))} between them."
        )
    return " ".join(sentences)


def _trust(e: Explanation, a: Account) -> str:
    return " ".join([*_agreement(e, a), *_redundancy(e, a), _flags(e)])


def _agreement(e: Explanation, a: Account) -> list[str]:
    comparisons = [c for c in e.comparisons if is_comparable(c, a)]
    if len(comparisons) < 3:
        return []
    adding, leaving, at_end = comparisons
    return [
        f"Measured, adding one module at a time agrees with first order at ε = 0 to "
        f"{_statistics(adding)}: {_guide(adding)}. Leaving one out agrees with it to "
        f"{_statistics(leaving)}: {_guide(leaving)}; and with first order at ε = 1 to "
        f"{_statistics(at_end)}: {_guide(at_end)}."
    ]


def _statistics(c: Comparison) -> str:
    r, rank, slope = (float(getattr(c, name)[0]) for name in ("pearson", "spearman", "slope"))
    if r != r:
        return "no correlation that exists"
    return f"a correlation of {r:.3f} (of ranks {rank:.3f}, slope {slope:.2f})"


def _guide(c: Comparison) -> str:
    r, rank, slope = (float(getattr(c, name)[0]) for name in ("pearson", "spearman", "slope"))
    orders, sizes = r >= PEARSON and rank >= SPEARMAN, SLOPE[0] <= slope <= SLOPE[1]
    if orders and sizes:
        return "a good guide here"
    return "right in order, not in size" if orders else "not a good guide here"


def _redundancy(e: Explanation, a: Account) -> list[str]:
    if e.leave_one_out is None:
        return []
    together = float(e.leave_one_out.values.sum())
    share = together / a.shift
    if share >= 0.5 or is_rounding(together, e, a):
        return []
    return [
        f"Left out one at a time, all modules together account for {percent(share)} of the shift: "
        "they stand in for one another, or the margin saturates."
    ]


def _flags(e: Explanation) -> str:
    """How many first-order numbers are flagged, as the answer to which question."""
    counts: list[str] = []
    for question, found in e.reliability.items():
        names = found.flagged_sites(0)
        more = ", …" if len(names) > _NAMED else ""
        which = f" ({', '.join(names[:_NAMED])}{more})" if names else ""
        counts.append(f"{len(names)}{which} as the answer to {_DONE[question]}")
    return (
        f"Of {len(e.first_order.sites)} first-order numbers, reliability flags "
        f"{' and '.join(counts)}; one without a flag is not thereby right, for small ones are not "
        "looked at."
    )


def top_of(curves: Faithfulness) -> tuple[float, int]:
    """The fraction that was run nearest to a fifth of the sites, and how many sites that is.

    Args:
        curves: of keeping and dropping.
    """
    index = int((curves.fractions - TOP_SHARE).abs().argmin())
    return float(curves.fractions[index]), curves.counts[index]


def _carried(e: Explanation) -> str:
    """What the top of each ranking keeps of the shift."""
    curves = e.faithfulness
    if curves is None or bool(curves.keep.isnan().all()):
        return ""
    fraction, count = top_of(curves)
    kept = ", ".join(
        f"{percent(float(curves.kept_share(name, fraction)[0]))} at random"
        if name == RANDOM
        else f"{percent(float(curves.kept_share(name, fraction)[0]))} by {key_text(name)}"
        for name in curves.names
    )
    return (
        f"Measured, the top {percent(fraction)} of the modules ({count}) alone keep, of the shift: "
        f"{kept}."
    )


def _limits(e: Explanation, a: Account) -> str:
    sentences = []
    if e.null is not None:
        sentences.append(f"Against random directions: {e.null.verdict[0]}.")
    missing = [] if not e.is_fast else ["single modules added or left out", "keep and drop curves"]
    missing += (
        [] if e.null is not None else ["whether random directions of the same size do as much"]
    )
    if missing:
        sentences.append(f"Not measured: {', '.join(missing)}.")
    sentences.append(
        "All this is one prompt and one pair of answers; it says how much the modules move this "
        "margin, not by what mechanism."
    )
    return " ".join(sentences)
