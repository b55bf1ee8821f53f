"""Names of rankings and attributions: stable identifiers, from which `show` makes what is read.

first_order@0, first_order@1, second_order@0    a derivative, and the gate value it is taken at
first_order/patterns@0                          the same with attention patterns held fixed
path, add_one, leave_one_out                    along the whole path; real interventions
leave_one_out/mean, …/resample                  … with δ replaced by something else than zero
second_order/add_one@0, second_order/leave_one_out@1   effects to second order (`Coupling.estimate`)
weight_norm, update_norm, random, greedy        the baselines of `faithfulness`
signed_weight_norm, norm_product, signed_random          `foils`: what a derivative knows, in part
"""

from __future__ import annotations

__all__ = [
    "FOILS",
    "GREEDY",
    "NORM_PRODUCT",
    "RANDOM",
    "SIGNED_RANDOM",
    "SIGNED_WEIGHT_NORM",
    "UPDATE_NORM",
    "WEIGHT_NORM",
    "key_of",
]

WEIGHT_NORM, UPDATE_NORM, RANDOM, GREEDY = "weight_norm", "update_norm", "random", "greedy"
SIGNED_WEIGHT_NORM, NORM_PRODUCT = "signed_weight_norm", "norm_product"
SIGNED_RANDOM = "signed_random"
FOILS = (SIGNED_WEIGHT_NORM, NORM_PRODUCT, SIGNED_RANDOM)
_WITHOUT_GATE = ("path", "add_one", "leave_one_out", *FOILS)


def key_of(method: str, at: float) -> str:
    """'first_order@0', 'path', 'add_one'.

    Args:
        method: how it was computed.
        at: the gate value at which it was taken, where it has one.
    """
    return method if method.partition("/")[0] in _WITHOUT_GATE else f"{method}@{at:g}"
