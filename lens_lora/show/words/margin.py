"""A fact margin's story in plain words. Every sentence is a number of the result, no more.

A difference of at most three noise floors is called noise, and no share of it is given. How good
first order is was decided with the result (`analyses/verdict.py`); here it is put into words.
"""

from __future__ import annotations

from lens_lora.analyses.margin import FactMargin
from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt
from lens_lora.results.measured import SIGMAS
from lens_lora.show.text import magnitude, percent, share_text, signed, top_rows
from lens_lora.show.words.account import Account, account_of

__all__ = ["margin_story", "paragraphs_of"]

_TOP = 5


@drawing.story.register(FactMargin)
def margin_story(fact_margin: FactMargin, prompt: int | None = None) -> str:
    """One prompt's story, in three paragraphs: what happened, what first order says, where.

    Args:
        fact_margin: of one prompt or several.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: no such prompt, or several and none named.
    """
    return "\n".join(paragraphs_of(fact_margin, account_of(fact_margin, prompt), prompt))


def paragraphs_of(
    fact_margin: FactMargin, account: Account, prompt: int | None = None
) -> tuple[str, str, str]:
    """The three paragraphs, from an account at hand.

    Args:
        fact_margin: of one prompt or several.
        account: of the prompt.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: no such prompt, or several and none named.
    """
    happened = [_base(account), _units(account), _adapted(account), _flip(account)]
    return (
        " ".join(sentence for sentence in happened if sentence),
        f"{_first_order(account)} {_remainder(account)}",
        _modules(fact_margin, account, prompt),
    )


def _noise_text(floor: float) -> str:
    return f"below {SIGMAS:g} noise floors ({magnitude(floor)})"


def _preferred(account: Account, margin: float) -> tuple[str, str]:
    doc, pre = account.doc, account.pre
    return (doc, pre) if margin > 0 else (pre, doc)


def _base(a: Account) -> str:
    where = f"On the prompt “{a.prompt}”"
    if a.is_noise(a.m0):
        return (
            f"{where} the base model prefers neither {a.doc} nor {a.pre}: its margin of "
            f"{signed(a.m0)} {a.units} is {_noise_text(a.floor)}."
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
            f"The adapter moves this margin by {signed(a.shift)} {a.units}, "
            f"{_noise_text(a.floor)}: that cannot be told from rounding, so this run shows no "
            "effect of the adapter."
        )
    towards = a.doc if a.shift > 0 else a.pre
    moved = f"a shift of {magnitude(a.shift)} towards {towards}"
    if a.is_noise(a.m):
        return (
            f"With the adapter it prefers neither: its margin of {signed(a.m)} is "
            f"{_noise_text(a.floor)}, {moved}."
        )
    still = "still " if a.m * a.m0 > 0 and not a.is_noise(a.m0) else ""
    winner, _ = _preferred(a, a.m)
    return f"With the adapter it {still}prefers {winner}, by {magnitude(a.m)}: {moved}."


def _flip(a: Account) -> str:
    if a.is_noise(a.m0) or a.is_noise(a.m):
        return "Rounding hides whether the preference flips: rerun at a higher precision."
    if a.is_noise(a.shift):
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
    if a.is_noise(a.m0) or a.is_noise(a.m) or abs(a.predicted) <= a.remainder_floor:
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
            f"What it leaves, {signed(a.remainder)}, is {_noise_text(a.remainder_floor)} as well."
            if a.remainder_is_noise
            else f"It differs from the run by {signed(a.remainder)}, which is more than rounding."
        )
    v = a.verdict
    left = f"It leaves {signed(a.remainder)} at ε = 1"
    noise = _noise_text(a.remainder_floor)
    left += f", {noise}" if a.remainder_is_noise else f", {share_text(v.share)}"
    if v.worst is None or v.worst_scale is None:
        return f"{left}; {_ON_THE_WAY} no share of it stands out of the noise{_VERDICTS[v.kind]}."
    worst = f"{share_text(v.worst)} so far"
    if v.kind == "coincidence":
        return f"{left}, but at ε = {v.worst_scale:.3g} it leaves {worst}{_VERDICTS[v.kind]}."
    return (
        f"{left}, and {_ON_THE_WAY} at most {worst} (at ε = {v.worst_scale:.3g})"
        f"{_VERDICTS[v.kind]}."
    )


_ON_THE_WAY = "at a quarter, half and three quarters of the strength"
_VERDICTS: dict[str, str] = {
    "no_shift": "",
    "noise": "",
    "uneven": "",
    "small": ": as far as these strengths show, first order describes the whole path",
    "large": ": the modules' first-order parts do not add up to the shift",
    "coincidence": (
        ": the agreement at ε = 1 is a coincidence, and no sign that first order holds"
    ),
}


def _modules(fact_margin: FactMargin, a: Account, prompt: int | None) -> str:
    attribution = fact_margin.attribution
    index = only_prompt(prompt, len(attribution.base), "accounts")
    top, largest = top_rows(attribution, _TOP, index), attribution.per_site[index].abs().max()
    heading = f"Largest first-order parts of {len(attribution.sites)} modules"
    if a.is_noise(a.shift):
        return f"{heading}: {', '.join(f'{site} {value}' for site, _, value, _ in top)}."
    parts = ", ".join(f"{site} {value} ({share})" for site, _, value, share in top)
    return (
        f"{heading}, with their share of the shift: {parts}{_unconfirmed(a, float(largest))}; "
        f"all together {percent(a.first_order / a.shift)}."
    )
