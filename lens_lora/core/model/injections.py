"""The hooks that let each site write W z + ε ΔW z, with z live.

Each site has a reader at its input hook and a writer at its output hook (`site_hooks`). What the
writer does is an `Inject`: from the injection's index, the running output and z it makes the new
output. A scaled run, a reverse-mode tap and a forward-mode tangent are three injections through the
same hooks.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.compat import edits_of, is_wrapped
from lens_lora.core.model import hooks
from lens_lora.core.model.gates import Scale
from lens_lora.core.model.hooks import HookFn
from lens_lora.core.model.host import Ports
from lens_lora.core.model.plan import AS_ONE, Injection, Plan
from lens_lora.errors import ModelStateError
from lens_lora.families import NORM_KINDS


@runtime_checkable
class Inject(Protocol):
    """What a writer does: (index of the injection, running output, z) → output.

    z is [batch, pos, in], or [batch, pos, head, in] where each head of q, k or v has an input of
    its own; for a constant it is zero.
    """

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        """The new output, or None to leave it as it is."""
        ...


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
        u = injection.map.coordinates(z)
        gates = self._on(injection.map.device)
        return injection.map.added(out, u, injection.gate(gates))

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
                    f"change of v's bias passes through o. {AS_ONE}"
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


def refuse_lens_hooks(functions: Iterable[object]) -> None:
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
    """[(hook name, function)] for one or more forward passes with this injection.

    At the input of each block an `Arranger` puts the hooks of the block in order; the hooks of
    `before` come first, and then what guards hook points that are not read.
    """
    readers: dict[str, _Reader] = {}
    by_start: dict[str | None, list[tuple[str, HookFn]]] = {}
    for index in _norms_first(plan):
        injection = plan.injections[index]
        site = plan.sites[injection.site]
        start = plan.host.block_input(site.layer) if site.layer >= 0 else injection.ports.read
        placed = by_start.setdefault(start, [])
        placed += _new_readers(injection.ports, readers, points)
        placed.append((injection.ports.write, _writer(plan, index, inject, readers, points)))

    def begin() -> None:
        plan.check_flags()
        for reader in readers.values():
            reader.kept.clear()

    unread = [name for name in plan.points_without_update if name in points]
    guards = [(name, hooks.Unread(points[name], name, plan.adapter)) for name in unread]
    arranged = [*before, *guards]
    for start, placed in by_start.items():
        if start is not None and start in points:
            ours = _in_order(placed, before, points)
            arranged.append((start, hooks.Arranger(points, ours, begin)))
        arranged.extend(placed)
    return arranged


def _new_readers(
    ports: Ports, readers: dict[str, _Reader], points: Mapping[str, Any]
) -> list[tuple[str, HookFn]]:
    """The readers that these ports need and no earlier ones had; they are added to `readers`."""
    added: list[tuple[str, HookFn]] = []
    for name in (ports.like, ports.read):
        if name is not None and name != ports.write and name not in readers:
            readers[name] = _Reader(ports.firings, name, points.get(name))
            added.append((name, readers[name]))
    return added


def _writer(
    plan: Plan,
    index: int,
    inject: Inject,
    readers: Mapping[str, _Reader],
    points: Mapping[str, Any],
) -> HookFn:
    """What writes at an injection: at its hook point, or at a module that has none."""
    injection = plan.injections[index]
    site = plan.sites[injection.site]
    ports = injection.ports
    reader = readers.get(ports.read or "")
    like = readers.get(ports.like or "")
    if reader is not None:
        reader.site = site.name
    if ports.read == ports.write and ports.write not in points:
        return _ModuleWriter(index, inject, like, plan.adapter, site.kind, ports)
    return _Writer(index, inject, like, plan.adapter, injection, site.name, reader)


def _in_order(
    placed: Sequence[tuple[str, HookFn]],
    before: Sequence[tuple[str, HookFn]],
    points: Mapping[str, Any],
) -> list[tuple[str, HookFn, bool]]:
    """A block's hooks for its `Arranger`, each with whether it reads.

    Hooks of `before` at points that are written are arranged too, so that they stay first.
    """
    written = {name for name, fn in placed if not isinstance(fn, _Reader)}
    first = [(name, fn) for name, fn in reversed(before) if name in written]
    known = [(name, fn) for name, fn in [*placed, *first] if name in points]
    return [(name, fn, isinstance(fn, _Reader)) for name, fn in known]


def _norms_first(plan: Plan) -> list[int]:
    """The injections' indices: what reads at a norm's module must see what was added there."""
    kinds = [plan.sites[injection.site].kind for injection in plan.injections]
    return sorted(range(len(kinds)), key=lambda index: kinds[index] not in NORM_KINDS)
