"""The top of a page: three sentences and four numbers of one prompt, before anything else.

They say what the whole story says, and no more: within rounding nothing is compared.
"""

from __future__ import annotations

import dataclasses

from lens_lora.analyses.explain_all import Explanations
from lens_lora.analyses.explain_margin import Explanation
from lens_lora.analyses.explain_response import ResponseExplanation
from lens_lora.results import drawing
from lens_lora.results.attribution import Attribution
from lens_lora.show.text import magnitude, percent, short_prompt, signed, top_rows
from lens_lora.show.words.account import Account
from lens_lora.show.words.explanation import explained_account
from lens_lora.show.words.response import half_held_by, named

__all__ = [
    "Headline",
    "explanations_story",
    "largest_module",
    "margin_headline",
    "response_headline",
]

_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Headline:
    """What a reader in a hurry takes away.

    Attributes:
        sentences: three.
        numbers: four, each (value, what it is).
    """

    sentences: tuple[str, str, str]
    numbers: tuple[tuple[str, str], ...]


def margin_headline(e: Explanation) -> Headline:
    """Of two answers: what changed, how far first order holds, and where.

    Args:
        e: the explanation of one prompt.
    """
    a = explained_account(e)
    flip = "no flip" if a.flip_scale is None else f"ε = {a.flip_scale:.2g}"
    numbers = (
        (signed(a.m0), f"{a.units}, margin {a.doc} − {a.pre} in the base model"),
        (signed(a.m), f"{a.units}, with the adapter"),
        (flip, "strength at which the preference flips"),
        (_found(a), "of the shift is in the first-order parts"),
    )
    return Headline((_preferences(a), _first_order(a), _where(e, a)), numbers)


@drawing.story.register(Explanations)
def explanations_story(found: Explanations) -> str:
    """Each prompt by number, with its headline.

    Args:
        found: to be told.
    """
    return "\n".join(
        f"{n}. “{short_prompt(e.prompt)}”: {' '.join(margin_headline(e).sentences)}"
        for n, e in enumerate(found, start=1)
    )


def largest_module(e: Explanation) -> str:
    """The site of the largest first-order part, with its value.

    Args:
        e: the explanation of one prompt.
    """
    ((site, _, value, _),) = top_rows(e.first_order, 1)
    return f"{site} {value}"


def _found(a: Account) -> str:
    return "noise" if a.is_noise(a.shift) else percent(a.first_order / a.shift)


def _preferences(a: Account) -> str:
    if a.is_noise(a.shift):
        return (
            f"The adapter moves the margin {a.doc} − {a.pre} by {signed(a.shift)} {a.units}, which "
            "cannot be told from rounding."
        )
    before, after = _preferred(a, a.m0), _preferred(a, a.m)
    by = [
        "" if a.is_noise(m) else f" by {magnitude(m)}{units}"
        for m, units in ((a.m0, f" {a.units}"), (a.m, ""))
    ]
    if before == after:
        return f"Both models prefer {before}: the base model{by[0]}, the adapted one{by[1]}."
    return f"The base model prefers {before}{by[0]}, the adapted one {after}{by[1]}."


def _preferred(a: Account, margin: float) -> str:
    if a.is_noise(margin):
        return "neither"
    return a.doc if margin > 0 else a.pre


def _first_order(a: Account) -> str:
    if a.is_noise(a.shift):
        return f"First order gives {signed(a.first_order)} {a.units}, a derivative."
    parts = f"The modules' first-order parts sum to {percent(a.first_order / a.shift)} of the shift"
    return (
        parts
        + {
            "small": ", and hold along the whole path as far as it was run.",
            "large": ": they do not add up to it.",
            "coincidence": ", but only at full strength, by coincidence: on the way they do not.",
            "uneven": ", more or less along the way.",
            "noise": "; what they leave is within rounding.",
            "no_shift": ".",
        }[a.verdict.kind]
    )


def _where(e: Explanation, a: Account) -> str:
    noise = a.is_noise(a.shift)
    parts = [
        f"{site} ({value}{'' if noise else f', {share}'})"
        for site, _, value, share in top_rows(e.first_order, _NAMED)
    ]
    return f"Of {len(e.first_order.sites)} modules the largest parts are {_listed(parts)}."


def response_headline(e: ResponseExplanation) -> Headline:
    """Of a response: how far it moved, where most, and which modules moved it.

    Args:
        e: the explanation of one prompt's response.
    """
    kl, t = e.shifts.kl[0, 0], e.moved_tokens[0]
    total = float(kl.nansum())
    before, after = (percent(float(end[0, t].exp())) for end in e.shifts.log_p)
    largest = e.modules if e.path is None else e.path
    values, shift = largest.per_site[0], float(largest.shift[0])
    most = percent(float(values.abs().max()) / shift) if shift else "—"
    what = "the path integral" if e.path is not None else "first order at ε = 1"
    numbers = (
        (magnitude(total), f"nats, KL over {len(e.response)} tokens"),
        (percent(float(kl[t]) / total) if total else "—", f"of it at {named(e, t)}"),
        (f"{before} → {after}", "probability of that token, base → adapted"),
        (most, f"of KL at the largest module, by {what}"),
    )
    return Headline((_apart(e, total), _token(e, before, after), _modules(largest)), numbers)


def _apart(e: ResponseExplanation, total: float) -> str:
    if not total > 0:
        return "The adapter changes no token's distribution."
    held = half_held_by(e.shifts.kl[0, 0].tolist())
    return (
        f"The adapter moves the distributions behind this response by {magnitude(total)} nats of "
        f"KL; {held} of {len(e.response)} tokens hold{'s' if held == 1 else ''} half of it."
    )


def _token(e: ResponseExplanation, before: str, after: str) -> str:
    return (
        f"Most at {named(e, e.moved_tokens[0])}: the base model gives it {before}, the adapted "
        f"one {after}."
    )


def _modules(found: Attribution) -> str:
    parts = [f"{site} ({share})" for site, _, _, share in top_rows(found, _NAMED)]
    return f"Of {len(found.sites)} modules the largest shares are {_listed(parts)}."


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
