"""Verdicts as phrases, each with its numbers; what they say is decided in `analyses/verdict.py`."""

from __future__ import annotations

from lens_lora.analyses.verdict import FlipVerdict, NullVerdict, SecondVerdict, Verdict
from lens_lora.results import drawing

__all__ = ["flip_text", "null_text", "second_text", "verdict_text"]


@drawing.text.register(Verdict)
def verdict_text(verdict: Verdict) -> str:
    """How good first order is.

    Args:
        verdict: on the remainder of one prompt.
    """
    v = verdict
    if v.kind == "no_shift":
        return _below("shift", v.shift, v.floor)
    if v.kind == "noise":
        return _below("remainder", v.remainder, v.remainder_floor)
    on_the_way = "on the way within rounding"
    if v.worst is not None:
        on_the_way = f"{v.worst:.0%} of the shift at ε = {v.worst_scale:g}"
    if v.kind == "coincidence":
        return f"a coincidence at ε = 1: {v.share:.1%} of the shift there, but {on_the_way}"
    if v.kind == "large":
        return f"large: {v.share:.0%} of the shift at ε = 1, {on_the_way}"
    most = "" if v.worst is None else "at most "
    return f"{v.kind}: {v.share:.1%} of the shift at ε = 1, {most}{on_the_way}"


@drawing.text.register(SecondVerdict)
def second_text(verdict: SecondVerdict) -> str:
    """Whether second order is nearer than first.

    Args:
        verdict: on one prompt.
    """
    v = verdict
    if v.kind == "no_shift":
        return _below("shift", v.shift, v.floor)
    left = (
        f"leaves {abs(v.second / v.shift):.1%} of the shift at ε = 1, first order "
        f"{abs(v.first / v.shift):.1%}"
    )
    reach = f"ε = {v.helps_up_to:.2g}"
    return {
        "neither": f"neither nearer nor farther, within rounding: {left}",
        "farther": f"farther, no correction: {left}; nearer only up to {reach}",
        "coincidence": (
            f"nearer at ε = 1 by coincidence: {left}; farther on the way, from ε > "
            f"{v.helps_up_to:.2g}"
        ),
        "nearer": f"nearer: {left}",
    }[v.kind]


@drawing.text.register(NullVerdict)
def null_text(verdict: NullVerdict) -> str:
    """How far the shift stands out from random directions.

    Args:
        verdict: on one prompt.
    """
    v = verdict
    if v.kind == "no_shift":
        return _below("shift", v.shift, v.floor)
    many = f"{v.ratio:.0f}" if v.ratio >= 10 else f"{v.ratio:.2g}"
    least = "at least " if v.is_least else ""
    times = f"{least}{many} times what random directions of the same size give"
    found = f"the adapter's shift is {times}"
    if v.kind == "as_random":
        found = f"no more than random directions: the shift is {times} (p = {v.p:.2g})"
    return (
        f"{found}; {v.exceeds_all:.0%} of sites exceed every one of {v.draws} draws "
        f"({v.chance:.1%} would by chance)"
    )


@drawing.text.register(FlipVerdict)
def flip_text(verdict: FlipVerdict) -> str:
    """Whether a margin flips, or rounding hides it.

    Args:
        verdict: on one prompt.
    """
    v = verdict
    if v.kind != "hidden":
        return f"{v.kind}: from {v.m0:+.3g} to {v.m:+.3g}"
    names = {"m0": v.m0, "m": v.m}
    near = [f"{name} = {value:+.2g}" for name, value in names.items() if abs(value) <= v.floor]
    verb = "is" if len(near) == 1 else "are"
    return (
        f"hidden: {' and '.join(near)} {verb} within rounding ({v.floor:.2g}), so the sign is not "
        "known; rerun in float32 or float64"
    )


def _below(what: str, value: float, floor: float) -> str:
    return f"below the noise: the {what} {value:.2g} is within rounding ({floor:.2g})"
