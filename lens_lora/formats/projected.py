"""Updates from which a direction is taken away, and updates of a lower rank.

With V an orthonormal basis of the directions, an update without them is

    ΔW − V Vᵀ ΔW,  Δb − V Vᵀ Δb      of what it writes
    ΔW − ΔW V Vᵀ                     of what it reads

so its rank does not rise. An update that is cut to rank k is the first k terms of its SVD.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.compat import in_float64
from lens_lora.core import LoRAFactors, ModuleUpdate
from lens_lora.core.adapter import Side, Updates, expert_factors, extensions, module_path, plain
from lens_lora.errors import AdapterError, SiteError
from lens_lora.families import FAMILIES
from lens_lora.formats.directions import directions_of

_WRITE_TO_STREAM = ("o", "down", "fc_out", "embed", "pos_embed")


@extensions.without_direction.provide
def without_direction(
    modules: Updates, directions: Any, side: Side, *, only_of_stream: bool
) -> dict[str, ModuleUpdate]:
    """Updates that write, or read, nothing along a direction: see `Adapter.without_direction`."""
    chosen = _of_stream(modules, side) if only_of_stream else modules
    V = directions_of(directions).basis()
    return {key: _projected(key, update, V, side) for key, update in chosen.items()}


def _of_stream(modules: Updates, side: Side) -> dict[str, ModuleUpdate]:
    """The modules that write to the residual stream, or those that read it.

    Raises:
        SiteError: there are none, or it is not known whether one of the modules does.
    """
    writes = {key: is_writer(module_path(key)) for key in modules}
    unknown = [key for key in modules if writes[key] is None]
    wanted = side == "write"
    chosen = {key: update for key, update in modules.items() if writes[key] is wanted}
    if unknown or not chosen:
        first, *_ = [*unknown, *modules]
        verb = "read" if side == "read" else "write to"
        raise SiteError(
            f"{first} is no module that is known to {verb} the residual stream; name the "
            "modules that the direction belongs to with sites=…, such as '*.down_proj'."
        )
    return chosen


def is_writer(module: str) -> bool | None:
    """Whether a module writes to the residual stream; None if no family has such a module."""
    for family in FAMILIES:
        place = family.place(module)
        if place is not None:
            return place.kinds[0] in _WRITE_TO_STREAM
    return None


def _projected(path: str, update: ModuleUpdate, V: Tensor, side: Side) -> LoRAFactors:
    """The update without what it writes, or reads, along the columns of V, [d, few]."""
    factors = plain(path, update)
    width = len(factors.B) if side == "write" else factors.A.shape[1]
    if width != len(V):
        fact = f"{path} {side}s {width} features, and the direction has {len(V)}"
        raise AdapterError(f"{fact}; name its modules with sites=…, such as '*.down_proj'.")

    if side == "read":
        return dataclasses.replace(factors, A=_without(V, factors.A))
    bias = None if factors.lora_bias is None else _without(V, factors.lora_bias)
    columns = _without(V, factors.B.T)
    return dataclasses.replace(factors, B=columns.T.contiguous(), lora_bias=bias)


def _without(V: Float[Tensor, "d few"], rows: Float[Tensor, "*row d"]) -> Float[Tensor, "*row d"]:
    """Each row less its part in the span of V's orthonormal columns."""
    wide = in_float64(rows)
    basis = V.to(wide)
    return (wide - (wide @ basis) @ basis.T).to(rows)


@extensions.truncated.provide
def truncated(modules: Updates, rank: int) -> tuple[dict[str, ModuleUpdate], dict[str, float]]:
    """Each update's best approximation of this rank, and its relative error."""
    updates: dict[str, ModuleUpdate] = {}
    errors: dict[str, float] = {}
    for path, update in modules.items():
        cut, error = _truncated(path, update, rank)
        updates[path] = cut
        errors[path] = error
    return updates, errors


def _truncated(path: str, update: ModuleUpdate, rank: int) -> tuple[LoRAFactors, float]:
    """The best approximation of this rank in the Frobenius norm, and its relative error."""
    factors = plain(path, update)
    if factors.experts > 1:
        return _truncated_experts(path, factors, rank)
    if factors.rank <= rank:
        return factors, 0.0
    Q_B, R_B = torch.linalg.qr(in_float64(factors.B))
    Q_A, R_A = torch.linalg.qr(in_float64(factors.A).T)
    U, sizes, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    rows = ((Q_A @ Vt.T[:, :rank]) * sizes[:rank]).T
    columns = Q_B @ U[:, :rank]
    A = rows.to(factors.A).contiguous()
    B = columns.to(factors.B)
    lost = float(sizes[rank:].norm()) / (float(sizes.norm()) or 1.0)
    return dataclasses.replace(factors, A=A, B=B), lost


def _truncated_experts(path: str, factors: LoRAFactors, rank: int) -> tuple[LoRAFactors, float]:
    """Each expert's update cut to this rank, and the relative error of all of them together."""
    cuts: list[LoRAFactors] = []
    lost: list[float] = []
    for part in factors.by_expert():
        cut, error = _truncated(path, part, rank)
        cuts.append(cut)
        lost.append(part.norm() * error)
    return expert_factors(cuts), math.hypot(*lost) / (factors.norm() or 1.0)
