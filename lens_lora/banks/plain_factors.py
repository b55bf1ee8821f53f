"""Compute first order of many adapters of plain factors by matrix products with the recorded base.

    a_l = s_l Σ_t ⟨A_l' z_t + A_l β, B_l'ᵀ G_t⟩,    A' = A diag(γ),  B' = PB

in the basis of the hooked model (`core/model/basis.py`).

1. Adapters of the same modules and shapes differ only in A, B and s, so they share what a lens has
   worked out about the model (`SharedPlan`).
2. Maps of one kind and shape, layer by layer, form one batch (`_MapGroup`).
3. Adapters that are contracted together are stacked side by side along the axis of ranks, so that
   the recorded tensors are read once for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.banks.record import Address, Addresses, Half, Stacks, place_of
from lens_lora.compat import in_float64
from lens_lora.core import Adapter, Injection, LoRAFactors, LoraLens, SiteMap

# The paths of an adapter's modules, and the shapes and dtypes of their factors.
Shapes = tuple[object, ...]


def shapes_of(adapter: Adapter) -> Shapes:
    """Return the modules and shapes of an adapter of plain factors, by which it shares a plan.

    They are () for any other adapter, and if a ΔW is dense: stacking would write out its second
    factor.
    """
    shapes: list[object] = [*adapter.modules]
    for update in adapter.modules.values():
        if not isinstance(update, LoRAFactors) or not update.is_plain or update.is_dense:
            return ()
        shapes.append((update.A.shape, update.B.shape, update.A.dtype, update.B.dtype))
    return tuple(shapes)


def can_share_plan(lens: LoraLens, halves: Sequence[Half], stacks: Stacks) -> bool:
    """Whether each δ is a product of two plain factors, and its z and G were recorded once."""
    for injection in lens.injections:
        if type(injection.map) is not SiteMap or injection.whole is not None:
            return False
        if injection.ports.read is None or injection.partner is not None:
            return False
        if lens.sites[injection.site].is_outside:
            return False
        place = place_of(lens, injection)
        for column in _columns(halves):
            if not _is_recorded_once(column.get(place, ()), stacks):
                return False
    return True


def _is_recorded_once(pairs: Sequence[tuple[Address, Address]], stacks: Stacks) -> bool:
    """Whether there is a single z, of shape [row, pos, in] without heads or slots."""
    if len(pairs) != 1:
        return False
    _, (stack, _) = pairs[0]
    return stacks[stack].ndim == 4


def _columns(halves: Sequence[Half]) -> list[Addresses]:
    return list(itertools.chain.from_iterable(half.columns for half in halves))


class StackedFactors(NamedTuple):
    """The factors of some adapters for a group of maps, side by side along the axis of ranks.

    Attributes:
        A: the adapters' A, without γ.
        B: B'ᵀ, centred if the model's writing weights are.
        scales: the scale s of each map and adapter.
    """

    A: Float[Tensor, "map adapter_and_rank in"]
    B: Float[Tensor, "map adapter_and_rank out"]
    scales: Float[Tensor, "map adapter"]


class SharedPlan:
    """First order, by matrix products alone, of adapters with the same modules and shapes.

    Attributes:
        lens: a lens of one of these adapters, whose sites all of them have.
    """

    def __init__(self, lens: LoraLens, halves: Sequence[Half], stacks: Stacks) -> None:
        self.lens: LoraLens = lens
        self._halves = halves
        columns = _columns(halves)
        groups: dict[tuple[object, ...], list[_RecordedMap]] = {}
        for site, injection in enumerate(lens.injections):
            place = place_of(lens, injection)
            pairs: list[tuple[Address, Address]] = []
            for column in columns:
                (pair,) = column[place]
                pairs.append(pair)
            recorded = _RecordedMap(pairs, site)
            groups.setdefault(_kind(lens, injection, recorded), []).append(recorded)

        views = _Views(stacks)
        self._groups = [_MapGroup(lens, sorted(group), views) for group in groups.values()]

    @torch.no_grad()
    def stacked(self, adapters: Sequence[Adapter]) -> list[StackedFactors]:
        """Return the factors of some such adapters, for each group of maps."""
        return [group.stacked(adapters) for group in self._groups]

    def relative_norm(self, factors: Sequence[StackedFactors]) -> float:
        """Compute ‖ΔW‖ / ‖W‖ over all adapted modules, equal to that of a lens's plan.

        Args:
            factors: what `stacked` returns for a single adapter.
        """
        squares = 0.0
        for group, of_group in zip(self._groups, factors, strict=True):
            squares += group.square_norm(of_group)
        return squares**0.5 / self.lens.plan.base_norm

    @torch.no_grad()
    def slopes(
        self, factors: Sequence[StackedFactors]
    ) -> list[tuple[Float[Tensor, "prompt site"], ...]]:
        """Compute ∂g/∂ε_l at 0 of each adapter, over the rows of each half.

        Args:
            factors: what `stacked` returns for the adapters.
        """
        lens = self.lens
        adapter_count = factors[0].scales.shape[1]
        columns_of_groups: list[Iterator[Tensor]] = []
        for group, of_group in zip(self._groups, factors, strict=True):
            columns_of_groups.append(group.slopes(of_group))

        by_half: list[list[Tensor]] = []
        for half in self._halves:
            row_count = len(half.owner)
            shape = (adapter_count, row_count, len(lens.sites))
            by_row = torch.zeros(shape, dtype=lens.gate_dtype).to(lens.device)
            for group, columns in zip(self._groups, columns_of_groups, strict=True):
                for by_token in itertools.islice(columns, len(half.columns)):
                    summed = by_token.unflatten(2, (row_count, -1)).sum(3)
                    by_row[:, :, group.sites] += summed.movedim(0, -1).to(by_row)
            by_half.append([half.reading.by_prompt(of_adapter) for of_adapter in by_row])
        # From [half][adapter] to [adapter][half].
        return list(zip(*by_half, strict=True))


class _RecordedMap(NamedTuple):
    """A map, and where what was recorded of it is kept.

    Sorted by address, maps of one kind are in the order in which they were recorded.

    Attributes:
        pairs: the addresses of G and z in each column.
        site: the index of the map's site.
    """

    pairs: list[tuple[Address, Address]]
    site: int


def _kind(lens: LoraLens, injection: Injection, recorded: _RecordedMap) -> tuple[object, ...]:
    """Return the key that maps of one batch have in common."""
    has_offset = injection.map.a0 is not None
    stacks: list[str] = []
    for (stack_of_gradient, _), (stack_of_z, _) in recorded.pairs:
        stacks += [stack_of_gradient, stack_of_z]
    return (lens.sites[injection.site].kind, injection.map.rank, has_offset, *stacks)


class _MapGroup:
    """Maps of one kind and shape, layer by layer.

    Attributes:
        sites: the index of each map's site.
    """

    def __init__(self, lens: LoraLens, maps: Sequence[_RecordedMap], views: _Views) -> None:
        self.sites: list[int] = [each.site for each in maps]
        self._factors = [lens.updates[site].site for site in self.sites]
        bases = [lens.host.basis_of(site) for site in self._factors]
        self._basis = bases[0]
        self._gamma = _stacked([basis.gamma for basis in bases])
        self._beta = _stacked([basis.beta for basis in bases])

        # G and z of all maps, in each recorded column.
        self._columns: list[tuple[Tensor, Tensor]] = []
        for pairs_of_maps in zip(*(each.pairs for each in maps), strict=True):
            of_gradients, of_inputs = zip(*pairs_of_maps, strict=True)
            self._columns.append((views.of(of_gradients), views.of(of_inputs)))

    def stacked(self, adapters: Sequence[Adapter]) -> StackedFactors:
        """Return the adapters' factors in the model's basis, without γ, side by side."""
        basis = self._basis
        reads: list[Tensor] = []
        writes: list[Tensor] = []
        scales: list[float] = []
        for site in self._factors:
            for adapter in adapters:
                update = cast(LoRAFactors, adapter.modules[site.key])
                B = update.B if site.rows is None else update.B[site.rows]
                reads.append(update.A)
                writes.append(B)
                scales.append(update.scale * update.strength)

        A = torch.stack(reads).to(basis.device, basis.dtype)
        back = torch.stack(writes).mT.to(A, memory_format=torch.contiguous_format)
        if basis.centre_write:
            back = back - back.mean(-1, keepdim=True)
        if basis.kv_copies > 1:
            by_head = back.unflatten(-1, (-1, basis.d_head))
            back = by_head.repeat_interleave(basis.kv_copies, -2).flatten(-2)

        # The stacks are [map · adapter, rank, _], so the ranks of one map's adapters are adjacent.
        shape = (len(self._factors), len(adapters))
        return StackedFactors(
            A=A.unflatten(0, shape).flatten(1, 2),
            B=back.unflatten(0, shape).flatten(1, 2),
            scales=A.new_tensor(scales).view(shape),
        )

    def square_norm(self, factors: StackedFactors) -> float:
        """Compute Σ ‖ΔW‖² = Σ s² tr((BᵀB)(AAᵀ)) over the model's own weights."""
        reads = factors.A
        if not self._basis.gamma_is_own:
            reads = self._reads(reads)
        reads = in_float64(reads)
        writes = in_float64(factors.B)
        by_map = ((writes @ writes.mT) * (reads @ reads.mT)).sum((1, 2))
        scales = in_float64(factors.scales[:, 0])
        return float(by_map @ scales.square())

    def slopes(self, factors: StackedFactors) -> Iterator[Float[Tensor, "map adapter token"]]:
        """Yield ⟨G, δz⟩ of each map, adapter and token, one column after another."""
        A, B, scales = factors
        offset = 0
        if self._beta is not None:
            offset = A @ self._beta[..., None].to(A)
        reads = self._reads(A)
        # Readouts of the same rows share z, and so u.
        u_of: dict[int, Tensor] = {}
        for gradient, z in self._columns:
            if id(z) not in u_of:
                u_of[id(z)] = reads @ z.to(A).mT + offset
            by_rank = u_of[id(z)] * (B @ gradient.to(B).mT)
            adapter_count = scales.shape[1]
            by_adapter = by_rank.unflatten(1, (adapter_count, -1)).sum(2)
            yield by_adapter * scales[..., None]

    def _reads(self, A: Tensor) -> Tensor:
        """Compute A' = A diag(γ), centred if z is."""
        reads = A
        if self._gamma is not None:
            reads = reads * self._gamma[:, None].to(A)
        if self._basis.centre_read:
            reads = reads - reads.mean(-1, keepdim=True)
        return reads


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Stack the tensors of all maps, [map, …]; None if some map has none."""
    given = [tensor for tensor in tensors if tensor is not None]
    if len(given) < len(tensors):
        return None
    return torch.stack(given)


class _Views:
    """Joins recorded tensors of several addresses into one, and makes each such tensor once."""

    def __init__(self, stacks: Stacks) -> None:
        self._stacks = stacks
        self._made: dict[tuple[Address, ...], Tensor] = {}

    def of(self, addresses: tuple[Address, ...]) -> Float[Tensor, "map token _"]:
        """Join the tensors at these addresses of one stack; no copy if they are evenly spaced."""
        if addresses not in self._made:
            self._made[addresses] = self._gathered(addresses)
        return self._made[addresses]

    def _gathered(self, addresses: Sequence[Address]) -> Tensor:
        name = addresses[0][0]
        stack = self._stacks[name]
        indices = [index for _, index in addresses]
        first = indices[0]
        last = indices[-1]
        intervals = max(1, len(indices) - 1)
        step = max(1, (last - first) // intervals)
        are_evenly_spaced = list(range(first, last + 1, step)) == indices
        if are_evenly_spaced:
            return stack[first : last + 1 : step].flatten(1, 2)
        return stack[indices].flatten(1, 2)
