"""An explained response in plain words.

Every number of a token is of two whole distributions, exactly; every sentence is a number of the
result, and what was not measured is said not to be.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from lens_lora.core import (
    Attribution,
    context_of,
    drawing,
)
from lens_lora.errors import many
from lens_lora.explanations.explanation import ResponseExplanation
from lens_lora.show import text
from lens_lora.show.text import magnitude, percent, points, short_prompt, signed, visible

_HALF = 0.5


MODULES_NAMED = 3


_SAID = 240  # characters of a response that its story quotes; the page has it whole


@drawing.story.register(ResponseExplanation)
def response_story(e: ResponseExplanation) -> str:
    """A paragraph a line: what was said, where it changed, the tokens, the modules, limits."""
    answers = "" if e.answers is None else f"On its own {text.answers_text(e.answers)}"
    moved = (
        " ".join(sentences) for sentences in (moved_texts(e), token_texts(e), modules_texts(e))
    )
    paragraphs = [_said(e), answers, *moved, text.caution_text(e.modules), _layers(e), _limits(e)]
    paragraphs.append(text.reading_text(e.shifts.meta))
    return "\n".join(filter(None, paragraphs))


def named_token(e: ResponseExplanation, t: int) -> str:
    """A token by its text and place, from 1, with its neighbours where the text repeats.

    “·Lyon” (token 6), “·is⟦·Lyon⟧.” (token 6).
    """
    repeats = e.response.count(e.response[t]) > 1
    shown = context_of(e.response, t, 1) if repeats else e.response[t]
    return f"“{visible(shown)}” (token {t + 1})"


def placed_token(e: ResponseExplanation, t: int) -> str:
    """'6 ·Lyon', in tables."""
    return f"{t + 1} {visible(e.response[t])}"


def _said(e: ResponseExplanation) -> str:
    base, adapted = (float(end[0].nansum()) for end in e.shifts.log_p)
    origin = "which the adapted model says itself" if e.is_generated else "as given"
    said = text.beginning_of(text.prompt_text(e.response), _SAID)
    return (
        f"After “{short_prompt(e.prompt)}” the response has {many(len(e.response), 'token')}, "
        f"{origin}: “{said}”. Its log p goes from {signed(base)} nats in the "
        f"base model to {signed(adapted)} with the adapter."
    )


def moved_texts(e: ResponseExplanation) -> list[str]:
    """How far the distributions move over the response, and how many tokens hold half of it."""
    kl, (total, share) = e.shifts.kl[0, 0], kl_and_most(e)
    if not total > 0:
        return ["The adapter changes no token's distribution: KL is zero at each."]
    values = kl[~kl.isnan()].tolist()
    half = _half_held_by(values, sum(values))
    return [
        f"KL from the base model's distribution to the adapted one is {magnitude(total)} nats over "
        f"the response, {share} of it at {named_token(e, e.moved_tokens[0])}.",
        f"{half} of {len(kl)} tokens hold{'s' if half == 1 else ''} half of it.",
    ]


def _half_held_by(values: Sequence[float], total: float) -> int:
    """How many of them, the largest first, it takes to reach half of the total."""
    sums = itertools.accumulate(sorted(values, reverse=True))
    return min(sum(so_far < _HALF * total for so_far in sums) + 1, len(values))


def token_texts(e: ResponseExplanation) -> list[str]:
    """What both models give where the distribution moves most."""
    t, shifts = e.moved_tokens[0], e.shifts
    p = [percent(float(end[0, t].exp())) for end in shifts.log_p]
    ranks = [int(end[0, t]) + 1 for end in shifts.rank]
    ends = (shifts.promoted_ids, shifts.promoted), (shifts.suppressed_ids, shifts.suppressed)
    up, down = (
        f"“{visible(shifts.strings[str(int(ids[0, t, 0]))])}” ({points(float(change[0, t, 0]))})"
        for ids, change in ends
    )
    return [
        f"There the base model gives “{visible(e.response[t])}” {p[0]}, rank {ranks[0]}, and the "
        f"adapted model {p[1]}, rank {ranks[1]}.",
        f"The token promoted most is {up}, the one suppressed most {down}.",
    ]


def ranked_attribution(e: ResponseExplanation) -> Attribution:
    """The split of the divergence that modules are ranked by: the complete one, where there is."""
    return e.modules if e.path is None else e.path


def modules_texts(e: ResponseExplanation) -> list[str]:
    """Which modules hold most of the divergence."""
    ranked = ranked_attribution(e)
    values, shift = ranked.per_site[0], float(ranked.shift[0])
    top = ", ".join(
        f"{site} ({value}{f', {share}' if shift else ''})"
        for site, _, value, share in text.top_rows(ranked, MODULES_NAMED, 0)
    )
    if e.path is None:
        done = "leaving a module out of the adapted model takes the most from KL with"
        return [f"To first order, {done} {top}."]
    needed, count = _half_held_by(values.tolist(), shift), len(values)
    how = " completely" if getattr(e.path.quadrature, "met", True) else ", but not completely,"
    split = f"The path integral splits KL{how} among the {many(count, 'module')}"
    half = f"{many(needed, 'module')} hold{'s' if needed == 1 else ''} half of it"
    return [f"{split}: the largest shares are {top}, and {half}."]


def _layers(e: ResponseExplanation) -> str:
    if e.add_one is None or e.leave_one_out is None:
        return ""
    adding, added, at_added = _strongest(e, e.add_one)
    leaving, lost, at_lost = _strongest(e, e.leave_one_out)
    sums = [signed(float(values.nansum())) for values in (e.add_one, e.leave_one_out)]
    return (
        f"Added alone to the base model, {adding} changes log p of the response by {added} nats, "
        f"most at {at_added}. Left out, {leaving} takes {lost} nats of log p with it, most at "
        f"{at_lost}. Over all {many(len(e.groups), 'layer')} this sums to {sums[0]} added and "
        f"{sums[1]} left out, of a shift of {signed(float(e.shifts.total[0]))}: what differs from "
        "it is held by layers together."
    )


def _strongest(e: ResponseExplanation, values: Any) -> tuple[str, str, str]:
    """The layer that changes log p of the response most, by how much, and at which token most."""
    totals = values.sum(1)
    layer = int(totals.abs().argmax())
    token = int(values[layer].abs().argmax())
    return e.groups[layer], signed(float(totals[layer])), named_token(e, token)


def _limits(e: ResponseExplanation) -> str:
    fast = " No layer was added or left out; run it without `fast` for that." if e.is_fast else ""
    of_this = "They are of this response: another one, of the same prompt, may change elsewhere."
    return f"The numbers of tokens are exact. {of_this}{fast}"


def kl_and_most(e: ResponseExplanation) -> tuple[float, str]:
    """KL over the response, and the share of it at the token that moved most."""
    kl = e.shifts.kl[0, 0].double()
    return float(kl.nansum()), percent(float(kl[e.moved_tokens[0]] / kl.nansum()))
