"""Signals that may warn that an estimate is broken, without an intervention.

strength                     ‖ΔW‖ / ‖W‖ over the adapted modules
shift                        mean |g(1) − g(0)|, in the readout's units
sum_at_0, sum_at_1           Σ a at each end over the shift: 1 where g is linear
ends_apart                   1 − Spearman of a at 0 and at 1
half_apart_0, half_apart_1   1 − Spearman of a at ½ and at 0, at ½ and at 1
relative_gap                 Σ|a(1) − a(0)| / Σ|a(0)|
path_gap                     |Σ path/4 − shift| / |shift|: what four nodes leave open
"""

from __future__ import annotations

from collections.abc import Mapping

from scipy.stats import spearmanr
from torch import Tensor

from lens_lora.core import Evaluations


def signals_of(g: Evaluations, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Every signal by its name, in the mean over prompts."""
    base, adapted = g.ends.cpu().double()
    shift = adapted - base
    at_0 = parts["first_order@0"]
    at_half = parts["first_order@0.5"]
    at_1 = parts["first_order@1"]
    gap = (at_1 - at_0).abs().sum() / at_0.abs().sum()
    return {
        "strength": g.lens.plan.relative_norm,
        "shift": float(shift.abs().mean()),
        "sum_at_0": share_of(shift, at_0),
        "sum_at_1": share_of(shift, at_1),
        "ends_apart": apart(at_0, at_1),
        "half_apart_0": apart(at_half, at_0),
        "half_apart_1": apart(at_half, at_1),
        "relative_gap": float(gap),
        "path_gap": abs(share_of(shift, parts["path/4"]) - 1),
    }


def share_of(shift: Tensor, values: Tensor) -> float:
    """Σ_l of the values over the shift, all prompts together; each counts towards its own shift.

    Args:
        shift: [prompt], g(1) − g(0).
        values: [prompt, site].
    """
    sum_of_each = values.sum(1)
    return float((sum_of_each * shift.sign()).sum() / shift.abs().sum())


def apart(one: Tensor, other: Tensor) -> float:
    """1 − Spearman's correlation of two sets of values [prompt, site], in the mean over prompts."""
    pairs = zip(one.numpy(), other.numpy(), strict=True)
    correlations = [spearmanr(a, b).statistic for a, b in pairs]
    return float(1 - sum(correlations) / len(correlations))
