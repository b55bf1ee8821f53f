"""The plan of a lens: where each site of an adapter reads in a hooked model, and what it adds.

1. Each adapted module becomes one site or several, with its update in the Hugging Face basis
   (`adapted_modules`, `updates`).
2. The host says where a site reads and writes (`Ports`), and what its δ is in the model's basis.
   If the norm before a map changes as well, the map is read behind that norm.
3. If value biases were folded, the constant part of an update of v is added at o
   (`value_constants`).

A plan also remembers the state of the model when it was made, and refuses any other state.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora import compat
from lens_lora.core.adapter.adapter import Adapter
from lens_lora.core.model import extensions, gauge, hooks, value_constants
from lens_lora.core.model.adapted_modules import SiteFactors, resolve_sites
from lens_lora.core.model.basis import NormMap, NormUpdate, SiteMap, Update
from lens_lora.core.model.check import (
    refuse_checkpointing,
    refuse_compiled,
    refuse_random_numbers,
)
from lens_lora.core.model.find_host import host_of
from lens_lora.core.model.hooked_host import HookedHost
from lens_lora.core.model.host import Ports
from lens_lora.core.model.own_parameters import Fact
from lens_lora.core.model.site_basis import folded_value_bias, map_of, norm_map
from lens_lora.core.model.sites import Site, Sites, points_between
from lens_lora.core.model.updates import SiteUpdate, site_updates
from lens_lora.core.model.watch import Watch
from lens_lora.errors import ModelStateError
from lens_lora.families import NORM_KINDS


@dataclasses.dataclass(frozen=True)
class Injection:
    """The addition of one site at one place: its gate times δ.

    Attributes:
        site: the index of the site.
        ports: where z is read and δ is added.
        map: the map z → δ(z).
        partner: the index of a second site, by whose gate δ is multiplied as well; None for all but
            one term, ε_v ε_o ΔW_O Rep(c_v) (`value_constants.py`). Both sites have this δ, each in
            its own rank space, and each adds half of it, so that both can be split by rank. Its
            slope by ε_v is read from v's half alone, and that by ε_o from o's half alone, so there
            it has the weight of the partner's whole gate.
        whole: the map with its constant part, at v's own output, if that part is added at o.
        is_constant_of_v: whether this is the constant part of an update of v, added at o.
    """

    site: int
    ports: Ports
    map: SiteMap
    partner: int | None = None
    whole: SiteMap | None = None
    is_constant_of_v: bool = False

    def gate(self, gates: Float[Tensor, "*batch site"]) -> Float[Tensor, "*batch"]:
        """The number that multiplies δ: ε_site, or half of ε_site · ε_partner."""
        gate = gates[..., self.site]
        if self.partner is None:
            return gate
        return gate * gates[..., self.partner] / 2

    @property
    def map_by_position(self) -> SiteMap | None:
        """The map by which δ is split over positions; None if another injection is split instead.

        v's constant part is added at o, but it comes from the positions of v, so it is split at v.
        """
        if self.is_constant_of_v:
            return None
        return self.map if self.whole is None else self.whole


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that the hooks need.

    Attributes:
        host: the hooked model.
        sites: the sites as data, in the order in which a forward pass meets them.
        maps: the map z → δ(z) of each site.
        injections: what is added: one injection for each site, in the same order, and then further
            ones of norms and of v.
        state: the flags of the host when the plan was made.
        updates: the update of each site in the Hugging Face basis.
        of_model: the weights of the model when the plan was made.
        of_adapter: the adapter's tensors at that time.
        base: the weights of `hf_model` at that time, for the plan of another adapter.
        quantised: the quantised linear modules.
        adapter: the name of the adapter.
    """

    host: HookedHost
    sites: Sites
    maps: tuple[SiteMap, ...]
    injections: tuple[Injection, ...]
    state: tuple[tuple[str, Any], ...]
    updates: tuple[SiteUpdate, ...] = ()
    of_model: Watch = dataclasses.field(default_factory=Watch)
    of_adapter: Watch = dataclasses.field(default_factory=Watch)
    base: Watch | None = None
    quantised: tuple[nn.Module, ...] = ()
    adapter: str = ""

    @property
    def with_constants(self) -> list[int]:
        """The indices of sites of v whose constant part is added at o."""
        return [injection.site for injection in self.injections if injection.whole is not None]

    @functools.cached_property
    def relative_norm(self) -> float:
        """√Σ‖ΔW‖_F² / √Σ‖W‖_F² over the adapted linear maps, as the model has them.

        NaN if only norms change. No forward pass; every such W is read once.
        """
        linear = [delta for delta in self.maps if not isinstance(delta, NormMap)]
        if not linear:
            return math.nan
        return _root_of_squares(delta.weight_norm() for delta in linear) / self.base_norm

    @functools.cached_property
    def base_norm(self) -> float:
        """√Σ‖W‖_F² over the adapted linear maps."""
        norms: list[Float[Tensor, ""]] = []
        for site, delta in zip(self.sites, self.maps, strict=True):
            if not isinstance(delta, NormMap):
                norms.append(self._weight_norm(site, delta.dtype))
        return _root_of_squares(norms)

    def _weight_norm(self, site: Site, dtype: torch.dtype) -> Float[Tensor, ""]:
        def norm() -> Tensor:
            return torch.linalg.vector_norm(self.host.weight(site.layer, site.kind).to(dtype))

        return self.host.known(Fact.WEIGHT_NORM, site.layer, site.kind, dtype, make=norm)

    @functools.cached_property
    def turns(self) -> tuple[gauge.Turn | None, ...]:
        """For each site, the change of coordinates to those of its SVD; None for a norm."""
        turns: list[gauge.Turn | None] = []
        for pair in self.updates:
            turn: gauge.Turn | None = None
            if isinstance(pair.update, Update):
                turn = gauge.svd_turn(pair.update)
            turns.append(turn)
        return tuple(turns)

    @functools.cached_property
    def in_svd_gauge(self) -> Plan:
        """The same plan, each rank space in the coordinates of its SVD (`gauge`)."""
        injections = tuple(self._in_svd(injection) for injection in self.injections)
        maps = tuple(injection.map for injection in injections[: len(self.sites)])
        return dataclasses.replace(self, maps=maps, injections=injections)

    def _in_svd(self, injection: Injection) -> Injection:
        turn = self.turns[injection.site]
        if turn is None:
            return injection
        whole = injection.whole
        if whole is not None:
            whole = gauge.turned(whole, turn)
        return dataclasses.replace(injection, map=gauge.turned(injection.map, turn), whole=whole)

    @property
    def quantisation(self) -> str:
        """The words ', linear modules in 4 bit', for results; '' if none is quantised."""
        if not self.quantised:
            return ""
        bits = sorted({str(extensions.quantised_name(module)) for module in self.quantised})
        return f", linear modules in {' and '.join(bits)}"

    @property
    def activation_rounding(self) -> float:
        """Half a step of an 8-bit kernel, relative to a row's largest entry; 0 if there is none."""
        is_in_8bit = "8 bit" in self.quantisation
        return 1 / 254 if is_in_8bit else 0.0

    @functools.cached_property
    def is_over_ranks(self) -> bool:
        """Whether several processes hold parts of the weights, and so run the same rows."""
        return compat.is_over_ranks(self.host.modules)

    def refuse_gathered(self) -> None:
        """Refuse a second backward pass through a graph whose weights FSDP2 frees after the first.

        Raises:
            ModelStateError: FSDP2 gathers weights of this model.
        """
        if self.is_over_ranks and compat.gathered_modules(self.host.modules):
            raise ModelStateError(
                "this takes several backward passes through one graph, and FSDP2 (fully_shard) "
                "frees its weights after the first",
                remedy="load the model whole, over several devices by device_map='balanced', or "
                "by transformers' tp_plan='auto'.",
                in_shell="load the model whole, over several devices by --device-map balanced.",
            )

    def check_state(self, *, entries: bool = True) -> None:
        """Check that flags, mode and weights have not changed since the plan was made.

        Raises:
            ModelStateError: they have; the error names what changed.
        """
        self.check_flags()
        refuse_random_numbers(self.host.model, self.host.modules)
        refuse_compiled(self.host.modules)
        self.of_model.require_same(entries=entries)
        self.of_adapter.require_same(entries=entries)

    def check_flags(self) -> None:
        """Check only the flags. Each pass does this, as a tool may set flags on its own.

        Raises:
            ModelStateError: a flag has changed; the error names it.
        """
        for (name, then), (_, now) in zip(self.state, self.host.state(), strict=True):
            if then != now:
                raise ModelStateError(
                    f"{name} was {then} when the lens was made and is {now}",
                    remedy="make a new LoraLens, or set it back. For a tool that changes it by "
                    "itself, set it so before you make the lens.",
                )

    def check_backward(self, *, once: bool = True) -> None:
        """Check that each block runs once in the graph of a pass.

        Args:
            once: whether there is a single backward pass, with the hooks still on.

        Raises:
            ModelStateError: gradient checkpointing would run blocks again.
        """
        refuse_checkpointing(self.host.modules, once=once)

    @functools.cached_property
    def points_without_update(self) -> tuple[str, ...]:
        """Hook points between a site's input and the point at which its δ is added."""
        return points_between((self.sites[i.site], i.ports.write) for i in self.injections)

    def changed_parameters(self) -> Iterator[tuple[SiteFactors, tuple[str, ...]]]:
        """The parameters that the adapter changes, by name, for each linear site.

        If value biases are folded, an update of v also changes the bias of o.
        """
        for pair in self.updates:
            if not isinstance(pair.update, Update):
                continue
            if pair.update.bias is None:
                yield pair.site, ("weight",)
            else:
                yield pair.site, ("weight", "bias")
        for index in self.with_constants:
            yield dataclasses.replace(self.updates[index].site, kind="o"), ("bias",)

    def require_update(self, points: Iterable[str]) -> None:
        """Refuse hook points that never hold the adapted model's value."""
        for name in self.points_without_update:
            if name in points:
                raise hooks.never_updated_error(name, self.adapter)


def _root_of_squares(norms: Iterable[Float[Tensor, ""]]) -> float:
    """Compute √Σ‖·‖², with one read from each device."""
    by_device: dict[torch.device, list[Tensor]] = collections.defaultdict(list)
    for norm in norms:
        by_device[norm.device].append(norm)
    totals = [float(torch.stack(part).detach().norm()) for part in by_device.values()]
    return math.hypot(*totals)


def make_plan(
    model: Any, adapter: Adapter, hf_model: nn.Module | None, earlier: Plan | None = None
) -> Plan:
    """Plan where each site of the adapter reads and writes in this model. No forward pass.

    Args:
        model: the hooked model.
        adapter: the adapter, its modules named as the model names them.
        hf_model: the unprocessed Hugging Face base, if it is given.
        earlier: the plan of another adapter over the same, unchanged model; what it knows about the
            model is reused.

    Raises:
        SiteError: the adapter names a module that the model lacks.
        AdapterError: its shapes do not fit the model's.
        ModelStateError: the model was processed and needs `hf_model`, or no exact lens is possible.
    """
    if earlier is None:
        host = host_of(model, hf_model)
        quantised = extensions.quantised_linears(host.modules)
        gathered = compat.gathered_modules(host.modules)
        of_model = Watch.of_module(model, "the model's ", gathered)
        base = None
        if hf_model is not None:
            gathered = compat.gathered_modules(hf_model.modules())
            base = Watch.of_module(hf_model, "hf_model's ", gathered)
    else:
        host = earlier.host
        quantised = earlier.quantised
        of_model = earlier.of_model
        base = earlier.base
    of_adapter = Watch.of_adapter(adapter)
    factors = resolve_sites(adapter, host.family, host.heads, host.n_layers)
    updates = site_updates(host, factors)
    changed_norms = _changed_norms(updates)
    placed = [_placed(host, pair, changed_norms) for pair in updates]
    maps, at_o = _with_constants_at_o(host, updates, [each.delta for each in placed])

    sites: list[Site] = []
    first_places: list[Injection] = []
    further_places: list[Injection] = []
    for index, (pair, each) in enumerate(zip(updates, placed, strict=True)):
        first, *others = each.places
        has_constant_at_o = maps[index] is not each.delta
        whole = each.delta if has_constant_at_o else None
        sites.append(_site(pair, first, each.delta))
        first_places.append(Injection(index, first, maps[index], whole=whole))
        further_places += [Injection(index, other, each.delta) for other in others]
    return Plan(
        host=host,
        sites=Sites(sites),
        maps=maps,
        injections=(*first_places, *further_places, *at_o),
        state=host.state(),
        updates=updates,
        of_model=of_model,
        of_adapter=of_adapter,
        base=base,
        quantised=quantised,
        adapter=adapter.name,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _PlacedUpdate:
    """An update in the hooked model.

    Attributes:
        places: where the site reads and writes; two for a norm that the model runs twice.
        delta: its map z → δ(z) in the model's basis.
    """

    places: tuple[Ports, ...]
    delta: SiteMap


def _changed_norms(updates: Sequence[SiteUpdate]) -> frozenset[str]:
    """The Hugging Face paths of the norms that change."""
    return frozenset(pair.site.path for pair in updates if pair.site.kind in NORM_KINDS)


def _placed(host: HookedHost, pair: SiteUpdate, changed_norms: frozenset[str]) -> _PlacedUpdate:
    """Find where a site reads and writes, and compute its δ in the model's basis.

    If the norm before a map changes as well, the map is read behind the norm, where z contains the
    change already.
    """
    site = pair.site
    layer = site.layer
    kind = site.kind
    if isinstance(pair.update, NormUpdate):
        delta = norm_map(host, site, pair.update)
        return _PlacedUpdate(host.norm_ports(layer, kind), delta)
    is_behind = host.family.norm_path(layer, kind) in changed_norms
    ports_of = host.ports_behind_norm if is_behind else host.ports
    make = functools.partial(ports_of, layer, kind)
    ports = host.known(Fact.PORTS, layer, kind, is_behind, make=make)
    delta = map_of(host.base, site, pair.update, behind_norm=is_behind)
    return _PlacedUpdate((ports,), delta)


def _site(pair: SiteUpdate, port: Ports, delta: SiteMap) -> Site:
    site = pair.site
    return Site(
        name=site.name,
        module=site.module,
        layer=site.layer,
        kind=site.kind,
        read=port.read or port.write,
        write=port.write,
        rank=delta.rank,
        adapter=site.adapter,
        experts=delta.experts,
    )


def _with_constants_at_o(
    host: HookedHost, updates: Sequence[SiteUpdate], deltas: Sequence[SiteMap]
) -> tuple[tuple[SiteMap, ...], list[Injection]]:
    """Each site's map, and injections at o for the constant parts of updates of v.

    If value biases are folded, v's map loses its constant part, which is added at o instead.
    """
    maps = list(deltas)
    at_o: list[Injection] = []
    for v, pair in enumerate(updates):
        constant = _folded_constant(host, pair, deltas[v])
        if constant is None:
            continue
        maps[v] = value_constants.without_constant(deltas[v], constant)
        at_o += _constant_at_o(host, updates, deltas, v, constant)
    return tuple(maps), at_o


def _folded_constant(
    host: HookedHost, pair: SiteUpdate, delta: SiteMap
) -> value_constants.Constant | None:
    """The constant part of an update of v, if the model folded the bias of v into that of o."""
    site = pair.site
    if site.kind != "v":
        return None
    constant = value_constants.constant_of_v(
        delta,
        host.heads_at_hooks,
        norm_folded=host.is_folded(site.layer, "v"),
        has_bias=isinstance(pair.update, Update) and pair.update.bias is not None,
    )
    if constant is None or folded_value_bias(host.base, site) is None:
        return None
    return constant


def _constant_at_o(
    host: HookedHost,
    updates: Sequence[SiteUpdate],
    deltas: Sequence[SiteMap],
    v: int,
    constant: value_constants.Constant,
) -> list[Injection]:
    """The injections at o that add the constant part of v: through W_O, and through each ΔW_O.

    Args:
        host: the hooked model.
        updates: all updates.
        deltas: the map of each of them.
        v: the index of the update of v.
        constant: its constant part.
    """
    heads = host.heads_at_hooks
    layer = updates[v].site.layer
    port = Ports(None, host.ports(layer, "o").write)
    through_o = value_constants.through_o(constant, host.weight(layer, "o"), heads)
    at_o = [Injection(v, port, through_o, is_constant_of_v=True)]
    for o, other in enumerate(updates):
        if other.site.kind == "o" and other.site.layer == layer:
            by_v, by_o = value_constants.through_update_of_o(constant, deltas[o], heads)
            at_o.append(Injection(v, port, by_v, o, is_constant_of_v=True))
            at_o.append(Injection(o, port, by_o, v))
    return at_o


AS_ONE = "Make one lens of the sum of both adapters: lens.with_adapter(a + b)."


def require_sum(plan: Plan, others: Sequence[Plan]) -> None:
    """Check that a block of this plan adds up with the blocks around it.

    Raises:
        ModelStateError: a norm changes in one of them, on which the δ of another one depends.
    """
    for other in others:
        if other is plan:
            continue
        norms = [site.name for site in (*plan.sites, *other.sites) if site.kind in NORM_KINDS]
        if norms:
            raise ModelStateError(
                f"{norms[0]} is a norm that one of two blocks changes, of {other.adapter!r} and "
                f"{plan.adapter!r}, and the other one's δ depends on it: they do not add up. "
                f"{AS_ONE}"
            )
