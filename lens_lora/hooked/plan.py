"""The plan: an adapter on one hooked model. Its sites, where they read and write, and their δ.

1. Resolve each adapted module to sites, and their updates in the Hugging Face basis (updates.py).
2. Ask the host for each site's ports and for its δ in the model's basis. What reads a norm that
   changes too is read behind it.
3. Where value biases were folded, add the constant part of an update of v at o (value_bias.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lens_lora.adapters.adapter import Adapter
from lens_lora.errors import ModelStateError
from lens_lora.families import NORM_KINDS
from lens_lora.hooked.base_weights import BaseWeights
from lens_lora.hooked.basis import SiteMap, Update
from lens_lora.hooked.gauge import Turn, svd_turn, turned
from lens_lora.hooked.host import Host
from lens_lora.hooked.host_check import refuse_dropout
from lens_lora.hooked.hosts import host_of
from lens_lora.hooked.norm_map import NormUpdate
from lens_lora.hooked.ports import Ports
from lens_lora.hooked.quantised import quantised_linears, quantised_name
from lens_lora.hooked.site_factors import resolve_sites
from lens_lora.hooked.sites import Site
from lens_lora.hooked.updates import SiteUpdate, site_updates
from lens_lora.hooked.value_bias import through_o, through_update_of_o, without_constant
from lens_lora.hooked.watch import Watch

__all__ = ["Injection", "Plan", "make_plan"]


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
    """

    host: Host
    sites: tuple[Site, ...]
    maps: tuple[SiteMap, ...]
    injections: tuple[Injection, ...]
    state: tuple[tuple[str, Any], ...]
    updates: tuple[SiteUpdate, ...] = ()
    watched: tuple[Watch, ...] = ()
    base: Watch | None = None
    quantised: tuple[nn.Module, ...] = ()

    @property
    def with_constants(self) -> list[int]:
        """Indices of sites of v whose constant part is added at o."""
        return [injection.site for injection in self.injections if injection.whole is not None]

    @functools.cached_property
    def turns(self) -> tuple[Turn | None, ...]:
        """Each site's own change to the coordinates of its SVD; None of a norm."""
        updates = (one.update for one in self.updates)
        return tuple(svd_turn(u) if isinstance(u, Update) else None for u in updates)

    @functools.cached_property
    def in_svd_gauge(self) -> Plan:
        """The same plan, each rank space in the coordinates of its SVD (gauge.py)."""

        def of(site: int, own: SiteMap | None) -> SiteMap | None:
            turn = self.turns[site]
            return own if own is None or turn is None else turned(own, turn)

        injections = [
            dataclasses.replace(one, map=of(one.site, one.map), whole=of(one.site, one.whole))
            for one in self.injections
        ]
        maps = tuple(one.map for one in injections[: len(self.sites)])
        return dataclasses.replace(self, maps=maps, injections=tuple(injections))

    @property
    def quantisation(self) -> str:
        """', linear modules in 4 bit', for people; nothing where none is quantised."""
        bits = sorted({str(quantised_name(module)) for module in self.quantised})
        return f", linear modules in {' and '.join(bits)}" if bits else ""

    @property
    def activation_rounding(self) -> float:
        """Half a step of an 8-bit kernel, relative to a row's largest entry; 0 without one."""
        return 1 / 254 if "8 bit" in self.quantisation else 0.0

    def check_state(self, *, entries: bool = True) -> None:
        """Check that flags, mode and weights are as they were when the plan was made.

        Args:
            entries: also look at entries of the weights, as a call does once (`hooked/watch.py`).

        Raises:
            ModelStateError: naming what changed.
        """
        for (name, then), (_, now) in zip(self.state, self.host.state(), strict=True):
            if then != now:
                raise ModelStateError(
                    f"{name} was {then} when the lens was made and is {now}; make a new LoraLens, "
                    "or set it back."
                )
        refuse_dropout(self.host.model)
        for watch in self.watched:
            _require_same(watch, entries)

    def check_base(self) -> None:
        """Check that `hf_model` is as it was when the plan was made.

        Raises:
            ModelStateError: naming the weight that changed.
        """
        if self.base is not None:
            _require_same(self.base, entries=True)


def make_plan(model: Any, adapter: Adapter, hf_model: nn.Module | None) -> Plan:
    """Where each site of the adapter reads and writes in this model. No forward pass.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        adapter: what was fine-tuned.
        hf_model: the unprocessed base, or None.

    Raises:
        SiteError: the adapter names a module that the model lacks.
        AdapterError: its shapes do not fit the model's.
        ModelStateError: the model was processed and needs `hf_model`, or no exact lens is possible.
    """
    host = host_of(model)
    base = None if hf_model is None else BaseWeights(hf_model, host.family)
    watched = (Watch.of_module(model, "the model's "), Watch(_tensors_of(adapter)))
    resolved = resolve_sites(adapter, host.family, host.heads, host.n_layers)
    updates = site_updates(host, resolved, base, adapter.base_model)
    changed_norms = {one.site.path for one in updates if one.site.kind in NORM_KINDS}
    ports, maps, more = [], [], []
    for index, one in enumerate(updates):
        site = one.site
        if isinstance(one.update, NormUpdate):
            port, *others = host.norm_ports(site.layer, site.kind)
            delta: SiteMap = host.norm_map(site, one.update)
            more += [Injection(index, other, delta) for other in others]
        else:
            is_behind = host.family.norm_path(site.layer, site.kind) in changed_norms
            port = (host.ports_behind_norm if is_behind else host.ports)(site.layer, site.kind)
            delta = host.map_of(site, one.update, base, behind_norm=is_behind)
        ports.append(port)
        maps.append(delta)
    sites = tuple(map(_named, updates, ports, maps))
    left, extra = _with_constants_at_o(host, base, updates, maps)
    own = [
        Injection(i, port, rest, whole=None if rest is whole else whole)
        for i, (port, rest, whole) in enumerate(zip(ports, left, maps, strict=True))
    ]
    of_base = None if hf_model is None else Watch.of_module(hf_model, "hf_model's ")
    injections = (*own, *more, *extra)
    return Plan(
        host,
        sites,
        left,
        injections,
        host.state(),
        updates,
        watched,
        of_base,
        quantised_linears(model),
    )


def _tensors_of(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for module, factors in adapter.modules.items():
        for name, tensor in vars(factors).items():
            if isinstance(tensor, Tensor):
                yield f"the adapter's {name} of {module}", tensor


def _require_same(watch: Watch, entries: bool) -> None:
    changed = watch.changed(entries=entries)
    if changed is not None:
        raise ModelStateError(
            f"{changed} after the lens was made, and its updates were computed from what was there "
            "before; make a new LoraLens."
        )


def _named(one: SiteUpdate, port: Ports, delta: SiteMap) -> Site:
    site = one.site
    return Site(
        name=site.name,
        module=site.module,
        layer=site.layer,
        kind=site.kind,
        read=port.read or port.write,
        write=port.write,
        rank=delta.rank,
        adapter=site.adapter,
    )


def _with_constants_at_o(
    host: Host, base: BaseWeights | None, updates: Sequence[SiteUpdate], maps: list[SiteMap]
) -> tuple[tuple[SiteMap, ...], list[Injection]]:
    """Where value biases are folded, v loses its constant part, which is added at o instead."""
    extra: list[Injection] = []
    heads, own = host.heads_at_hooks, list(maps)
    for v, one in enumerate(updates):
        site, has_bias = one.site, isinstance(one.update, Update) and one.update.bias is not None
        is_v = site.kind == "v"
        constant = host.constant_of_v(site, own[v], has_bias=has_bias) if is_v else None
        if constant is None or host.folded_value_bias(site, base) is None:
            continue
        own[v] = without_constant(own[v], constant)
        at_o = Ports(None, host.ports(site.layer, "o").write)
        W_O = host.weight(site.layer, "o")
        through = through_o(constant, W_O, heads)
        extra.append(Injection(v, at_o, through, is_constant_of_v=True))
        for o, other in enumerate(other.site for other in updates):
            if other.kind == "o" and other.layer == site.layer:
                of_v, of_o = through_update_of_o(constant, own[o], heads)
                extra.append(Injection(v, at_o, of_v, o, is_constant_of_v=True))
                extra.append(Injection(o, at_o, of_o, v))
    return tuple(own), extra
