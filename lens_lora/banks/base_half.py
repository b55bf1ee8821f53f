"""The base's half of first order, kept: at ε = 0 it does not depend on the adapter.

    a_l = ⟨G_l, s_l B_l A_l z_l⟩        z_l what a map reads, G_l = ∂g/∂(its output)

1. `stand_ins` add nothing on every module that an adapter may target; a forward and a backward pass
   under them show z and G (`record`); again with norms, whose change moves where maps read.
2. Any adapter's plan is shown these in place of a pass (`Half.slopes`), one adapter after another
   (`Halves`).
3. Plain factors of the same modules and shapes share a plan, maps of one kind a batch (`Thin`):
   a_l = s_l Σ_t ⟨A_l' z_t + A_l β, B_l'ᵀ G_t⟩, A' = A diag(γ), B' = PB (`model/basis`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.compat import in_float64
from lens_lora.core import (
    Adapter,
    Injection,
    LoRAFactors,
    LoraLens,
    ModuleUpdate,
    Prompts,
    Reading,
    Site,
    TrainedModule,
)
from lens_lora.core.adapter.dense import stored_bytes
from lens_lora.core.function.forward import differentiable_tokens, read_for_slopes
from lens_lora.core.function.memory import graph_groups
from lens_lora.core.function.reverse import Slopes, Visit, go_back, require_finite_sites
from lens_lora.core.model.basis import SiteMap
from lens_lora.core.model.hooked_host import HookedHost
from lens_lora.core.model.sites import OUTSIDE_KINDS, outside_layer
from lens_lora.errors import LensLoraError, SiteError
from lens_lora.families import HEADS, NORM_KINDS

# --- What an adapter may target


def stand_ins(host: HookedHost, globs: Sequence[str] = ("*",)) -> list[Adapter]:
    """Adapters that add nothing at gates 0: of every module that can be a site; without norms."""
    updates: dict[str, ModuleUpdate] = {}
    paths = _paths(host)
    for path in (p for p in paths if any(fnmatch.fnmatch(p, glob) for glob in globs)):
        # A module that can be no exact site is left out: a lens refuses adapters of it.
        with contextlib.suppress(LensLoraError):
            updates.update(_stand_in(host, path))
    linear = {path: u for path, u in updates.items() if isinstance(u, LoRAFactors)}
    if not updates:
        raise SiteError(
            f"modules={globs}: no module of this model matches; it has {', '.join(paths[:3])}, …"
        )
    return [Adapter(maps, name="bank") for maps in (updates, linear) if maps]


def _paths(host: HookedHost) -> list[str]:
    family, layers = host.family, range(host.n_layers)
    head = HEADS[0] if host.base is None else host.base.head
    usual = [path for path in family.every_path() if path not in HEADS or path == head]
    paths = (path.format(l=layer) for path in usual for layer in layers)
    return list(dict.fromkeys([*paths, *family.linear_paths(host.n_layers)]))


def _stand_in(host: HookedHost, path: str) -> dict[str, ModuleUpdate]:
    """Nothing where the model has no such module, or has it folded."""
    place = host.family.place(path)
    if place is None:
        return {}
    (kind, *_), layer = place.kinds, place.layer
    layer = outside_layer(kind, host.n_layers) if layer is None else layer
    if kind in NORM_KINDS:
        affine = host.norm_parameters(layer, kind)
        if affine is None or host.is_norm_folded(layer, kind) or not host.norm_ports(layer, kind):
            return {}
        return {path: TrainedModule(affine[0] + 1)}  # at gates 0 its size is nothing
    shapes = [host.shape(layer, kind) for kind in place.kinds if host.ports(layer, kind)]
    stack = host.stack(layer, kind)
    ranks = 1 if stack is None else len(stack)
    A = torch.zeros(ranks, shapes[0][1], device="cpu")
    B = torch.zeros(sum(out for out, _ in shapes), ranks, device="cpu")
    return {path: LoRAFactors(A, B, experts=0 if stack is None else ranks)}


# --- What is kept


_Stacks = Mapping[str, Tensor]
_Place = tuple[str, int]  # the name of a stack, and which of its tensors
_Pairs = dict[str, tuple[tuple[_Place, _Place], ...]]


class Once:
    """Tensors in stacks of one shape, equal ones once: q, k and v read the same z."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Tensor]] = {}
        self._alike: dict[tuple[str, float], list[int]] = {}

    def place_of(self, tensor: Tensor) -> _Place:
        """Where its entries are kept, from now on if they were not."""
        name = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.device}"
        kept = self._kept.setdefault(name, [])
        alike = self._alike.setdefault((name, float(tensor.sum())), [])
        for index in alike:
            if torch.equal(kept[index], tensor):
                return name, index
        alike.append(len(kept))
        kept.append(tensor.detach().clone(memory_format=torch.contiguous_format))
        return name, alike[-1]

    def stacks(self) -> dict[str, Tensor]:
        """[tensor, row, pos, …] of each shape."""
        return {name: torch.stack(kept) for name, kept in self._kept.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Half:
    """The base's half over some rows."""

    prompts: Prompts
    owner: Int[Tensor, " row"]  # the index of each one's prompt
    columns: tuple[_Pairs, ...]  # where G and z of a place are; of g, or of each token's log p

    @property
    def reading(self) -> Reading:
        """Of these rows; what was read is in the gradients."""
        return Reading(self.prompts, _no_read, self.owner)

    @torch.no_grad()
    def slopes(
        self, lens: LoraLens, stacks: _Stacks, axes: tuple[str, ...] = ()
    ) -> Float[Tensor, "batch site *by"]:
        """∂g/∂ε_l at 0 of the lens's adapter, split. No forward pass."""
        by_column: list[Tensor] = []
        for column in self.columns:
            slopes = Slopes(lens, self.prompts, tuple(axis for axis in axes if axis != "token"))
            for injection in lens.plan.injections:
                if injection.partner is None:  # what waits for a partner's gate is 0
                    for gradient, z in _recorded(lens, injection, column, stacks):
                        slopes.visit(injection, None, gradient, z)
            by_column.append(slopes.by_prompt(self.reading))
        return torch.stack(by_column, -1) if "token" in axes else torch.stack(by_column).sum(0)


def _recorded(
    lens: LoraLens, injection: Injection, column: _Pairs, stacks: _Stacks
) -> Iterator[tuple[Tensor, Tensor]]:
    """G and z of one injection. The constant part of v needs no z, and is added where o writes."""
    site, ports = lens.sites[injection.site], injection.ports
    place = _place(lens, injection)
    if ports.read is None and place not in column:
        place = next((p for p in column if p.startswith("o ") and f" {ports.write} " in p), "")
    if place not in column:
        o = "the o of this layer, into whose bias v's is folded"
        lacking = "this module" if ports.read else o
        raise SiteError(
            f"{site.name} ({site.module}): the bank lacks {lacking}, and what it lacks is not "
            "counted as zero. Make a bank of more modules (modules=), or leave this one out: "
            f"adapter.without({site.module!r})."
        )
    for places in column[place]:
        gradient, z = (stacks[name][index].to(injection.map.device) for name, index in places)
        if ports.read is None:
            z = gradient.new_zeros(*gradient.shape[:2], injection.map.width)
        yield gradient, z


def _no_read(logits: Tensor) -> Tensor:
    raise RuntimeError("what is read of the logits is in the gradients already")


def _place(lens: LoraLens, injection: Injection) -> str:
    """Where a site reads and writes, and which firing of its read point is its own."""
    ports = injection.ports
    return f"{lens.sites[injection.site].kind} {ports.read} {ports.write} {ports.firing}"


def record(lenses: Iterable[LoraLens], reading: Reading, once: Once, *, by_token: bool) -> Half:
    """The base's half at every place of these lenses; each that has a new place is run once."""
    columns: list[_Pairs] = []
    for lens in lenses:
        places = {_place(lens, i) for i in lens.plan.injections if i.partner is None}
        if not columns or places - columns[0].keys():
            seen = _seen(lens, reading, once, by_token)
            known = columns or [{} for _ in seen]
            columns = [{**new, **old} for new, old in zip(seen, known, strict=True)]
    return Half(reading.prompts, reading.owner, tuple(columns))


def _seen(lens: LoraLens, reading: Reading, once: Once, by_token: bool) -> list[_Pairs]:
    columns: list[_Pairs] = []
    shown_by: dict[str, Injection] = {}

    def read() -> Float[Tensor, "row value"]:
        if by_token:
            return differentiable_tokens(lens, reading)
        return read_for_slopes(lens, reading)[:, None]

    def visit_of(column: int) -> Visit:
        columns.append({})

        def visit(injection: Injection, weight: Any, gradient: Tensor, z: Tensor) -> None:
            # What waits for a partner's gate is 0; of several updates of a place, one shows it.
            place = _place(lens, injection)
            if injection.partner is None and shown_by.setdefault(place, injection) is injection:
                G = once.place_of(gradient)
                pair = G, G if injection.ports.read is None else once.place_of(z)
                columns[column][place] = (*columns[column].get(place, ()), pair)

        return visit

    go_back(lens, reading, lens.gates(0.0), read, visit_of)
    return columns


# --- Adapters of the same modules and shapes


_PLANS = 16  # of adapters of other modules or shapes, the latest that are kept, each with its first
LARGE = 2**28  # bytes of adapters, above which no further one is kept beside them
# A [map, rank, in] before γ, B'ᵀ [map, rank, out], and s [map, 1]
Parts = tuple[Tensor, Tensor, Tensor]


def shapes_of(adapter: Adapter) -> tuple[Any, ...]:
    """Adapters of plain factors that agree in this share a plan; empty for any other adapter.

    Nor has a dense ΔW a plan: stacked with others, its second factor would be written out.
    """
    factors = [u for u in adapter.modules.values() if isinstance(u, LoRAFactors)]
    updates = [u for u in factors if u.is_plain and not u.is_dense]
    if len(updates) < len(adapter.modules):
        return ()
    return (*adapter.modules, *((u.A.shape, u.B.shape, u.A.dtype, u.B.dtype) for u in updates))


def bytes_of(adapter: Adapter) -> int:
    """Of every tensor: factors, magnitudes, and modules that were trained whole."""
    tensors = (part for update in adapter.modules.values() for part in vars(update).values())
    return sum(stored_bytes(tensor) for tensor in tensors if isinstance(tensor, Tensor))


class _Maps:
    """Maps of one kind and shape, layer by layer; `pairs` are each column's G and z."""

    def __init__(
        self,
        lens: LoraLens,
        group: Sequence[tuple[list[_Place], int]],
        view: Callable[[tuple[_Place, ...]], Tensor],
    ) -> None:
        self.sites = [index for _, index in group]
        self._keys = [lens.plan.updates[index].site for index in self.sites]
        bases = [lens.plan.host.basis_of(site) for site in self._keys]
        self._basis = bases[0]
        self._gamma = _stacked([b.gamma for b in bases])
        self._beta = _stacked([b.beta for b in bases])
        tensors = [view(places) for places in zip(*(places for places, _ in group), strict=True)]
        self.pairs = list(zip(tensors[::2], tensors[1::2], strict=True))

    def factors_of(self, adapter: Adapter) -> Parts:
        held = [cast(LoRAFactors, adapter.modules[site.key]) for site in self._keys]
        pairs, basis = zip(held, self._keys, strict=True), self._basis
        A = torch.stack([u.A for u in held]).to(basis.device, basis.dtype)
        writes = torch.stack([u.B if at.rows is None else u.B[at.rows] for u, at in pairs])
        back = writes.mT.to(A, memory_format=torch.contiguous_format)
        if basis.centre_write:
            back = back - back.mean(-1, keepdim=True)
        if basis.kv_copies > 1:
            by_head = back.unflatten(-1, (-1, basis.d_head))
            back = by_head.repeat_interleave(basis.kv_copies, -2).flatten(-2)
        return A, back, A.new_tensor([u.scale * u.strength for u in held])[:, None]

    def _reads(self, A: Tensor) -> Tensor:
        reads = A if self._gamma is None else A * self._gamma[:, None].to(A)
        return reads - reads.mean(-1, keepdim=True) if self._basis.centre_read else reads

    def square_norm(self, A: Tensor, B: Tensor, scales: Tensor) -> float:
        """Σ ‖ΔW‖² = Σ s² tr((BᵀB)(AAᵀ)) of the model's own weights."""
        reads = in_float64(A if self._basis.gamma_is_own else self._reads(A))
        back = in_float64(B * scales[..., None])
        return float(((back @ back.mT) * (reads @ reads.mT)).sum())

    def slopes(
        self, A: Tensor, B: Tensor, scales: Tensor
    ) -> Iterator[Float[Tensor, "map adapter token"]]:
        """Of adapters whose factors stand after one another."""
        offset = 0 if self._beta is None else A @ self._beta[..., None].to(A)
        reads = self._reads(A)
        # Readouts of the same rows share z, and so u.
        u_of = functools.cache(lambda z: reads @ z.to(A).mT + offset)
        for gradient, z in self.pairs:
            by_rank = u_of(z) * (B @ gradient.to(B).mT)
            yield by_rank.unflatten(1, (scales.shape[1], -1)).sum(2) * scales[..., None]


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return None if any(t is None for t in tensors) else torch.stack(cast("list[Tensor]", tensors))


class Thin:
    """First order, by products alone, of adapters of the same modules and shapes as a lens's."""

    def __init__(self, lens: LoraLens, halves: Sequence[Half], stacks: _Stacks) -> None:
        self.lens: LoraLens = lens
        self._halves = halves
        columns = [column for half in halves for column in half.columns]
        alike: dict[tuple[Any, ...], list[tuple[list[_Place], int]]] = {}
        for index, injection in enumerate(lens.plan.injections):
            place = _place(lens, injection)
            delta = injection.map
            places: list[_Place] = []
            for column in columns:
                places += column[place][0]
            stacks_of_places = [name for name, _ in places]
            kind = (lens.sites[index].kind, delta.rank, delta.a0 is None, *stacks_of_places)
            alike.setdefault(kind, []).append((places, index))
        view = functools.cache(functools.partial(_in_one, stacks))
        self._maps = [_Maps(lens, sorted(group), view) for group in alike.values()]

    @torch.no_grad()
    def factors_of(self, adapter: Adapter) -> list[Parts]:
        """An adapter's, kind by kind."""
        return [maps.factors_of(adapter) for maps in self._maps]

    def relative_norm(self, factors: Sequence[Parts]) -> float:
        """As a plan has it."""
        pairs = zip(self._maps, factors, strict=True)
        squares = sum(maps.square_norm(*parts) for maps, parts in pairs)
        return squares**0.5 / self.lens.plan.base_norm

    @torch.no_grad()
    def slopes(self, *adapters: Sequence[Parts]) -> list[tuple[Float[Tensor, "prompt site"], ...]]:
        """Of each adapter's factors ∂g/∂ε_l at 0 of each half; what is kept is read once."""
        lens = self.lens
        by_kind: list[tuple[list[int], Iterator[Tensor]]] = []
        for maps, *parts in zip(self._maps, *adapters, strict=True):
            A, B, scales = (torch.cat(part, 1) for part in zip(*parts, strict=True))
            by_kind.append((maps.sites, maps.slopes(A, B, scales)))
        by_half: list[Sequence[Tensor]] = []
        for half in self._halves:
            shape = (len(adapters), len(half.owner), len(lens.sites))
            rows = torch.zeros(shape, dtype=lens.gate_dtype).to(lens.device)
            for sites, columns in by_kind:
                for values in itertools.islice(columns, len(half.columns)):
                    by_row = values.unflatten(2, (shape[1], -1)).sum(3)
                    rows[:, :, sites] += by_row.movedim(0, -1).to(rows)
            by_half.append([half.reading.by_prompt(of_adapter) for of_adapter in rows])
        return [*zip(*by_half, strict=True)]


def is_thin(lens: LoraLens, halves: Sequence[Half], stacks: _Stacks) -> bool:
    """Whether each δ is a product of two plain factors, and recorded once."""
    for i in lens.plan.injections:
        if type(i.map) is not SiteMap or i.ports.read is None or i.partner is not None:
            return False
        pairs = [column.get(_place(lens, i), ()) for half in halves for column in half.columns]
        is_single = all(len(p) == 1 and stacks[p[0][1][0]].ndim == 4 for p in pairs)
        if not is_single or i.whole is not None or lens.sites[i.site].kind in OUTSIDE_KINDS:
            return False
    return True


def _in_one(stacks: _Stacks, places: Sequence[_Place]) -> Float[Tensor, "map token _"]:
    """The tensors at these places of one stack; no copy where they are equally far apart."""
    indices = [index for _, index in places]
    step = max(1, (indices[-1] - indices[0]) // max(1, len(indices) - 1))
    regular = slice(indices[0], indices[-1] + 1, step)
    stack = stacks[places[0][0]]
    is_regular = [*range(len(stack))[regular]] == indices
    return stack[regular if is_regular else indices].flatten(1, 2)


# --- One adapter after another


class Halves:
    """The base's half over some rows, contracted with any adapter."""

    def __init__(self, lens: LoraLens, halves: Sequence[Half], stacks: _Stacks) -> None:
        self._lens = lens
        self._halves = halves
        self._stacks = stacks
        self.thin: dict[tuple[Any, ...], Thin] = {}  # by the shapes of plain factors

    def plan_of(self, adapter: Adapter) -> Thin | LoraLens:
        """Products that all adapters of its shapes share, or a lens of it where none are enough."""
        shapes = shapes_of(adapter)
        if shapes not in self.thin:
            lens = self._lens.with_adapter(adapter)
            is_plain = shapes and lens.adapter is adapter
            if not (is_plain and is_thin(lens, self._halves, self._stacks)):
                return lens
            thin = Thin(lens, self._halves, self._stacks)
            latest = 1 if bytes_of(adapter) > LARGE else _PLANS
            self.thin = dict([*self.thin.items(), (shapes, thin)][-latest:])
        return self.thin[shapes]

    def slopes(self, adapter: Adapter) -> tuple[LoraLens, Sequence[Float[Tensor, "prompt site"]]]:
        """∂g/∂ε_l at 0 of each half, and a lens whose sites are the adapter's."""
        plan = self.plan_of(adapter)
        if isinstance(plan, Thin):
            (slopes,) = plan.slopes(plan.factors_of(adapter))
            return plan.lens, slopes
        return plan, self.split(plan)

    def together(
        self, adapters: Sequence[Adapter]
    ) -> dict[int, tuple[LoraLens, Sequence[Float[Tensor, "prompt site"]]]]:
        """`slopes`, by `id`, of those that are products alone: the base's half is read once."""
        alike: dict[Thin, list[Adapter]] = {}
        for adapter in filter(shapes_of, adapters):
            with contextlib.suppress(LensLoraError):  # `slopes` says what is wrong with it
                if isinstance(plan := self.plan_of(adapter), Thin):
                    alike.setdefault(plan, []).append(adapter)
        return {
            id(adapter): (plan.lens, slopes)
            for plan, same in alike.items()
            for adapter, slopes in zip(same, plan.slopes(*map(plan.factors_of, same)), strict=True)
        }

    def split(self, lens: LoraLens, axes: tuple[str, ...] = ()) -> list[Tensor]:
        """∂g/∂ε_l at 0 of each half, by the lens's own plan."""
        return [half.slopes(lens, self._stacks, axes) for half in self._halves]


def first_orders(
    lens: LoraLens,
    like: Sequence[Adapter],
    reading: Reading,
    adapters: Callable[[], Iterable[Adapter]],
    sites: Sequence[Site],
) -> Float[Tensor, "adapter batch site"]:
    """∂g/∂ε_l at 0 of adapters that read and write where those of `like` do, at sites of theirs.

    One forward and one backward pass, and for each in `like` that has places of its own; in groups
    of prompts, for each of which `adapters` is called, where all of them are too many.
    """
    by_group: list[Tensor] = []
    for group in graph_groups(lens, reading):
        once = Once()
        rows: list[Tensor] = []
        half = record(map(lens.with_adapter, like), group, once, by_token=False)
        base = Halves(lens, [half], once.stacks())
        for adapter in adapters():
            laid, (slopes,) = base.slopes(adapter)
            require_finite_sites(laid, slopes)
            index = {site.name: i for i, site in enumerate(laid.sites)}
            rows.append(slopes[:, [index[site.name] for site in sites]])
        by_group.append(torch.stack(rows))
    return torch.cat(by_group, 1)
