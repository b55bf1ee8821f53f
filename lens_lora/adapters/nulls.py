"""Null adapters: the same sizes and ranks, random directions.

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

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.adapters.factors import (
    LoRAFactors,
    ModuleUpdate,
    TrainedModule,
    base_part,
    expert_factors,
)
from lens_lora.errors import UnsupportedAdapterError

Parts = Mapping[str, Sequence[Int[Tensor, " row"]]]


def null_updates(
    modules: Mapping[str, ModuleUpdate], seed: int, draw: int, parts: Parts
) -> dict[str, LoRAFactors]:
    """The draw-th update of each module in random directions, in float64; see `Adapter.null`."""
    generator = torch.Generator().manual_seed(draw_seeds(seed, draw + 1)[draw])
    return {
        key: _null(_known(key, update), parts.get(key), generator)
        for key, update in modules.items()
    }


def draw_seeds(seed: int, draws: int) -> list[int]:
    """The generator's seed of each draw; more draws begin with the same ones."""
    return np.random.SeedSequence(seed).generate_state(draws).tolist()


def _null(
    factors: LoRAFactors, parts: Sequence[Tensor] | None, generator: torch.Generator
) -> LoRAFactors:
    if factors.experts > 1:
        return expert_factors([_null(each, parts, generator) for each in factors.by_expert()])
    A, B = factors.A.cpu().double(), factors.B.cpu().double()
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


def _known(key: str, update: ModuleUpdate) -> LoRAFactors:
    """The factors, if nothing beside them depends on the base model."""
    part = base_part(update)
    if isinstance(update, LoRAFactors) and part is None:
        return update
    if isinstance(update, TrainedModule) and update.weight is not None and update.weight.ndim == 1:
        raise UnsupportedAdapterError(
            f"{key}: a norm's γ and β have no directions to draw at random; leave such modules out "
            "with adapter.without(…)."
        )
    raise UnsupportedAdapterError(
        f"{key}: {part} makes its change depend on the base model, so its size is not known here. "
        "Make the change plain first: Adapter.between(base, peft_model.merge_and_unload())."
    )


def orthonormal(
    rows: int, columns: int, generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """Uniform over orthonormal frames: the signs of R's diagonal would favour some."""
    gaussian = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    frame, triangle = torch.linalg.qr(gaussian)
    return frame * triangle.diagonal().sign()
