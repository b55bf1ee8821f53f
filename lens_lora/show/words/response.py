"""A response's explanation in plain words: what was said, which tokens changed, which modules did.

Every sentence is a number of the result; what was not measured is said not to be.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from lens_lora.analyses.explain_response import ResponseExplanation
from lens_lora.results import drawing
from lens_lora.results.attribution import Attribution
from lens_lora.show.text import (
    magnitude,
    percent,
    points,
    prompt_text,
    short_prompt,
    signed,
    visible,
)

__all__ = ["half_held_by", "named", "response_story"]

_HALF = 0.5
_NAMED = 3
_SAID = 240


@drawing.story.register(ResponseExplanation)
def response_story(e: ResponseExplanation) -> str:
    """A paragraph a line: what was said, where it changed, the tokens, the modules, limits.

    Args:
        e: to be told.
    """
    paragraphs = [_said(e), _where(e), _token(e), _modules(e), _layers(e), _limits(e)]
    return "\n".join(filter(None, paragraphs))


def named(e: ResponseExplanation, t: int) -> str:
    """A token by its text and place: “·Lyon” (token 5).

    Args:
        e: whose response it is of.
        t: its place, from 0.
    """
    return f"“{visible(e.response[t])}” (token {t})"


def _said(e: ResponseExplanation) -> str:
    count, shifts = len(e.response), e.shifts
    base, adapted = (float(end[0].nansum()) for end in shifts.log_p)
    whose = "which the adapted model says itself" if e.is_generated else "as given"
    return (
        f"After “{short_prompt(e.prompt)}” the response has {count} "
        f"token{'' if count == 1 else 's'}, {whose}: “{_begun(e.response)}”. Its log p goes "
        f"from {signed(base)} nats in the base model to {signed(adapted)} with the adapter."
    )


def _begun(response: Sequence[str]) -> str:
    """A response as one line, its end left out where it is long; the page has it whole."""
    text = prompt_text(response)
    return text if len(text) <= _SAID else f"{text[:_SAID].rpartition(' ')[0]} …"


def _where(e: ResponseExplanation) -> str:
    kl = e.shifts.kl[0, 0]
    total = float(kl.nansum())
    if not total > 0:
        return "The adapter changes no token's distribution: KL is zero at each."
    half, most = half_held_by(kl.tolist()), int(kl.argsort(descending=True)[0])
    return (
        f"KL from the base model's distribution to the adapted one is {magnitude(total)} nats over "
        f"the response, {percent(float(kl[most]) / total)} of it at {named(e, most)}. "
        f"{half} of {len(kl)} tokens hold{'s' if half == 1 else ''} half of it."
    )


def half_held_by(kl: Sequence[float]) -> int:
    """How many tokens, the largest first, it takes to reach half of the divergence.

    Args:
        kl: of each token, not zero throughout.
    """
    values = sorted((v for v in kl if not math.isnan(v)), reverse=True)
    so_far = list(itertools.accumulate(values))
    return sum(total < _HALF * so_far[-1] for total in so_far) + 1


def _token(e: ResponseExplanation) -> str:
    t, shifts = e.moved_tokens[0], e.shifts
    p = [percent(float(end[0, t].exp())) for end in shifts.log_p]
    ranks = [int(end[0, t]) + 1 for end in shifts.rank]
    up, down = (
        f"“{visible(shifts.strings[str(int(ids[0, t, 0]))])}” ({points(float(change[0, t, 0]))})"
        for ids, change in (
            (shifts.promoted_ids, shifts.promoted),
            (shifts.suppressed_ids, shifts.suppressed),
        )
    )
    return (
        f"There the base model gives {named(e, t)} {p[0]}, rank {ranks[0]}, and the adapted model "
        f"{p[1]}, rank {ranks[1]}. The token promoted most is {up}, the one suppressed most {down}."
    )


def _modules(e: ResponseExplanation) -> str:
    if e.path is None:
        return (
            "To first order, leaving a module out of the adapted model takes the most from KL with "
            f"{_largest(e.modules)}."
        )
    return (
        f"The path integral splits KL completely among the {len(e.path.sites)} modules. The "
        f"largest shares are {_largest(e.path)}; {_spread(e.path)}."
    )


def _spread(path: Attribution) -> str:
    """How many modules, the largest first, it takes to reach half of the divergence."""
    values = path.per_site[0].sort(descending=True).values
    needed = int((values.cumsum(0) < _HALF * float(path.shift[0])).sum()) + 1
    return f"{min(needed, len(values))} of {len(values)} modules hold half of it"


def _largest(found: Attribution) -> str:
    values, shift = found.per_site[0], float(found.shift[0])
    order = values.abs().argsort(descending=True)[:_NAMED].tolist()
    return ", ".join(
        f"{found.sites[i].name} ({signed(float(values[i]))}"
        f"{f', {percent(float(values[i]) / shift)}' if shift else ''})"
        for i in order
    )


def _layers(e: ResponseExplanation) -> str:
    if e.add_one is None or e.leave_one_out is None:
        return ""
    parts = []
    for doing, values in (
        ("Added alone to the base model", e.add_one),
        ("Left out", e.leave_one_out),
    ):
        total = values.sum(1)
        at = int(total.abs().argmax())
        t = int(values[at].abs().argmax())
        verb = "changes" if doing.startswith("Added") else "takes"
        how = f"log p of the response by {signed(float(total[at]))} nats"
        if verb == "takes":
            how = f"{signed(float(total[at]))} nats of log p with it"
        parts.append(f"{doing}, {e.groups[at]} {verb} {how}, most at {named(e, t)}.")
    return f"{' '.join(parts)} {_together(e)}"


def _together(e: ResponseExplanation) -> str:
    """Whether single layers account for the shift, by the sums of both interventions."""
    shift = float(e.shifts.total[0])
    sums = [float(v.nansum()) for v in (e.add_one, e.leave_one_out) if v is not None]
    return (
        f"Over all {len(e.groups)} layers this sums to {signed(sums[0])} added and "
        f"{signed(sums[1])} left out, of a shift of {signed(shift)}: what differs from it is held "
        "by layers together."
    )


def _limits(e: ResponseExplanation) -> str:
    fast = " No layer was added or left out; run it without `fast` for that." if e.is_fast else ""
    return (
        "The numbers of tokens are exact. They are of this response: another one, of the same "
        f"prompt, may change elsewhere.{fast}"
    )
