"""The base's half of first order, kept: at ε = 0 it does not depend on the adapter.

    a_l = ⟨G_l, s_l B_l A_l z_l⟩        z_l what a map reads, G_l = ∂g/∂(its output)

1. A stand-in adapter that adds nothing, on every module that an adapter may target (`stand_ins`),
   is laid over the model; one forward and one backward pass shows z and G of each place where an
   adapter of these modules reads and writes (`record`). A norm that changes moves the place at
   which the maps behind it read, so both places are recorded.
2. What an adapter adds at each place, in the model's basis, is its plan's, as for any lens:
   constants of folded value biases, heads, ranks and experts too. Its injections are shown the
   recorded G and z in place of a pass (`Half.slopes`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.factors import LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.engine.read import differentiable_tokens, read_for_slopes
from lens_lora.engine.reverse import Slopes, Visit, go_back
from lens_lora.errors import LensLoraError, SiteError
from lens_lora.families import HEADS, NORM_KINDS
from lens_lora.model.gates import Injection
from lens_lora.model.host import Host
from lens_lora.model.lens import LoraLens
from lens_lora.model.sites import outside_layer
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


_Pairs = dict[str, tuple[tuple[str, str], ...]]


class Once:
    """Tensors by name, equal ones under one name: q, k and v read the same z."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], list[str]] = {}

    def name_of(self, tensor: Tensor) -> str:
        """The name of a tensor with these entries, which is kept if there is none yet."""
        alike = (tensor.shape, tensor.dtype, tensor.device, float(tensor.sum()))
        names = self._names.setdefault(alike, [])
        for name in names:
            if torch.equal(self.tensors[name], tensor):
                return name
        names.append(str(len(self.tensors)))
        self.tensors[names[-1]] = tensor.detach().clone(memory_format=torch.contiguous_format)
        return names[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class Half:
    """The base's half over some rows.

    Attributes:
        prompts, owner: the rows, and the index of each one's prompt.
        columns: place → the names of each G and z there; of g, or of each token's log p.
    """

    prompts: Prompts
    owner: Int[Tensor, " row"]
    columns: tuple[_Pairs, ...]

    @torch.no_grad()
    def slopes(
        self, lens: LoraLens, tensors: Mapping[str, Tensor], axes: tuple[str, ...] = ()
    ) -> Float[Tensor, "batch site *by"]:
        """∂g/∂ε_l at 0 of the lens's adapter, split. No forward pass.

        Raises:
            SiteError: a module whose z and G were not recorded.
        """
        reading = Reading(self.prompts, _no_read, self.owner)
        by_column: list[Tensor] = []
        for column in self.columns:
            slopes = Slopes(lens, self.prompts, tuple(axis for axis in axes if axis != "token"))
            for injection in lens.plan.injections:
                if injection.partner is None:  # what waits for a partner's gate is 0
                    for gradient, z in _recorded(lens, injection, column, tensors):
                        slopes.visit(injection, None, gradient, z)
            by_column.append(slopes.by_prompt(reading))
        return torch.stack(by_column, -1) if "token" in axes else torch.stack(by_column).sum(0)


def _recorded(
    lens: LoraLens, injection: Injection, column: _Pairs, tensors: Mapping[str, Tensor]
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
    for names in column[place]:
        gradient, z = (tensors[name].to(injection.map.device) for name in names)
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
                place, pair = _place(lens, injection), (once.name_of(gradient), once.name_of(z))
                columns[column][place] = (*columns[column].get(place, ()), pair)

        return visit

    go_back(lens, reading, lens.gates(0.0), read, visit_of)
    return columns
