"""The plan of a lens: where each site of an adapter reads and writes in a hooked model, and what.

1. Each adapted module becomes one site or several, with its update in the Hugging Face basis
   (`updates`).
2. The host says where a site reads and writes (`Ports`), and what its δ is in the model's basis;
   what reads a norm that changes too is read behind it.
3. Where value biases were folded, the constant part of an update of v is added at o (`basis`).

A plan also knows in which state the model was when it was made, and refuses another.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.core.adapter.adapter import Adapter
from lens_lora.core.model import extensions, gauge, hooks, value_constants
from lens_lora.core.model.basis import NormMap, NormUpdate, SiteMap, Update
from lens_lora.core.model.check import (
    Watch,
    modules_of,
    refuse_checkpointing,
    refuse_compiled,
    refuse_dropout,
)
from lens_lora.core.model.find_host import host_of
from lens_lora.core.model.hooked_host import HookedHost
from lens_lora.core.model.host import Ports
from lens_lora.core.model.sites import Site, points_between, resolve_sites
from lens_lora.core.model.updates import SiteUpdate, site_updates
from lens_lora.errors import ModelStateError
from lens_lora.families import NORM_KINDS


@dataclasses.dataclass(frozen=True)
class Injection:
    """What one site adds at one place: gate_site · gate_partner · δ.

    Attributes:
        site: its index.
        ports: where z is read and δ is added.
        map: δ.
        partner: index of a second site by whose gate δ is multiplied too. Both sites then have this
            δ, each in its own rank space, and each adds half of it, so that each can be split.
        whole: at v's own output, δ with its constant part, where that is added at o.
        is_constant_of_v: whether this is that constant part, at o.
    """

    site: int
    ports: Ports
    map: SiteMap
    partner: int | None = None
    whole: SiteMap | None = None
    is_constant_of_v: bool = False

    def gate(self, gates: Float[Tensor, "*batch site"]) -> Float[Tensor, "*batch"]:
        """What multiplies δ: ε_site, or half of ε_site ε_partner."""
        gate = gates[..., self.site]
        if self.partner is None:
            return gate
        return gate * gates[..., self.partner] / 2

    @property
    def map_by_position(self) -> SiteMap | None:
        """δ as it is split over positions; None where that is done at another injection.

        Attention passes v's constant part on from the positions of v, so it is split there.
        """
        return None if self.is_constant_of_v else self.whole or self.map


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that the hooks need.

    Attributes:
        host: the hooked model.
        sites: as data, in the order in which a forward pass meets them.
        maps: each site's own δ.
        injections: first one for each site, in the same order; v may have more.
        state: of the host when the plan was made.
        updates: each site's own in the Hugging Face basis.
        watched: the weights of model and adapter when the plan was made.
        base: those of `hf_model`, from which a further adapter's plan would be made.
        quantised: linear modules of bitsandbytes.
        adapter: its name.
    """

    host: HookedHost
    sites: tuple[Site, ...]
    maps: tuple[SiteMap, ...]
    injections: tuple[Injection, ...]
    state: tuple[tuple[str, Any], ...]
    updates: tuple[SiteUpdate, ...] = ()
    watched: tuple[Watch, ...] = ()
    base: Watch | None = None
    quantised: tuple[nn.Module, ...] = ()
    adapter: str = ""

    @property
    def with_constants(self) -> list[int]:
        """Indices of sites of v whose constant part is added at o."""
        return [injection.site for injection in self.injections if injection.whole is not None]

    @functools.cached_property
    def relative_norm(self) -> float:
        """√Σ‖ΔW‖_F² / √Σ‖W‖_F² over the adapted linear maps, as the model has them; NaN of norms
        alone. No forward pass; every such W is read once.
        """
        linear = [delta for delta in self.maps if not isinstance(delta, NormMap)]
        changes = _root_of_squares(delta.weight_norm() for delta in linear)
        return changes / self.base_norm if linear else math.nan

    @functools.cached_property
    def base_norm(self) -> float:
        """√Σ‖W‖_F² over the adapted linear maps."""
        pairs = zip(self.sites, self.maps, strict=True)
        linear = [pair for pair in pairs if not isinstance(pair[1], NormMap)]
        return _root_of_squares(self._weight_norm(site, delta.dtype) for site, delta in linear)

    def _weight_norm(self, site: Site, dtype: torch.dtype) -> Float[Tensor, ""]:
        def norm() -> Tensor:
            return torch.linalg.vector_norm(self.host.weight(site.layer, site.kind).to(dtype))

        return self.host.known("norm", site.layer, site.kind, dtype, make=norm)

    @functools.cached_property
    def turns(self) -> tuple[gauge.Turn | None, ...]:
        """Each site's own change to the coordinates of its SVD; None of a norm."""
        updates = (pair.update for pair in self.updates)
        return tuple(gauge.svd_turn(u) if isinstance(u, Update) else None for u in updates)

    @functools.cached_property
    def in_svd_gauge(self) -> Plan:
        """The same plan, each rank space in the coordinates of its SVD (`basis`)."""

        def in_svd(site: int, delta: SiteMap | None) -> SiteMap | None:
            turn = self.turns[site]
            return delta if delta is None or turn is None else gauge.turned(delta, turn)

        injections = tuple(
            dataclasses.replace(i, map=in_svd(i.site, i.map), whole=in_svd(i.site, i.whole))
            for i in self.injections
        )
        maps = tuple(injection.map for injection in injections[: len(self.sites)])
        return dataclasses.replace(self, maps=maps, injections=injections)

    @property
    def quantisation(self) -> str:
        """', linear modules in 4 bit', for people; nothing where none is quantised."""
        bits = sorted({str(extensions.quantised_name(module)) for module in self.quantised})
        return f", linear modules in {' and '.join(bits)}" if bits else ""

    @property
    def activation_rounding(self) -> float:
        """Half a step of an 8-bit kernel, relative to a row's largest entry; 0 without one."""
        return 1 / 254 if "8 bit" in self.quantisation else 0.0

    def check_state(self, *, entries: bool = True) -> None:
        """Check that flags, mode and weights are as they were when the plan was made.

        Raises:
            ModelStateError: naming what changed.
        """
        self.check_flags()
        model = self.host.model
        modules = self.host.known("modules", make=lambda: modules_of(model))
        refuse_dropout(model, modules)
        refuse_compiled(modules)
        for watch in self.watched:
            watch.require_same(entries=entries)

    def check_flags(self) -> None:
        """The part of `check_state` that each pass repeats: a tool may set flags by itself."""
        for (name, then), (_, now) in zip(self.state, self.host.state(), strict=True):
            if then != now:
                raise ModelStateError(
                    f"{name} was {then} when the lens was made and is {now}",
                    remedy="make a new LoraLens, or set it back. For a tool that changes it by "
                    "itself, set it so before you make the lens.",
                )

    def check_backward(self, *, once: bool = True) -> None:
        """Check that the graph of a pass is that of one run of each block.

        Args:
            once: whether it is walked back once, for a first derivative, with hooks still on.

        Raises:
            ModelStateError: gradient checkpointing would run blocks again.
        """
        model = self.host.model
        modules = self.host.known("modules", make=lambda: modules_of(model))
        refuse_checkpointing(modules, once=once)

    @functools.cached_property
    def points_without_update(self) -> tuple[str, ...]:
        """Hook points between a site's input and the point at which its δ is added."""
        return points_between((self.sites[i.site], i.ports.write) for i in self.injections)

    def require_update(self, points: Iterable[str]) -> None:
        """Refuse hook points that never hold the adapted model's value."""
        for name in self.points_without_update:
            if name in points:
                raise hooks.without_update(name, self.adapter)


def _root_of_squares(norms: Iterable[Float[Tensor, ""]]) -> float:
    """√Σ‖·‖²; the host reads one number from each device."""
    by_device: dict[torch.device, list[Tensor]] = collections.defaultdict(list)
    for norm in norms:
        by_device[norm.device].append(norm)
    return math.hypot(*(float(torch.stack(part).detach().norm()) for part in by_device.values()))


def make_plan(
    model: Any, adapter: Adapter, hf_model: nn.Module | None, earlier: Plan | None = None
) -> Plan:
    """Where each site of the adapter reads and writes in this model. No forward pass.

    What `earlier`, another adapter's plan of the unchanged model, knows of it is taken from there.

    Raises:
        SiteError: the adapter names a module that the model lacks.
        AdapterError: its shapes do not fit the model's.
        ModelStateError: the model was processed and needs `hf_model`, or no exact lens is possible.
    """
    if earlier is None:
        host = host_of(model, hf_model)
        quantised = extensions.quantised_linears(model)
        of_model = Watch.of_module(model, "the model's ")
        base = None if hf_model is None else Watch.of_module(hf_model, "hf_model's ")
    else:
        host = earlier.host
        quantised = earlier.quantised
        of_model = earlier.watched[0]
        base = earlier.base
    of_adapter = Watch.of_adapter(adapter)
    factors = resolve_sites(adapter, host.family, host.heads, host.n_layers)
    updates = site_updates(host, factors)
    placed = _placed(host, updates)
    ports = [places[0] for places, _ in placed]
    deltas = [delta for _, delta in placed]
    maps, at_o = _with_constants_at_o(host, updates, deltas)
    injections: list[Injection] = []
    for index, port in enumerate(ports):
        whole = None if maps[index] is deltas[index] else deltas[index]
        injections.append(Injection(index, port, maps[index], whole=whole))
    for index, (places, delta) in enumerate(placed):
        injections += [Injection(index, other, delta) for other in places[1:]]
    return Plan(
        host=host,
        sites=tuple(map(_site, updates, ports, deltas)),
        maps=maps,
        injections=(*injections, *at_o),
        state=host.state(),
        updates=updates,
        watched=(of_model, of_adapter),
        base=base,
        quantised=quantised,
        adapter=adapter.name,
    )


def _placed(
    host: HookedHost, updates: Sequence[SiteUpdate]
) -> list[tuple[tuple[Ports, ...], SiteMap]]:
    """Of each site where it reads and writes, and its δ in the model's basis.

    A norm that the model runs twice has two places. What reads a norm that changes is read behind
    it, where the change of the norm is in z already.
    """
    changed_norms = {pair.site.path for pair in updates if pair.site.kind in NORM_KINDS}
    placed: list[tuple[tuple[Ports, ...], SiteMap]] = []
    for site, update in ((pair.site, pair.update) for pair in updates):
        place = site.layer, site.kind
        if isinstance(update, NormUpdate):
            placed.append((host.norm_ports(*place), host.norm_map(site, update)))
            continue
        is_behind = host.family.norm_path(*place) in changed_norms
        ports_of = host.ports_behind_norm if is_behind else host.ports
        port = host.known("ports", *place, is_behind, make=functools.partial(ports_of, *place))
        placed.append(((port,), host.map_of(site, update, behind_norm=is_behind)))
    return placed


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
    """Where value biases are folded, v loses its constant part, which is added at o instead."""
    maps, at_o, heads = list(deltas), list[Injection](), host.heads_at_hooks
    for v, (site, update) in enumerate((pair.site, pair.update) for pair in updates):
        if site.kind != "v":
            continue
        has_bias = isinstance(update, Update) and update.bias is not None
        norm_folded = host.is_folded(site.layer, "v")
        constant = value_constants.constant_of_v(
            maps[v], heads, norm_folded=norm_folded, has_bias=has_bias
        )
        if constant is None or host.folded_value_bias(site) is None:
            continue
        maps[v] = value_constants.without_constant(maps[v], constant)
        port = Ports(None, host.ports(site.layer, "o").write)
        through = value_constants.through_o(constant, host.weight(site.layer, "o"), heads)
        at_o.append(Injection(v, port, through, is_constant_of_v=True))
        for o, other in enumerate(pair.site for pair in updates):
            if other.kind == "o" and other.layer == site.layer:
                by_v, by_o = value_constants.through_update_of_o(constant, maps[o], heads)
                at_o.append(Injection(v, port, by_v, o, is_constant_of_v=True))
                at_o.append(Injection(o, port, by_o, v))
    return tuple(maps), at_o


AS_ONE = "Make one lens of the sum of both adapters: lens.with_adapter(a + b)."


def require_sum(plan: Plan, others: Sequence[Plan]) -> None:
    """Check that blocks of these plans, one within another, add up.

    Raises:
        ModelStateError: a norm that changes in one of them; another one's z may be read before it.
    """
    for other in others:
        norms = [site.name for site in (*plan.sites, *other.sites) if site.kind in NORM_KINDS]
        if norms and other is not plan:
            raise ModelStateError(
                f"{norms[0]} is a norm that one of two blocks changes, of {other.adapter!r} and "
                f"{plan.adapter!r}, and the other one's δ depends on it: they do not add up. "
                f"{AS_ONE}"
            )
