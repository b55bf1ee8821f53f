"""The base's half of first order, kept: at ε = 0 it does not depend on the adapter.

    a_l = ⟨G_l, s_l B_l A_l z_l⟩        z_l what a map reads, G_l = ∂g/∂(its output)

1. A stand-in adapter that adds nothing, on every module that an adapter may target (`stand_ins`),
   is laid over the model; one forward and one backward pass shows z and G of each place where an
   adapter of these modules reads and writes (`record`). A norm that changes moves the place at
   which the maps behind it read, so both places are recorded.
2. What an adapter adds at each place, in the model's basis, is its plan's, as for any lens:
   constants of folded value biases, heads, ranks and experts too. Its injections are shown the
   recorded G and z in place of a pass (`Half.slopes`).
3. Adapters of plain factors, of the same modules and shapes, share a plan. Maps of one kind are
   contracted together, all layers as one batch (`Thin`):

       a_l = s_l Σ_t ⟨A_l' z_t + A_l β, B_l'ᵀ G_t⟩        A' = A diag(γ), B' = PB (`model/basis`)

   Two thin products of r (in + out) operations a token; Σ_t G_t z_tᵀ, [out, in], would be cheaper
   only beyond in · out / (in + out) tokens a prompt, hundreds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.factors import LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.engine.function import differentiable_tokens, read_for_slopes
from lens_lora.engine.reverse import Slopes, Visit, go_back
from lens_lora.errors import LensLoraError, SiteError
from lens_lora.families import HEADS, NORM_KINDS
from lens_lora.model.basis import Basis, SiteMap
from lens_lora.model.gates import Injection
from lens_lora.model.host import Host
from lens_lora.model.lens import LoraLens
from lens_lora.model.sites import OUTSIDE_KINDS, SiteFactors, outside_layer
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.reading import Reading

# --- What an adapter may target


def stand_ins(host: Host, globs: Sequence[str] = ("*",)) -> list[Adapter]:
    """Adapters that add nothing at gates 0: of every module that can be a site; without norms.

    Raises:
        SiteError: no module matches the globs.
    """
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


def _paths(host: Host) -> list[str]:
    """Every module that an adapter may name."""
    family, layers = host.family, range(host.n_layers)
    head = HEADS[0] if host.base is None else host.base.head
    usual = [path for path in family.every_path() if path not in HEADS or path == head]
    paths = (path.format(l=layer) for path in usual for layer in layers)
    return list(dict.fromkeys([*paths, *family.linear_paths(host.n_layers)]))


def _stand_in(host: Host, path: str) -> dict[str, ModuleUpdate]:
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


_Place = tuple[str, int]  # the name of a stack, and which of its tensors
_Pairs = dict[str, tuple[tuple[_Place, _Place], ...]]


class Once:
    """Tensors in stacks of one shape, equal ones once: q, k and v read the same z."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Tensor]] = {}
        self._alike: dict[tuple[str, float], list[int]] = {}

    def place_of(self, tensor: Tensor) -> _Place:
        """Where a tensor with these entries is, which is kept if there is none yet."""
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
    """The base's half over some rows.

    Attributes:
        prompts, owner: the rows, and the index of each one's prompt.
        columns: place → where each G and z of it are; of g, or of each token's log p.
    """

    prompts: Prompts
    owner: Int[Tensor, " row"]
    columns: tuple[_Pairs, ...]

    @property
    def reading(self) -> Reading:
        """Of these rows; what was read is in the gradients."""
        return Reading(self.prompts, _no_read, self.owner)

    @torch.no_grad()
    def slopes(
        self, lens: LoraLens, stacks: Mapping[str, Tensor], axes: tuple[str, ...] = ()
    ) -> Float[Tensor, "batch site *by"]:
        """∂g/∂ε_l at 0 of the lens's adapter, split. No forward pass.

        Raises:
            SiteError: a module whose z and G were not recorded.
        """
        reading = self.reading
        by_column: list[Tensor] = []
        for column in self.columns:
            slopes = Slopes(lens, self.prompts, tuple(axis for axis in axes if axis != "token"))
            for injection in lens.plan.injections:
                if injection.partner is None:  # what waits for a partner's gate is 0
                    for gradient, z in _recorded(lens, injection, column, stacks):
                        slopes.visit(injection, None, gradient, z)
            by_column.append(slopes.by_prompt(reading))
        return torch.stack(by_column, -1) if "token" in axes else torch.stack(by_column).sum(0)


def _recorded(
    lens: LoraLens, injection: Injection, column: _Pairs, stacks: Mapping[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """G and z of one injection. The constant part of v needs no z, and is added where o writes."""
    site, ports = lens.sites[injection.site], injection.ports
    place = _place(lens, injection)
    if ports.read is None:
        place = next((p for p in column if p.startswith("o ") and f" {ports.write} " in p), "")
    if place not in column:
        lacking = (
            "this module" if ports.read else "the o of this layer, into whose bias v's is folded"
        )
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


def record(lenses: Sequence[LoraLens], reading: Reading, once: Once, *, by_token: bool) -> Half:
    """The base's half at every place of these lenses; each that has a new place is run once."""
    columns: list[_Pairs] = []
    for lens in lenses:
        places = {_place(lens, i) for i in lens.plan.injections if i.ports.read is not None}
        if not columns or places - columns[0].keys():
            seen = _seen(lens, reading, once, by_token)
            known = columns or [{} for _ in seen]
            columns = [{**new, **old} for new, old in zip(seen, known, strict=True)]
    return Half(reading.prompts, reading.owner, tuple(columns))


def _seen(lens: LoraLens, reading: Reading, once: Once, by_token: bool) -> list[_Pairs]:
    """What goes by at each place of one lens, for each value that is read."""
    columns: list[_Pairs] = []

    def read() -> Float[Tensor, "row value"]:
        if by_token:
            return differentiable_tokens(lens, reading)
        return read_for_slopes(lens, reading)[:, None]

    def visit_of(column: int) -> Visit:
        columns.append({})

        def visit(injection: Injection, weight: Any, gradient: Tensor, z: Tensor) -> None:
            if injection.ports.read is not None:
                place, pair = _place(lens, injection), (once.place_of(gradient), once.place_of(z))
                columns[column][place] = (*columns[column].get(place, ()), pair)

        return visit

    go_back(lens, reading, lens.gates(0.0), read, visit_of)
    return columns


# --- Adapters of the same modules and shapes


# A and B, perhaps flat, and s by an adapter's own key
Factors = Callable[[str], tuple[Tensor, Tensor, float]]
# A [map, rank, in] before γ, B'ᵀ [map, rank, out], and s [map, 1]
Parts = tuple[Tensor, Tensor, Tensor]


def shapes_of(adapter: Adapter) -> tuple[Any, ...]:
    """Adapters of plain factors that agree in this share a plan; empty for any other adapter."""
    updates = [u for u in adapter.modules.values() if isinstance(u, LoRAFactors) and u.is_plain]
    if len(updates) < len(adapter.modules):
        return ()
    kinds = ((u.A.shape, u.B.shape, u.A.dtype, u.B.dtype) for u in updates)
    return (*adapter.modules, *kinds)


@dataclasses.dataclass(frozen=True, eq=False)
class _Maps:
    """Maps of one kind and shape, one layer after another.

    Attributes:
        sites, updates: each one's index in the lens, and what the adapter holds there.
        rank: A's and B's.
        basis: the first one's; its flags are those of all.
        gamma, beta: [map, 1, in] and [map, in, 1], as in `Basis`.
        pairs: G [map, token, out] and z [map, token, in], of each column.
    """

    sites: list[int]
    updates: list[SiteFactors]
    rank: int
    basis: Basis
    gamma: Tensor | None
    beta: Tensor | None
    pairs: list[tuple[Tensor, Tensor]]

    def factors(self, of: Factors) -> Parts:
        """An adapter's."""
        triples, basis = [of(site.key) for site in self.updates], self.basis
        writes = [
            B.view(-1, self.rank) if site.rows is None else B.view(-1, self.rank)[site.rows]
            for (_, B, _), site in zip(triples, self.updates, strict=True)
        ]
        reads = torch.stack([A for A, _, _ in triples]).view(len(triples), self.rank, -1)
        reads = reads.to(basis.device, basis.dtype)
        back = torch.stack(writes).mT.to(reads, memory_format=torch.contiguous_format)
        if basis.centre_write:
            back = back - back.mean(-1, keepdim=True)
        if basis.kv_copies > 1:
            by_head = back.unflatten(-1, (-1, basis.d_head))
            back = by_head.repeat_interleave(basis.kv_copies, -2).flatten(-2)
        return reads, back, reads.new_tensor([scale for *_, scale in triples])[:, None]

    def reads(self, A: Tensor) -> Tensor:
        """A'."""
        turned = A if self.gamma is None else A * self.gamma
        return turned - turned.mean(-1, keepdim=True) if self.basis.centre_read else turned

    def slopes(self, A: Tensor, B: Tensor, scales: Tensor) -> Iterator[Float[Tensor, "map token"]]:
        """Of each column. Readouts of the same rows share z, and so u."""
        reads, offset = self.reads(A), None if self.beta is None else A @ self.beta
        by_z: dict[int, Tensor] = {}
        for gradient, z in self.pairs:
            if id(z) not in by_z:
                u = reads @ z.to(A).mT
                by_z[id(z)] = u if offset is None else u + offset
            yield (by_z[id(z)] * (B @ gradient.to(B).mT)).sum(1) * scales

    def square_norm(self, A: Tensor, B: Tensor, scales: Tensor) -> Float[Tensor, ""]:
        """Σ ‖ΔW‖², of the model's own weights: s² tr((BᵀB)(AAᵀ))."""
        reads = A if self.basis.gamma_is_own else self.reads(A)
        return ((B @ B.mT) * (reads @ reads.mT) * scales[..., None].square()).sum()


class Thin:
    """First order, by products alone, of every adapter of the same modules and shapes.

    Attributes:
        lens: one adapter's; its sites are those of all.
    """

    def __init__(
        self, lens: LoraLens, halves: Sequence[Half], stacks: Mapping[str, Tensor]
    ) -> None:
        self.lens, self._halves = lens, halves
        columns = [column for half in halves for column in half.columns]
        alike: dict[tuple[Any, ...], list[tuple[list[_Place], int]]] = {}
        for index, injection in enumerate(lens.plan.injections):
            place, site, delta = _place(lens, injection), lens.sites[index], injection.map
            places = [tensor for column in columns for tensor in column[place][0]]
            kind = site.kind, site.adapter, delta.rank, delta.device, delta.a0 is None
            alike.setdefault((*kind, *(name for name, _ in places)), []).append((places, index))
        views: dict[tuple[_Place, ...], Tensor] = {}
        self._maps = [self._alike(sorted(group), stacks, views) for group in alike.values()]

    def _alike(
        self,
        group: Sequence[tuple[list[_Place], int]],
        stacks: Mapping[str, Tensor],
        views: dict[tuple[_Place, ...], Tensor],
    ) -> _Maps:
        plan, sites = self.lens.plan, [index for _, index in group]
        updates = [plan.updates[index].site for index in sites]
        bases = [plan.host.basis_of(site) for site in updates]
        first, offset = bases[0], plan.injections[sites[0]].map.a0
        gammas, betas = [cast(Any, b.gamma) for b in bases], [cast(Any, b.beta) for b in bases]
        gamma = None if first.gamma is None else torch.stack(gammas)[:, None].to(first.dtype)
        beta = None if offset is None else torch.stack(betas)[..., None].to(first.dtype)
        tensors: list[Tensor] = []
        for places in zip(*(places for places, _ in group), strict=True):
            if places not in views:
                views[places] = _in_one(stacks, places)
            tensors.append(views[places])
        pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
        rank = plan.injections[sites[0]].map.rank
        return _Maps(sites, updates, rank, first, gamma, beta, pairs)

    @classmethod
    def of(
        cls, lens: LoraLens, halves: Sequence[Half], stacks: Mapping[str, Tensor]
    ) -> Thin | None:
        """None where some δ is no product of two plain factors."""

        def is_thin(i: Injection) -> bool:
            if type(i.map) is not SiteMap or i.ports.read is None or i.partner is not None:
                return False
            pairs = [column.get(_place(lens, i), ()) for half in halves for column in half.columns]
            is_single = all(len(p) == 1 and stacks[p[0][1][0]].ndim == 4 for p in pairs)
            return is_single and i.whole is None and lens.sites[i.site].kind not in OUTSIDE_KINDS

        return cls(lens, halves, stacks) if all(map(is_thin, lens.plan.injections)) else None

    @torch.no_grad()
    def factors(self, of: Factors) -> list[Parts]:
        """An adapter's, kind by kind."""
        return [maps.factors(of) for maps in self._maps]

    @torch.no_grad()
    def slopes(self, factors: Sequence[Parts]) -> list[Float[Tensor, "prompt site"]]:
        """∂g/∂ε_l at 0, of each half."""
        lens, by_half = self.lens, list[Tensor]()
        pairs = zip(self._maps, factors, strict=True)
        by_kind = [maps.slopes(*parts) for maps, parts in pairs]
        for half in self._halves:
            rows = torch.zeros(len(half.owner), len(lens.sites), dtype=lens.gate_dtype)
            rows = rows.to(lens.device)
            for maps, columns in zip(self._maps, by_kind, strict=True):
                for values in itertools.islice(columns, len(half.columns)):
                    rows[:, maps.sites] += values.unflatten(1, (len(rows), -1)).sum(2).T.to(rows)
            by_half.append(half.reading.by_prompt(rows))
        return by_half

    def relative_norm(self, factors: Sequence[Parts]) -> float:
        """‖ΔW‖ / ‖W‖, as a plan has it."""
        pairs = zip(self._maps, factors, strict=True)
        square = sum(float(maps.square_norm(*parts)) for maps, parts in pairs)
        return math.sqrt(max(square, 0.0)) / self.lens.plan.base_norm


def _in_one(stacks: Mapping[str, Tensor], places: Sequence[_Place]) -> Float[Tensor, "map token _"]:
    """The tensors at these places of one stack; no copy where they are equally far apart."""
    name, indices = places[0][0], [index for _, index in places]
    steps = {later - earlier for earlier, later in itertools.pairwise(indices)} or {1}
    step = min(steps)
    is_regular = len(steps) == 1 and step > 0
    chosen = slice(indices[0], indices[-1] + 1, step) if is_regular else indices
    return stacks[name][chosen].flatten(1, 2)
