"""A fact margin's story in plain words. Every sentence is a number of the result, no more.

A difference under three noise floors is called that, and no share of it is given. First order is
called good only where it is good along the path, since one point can agree by coincidence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lens_lora.show.text import magnitude, percent, share_text, signed, top_rows
from lens_lora.show.words.account import SIGMAS, Account, Step, account_of

if TYPE_CHECKING:
    from lens_lora.analyses.margin import FactMargin

__all__ = ["margin_story", "paragraphs_of"]

SMALL, LARGE = 0.1, 0.2
_TOP = 5


def margin_story(fact_margin: FactMargin, prompt: int = 0) -> str:
    """One prompt's story, in three paragraphs: what happened, what first order says, where."""
    return "\n".join(paragraphs_of(fact_margin, account_of(fact_margin, prompt), prompt))


def paragraphs_of(
    fact_margin: FactMargin, account: Account, prompt: int = 0
) -> tuple[str, str, str]:
    """The three paragraphs, from an account at hand."""
    happened = [_base(account), _units(account), _adapted(account), _flip(account)]
    return (
        " ".join(sentence for sentence in happened if sentence),
        f"{_first_order(account)} {_remainder(account)}",
        _modules(fact_margin, account, prompt),
    )


def _noise_text(account: Account) -> str:
    return f"below {SIGMAS:g} noise floors ({magnitude(account.floor)})"


def _preferred(account: Account, margin: float) -> tuple[str, str]:
    doc, pre = account.doc, account.pre
    return (doc, pre) if margin > 0 else (pre, doc)


def _base(a: Account) -> str:
    where = f"On the prompt “{a.prompt}”"
    if a.is_noise(a.m0):
        return (
            f"{where} the base model prefers neither {a.doc} nor {a.pre}: its margin of "
            f"{signed(a.m0)} {a.units} is {_noise_text(a)}."
        )
    winner, loser = _preferred(a, a.m0)
    return f"{where} the base model prefers {winner} to {loser} by {magnitude(a.m0)} {a.units}."


def _units(a: Account) -> str:
    """What a margin in nats is of."""
    if a.units != "nats":
        return ""
    return "(A margin in nats is a difference of the whole answers' log-probabilities.)"


def _adapted(a: Account) -> str:
    if a.is_noise(a.shift):
        return (
            f"The adapter moves this margin by {signed(a.shift)} {a.units}, {_noise_text(a)}: that "
            "cannot be told from rounding, so this run shows no effect of the adapter."
        )
    towards = a.doc if a.shift > 0 else a.pre
    moved = f"a shift of {magnitude(a.shift)} towards {towards}"
    if a.is_noise(a.m):
        return (
            f"With the adapter it prefers neither: its margin of {signed(a.m)} is "
            f"{_noise_text(a)}, {moved}."
        )
    still = "still " if a.m * a.m0 > 0 and not a.is_noise(a.m0) else ""
    winner, _ = _preferred(a, a.m)
    return f"With the adapter it {still}prefers {winner}, by {magnitude(a.m)}: {moved}."


def _flip(a: Account) -> str:
    if a.is_noise(a.shift) or a.is_noise(a.m0) or a.is_noise(a.m):
        return ""
    if a.flips and a.flip_scale is None:
        return "The preference flips, at a strength that was not located."
    if a.flips:
        more = f", the first of {a.crossings} changes on the way" if a.crossings > 1 else ""
        return (
            f"The preference flips at ε = {a.flip_scale:.3g}, with the adapter at "
            f"{percent(a.flip_scale or 0.0)} of its strength{more}."
        )
    if a.crossings:
        where = "" if a.flip_scale is None else f" at ε = {a.flip_scale:.3g}"
        return f"On the way the preference flips{where} and has flipped back at ε = 1."
    if a.flip_scale is not None:
        return f"On the way, near ε = {a.flip_scale:.3g}, the margin comes within rounding of zero."
    return f"The preference flips at none of the {len(a.steps)} strengths that were run."


def _first_order(a: Account) -> str:
    if a.is_noise(a.shift):
        return (
            "First order at ε = 0, a derivative and not a difference, gives "
            f"{signed(a.first_order)} {a.units}{_unconfirmed(a, a.first_order)}."
        )
    text = (
        f"First order at ε = 0 predicts a shift of {signed(a.first_order)} {a.units}, to a margin "
        f"of {signed(a.predicted)}"
    )
    if any(a.is_noise(margin) for margin in (a.m0, a.m, a.predicted)):
        return f"{text}."
    verdict = {
        (True, True): "it predicts the flip",
        (True, False): "it predicts a flip, and at ε = 1 there is none",
        (False, True): "it misses the flip",
        (False, False): "it predicts no flip, and at ε = 1 there is none",
    }[a.flip_predicted, a.flips]
    return f"{text}: {verdict}."


def _unconfirmed(a: Account, value: float) -> str:
    return ", too small for a run at this precision to confirm" if a.is_noise(value) else ""


def _remainder(a: Account) -> str:
    if a.is_noise(a.shift):
        return (
            f"What it leaves, {signed(a.remainder)}, is {_noise_text(a)} as well."
            if a.is_noise(a.remainder)
            else f"It differs from the run by {signed(a.remainder)}, which is more than rounding."
        )
    here, worst = abs(a.remainder / a.shift), a.worst_on_the_way
    left = f"It leaves {signed(a.remainder)} at ε = 1"
    left += f", {_noise_text(a)}" if a.is_noise(a.remainder) else f", {share_text(here)}"
    if worst is None:
        return f"{left}; on the way no share of it stands out of the noise."
    if here <= SMALL and (worst.share or 0.0) > LARGE:
        return (
            f"{left}, but {_at(worst)} it leaves {share_text(worst.share or 0.0)} so far: the "
            "agreement at ε = 1 is a coincidence, and no sign that first order holds."
        )
    most = f"on the way at most {share_text(worst.share or 0.0)} so far ({_at(worst)})"
    return f"{left}, and {most}{_verdict(here, worst)}."


def _at(step: Step) -> str:
    return f"at ε = {step.scale:.3g}"


def _verdict(here: float, worst: Step) -> str:
    largest = max(here, worst.share or 0.0)
    if largest <= SMALL:
        return ": first order describes the whole path"
    if here > SMALL:
        return ": the modules' first-order parts do not add up to the shift"
    return ""


def _modules(fact_margin: FactMargin, a: Account, prompt: int) -> str:
    attribution = fact_margin.attribution
    top, largest = top_rows(attribution, _TOP, prompt), attribution.per_site[prompt].abs().max()
    heading = f"Largest first-order parts of {len(attribution.sites)} modules"
    if a.is_noise(a.shift):
        return f"{heading}: {', '.join(f'{site} {value}' for site, _, value, _ in top)}."
    parts = ", ".join(f"{site} {value} ({share})" for site, _, value, share in top)
    return (
        f"{heading}, with their share of the shift: {parts}{_unconfirmed(a, float(largest))}; "
        f"all together {percent(a.first_order / a.shift)}."
    )
