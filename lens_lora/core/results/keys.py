"""Names of rankings and attributions: stable identifiers, from which `show` makes what is read.

first_order@0, first_order@1, second_order@0    a derivative, and the gate value it is taken at
first_order/patterns@0                          the same with attention patterns held fixed
path, add_one, leave_one_out                    along the whole path; real interventions
leave_one_out/mean, …/resample                  … with δ replaced by something else than zero
weight_norm, update_norm, random, greedy        the baselines of `faithfulness`
signed_weight_norm, norm_product, signed_random `foils`: each knows a part of a derivative
"""

from __future__ import annotations

_WITHOUT_GATE = (
    "path",
    "add_one",
    "leave_one_out",
    "signed_weight_norm",
    "norm_product",
    "signed_random",
)


def key_of(method: str, at: float) -> str:
    """The stable name of a ranking: 'first_order@0', 'path', 'add_one'.

    Args:
        method: how it was computed, perhaps with a variant behind '/'.
        at: the gate value at which it was taken.
    """
    plain, _, _ = method.partition("/")
    return method if plain in _WITHOUT_GATE else f"{method}@{at:g}"
