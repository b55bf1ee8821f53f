"""The words of second order and of coupling."""

from __future__ import annotations

from lens_lora.core import drawing
from lens_lora.curvature.coupling import Coupling
from lens_lora.curvature.second_order import SecondOrder
from lens_lora.curvature.verdict import SecondVerdict
from lens_lora.show.text import below_text


@drawing.text.register(SecondVerdict)
def second_text(v: SecondVerdict) -> str:
    """Say whether second order is nearer to the exact shift than first order."""
    if v.kind == "no_shift":
        return below_text("shift", v.shift, v.floor)
    second = f"{abs(v.second / v.shift):.1%}"
    first = f"{abs(v.first / v.shift):.1%}"
    left = f"misses {second} of the shift at ε = 1, first order {first}"
    reach = f"{v.helps_up_to:.2g}"
    return {
        "neither": f"neither nearer nor farther, within rounding: {left}",
        "farther": f"farther, no correction: {left}; nearer only up to ε = {reach}",
        "coincidence": f"nearer at ε = 1 by coincidence: {left}; farther from ε > {reach}",
        "nearer": f"nearer: {left}",
    }[v.kind]


_DIAGNOSTIC = "a diagnostic of curvature at ε = 0, not a correction at ε = 1\n"


@drawing.body.register(SecondOrder)
def _second_order(second: SecondOrder) -> str:
    frame = second.to_frame().assign(verdict=list(map(str, second.verdict)))
    return f"{_DIAGNOSTIC}{frame.to_string()}"


@drawing.body.register(Coupling)
def _coupling(coupling: Coupling) -> str:
    shares = coupling.shares().to_string()
    if len(coupling.groups) == 1:
        return shares
    return f"{shares}\nstrongest pairs, mean over prompts:\n{coupling.top(5).to_string()}"
