"""The hooks that let each site write W z + ε ΔW z, with z live.

An `Injection` (`plan.py`) is a place: which site adds its δ there, and where z is read. An `Inject`
is what is done there: a function of the index of the injection, the output and z, which returns the
new output. Three kinds of it use the same hooks: a run at given gates (`ScaleInject`), the taps of
reverse mode (`function/reverse.py`), and the tangents of forward mode (`function/tangents.py`).

1. A reader at the site's input hook keeps z, and a writer at its output hook changes the output
   W z (`site_hooks`).
2. An `Arranger` at each block's input keeps the order: at a hook point readers run after all other
   hooks, and writers before them.

The way of δ, from a pass with a graph down to the product, and what each call adds:

    lens.injected(taps)      adapted_model.py   puts the hooks of all sites on the model
    site_hooks(plan, taps)   here               makes a reader and a writer for each injection
    _Writer(out, z)          here               the hook itself: finds z and calls the inject
    Taps(index, out, z)      reverse.py         calls the inject below it, and then watches G
    ScaleInject(…)           here               out + sB(ε u), with the three lines below
      Injection.gate         plan.py            ε_l
      SiteMap.coordinates    basis.py           u = A z + a₀
      SiteMap.added          basis.py           out + sB(ε u)
        applied(x, M)        adapter/dense.py   x Mᵀ

A run without a graph, `lens.run`, has no taps. The scale s is multiplied into sB once, when the
lens is made (`site_map` in basis.py).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.compat import edits_of, is_wrapped
from lens_lora.core.model import hooks
from lens_lora.core.model.gates import Scale, require_gates_of_rows
from lens_lora.core.model.hooks import HookFn
from lens_lora.core.model.host import Ports
from lens_lora.core.model.plan import AS_ONE, Injection, Plan
from lens_lora.core.model.public_call import require_own_hooks
from lens_lora.errors import ModelStateError
from lens_lora.families import NORM_KINDS


@runtime_checkable
class Inject(Protocol):
    """The function that a writer calls: (index of the injection, output, z) → new output.

    z is [batch, pos, in], or [batch, pos, head, in] if each head of q, k or v has an input of its
    own. An injection that adds a constant gets zeros.
    """

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        """The new output, or None to leave it as it is."""
        ...


class ScaleInject:
    """The injection of a run at gates ε, [site] or [batch, site]: out + ε_l ΔW_l z_l.

    A gate that is exactly zero leaves the output as it is, bit for bit, unless the gates are
    differentiated (in reverse mode, in forward mode, or within a torch.func transform). Then a zero
    is added, because the zero has a derivative.
    """

    def __init__(self, plan: Plan, gates: Float[Tensor, "*batch site"], scale: Scale = 0.0) -> None:
        self._injections = plan.injections
        self._gates = {gates.device: gates}
        # Tensors of the caller whose values were copied or read here, with their edit counters: a
        # later edit would not be seen, so it is refused. If the gates are the caller's own tensor
        # and need a gradient, they may change between passes, as an optimiser changes them.
        self._copied: list[tuple[Tensor, int]] = []
        given = scale.values() if isinstance(scale, Mapping) else (scale,)
        for tensor in given:
            is_read_anew = tensor is gates and gates.requires_grad
            if isinstance(tensor, Tensor) and not is_read_anew:
                self._note_copied(tensor)
        self._active = [True] * gates.shape[-1]
        if not _is_differentiated(gates):
            self._active = (gates != 0).reshape(-1, gates.shape[-1]).any(0).tolist()

    def _note_copied(self, tensor: Tensor) -> None:
        if not tensor.is_inference():
            self._copied.append((tensor, edits_of(tensor)))

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        """Compute out + ε_l ΔW_l z_l; None if the gate is off."""
        if any(edits_of(tensor) != edits for tensor, edits in self._copied):
            raise ModelStateError("the gates were edited in place; begin another block, or list.")
        if not self.is_active(index):
            return None
        injection = self._injections[index]
        # u = A z + a₀, and the gate ε_l. Then `added` computes out + sB(ε_l u).
        u = injection.map.coordinates(z)
        gate = injection.gate(self._on(injection.map.device))
        # What all rows share, such as a position embedding, has a single row of u.
        if gate.numel() not in (1, len(u), len(out)):
            require_gates_of_rows(gate.numel(), len(out))
        return injection.map.added(out, u, gate)

    def _on(self, device: torch.device) -> Tensor:
        """The gates on a device, copied there once; the copy would not see a later edit."""
        if device not in self._gates:
            gates = next(iter(self._gates.values()))
            self._gates[device] = gates.to(device)
            self._note_copied(gates)
        return self._gates[device]

    def is_active(self, index: int) -> bool:
        """Whether anything is added at this injection."""
        injection = self._injections[index]
        if not self._active[injection.site]:
            return False
        return injection.partner is None or self._active[injection.partner]


def _is_differentiated(gates: Tensor) -> bool:
    """Whether a derivative may pass the gates, or a transform hides their values."""
    is_dual = fwad.unpack_dual(gates).tangent is not None
    return gates.requires_grad or is_wrapped(gates) or is_dual


class _Reader:
    """Keeps the last tensors of a read point until the next block begins.

    Attributes:
        kept: the tensors of its last firings.
        site: the name of a site that reads here; '' if only the layout of rows is read.
    """

    def __init__(self, firings: int, name: str, point: nn.Module | None) -> None:
        self.kept: collections.deque[Tensor] = collections.deque(maxlen=firings)
        self.site: str = ""
        self._name = name
        self._point = point
        self._laid_by = hooks.call_under_way()

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        if self.site and self._laid_by is None and tensor.requires_grad:
            hooks.refuse_backward_hooks(self._point, self._name, self.site)
        self.kept.append(tensor)


# Without a repr: TransformerLens names a hook by it, and that of an injection shows all tensors.
@dataclasses.dataclass(eq=False, repr=False)
class _AtSite:
    """The common part of both kinds of writers.

    Attributes:
        index: the index of the injection.
        inject: what is written.
        like: reads how the host lays out rows, if the site's own points do not show it.
        adapter: the name of the adapter, for errors.
        laid_by: the public call that has laid the hook.
    """

    index: int
    inject: Inject
    like: _Reader | None
    adapter: str
    laid_by: object | None = dataclasses.field(default_factory=hooks.call_under_way, kw_only=True)

    def begun(self) -> Tensor | None:
        """Refuse a hook that another call has put on the model.

        Returns:
            Tensor | None: the activation from which the layout of rows is read; None if the site's
                own points show it.
        """
        require_own_hooks(self.laid_by, self.adapter)
        return None if self.like is None else self.like.kept[-1]


@dataclasses.dataclass(eq=False, repr=False)
class _Writer(_AtSite):
    """A writer at a hook point, which takes z from a reader."""

    injection: Injection
    name: str
    reader: _Reader | None

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:
        like = self.begun()
        ports = self.injection.ports
        out = ports.in_rows(tensor, like)
        z = self._z(ports, out, like)
        changed = self.inject(self.index, out, z)
        if changed is None:
            return None
        if self.injection.is_constant_of_v:
            self._require_own_update_of_o(hook)
        return ports.as_at_point(changed, tensor)

    def _require_own_update_of_o(self, point: nn.Module) -> None:
        """Refuse a constant part of v together with an update of o from another plan.

        The constant passes through W_O and through the update of o in its own plan, but it would
        miss that of the other plan.
        """
        for fn in hooks.functions_at(point):
            if not isinstance(fn, _Writer) or fn.inject is self.inject:
                continue
            if not fn.injection.is_constant_of_v:
                raise ModelStateError(
                    f"{self.name} and {fn.name} are changed by two blocks, of {self.adapter!r} and "
                    f"{fn.adapter!r}, which do not add up where value biases are folded: the "
                    f"change of v's bias passes through o. {AS_ONE}"
                )

    def _z(self, ports: Ports, out: Tensor, like: Tensor | None) -> Tensor:
        """The input z of the site's map, with the rows of the output."""
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
        # o's hook point shows z head by head, and its map reads the heads side by side.
        if z.ndim == 4 and out.ndim == 3:
            z = z.flatten(2)
        # Some points show the positions of all rows on one axis. Token ids, too, have two axes.
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
            raise hooks.already_applied_error(fn.adapter)


@dataclasses.dataclass(eq=False, repr=False)
class _ModuleWriter(_AtSite):
    """A writer at a module that has no hook points: z is the module's own input."""

    kind: str
    ports: Ports

    def at_module(self, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Change the output of the module, or of the map of a parameter."""
        like = self.begun()
        z = args[0].to(output.device)
        if self.kind == "pos_embed":
            # Its input holds tokens, but it reads positions.
            offset = args[1] if len(args) > 1 else 0
            positions = torch.arange(output.shape[1], device=output.device)
            z = positions.expand(output.shape[:2]) + offset
        out = self.ports.in_rows(output, like)
        changed = self.inject(self.index, out, self.ports.in_rows(z, like))
        if changed is None:
            return None
        return self.ports.as_at_point(changed, output)

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:
        raise ModelStateError(f"{self.kind} has no hook point; use `with lens.applied():`.")


def site_hooks(
    plan: Plan, inject: Inject, points: Mapping[str, Any], before: Sequence[tuple[str, HookFn]] = ()
) -> list[tuple[str, HookFn]]:
    """The hooks of all sites as [(hook name, function)], for one forward pass or several.

    An `Arranger` at the input of each block puts the hooks of the block in order.

    Args:
        plan: where the sites read and write.
        inject: what is written.
        points: the model's hook points by name.
        before: hooks that come before all others.
    """
    readers: dict[str, _Reader] = {}
    # The hooks of each block, by the hook point at which the block begins.
    by_block: dict[str | None, list[tuple[str, HookFn]]] = {}
    for index in _norms_first(plan):
        injection = plan.injections[index]
        layer = plan.sites[injection.site].layer
        begins_at = plan.host.block_input(layer) if layer >= 0 else injection.ports.read
        of_block = by_block.setdefault(begins_at, [])
        of_block += _new_readers(injection.ports, readers, points)
        writer = _writer(plan, index, inject, readers, points)
        of_block.append((injection.ports.write, writer))

    def begin_block() -> None:
        plan.check_flags()
        for reader in readers.values():
            reader.kept.clear()

    placed = list(before)
    for name in plan.points_without_update:
        if name in points:
            placed.append((name, hooks.Unread(points[name], name, plan.adapter)))
    for begins_at, of_block in by_block.items():
        if begins_at is not None and begins_at in points:
            placed.append((begins_at, _arranger(of_block, before, points, begin_block)))
        placed += of_block
    return placed


def listed_hooks(plan: Plan, inject: Inject) -> list[tuple[str, HookFn]]:
    """The hooks of all sites as [(hook name, function)], if all of them are at hook points.

    Raises:
        ModelStateError: a site has no hook point at its output.
    """
    model = plan.host.model
    points = model.hook_dict
    for site in plan.sites:
        if site.write not in points:
            raise ModelStateError(
                f"{site.name}: no hook point of this model shows its output, so a list of "
                "hooks cannot hold its δ; use `with lens.applied():`."
            )
    listed = site_hooks(plan, inject, points)
    if getattr(model.cfg, "use_attn_result", False):
        return listed
    # TransformerLens refuses a hook at a point that a flag switches off, or warns about it.
    silent = plan.points_without_update
    return [(name, fn) for name, fn in listed if name not in silent]


def _new_readers(
    ports: Ports, readers: dict[str, _Reader], points: Mapping[str, Any]
) -> list[tuple[str, HookFn]]:
    """Add the readers that these ports need and earlier ones did not; also to `readers`."""
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
    """The writer of an injection, at its hook point, or at a module that has none."""
    injection = plan.injections[index]
    site = plan.sites[injection.site]
    ports = injection.ports
    reader = readers.get(ports.read or "")
    like = readers.get(ports.like or "")
    if reader is not None:
        reader.site = site.name
    if ports.read == ports.write and ports.write not in points:
        return _ModuleWriter(
            index=index, inject=inject, like=like, adapter=plan.adapter, kind=site.kind, ports=ports
        )
    return _Writer(
        index=index,
        inject=inject,
        like=like,
        adapter=plan.adapter,
        injection=injection,
        name=site.name,
        reader=reader,
    )


def _arranger(
    of_block: Sequence[tuple[str, HookFn]],
    before: Sequence[tuple[str, HookFn]],
    points: Mapping[str, Any],
    begin_block: Callable[[], None],
) -> hooks.Arranger:
    """The hook that keeps the hooks of a block in order.

    Hooks of `before` at points that are written are among its writers, so that they stay first.
    """
    readers = [(name, fn) for name, fn in of_block if isinstance(fn, _Reader)]
    writers = [(name, fn) for name, fn in of_block if not isinstance(fn, _Reader)]
    written_points = {name for name, _ in writers}
    writers += [(name, fn) for name, fn in reversed(before) if name in written_points]
    return hooks.Arranger(
        points,
        writers=[(name, fn) for name, fn in writers if name in points],
        readers=[(name, fn) for name, fn in readers if name in points],
        begin=begin_block,
    )


def _norms_first(plan: Plan) -> list[int]:
    """The indices of the injections, with those of norms first.

    A map that reads at a norm's module must see what was added there.
    """
    kinds = [plan.sites[injection.site].kind for injection in plan.injections]
    return sorted(range(len(kinds)), key=lambda index: kinds[index] not in NORM_KINDS)
