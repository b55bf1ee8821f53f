"""Adapters made of adapters: sums, differences, mixtures, and nulls of random directions.

    a + b                   both at once; the parts stay apart, as 'path@name'
    a − b, a.mixed(b, w)    one adapter: ΔW_a − ΔW_b,  (1 − w) ΔW_a + w ΔW_b

In one adapter the factors of a module that both adapt are stacked along the rank, which is exact
(PEFT's `add_weighted_adapter` calls that "cat"); changes of bias are summed. DoRA rescales whatever
W it finds, and a trained module or bias replaces the base's: these do not add up.

Null adapters have the same sizes and ranks, in random directions:

    ΔW = s B A = Q_B K Q_Aᵀ,   K = s R_B R_Aᵀ   [rank, rank]          (QR of B and of Aᵀ)
    ΔW′ = Q′_B K Q′_Aᵀ,        Q′ orthonormal, at random

1. K holds every singular value of ΔW, and is kept: so are rank, spectral and Frobenius norm. The
   dense ΔW is never built.
2. Q′_A and Q′_B are the Q of Gaussian matrices, signs fixed: uniform over orthonormal frames.
3. Where several sites share a module (a fused q, k, v), each part of B's rows has its own Q_B and
   Q′_B, so that each part's singular values are kept, and the whole's with them.
4. A change of bias becomes a random vector of its length, part by part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.core import LoRAFactors, ModuleUpdate
from lens_lora.core.adapter import Parts, Updates, expert_factors, extensions, module_path, plain
from lens_lora.errors import AdapterError, UnsupportedAdapterError


@extensions.side_by_side.provide
def side_by_side(named: Sequence[tuple[str, Updates]]) -> dict[str, ModuleUpdate]:
    """The modules of several adapters under 'path@name', where they stay apart.

    Raises:
        AdapterError: a name twice, or DoRA on a module that another adapter adapts too.
    """
    modules: dict[str, ModuleUpdate] = {}
    names: set[str] = set()
    for name, updates in named:
        tagged = _tagged(updates, name)
        if name in names or modules.keys() & tagged.keys():
            raise AdapterError(f"both adapters are called {name!r}; rename one: named('…').")
        names.add(name)
        modules |= tagged
    _refuse_dora_twice(modules)
    return modules


def _tagged(modules: Updates, name: str) -> dict[str, ModuleUpdate]:
    """The modules under 'path@name', those of a sum under the names they have."""
    return {key if "@" in key else f"{key}@{name}": update for key, update in modules.items()}


def _refuse_dora_twice(modules: Updates) -> None:
    """Refuse DoRA on a module that has another update too."""
    counts = Counter(map(module_path, modules))
    for key, update in modules.items():
        path = module_path(key)
        if isinstance(update, LoRAFactors) and update.magnitude is not None and counts[path] > 1:
            raise AdapterError(
                f"{path} is adapted twice, once by DoRA, which rescales whatever W it finds: the "
                "two updates do not add up. Merge one of them into the base model first."
            )


@extensions.stacked.provide
def stacked(weighted: Sequence[tuple[Updates, float]]) -> dict[str, ModuleUpdate]:
    """Σ weight · update of each module as one update; factors are stacked along the rank.

    Parts of a sum, 'path@name', are updates of one module too.
    """
    parts_of: dict[str, list[ModuleUpdate]] = {}
    for modules, weight in weighted:
        for key, update in modules.items():
            parts_of.setdefault(module_path(key), []).append(update.scaled(weight))
    updates: dict[str, ModuleUpdate] = {}
    for path, parts in parts_of.items():
        if len(parts) == 1:
            updates[path] = parts[0]
        else:
            updates[path] = _stack(path, [plain(path, part) for part in parts])
    return updates


def _stack(path: str, parts: Sequence[LoRAFactors]) -> LoRAFactors:
    """The sum of several updates of one module as one update."""
    experts = {part.experts for part in parts}
    if len(experts) > 1:
        raise AdapterError(f"{path}: the adapters have {experts} experts; the base has one number.")
    if max(experts) > 1:
        of_each = zip(*(part.by_expert() for part in parts), strict=True)
        return expert_factors([_stack(path, expert) for expert in of_each])
    _require_same_shapes(path, parts)
    dtypes = [tensor.dtype for part in parts for tensor in (part.A, part.B)]
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    bias = _summed_bias(parts, dtype)
    if all(part.is_dense for part in parts):
        change = torch.stack([part.materialise(dtype=dtype) for part in parts]).sum(0)
        return dataclasses.replace(LoRAFactors.dense(change), lora_bias=bias)
    A = torch.cat([part.A.to(dtype) for part in parts])
    B = torch.cat([part.scale * part.strength * part.B.to(dtype) for part in parts], 1)
    return LoRAFactors(A, B, lora_bias=bias, experts=max(experts))


def _require_same_shapes(path: str, parts: Sequence[LoRAFactors]) -> None:
    shapes = sorted({(len(part.B), part.A.shape[1]) for part in parts})
    if len(shapes) > 1:
        maps = " and ".join(f"{inputs}→{out}" for out, inputs in shapes[:2])
        raise AdapterError(f"{path}: the adapters map {maps}; were they trained on one base?")


def _summed_bias(parts: Sequence[LoRAFactors], dtype: torch.dtype) -> Float[Tensor, " out"] | None:
    """Σ Δb; None where no part changes the bias."""
    changes: list[Tensor] = []
    for part in parts:
        if part.lora_bias is not None:
            changes.append(part.scale * part.strength * part.lora_bias.to(dtype))
    return torch.stack(changes).sum(0) if changes else None


# --- Null adapters: the same sizes and ranks, random directions


_Rows = Sequence[Int[Tensor, " _row"]]


@extensions.null_updates.provide
def null_updates(modules: Updates, seed: int, draw: int, parts: Parts) -> dict[str, LoRAFactors]:
    """The draw-th update of each module in random directions, in float64; see `Adapter.null`."""
    generator = torch.Generator().manual_seed(draw_seeds(seed, draw + 1)[draw])
    return {
        key: _null(_with_directions(key, update), parts.get(key), generator)
        for key, update in modules.items()
    }


def draw_seeds(seed: int, draws: int) -> list[int]:
    """The generator's seed of each draw; more draws begin with the same ones."""
    return np.random.SeedSequence(seed).generate_state(draws).tolist()


def _null(factors: LoRAFactors, parts: _Rows | None, generator: torch.Generator) -> LoRAFactors:
    """One module's factors in random directions.

    Args:
        factors: the module's own.
        parts: its output rows, part by part, where several sites share it.
        generator: of the random numbers.
    """
    if factors.experts > 1:
        return expert_factors([_null(each, parts, generator) for each in factors.by_expert()])
    A = factors.A.cpu().double()
    B = factors.B.cpu().double()
    size = factors.scale * factors.strength
    _, right = torch.linalg.qr(A.T)
    reads = orthonormal(A.shape[1], len(right), generator)
    writes = B.new_empty(len(B), len(right))
    bias = None if factors.lora_bias is None else B.new_empty(len(B))
    for rows in parts or [torch.arange(len(B))]:
        _, left = torch.linalg.qr(B[rows])
        frame = orthonormal(len(rows), len(left), generator)
        writes[rows] = frame @ (size * left @ right.T)
        if bias is not None and factors.lora_bias is not None:
            length = size * factors.lora_bias.cpu().double()[rows].norm()
            bias[rows] = length * orthonormal(len(rows), 1, generator)[:, 0]
    return LoRAFactors(reads.T.contiguous(), writes, lora_bias=bias, experts=factors.experts)


def _with_directions(key: str, update: ModuleUpdate) -> LoRAFactors:
    """The factors of an update that has directions to draw; else it is refused."""
    if isinstance(update, LoRAFactors):
        if update.base_weight is not None:
            # A stored weight of the base is no part of a draw.
            update = dataclasses.replace(update, base_weight=None)
        return plain(key, update)
    if update.weight is not None and update.weight.ndim == 1:
        why = "a norm's γ and β have no directions to draw at random; leave it out"
        raise UnsupportedAdapterError(f"{key}: {why}: adapter.without_modules({key!r}).")
    return plain(key, update)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Float[Tensor, "row column"]:
    """Draw an orthonormal frame, uniformly.

    Without the signs of R's diagonal, QR would favour some frames.
    """
    gaussian = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    frame, triangle = torch.linalg.qr(gaussian)
    return frame * triangle.diagonal().sign()
