"""An explained response in plain words.

Every number of a token is computed exactly from two whole distributions. Every sentence states a
number of the result, and says so if something was not measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from lens_lora.core import Attribution, drawing
from lens_lora.errors import many, worded
from lens_lora.explanations.explanation import ResponseExplanation
from lens_lora.shifts.token_shifts import TokenShifts
from lens_lora.show import text
from lens_lora.show.text import (
    context_of,
    magnitude,
    percent,
    points,
    short_prompt,
    signed,
    visible,
)
from lens_lora.views.attribution_words import caution_text, top_sites

# How many modules a sentence names.
MODULES_NAMED = 3
# How many characters of a response its story quotes; the page has it whole.
_QUOTED = 240


@drawing.story.register(ResponseExplanation)
def response_story(e: ResponseExplanation) -> str:
    """One paragraph per line: the response, where it changed, the tokens, the modules, limits."""
    paragraphs = [_said(e)]
    if e.answers is not None:
        paragraphs.append(f"On its own {text.answers_text(e.answers)}")
    for sentences in (moved_texts(e), token_texts(e), modules_texts(e)):
        paragraphs.append(" ".join(sentences))
    paragraphs += [
        caution_text(e.modules),
        _layers(e),
        _limits(e),
        text.reading_text(e.shifts.meta),
    ]
    return "\n".join(filter(None, paragraphs))


def named_token(e: ResponseExplanation, t: int) -> str:
    """A token by its text and place, from 1, with its neighbours where the text repeats.

    “·Lyon” (token 6), “·is⟦·Lyon⟧.” (token 6).
    """
    token = e.response[t]
    is_repeated = e.response.count(token) > 1
    shown = context_of(e.response, t, 1) if is_repeated else token
    return f"“{visible(shown)}” (token {t + 1})"


def placed_token(e: ResponseExplanation, t: int) -> str:
    """A token after its place, as tables show it: '6 ·Lyon'."""
    return f"{t + 1} {visible(e.response[t])}"


def _said(e: ResponseExplanation) -> str:
    base = float(e.shifts.log_p[0, 0].nansum())
    adapted = float(e.shifts.log_p[1, 0].nansum())
    length = many(len(e.response), "token")
    opening = f"the adapted model says, in {length}"
    if not e.is_generated:
        opening = f"the response that was given has {length}"
    said = text.beginning_of(text.prompt_text(e.response), _QUOTED)
    return (
        f"After “{short_prompt(e.prompt)}” {opening}: “{said}”. The base model gives it a "
        f"log-probability of {signed(base)} nats, the adapted model {signed(adapted)}."
    )


def moved_texts(e: ResponseExplanation) -> list[str]:
    """How far the distributions move over the response, and how many tokens hold half of it."""
    total, share = kl_and_most(e)
    if not total > 0:
        return ["The adapter changes no token's distribution: KL is zero at each."]
    kl = e.shifts.kl[0, 0]
    values = kl[~kl.isnan()].tolist()
    count = _count_of_half(values, sum(values))
    hold = "holds" if count == 1 else "hold"
    return [
        f"Over the response the adapted model's KL from the base is {magnitude(total)} nats, "
        f"{share} of it at {named_token(e, e.moved_tokens[0])}.",
        f"{count} of {len(kl)} tokens {hold} half of it.",
    ]


def _count_of_half(values: Sequence[float], total: float) -> int:
    """The number of values, the largest first, that reach half of the total."""
    count = 0
    for so_far in itertools.accumulate(sorted(values, reverse=True)):
        count += 1
        if so_far >= total / 2:
            break
    return count


def token_texts(e: ResponseExplanation) -> list[str]:
    """The sentence on what both models give where the distribution moves most."""
    shifts = e.shifts
    t = e.moved_tokens[0]
    probabilities = [percent(float(end[0, t].exp())) for end in shifts.log_p]
    ranks = [int(end[0, t]) + 1 for end in shifts.rank]
    promoted = _changed_most(shifts, shifts.promoted_ids, shifts.promoted, t)
    suppressed = _changed_most(shifts, shifts.suppressed_ids, shifts.suppressed, t)
    return [
        f"There the base model gives “{visible(e.response[t])}” {probabilities[0]}, rank "
        f"{ranks[0]}, and the adapted model {probabilities[1]}, rank {ranks[1]}.",
        f"The token promoted most is {promoted}, the one suppressed most {suppressed}.",
    ]


def _changed_most(shifts: TokenShifts, ids: Tensor, changes: Tensor, t: int) -> str:
    """The first of the tokens that changed at this place, with the change of its probability."""
    token = shifts.strings[str(int(ids[0, t, 0]))]
    change = float(changes[0, t, 0])
    return f"“{visible(token)}” ({points(change)})"


def ranked_attribution(e: ResponseExplanation) -> Attribution:
    """The split of the divergence that ranks the modules: the complete one if there is one."""
    return e.modules if e.path is None else e.path


def modules_texts(e: ResponseExplanation) -> list[str]:
    """The sentence on which modules hold most of the divergence."""
    ranked = ranked_attribution(e)
    shift = float(ranked.shift[0])
    largest: list[str] = []
    for top in top_sites(ranked, MODULES_NAMED, 0):
        numbers = f"{top.value}, {top.share}" if shift else top.value
        largest.append(f"{top.site} ({numbers})")
    modules = ", ".join(largest)
    if e.path is None:
        return [f"By the estimate of first order, KL would fall most without {modules}."]
    values = ranked.per_site[0].tolist()
    count = _count_of_half(values, shift)
    is_complete = e.path.quadrature is None or e.path.quadrature.met
    completely = " completely" if is_complete else ", but not completely,"
    hold = "holds" if count == 1 else "hold"
    return [
        f"The path integral splits KL{completely} among the {many(len(values), 'module')}: the "
        f"largest shares are {modules}, and {many(count, 'module')} {hold} half of it."
    ]


def _layers(e: ResponseExplanation) -> str:
    if e.add_one is None or e.leave_one_out is None:
        return ""
    added = _strongest_layer(e, e.add_one)
    left_out = _strongest_layer(e, e.leave_one_out)
    sum_added = signed(float(e.add_one.nansum()))
    sum_lost = signed(float(e.leave_one_out.nansum()))
    shift = signed(float(e.shifts.total[0]))
    return (
        f"Added alone to the base model, {added.layer} changes log p of the response by "
        f"{added.effect} nats, most at {added.token}. Left out, {left_out.layer} takes "
        f"{left_out.effect} nats of log p with it, most at {left_out.token}. Summed over all "
        f"{many(len(e.groups), 'layer')}, adding gives {sum_added} and leaving out {sum_lost}, of "
        f"a shift of {shift}; the rest is what layers do only together."
    )


class _Strongest(NamedTuple):
    """The layer that changes log p of a response most.

    Attributes:
        layer: its name.
        effect: how much it changes log p, in nats.
        token: the token at which it changes log p most.
    """

    layer: str
    effect: str
    token: str


def _strongest_layer(e: ResponseExplanation, values: Float[Tensor, "group token"]) -> _Strongest:
    """The layer of the largest effect, by the effect of each layer on each token."""
    totals = values.sum(1)
    layer = int(totals.abs().argmax())
    token = int(values[layer].abs().argmax())
    return _Strongest(e.groups[layer], signed(float(totals[layer])), named_token(e, token))


def _limits(e: ResponseExplanation) -> str:
    limits = (
        "The numbers of tokens are exact. They are of this response: another one, of the same "
        "prompt, may change elsewhere."
    )
    if e.is_fast:
        how = worded("`fast`", "--fast")
        limits += f" No layer was added or left out; run it without {how} for that."
    return limits


def kl_and_most(e: ResponseExplanation) -> tuple[float, str]:
    """KL over the response, and the share of it at the token that moved most."""
    kl = e.shifts.kl[0, 0].double()
    total = kl.nansum()
    share = kl[e.moved_tokens[0]] / total
    return float(total), percent(float(share))
