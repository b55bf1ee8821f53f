"""What may warn that an estimate is broken, without an intervention.

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
    """Every signal, the mean over prompts."""
    base, adapted = g.ends.cpu().double()
    shift = adapted - base
    at = {key: parts[f"first_order@{key}"] for key in ("0", "0.5", "1")}
    signs = shift.sign()
    size = shift.abs().sum()

    def share(values: Tensor) -> float:
        return float((values.sum(1) * signs).sum() / size)

    gap = (at["1"] - at["0"]).abs().sum() / at["0"].abs().sum()
    return {
        "strength": g.lens.plan.relative_norm,
        "shift": float(shift.abs().mean()),
        "sum_at_0": share(at["0"]),
        "sum_at_1": share(at["1"]),
        "ends_apart": apart(at["0"], at["1"]),
        "half_apart_0": apart(at["0.5"], at["0"]),
        "half_apart_1": apart(at["0.5"], at["1"]),
        "relative_gap": float(gap),
        "path_gap": abs(share(parts["path/4"]) - 1),
    }


def apart(one: Tensor, other: Tensor) -> float:
    found = [spearmanr(a, b).statistic for a, b in zip(one.numpy(), other.numpy(), strict=True)]
    return float(1 - sum(found) / len(found))
