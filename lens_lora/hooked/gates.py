"""f(ε): the hooks that let each site write W z + ε ΔW z, with z live.

Each site has a reader at its input hook and a writer at its output hook. What the writer does is
an `Inject`: from the injection's index, the running output and z it makes the new output. A scaled
run, a reverse-mode tap and a forward-mode tangent are three injections through the same hooks.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from lens_lora.errors import ModelStateError
from lens_lora.families import NORM_KINDS
from lens_lora.hooked.attaching import Arranger, HookFn
from lens_lora.hooked.basis import SiteMap
from lens_lora.hooked.plan import Injection, Plan

__all__ = [
    "Inject",
    "ScaleInject",
    "add",
    "site_hooks",
    "weight_of",
    "write",
    "writes_at_modules",
]


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
    """The gate of an injection: ε_site, or half of ε_site ε_partner.

    Args:
        injection: what is added at one place.
        gates: ε, [..., site].
    """
    own = gates[..., injection.site]
    return own if injection.partner is None else own * gates[..., injection.partner] / 2


class ScaleInject:
    """out + ε_l ΔW_l z_l, with gates ε of shape [site] or [batch, site].

    A gate that is exactly zero and needs no derivative leaves the output untouched, bit for bit.
    One that is differentiated (in reverse mode, in forward mode, or within a torch.func transform)
    adds its zero, as the zero has a derivative.

    Args:
        plan: what the sites add.
        gates: ε.
    """

    def __init__(self, plan: Plan, gates: Float[Tensor, "*batch site"]) -> None:
        self._injections, self._gates = plan.injections, {gates.device: gates}
        self._active = [True] * gates.shape[-1]
        if not _is_differentiated(gates):
            self._active = (gates != 0).reshape(-1, gates.shape[-1]).any(0).tolist()

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        """out + ε_l ΔW_l z_l, or None where the gate is switched off.

        Args:
            index: of the injection.
            out: the running output.
            z: the site's input.
        """
        if not self.is_active(index):
            return None
        injection = self._injections[index]
        return add(out, injection.map, z, weight_of(injection, self._on(injection.map.device)))

    def _on(self, device: torch.device) -> Tensor:
        """The gates, moved once to each device."""
        if device not in self._gates:
            self._gates[device] = next(iter(self._gates.values())).to(device)
        return self._gates[device]

    def is_active(self, index: int) -> bool:
        """Whether anything is added at this injection.

        Args:
            index: of the injection.
        """
        injection = self._injections[index]
        partner = injection.site if injection.partner is None else injection.partner
        return self._active[injection.site] and self._active[partner]


def _is_differentiated(gates: Tensor) -> bool:
    """Whether a derivative may pass the gates, or a transform hides their values."""
    if gates.requires_grad or is_functorch_wrapped_tensor(gates):
        return True
    return fwad._current_level >= 0 and fwad.unpack_dual(gates).tangent is not None


def add(out: Tensor, site_map: SiteMap, z: Tensor, gate: Tensor) -> Tensor:
    """out + B(gate · u), computed at its own precision and cast to the model's.

    The gate multiplies u and not δ = Bu: u has only `rank` numbers, and so has its derivative.

    Args:
        out: the running output.
        site_map: δ of the site.
        z: its input.
        gate: ε, a number or [batch].
    """
    return write(out, site_map, site_map.coordinates(z), gate)


def write(out: Tensor, site_map: SiteMap, u: Tensor, gate: Tensor) -> Tensor:
    """out + B(gate · u), with u already computed.

    Args:
        out: the running output.
        site_map: δ of the site.
        u: its coordinates in rank space.
        gate: ε, a number or [batch].
    """
    gate = gate.to(u.device, u.dtype)
    scaled = site_map.write(u * (gate.view(-1, *[1] * (u.ndim - 1)) if gate.ndim else gate))
    return out + scaled.to(out.dtype).view(out.shape)


class _Reader:
    """Keeps the last firings of a read point until the next block begins."""

    def __init__(self, firings: int, holding: list[collections.deque[Tensor]]) -> None:
        self.kept: collections.deque[Tensor] = collections.deque(maxlen=firings)
        self._holding = holding

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        del hook
        self.kept.append(tensor)
        self._holding.append(self.kept)


class _Writer:
    def __init__(
        self, index: int, plan: Plan, readers: Mapping[str, _Reader], inject: Inject
    ) -> None:
        injection = plan.injections[index]
        self._index, self._inject, self._ports = index, inject, injection.ports
        self._reader = readers.get(injection.ports.read or "")
        self._like = readers.get(injection.ports.like or "")
        self._name = plan.sites[injection.site].name
        self._width = injection.map.width

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:
        del hook
        like = None if self._like is None else self._like.kept[-1]
        out = self._ports.in_rows(tensor, like)
        moved = self._inject(self._index, out, self._z(out, like))
        return None if moved is None else self._ports.as_at_point(moved, tensor)

    def _z(self, out: Tensor, like: Tensor | None) -> Tensor:
        if self._ports.read is None:
            return out.new_zeros(*out.shape[:2], self._width)
        if self._reader is None:
            return self._ports.through(out)
        kept = self._reader.kept
        if not kept or len(kept) <= self._ports.firing:
            raise ModelStateError(
                f"{self._name}: its output hook fired but its input hook did not, so z is "
                "unknown: a flag of the model bypasses the input hook. Turn that flag off."
            )
        z = self._ports.in_rows(self._ports.through(kept[self._ports.firing]), like)
        if z.ndim == 4 and out.ndim == 3:
            z = z.flatten(2)
        if z.ndim == 2 and out.ndim == 3 and z.is_floating_point():
            z = z.view(*out.shape[:2], -1)
        # A model over several devices may move its input after the hook point.
        return z.to(out.device).expand(len(out), *z.shape[1:])


class _ModuleWriter:
    """A writer at a module that has no hook points: z is the module's own input."""

    def __init__(self, index: int, kind: str, inject: Inject) -> None:
        self._index, self._kind, self._inject = index, kind, inject

    def at_module(self, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        z = args[0].to(output.device)
        if self._kind == "pos_embed":
            offset = args[1] if len(args) > 1 else 0
            z = torch.arange(output.shape[1], device=output.device).expand(output.shape[:2])
            z = z + offset
        return self._inject(self._index, output, z)

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:
        raise ModelStateError(f"{self._kind} has no hook point; use `with lens.applied():`.")


def site_hooks(
    plan: Plan,
    inject: Inject,
    points: Mapping[str, Any],
    before: Sequence[tuple[str, HookFn]] = (),
) -> list[tuple[str, HookFn]]:
    """[(hook name, function)] for one or more forward passes with this injection.

    Args:
        plan: the sites, and where they read and write.
        inject: what a writer does.
        points: the model's `hook_dict`.
        before: other hooks, which come first; at a site's output they run before δ is added.
    """
    by_start: dict[str | None, list[tuple[str, HookFn]]] = {}
    readers: dict[str, _Reader] = {}
    holding: list[collections.deque[Tensor]] = []

    def let_go() -> None:
        while holding:
            holding.pop().clear()

    for index in _norms_first(plan):
        site, port = plan.sites[plan.injections[index].site], plan.injections[index].ports
        start = plan.host.block_input(site.layer) if site.layer >= 0 else port.read
        hooks = by_start.setdefault(start, [])
        if port.read == port.write and port.write not in points:
            hooks.append((port.write, _ModuleWriter(index, site.kind, inject)))
            continue
        for name in (port.like, port.read):
            if name is not None and name != port.write and name not in readers:
                readers[name] = _Reader(port.firings, holding)
                hooks.append((name, readers[name]))
        hooks.append((port.write, _Writer(index, plan, readers, inject)))
    arranged = list(before)
    for start, hooks in by_start.items():
        written = {name for name, fn in hooks if not isinstance(fn, _Reader)}
        first = [(name, fn) for name, fn in reversed(before) if name in written]
        ours = [(n, fn, isinstance(fn, _Reader)) for n, fn in [*hooks, *first] if n in points]
        if start is not None and start in points:
            arranged.append((start, Arranger(points, ours, let_go)))
        arranged.extend(hooks)
    return arranged


def _norms_first(plan: Plan) -> list[int]:
    """The injections' indices: what reads at a norm's module must see what was added there."""
    kinds = [plan.sites[injection.site].kind for injection in plan.injections]
    return sorted(range(len(kinds)), key=lambda index: kinds[index] not in NORM_KINDS)


def writes_at_modules(plan: Plan) -> list[str]:
    """Names of sites whose δ is added to a module's output, as no hook point shows that output.

    Args:
        plan: the adapter over the model.
    """
    points = plan.host.model.hook_dict
    return [site.name for site in plan.sites if site.write not in points]
