"""Adapters made of adapters: sums, differences, mixtures, and null adapters of random directions.

    a + b                   both at once; the parts stay apart, as 'path@name'
    a − b, a.mixed(b, w)    one adapter: ΔW_a − ΔW_b,  (1 − w) ΔW_a + w ΔW_b

To make one adapter, the factors of a module that both adapt are stacked along the rank, which is
exact (PEFT's `add_weighted_adapter` calls it "cat"); changes of bias are summed. DoRA rescales
whatever W it finds, and a trained module or bias replaces the base's: these do not add up.

Null adapters have the same sizes and ranks, in random directions:

    ΔW = s B A = Q_B K Q_Aᵀ,   K = s R_B R_Aᵀ   [rank, rank]          (QR of B and of Aᵀ)
    ΔW′ = Q′_B K Q′_Aᵀ,        Q′ orthonormal, at random

1. K has all singular values of ΔW. It is kept, and with it the rank, the spectral norm and the
   Frobenius norm. The dense ΔW is never built.
2. Q′_A and Q′_B are the Q of Gaussian matrices, signs fixed: uniform over orthonormal frames.
3. Where several sites share a module (a fused q, k, v), each part of B's rows has its own Q_B and
   Q′_B, so that each part's singular values are kept, and the whole's with them.
4. A change of bias becomes a random vector of its length, part by part.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.core import LoRAFactors, ModuleUpdate
from lens_lora.core.adapter import Parts, Updates, expert_factors, extensions, module_path, plain
from lens_lora.errors import AdapterError, UnsupportedAdapterError


@extensions.side_by_side.provide
def side_by_side(named: Sequence[tuple[str, Updates]]) -> dict[str, ModuleUpdate]:
    """The modules of several adapters under 'path@name', so that they stay apart.

    Raises:
        AdapterError: two adapters have one name, or DoRA adapts a module that another adapts too.
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
    """The modules under 'path@name'; those of a sum keep the names that they have."""
    tagged: dict[str, ModuleUpdate] = {}
    for key, update in modules.items():
        own_name = key if "@" in key else f"{key}@{name}"
        tagged[own_name] = update
    return tagged


def _refuse_dora_twice(modules: Updates) -> None:
    """Refuse DoRA on a module that another adapter updates too."""
    counts = Counter(module_path(key) for key in modules)
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
        by_expert = zip(*(part.by_expert() for part in parts), strict=True)
        return expert_factors([_stack(path, updates) for updates in by_expert])
    _require_same_shapes(path, parts)
    dtype = torch.float32
    for part in parts:
        dtype = torch.promote_types(dtype, part.A.dtype)
        dtype = torch.promote_types(dtype, part.B.dtype)
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
def null_updates(
    modules: Updates, seed: int, draws: Sequence[int], parts: Parts
) -> Iterator[dict[str, LoRAFactors]]:
    """The updates of each module in random directions, draw by draw; see `Adapter.null`."""
    frames = {
        key: _Undirected.of(_with_directions(key, update), parts.get(key))
        for key, update in modules.items()
    }
    seeds = draw_seeds(seed, max(draws) + 1)
    for draw in draws:
        generator = torch.Generator().manual_seed(seeds[draw])
        yield {key: undirected.drawn(generator) for key, undirected in frames.items()}


def draw_seeds(seed: int, draws: int) -> list[int]:
    """The generator's seed of each draw; a longer list begins with the seeds of a shorter one."""
    return np.random.SeedSequence(seed).generate_state(draws).tolist()


class _Core(NamedTuple):
    """One part of a module's output, without its directions.

    Attributes:
        rows: the output rows of the part.
        K: has the singular values of the part's ΔW.
        bias_size: the norm of the part's change of bias; None if there is none.
    """

    rows: Int[Tensor, " _row"]
    K: Float[Tensor, "_left _rank"]
    bias_size: Float[Tensor, ""] | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Undirected:
    """One module's update without its directions, in float64, which all of its draws share.

    Attributes:
        width: how many features the module reads.
        height: how many features it writes.
        rank: how many directions a draw reads.
        cores: one for each part of the output.
        experts: the factors' own number of experts.
        by_expert: one of these for each expert if there are several; all else is then empty.
    """

    width: int = 0
    height: int = 0
    rank: int = 0
    cores: tuple[_Core, ...] = ()
    experts: int = 0
    by_expert: tuple[_Undirected, ...] = ()

    @classmethod
    def of(cls, factors: LoRAFactors, parts: _Rows | None) -> _Undirected:
        """Take the directions out of a module's factors.

        Args:
            factors: the module's factors.
            parts: the module's output rows, part by part, if several sites share it.
        """
        if factors.experts > 1:
            return cls(by_expert=tuple(cls.of(each, parts) for each in factors.by_expert()))
        A = factors.A.cpu().double()
        B = factors.B.cpu().double()
        size = factors.scale * factors.strength
        if not parts:
            all_rows = torch.arange(len(B))
            parts = [all_rows]
        _, R_A = torch.linalg.qr(A.T)
        cores: list[_Core] = []
        for rows in parts:
            _, R_B = torch.linalg.qr(B[rows])
            bias_size = None
            if factors.lora_bias is not None:
                bias_size = size * factors.lora_bias.cpu().double()[rows].norm()
            cores.append(_Core(rows, size * R_B @ R_A.T, bias_size))
        return cls(
            width=A.shape[1],
            height=len(B),
            rank=len(R_A),
            cores=tuple(cores),
            experts=factors.experts,
        )

    def drawn(self, generator: torch.Generator) -> LoRAFactors:
        """The factors in random directions."""
        if self.by_expert:
            return expert_factors([each.drawn(generator) for each in self.by_expert])
        reads = orthonormal(self.width, self.rank, generator)
        writes = reads.new_empty(self.height, self.rank)
        has_bias = any(core.bias_size is not None for core in self.cores)
        bias = reads.new_empty(self.height) if has_bias else None
        for rows, K, bias_size in self.cores:
            writes[rows] = orthonormal(len(rows), len(K), generator) @ K
            if bias is not None and bias_size is not None:
                direction = orthonormal(len(rows), 1, generator)[:, 0]
                bias[rows] = bias_size * direction
        A = reads.T.contiguous()
        return LoRAFactors(A, writes, lora_bias=bias, experts=self.experts)


def _with_directions(key: str, update: ModuleUpdate) -> LoRAFactors:
    """The factors of an update, which is refused if it has no directions to draw."""
    if isinstance(update, LoRAFactors):
        if update.base_weight is not None:
            # The base's own weight, stored with the update, is not drawn.
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
