"""f(ε): the hooks that let each site write W z + ε ΔW z, with z live.

1. The strength that a caller gives becomes gates ε, one per site (`gates_of`).
2. The plan (`make_plan`) resolves each adapted module to sites, and their updates in the Hugging
   Face basis (`updates`); asks the host for each site's ports and for its δ in the model's basis,
   where what reads a norm that changes too is read behind it; and, where value biases were folded,
   adds the constant part of an update of v at o.
3. Each site has a reader at its input hook and a writer at its output hook (`site_hooks`). What the
   writer does is an `Inject`: from the injection's index, the running output and z it makes the new
   output. A scaled run, a reverse-mode tap and a forward-mode tangent are three injections through
   the same hooks.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real as RealNumber
from typing import Any, Protocol, runtime_checkable

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float, Real
from torch import Tensor, nn

from lens_lora.arguments import number, one_entry
from lens_lora.compat import edits_of, is_wrapped
from lens_lora.core.adapter.adapter import Adapter
from lens_lora.core.model import basis, hooks
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
from lens_lora.core.model.hooks import HookFn
from lens_lora.core.model.host import Ports
from lens_lora.core.model.kernels import quantised_linears, quantised_name
from lens_lora.core.model.sites import Site, match_sites, points_between, resolve_sites
from lens_lora.core.model.updates import SiteUpdate, site_updates
from lens_lora.errors import ArgumentError, ModelStateError, SiteError
from lens_lora.families import NORM_KINDS

# --- The plan: an adapter on one hooked model


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
    def turns(self) -> tuple[basis.Turn | None, ...]:
        """Each site's own change to the coordinates of its SVD; None of a norm."""
        updates = (pair.update for pair in self.updates)
        return tuple(basis.svd_turn(u) if isinstance(u, Update) else None for u in updates)

    @functools.cached_property
    def in_svd_gauge(self) -> Plan:
        """The same plan, each rank space in the coordinates of its SVD (`basis`)."""

        def in_svd(site: int, delta: SiteMap | None) -> SiteMap | None:
            turn = self.turns[site]
            return delta if delta is None or turn is None else basis.turned(delta, turn)

        injections = tuple(
            dataclasses.replace(i, map=in_svd(i.site, i.map), whole=in_svd(i.site, i.whole))
            for i in self.injections
        )
        maps = tuple(injection.map for injection in injections[: len(self.sites)])
        return dataclasses.replace(self, maps=maps, injections=injections)

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
        host, quantised = host_of(model, hf_model), quantised_linears(model)
        of_model = Watch.of_module(model, "the model's ")
        base = None if hf_model is None else Watch.of_module(hf_model, "hf_model's ")
    else:
        host, quantised, base = earlier.host, earlier.quantised, earlier.base
        of_model, *_ = earlier.watched
    watched = (of_model, Watch.of_adapter(adapter))
    updates = site_updates(host, resolve_sites(adapter, host.family, host.heads, host.n_layers))
    changed_norms = {u.site.path for u in updates if u.site.kind in NORM_KINDS}
    ports: list[Ports] = []
    deltas: list[SiteMap] = []
    elsewhere: list[Injection] = []
    for index, (site, update) in enumerate((pair.site, pair.update) for pair in updates):
        if isinstance(update, NormUpdate):
            port, *others = host.norm_ports(site.layer, site.kind)
            delta: SiteMap = host.norm_map(site, update)
            elsewhere += [Injection(index, other, delta) for other in others]
        else:
            is_behind = host.family.norm_path(site.layer, site.kind) in changed_norms
            ports_of = host.ports_behind_norm if is_behind else host.ports
            place = site.layer, site.kind
            port = host.known("ports", *place, is_behind, make=functools.partial(ports_of, *place))
            delta = host.map_of(site, update, behind_norm=is_behind)
        ports.append(port)
        deltas.append(delta)
    maps, at_o = _with_constants_at_o(host, updates, deltas)
    injections = [
        Injection(i, port, part, whole=None if part is delta else delta)
        for i, (port, part, delta) in enumerate(zip(ports, maps, deltas, strict=True))
    ]
    sites, placed = tuple(map(_site, updates, ports, deltas)), (*injections, *elsewhere, *at_o)
    return Plan(
        host, sites, maps, placed, host.state(), updates, watched, base, quantised, adapter.name
    )


def _site(pair: SiteUpdate, port: Ports, delta: SiteMap) -> Site:
    site, read = pair.site, port.read or port.write
    names = (site.name, site.module, site.layer, site.kind)
    return Site(*names, read, port.write, delta.rank, site.adapter, delta.experts)


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
        constant = basis.constant_of_v(maps[v], heads, norm_folded=norm_folded, has_bias=has_bias)
        if constant is None or host.folded_value_bias(site) is None:
            continue
        maps[v] = basis.without_constant(maps[v], constant)
        port = Ports(None, host.ports(site.layer, "o").write)
        through = basis.through_o(constant, host.weight(site.layer, "o"), heads)
        at_o.append(Injection(v, port, through, is_constant_of_v=True))
        for o, other in enumerate(pair.site for pair in updates):
            if other.kind == "o" and other.layer == site.layer:
                by_v, by_o = basis.through_update_of_o(constant, maps[o], heads)
                at_o.append(Injection(v, port, by_v, o, is_constant_of_v=True))
                at_o.append(Injection(o, port, by_o, v))
    return tuple(maps), at_o


_AS_ONE = "Make one lens of the sum of both adapters: lens.with_adapter(a + b)."


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
                f"{_AS_ONE}"
            )


# --- The hooks


@runtime_checkable
class Inject(Protocol):
    """What a writer does: (index of the injection, running output, z) → output.

    z is [batch, pos, in], or [batch, pos, head, in] where each head of q, k or v has an input of
    its own; for a constant it is zero.
    """

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        """The new output, or None to leave it as it is."""
        ...


def weight_of(injection: Injection, gates: Tensor) -> Tensor:
    """The gate of an injection: ε_site, or half of ε_site ε_partner."""
    gate = gates[..., injection.site]
    return gate if injection.partner is None else gate * gates[..., injection.partner] / 2


class ScaleInject:
    """out + ε_l ΔW_l z_l, with gates ε of shape [site] or [batch, site].

    A gate that is exactly zero and needs no derivative leaves the output untouched, bit for bit.
    One that is differentiated (in reverse mode, in forward mode, or within a torch.func transform)
    adds its zero, as the zero has a derivative.
    """

    def __init__(self, plan: Plan, gates: Float[Tensor, "*batch site"], scale: Scale = 0.0) -> None:
        # `scale` is what the gates were made of. Where it is the gates, and is differentiated, it
        # may change between passes, as an optimiser changes it. Else it was copied, or read here.
        held = scale.values() if isinstance(scale, Mapping) else (scale,)
        copied = (t for t in held if isinstance(t, Tensor) and not (t is gates and t.requires_grad))
        self._copied = [(t, edits_of(t)) for t in copied if not t.is_inference()]
        self._injections, self._gates = plan.injections, {gates.device: gates}
        self._active = [True] * gates.shape[-1]
        if not _is_differentiated(gates):
            self._active = (gates != 0).reshape(-1, gates.shape[-1]).any(0).tolist()

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        """out + ε_l ΔW_l z_l, or None where the gate is switched off."""
        if any(edits_of(tensor) != edits for tensor, edits in self._copied):
            raise ModelStateError("the gates were edited in place; begin another block, or list.")
        if not self.is_active(index):
            return None
        injection = self._injections[index]
        u, gates = injection.map.coordinates(z), self._on(injection.map.device)
        return write(out, injection.map, u, weight_of(injection, gates))

    def _on(self, device: torch.device) -> Tensor:
        """The gates, copied once to each other device, where an edit would not be seen."""
        if device not in self._gates:
            gates = next(iter(self._gates.values()))
            self._gates[device] = gates.to(device)
            self._copied += [] if gates.is_inference() else [(gates, edits_of(gates))]
        return self._gates[device]

    def is_active(self, index: int) -> bool:
        """Whether anything is added at this injection."""
        injection = self._injections[index]
        partner = injection.site if injection.partner is None else injection.partner
        return self._active[injection.site] and self._active[partner]


def _is_differentiated(gates: Tensor) -> bool:
    """Whether a derivative may pass the gates, or a transform hides their values."""
    is_dual = fwad.unpack_dual(gates).tangent is not None
    return gates.requires_grad or is_wrapped(gates) or is_dual


def write(out: Tensor, site_map: SiteMap, u: Tensor, gate: Tensor) -> Tensor:
    """out + B(gate · u), computed at its own precision and cast to the model's.

    The gate multiplies u and not δ = Bu: u has only `rank` numbers, and so has its derivative.
    """
    gate = gate.to(u.device, u.dtype)
    scaled = site_map.write(u * (gate.view(-1, *[1] * (u.ndim - 1)) if gate.ndim else gate))
    return out + scaled.to(out.dtype).view(out.shape)


class _Reader:
    """Keeps the last firings of a read point until the next block begins."""

    def __init__(self, firings: int, name: str, point: nn.Module | None) -> None:
        self.kept: collections.deque[Tensor] = collections.deque(maxlen=firings)
        self.site, self._name, self._point = "", name, point
        self._laid_by = hooks.call_under_way()

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        if self.site and self._laid_by is None and tensor.requires_grad:
            hooks.refuse_backward_hooks(self._point, self._name, self.site)
        self.kept.append(tensor)


# Without a repr: TransformerLens names a hook by it, and an injection's holds all its tensors.
@dataclasses.dataclass(eq=False, repr=False)
class _AtSite:
    index: int
    inject: Inject
    like: _Reader | None
    adapter: str
    laid_by: object | None = dataclasses.field(default_factory=hooks.call_under_way, kw_only=True)

    def begun(self) -> Tensor | None:
        """What shows how the host lays out rows, after the check that the hook is still ours."""
        hooks.require_own_hooks(self.laid_by, self.adapter)
        return None if self.like is None else self.like.kept[-1]


@dataclasses.dataclass(eq=False, repr=False)
class _Writer(_AtSite):
    injection: Injection
    name: str
    reader: _Reader | None

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:
        like, ports = self.begun(), self.injection.ports
        out = ports.in_rows(tensor, like)
        moved = self.inject(self.index, out, self._z(ports, out, like))
        if moved is None:
            return None
        if self.injection.is_constant_of_v:
            self._require_own_update_of_o(hook)
        return ports.as_at_point(moved, tensor)

    def _require_own_update_of_o(self, point: nn.Module) -> None:
        """The constant part of v passes through the update of o in the same plan, and no other."""
        for fn in (fn for fn in hooks.functions_at(point) if isinstance(fn, _Writer)):
            if fn.inject is not self.inject and not fn.injection.is_constant_of_v:
                raise ModelStateError(
                    f"{self.name} and {fn.name} are changed by two blocks, of {self.adapter!r} and "
                    f"{fn.adapter!r}, which do not add up where value biases are folded: the "
                    f"change of v's bias passes through o. {_AS_ONE}"
                )

    def _z(self, ports: Ports, out: Tensor, like: Tensor | None) -> Tensor:
        if ports.read is None:
            return out.new_zeros(*out.shape[:2], self.injection.map.width)
        if self.reader is None:
            return ports.through(out)
        if not self.reader.kept or len(self.reader.kept) <= ports.firing:  # −1 is the last one
            raise ModelStateError(
                f"{self.name}: its output hook fired but its input hook did not, so z is "
                "unknown: a flag of the model bypasses the input hook. Turn that flag off."
            )
        z = ports.in_rows(ports.through(self.reader.kept[ports.firing]), like)
        if z.ndim == 4 and out.ndim == 3:
            z = z.flatten(2)
        if z.ndim == 2 and out.ndim == 3 and z.is_floating_point():
            z = z.view(*out.shape[:2], -1)
        # A model over several devices may move its input after the hook point.
        return z.to(out.device).expand(len(out), *z.shape[1:])


def refuse_writers(functions: Iterable[object]) -> None:
    """Check that no hook of a lens is among these functions.

    Raises:
        ModelStateError: naming the adapter that it applies.
    """
    for fn in functions:
        if isinstance(fn, _Writer):
            raise hooks.open_block(fn.adapter)


@dataclasses.dataclass(eq=False, repr=False)
class _ModuleWriter(_AtSite):
    """A writer at a module that has no hook points: z is the module's own input."""

    kind: str
    ports: Ports

    def at_module(self, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        like, z = self.begun(), args[0].to(output.device)
        if self.kind == "pos_embed":
            offset = args[1] if len(args) > 1 else 0
            z = torch.arange(output.shape[1], device=output.device).expand(output.shape[:2])
            z = z + offset
        rows = self.ports.in_rows(output, like)
        moved = self.inject(self.index, rows, self.ports.in_rows(z, like))
        return None if moved is None else self.ports.as_at_point(moved, output)

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:
        raise ModelStateError(f"{self.kind} has no hook point; use `with lens.applied():`.")


def site_hooks(
    plan: Plan, inject: Inject, points: Mapping[str, Any], before: Sequence[tuple[str, HookFn]] = ()
) -> list[tuple[str, HookFn]]:
    """[(hook name, function)] for one or more forward passes with this injection."""
    by_start: dict[str | None, list[tuple[str, HookFn]]] = {}
    readers: dict[str, _Reader] = {}

    def begin() -> None:
        plan.check_flags()
        for reader in readers.values():
            reader.kept.clear()

    for index in _norms_first(plan):
        injection = plan.injections[index]
        site, port = plan.sites[injection.site], injection.ports
        start = plan.host.block_input(site.layer) if site.layer >= 0 else port.read
        placed = by_start.setdefault(start, [])
        for name in (port.like, port.read):
            if name is not None and name != port.write and name not in readers:
                readers[name] = _Reader(port.firings, name, points.get(name))
                placed.append((name, readers[name]))
        if port.read in readers:
            readers[port.read].site = site.name
        reader, like = readers.get(port.read or ""), readers.get(port.like or "")
        at_site = index, inject, like, plan.adapter
        if port.read == port.write and port.write not in points:
            placed.append((port.write, _ModuleWriter(*at_site, site.kind, port)))
            continue
        placed.append((port.write, _Writer(*at_site, injection, site.name, reader)))
    unread = [name for name in plan.points_without_update if name in points]
    guards = [(name, hooks.Unread(points[name], name, plan.adapter)) for name in unread]
    arranged = [*before, *guards]
    for start, placed in by_start.items():
        written = {name for name, fn in placed if not isinstance(fn, _Reader)}
        first = [(name, fn) for name, fn in reversed(before) if name in written]
        ours = [(n, fn, isinstance(fn, _Reader)) for n, fn in [*placed, *first] if n in points]
        if start is not None and start in points:
            arranged.append((start, hooks.Arranger(points, ours, begin)))
        arranged.extend(placed)
    return arranged


def _norms_first(plan: Plan) -> list[int]:
    """The injections' indices: what reads at a norm's module must see what was added there."""
    kinds = [plan.sites[injection.site].kind for injection in plan.injections]
    return sorted(range(len(kinds)), key=lambda index: kinds[index] not in NORM_KINDS)


# --- The gates


_Number = float | Real[Tensor, ""]
Scale = _Number | Real[Tensor, "*batch site"] | Mapping[str, _Number]


def gates_of(
    scale: Scale, names: Sequence[str], dtype: torch.dtype
) -> Float[Tensor, "*batch site"]:
    """ε, through which derivatives pass to the tensors that were given.

    Raises:
        SiteError: a name that matches no site, or a tensor without one gate per site.
        ArgumentError: what is no number, tensor or mapping; NaN, infinity, a truth value.
    """
    if isinstance(scale, Mapping):
        by_site = match_sites(names, scale)
        gates = torch.stack([_number(by_site.get(i, 0.0), dtype) for i in range(len(names))])
    elif not isinstance(scale, Tensor) or not scale.ndim:
        gates = _number(scale, dtype).repeat(len(names))
    elif scale.shape[-1] != len(names):
        raise SiteError(f"{scale.shape[-1]} gates for {len(names)} sites: pass one per site.")
    else:
        gates = _real(scale).to(dtype)
    # Within a `torch.func` transform their values are not known.
    if not is_wrapped(gates) and not bool(torch.isfinite(gates.detach()).all()):
        # A HookedTransformer would drop the attention and return finite logits.
        raise ArgumentError("a gate is NaN or infinite; expected finite numbers.")
    return gates


def _number(value: object, dtype: torch.dtype) -> Float[Tensor, ""]:
    if isinstance(value, Tensor) and not value.ndim:
        return _real(value).to(dtype)
    plain = one_entry(value)
    if isinstance(plain, RealNumber):
        return torch.tensor(number("scale", plain), dtype=dtype, device="cpu")
    raise ArgumentError(
        f"a scale of type {type(value).__name__}: expected a number, a tensor with one gate per "
        "site, or {site name or glob: number}."
    )


def _real(gates: Tensor) -> Tensor:
    if gates.is_complex() or gates.dtype == torch.bool:
        raise ArgumentError(f"gates of {gates.dtype}: expected real numbers.")
    return gates
