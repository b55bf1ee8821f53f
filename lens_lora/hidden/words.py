"""The words of results about activations, which `print` shows below a result's heading."""

from __future__ import annotations

from lens_lora.core import drawing
from lens_lora.errors import many
from lens_lora.hidden.activation_shift import ActivationShift
from lens_lora.hidden.activations import Activations
from lens_lora.hidden.constant_part import ConstantPart
from lens_lora.hidden.feature_writes import FeatureWrites
from lens_lora.hidden.features import FeatureShift
from lens_lora.show.text import percent


@drawing.body.register(Activations)
def activations_body(activations: Activations) -> str:
    """Say how many tokens there are, and how many directions each site has."""
    tokens = many(sum(map(len, activations.str_tokens)), "token")
    ranks = ", ".join(map(str, dict.fromkeys(activations.ranks)))
    return f"{tokens} ({_left_out(activations)}), rank {ranks}"


@drawing.body.register(ActivationShift)
def activation_shift_body(shift: ActivationShift) -> str:
    """Say how many hook points there are, and how many tokens the means are over."""
    points = many(len(shift.names), "hook point")
    counted = int(shift.distinct.sum())
    return f"{points}, means over {counted} tokens ({_left_out(shift)})"


def _left_out(result: Activations | ActivationShift) -> str:
    """Say what means and examples leave out."""
    sinks = many(int(result.sinks.sum()), "sink")
    if not result.repeated:
        return sinks
    return f"{sinks}, {result.repeated} after the same tokens as earlier"


@drawing.body.register(ConstantPart)
def constant_part_body(constant: ConstantPart) -> str:
    """Say how much is constant, what the constants do alone, and where the share is largest."""
    share = f"held out, {percent(constant.total_share)} of Σ‖δ‖² is constant"
    kept = f"the constants alone keep {kept_by_constants(constant)}"
    return f"{share}, and {kept}\n{constant.top(5).to_string()}"


def kept_by_constants(constant: ConstantPart) -> str:
    """Say how much of the KL the constants keep, and of the readout, where one was given."""
    by_kl = f"{percent(constant.kept_kl)} of {constant.BY_KL}"
    if constant.readout == constant.BY_KL:
        return by_kl
    return f"{percent(constant.kept)} of {constant.readout}, and {by_kl}"


@drawing.body.register(FeatureShift)
def feature_shift_body(shift: FeatureShift) -> str:
    """List the features of largest shift; by position those of the first prompt."""
    if shift.by_position and len(shift.base) > 1:
        # Positions of several prompts have no mean.
        return f"prompt 0 of {len(shift.base)}:\n{shift.top(5, 0).to_string()}"
    return shift.top(5).to_string()


@drawing.body.register(FeatureWrites)
def feature_writes_body(writes: FeatureWrites) -> str:
    """List the largest writes."""
    return writes.top(k=5).to_string()
