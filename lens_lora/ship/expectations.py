"""Margins that an adapter is expected to reach, such as a fact that is to flip.

A margin is the logit of one answer minus that of another (or the difference of their
log-probabilities if an answer has several tokens). A check is undecided where rounding alone could
decide whether the margin is as expected.

Cost: ten forward passes for each expectation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lens_lora.core import SIGMAS, Evaluations, LoraLens, alone
from lens_lora.errors import LensLoraError, PromptError
from lens_lora.responses.answers import margin_between
from lens_lora.ship.checks import Check, Outcome

EXPECTATION = "expectation"


class Expectation(NamedTuple):
    """A demand on the margin of two answers after one prompt.

    Attributes:
        where: the line of the file that states it.
        prompt: a text or a conversation.
        doc: the answer that the fine-tune taught.
        pre: the answer that the base model gives.
        flips: True if the margin is to go from `pre` to `doc`, False if it is to keep its sign.
        at_least: the least margin that the adapted model is to have. It is zero if neither `flips`
            nor this is given.
    """

    where: str
    prompt: str | Sequence[Mapping[str, str]]
    doc: str
    pre: str
    flips: bool | None = None
    at_least: float | None = None


class _Bound(NamedTuple):
    """One demand on a margin.

    Attributes:
        text: the demand in words.
        holds: whether the computed margins meet it.
        is_hidden: whether rounding could decide it.
    """

    text: str
    holds: bool
    is_hidden: bool


class _Margins(NamedTuple):
    """The margin of the base and of the adapted model, and how far rounding moves each."""

    before: float
    after: float
    floor_before: float
    floor_after: float


@alone
def expectation_check(lens: LoraLens, expectation: Expectation) -> Check:
    """Check one expectation.

    Args:
        lens: the adapter over the base model.
        expectation: the margin that is to hold.

    Raises:
        PromptError: the prompt or an answer does not fit the model.
    """
    margins = _measured(lens, expectation)
    bounds = _bounds(expectation, margins)
    outcome = _outcome(bounds)
    where = ""
    if outcome != "passed":
        answers = f"{expectation.doc!r} against {expectation.pre!r}"
        where = f"{answers} after {_last_words(expectation.prompt)!r}"
    measured = f"margin {margins.before:+.3g} → {margins.after:+.3g}".replace("-", "−")
    return Check(
        name=f"{EXPECTATION}, {expectation.where}",
        outcome=outcome,
        measured=measured,
        bound=" and ".join(bound.text for bound in bounds),
        where=where,
        value=margins.after,
    )


def _measured(lens: LoraLens, expectation: Expectation) -> _Margins:
    try:
        prompts = lens.prompts(expectation.prompt)
        margin = margin_between(lens.model, expectation.doc, expectation.pre, prompts)
        g = Evaluations(lens.function(prompts, margin, progress=False))
    except LensLoraError as error:
        raise PromptError(f"{expectation.where}: {error}") from error
    before, after = g.ends[:, 0].tolist()
    floor_before = SIGMAS * float(g.noise((1.0,), at=0.0))
    floor_after = SIGMAS * float(g.noise((1.0,), at=1.0))
    return _Margins(before, after, floor_before, floor_after)


def _bounds(expectation: Expectation, margins: _Margins) -> list[_Bound]:
    bounds: list[_Bound] = []
    if expectation.flips is not None:
        bounds.append(_sign_bound(expectation.flips, margins))
    if expectation.at_least is not None or expectation.flips is None:
        least = expectation.at_least or 0.0
        is_hidden = abs(margins.after - least) <= margins.floor_after
        bounds.append(_Bound(f"at least {least:g}", margins.after >= least, is_hidden))
    return bounds


def _sign_bound(flips: bool, margins: _Margins) -> _Bound:
    is_hidden = (
        abs(margins.before) <= margins.floor_before or abs(margins.after) <= margins.floor_after
    )
    if flips:
        return _Bound("goes from pre to doc", margins.before < 0 < margins.after, is_hidden)
    keeps_sign = (margins.before < 0) == (margins.after < 0)
    return _Bound("keeps its sign", keeps_sign, is_hidden)


def _outcome(bounds: list[_Bound]) -> Outcome:
    if any(not bound.holds and not bound.is_hidden for bound in bounds):
        return "failed"
    if any(bound.is_hidden for bound in bounds):
        return "undecided"
    return "passed"


def _last_words(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """A text itself, or the last message of a conversation."""
    if isinstance(prompt, str):
        return prompt
    return str(prompt[-1].get("content"))
