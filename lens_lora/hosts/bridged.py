"""The sites of a model of an unlisted family, read from its raw TransformerBridge.

1. Every linear module, embedding and norm of the wrapped model is a place, named by its Hugging
   Face path; norms of each head are not.
2. A place reads at `hook_in` and writes at `hook_out` of the component that wraps the module, or at
   the module's own input and output if no component does. Its kind is the usual one ('q', 'up') in
   usual attention and MLPs. Otherwise it is the name of the component, or the path in the block.
3. If a component takes a fused projection apart, its own split is run on a weight that holds the
   index of each row. The result says which rows each part has.
4. A stack of experts, or the weight of a router, is a place named by the path of the parameter
   (`experts`).

`probe` compares the result with the Hugging Face model.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lens_lora.compat import has_own_code, is_conv1d, is_linear, unwrapped
from lens_lora.core import Adapter, TrainedModule
from lens_lora.core.adapter import module_path
from lens_lora.core.model import (
    ATTENTION_KINDS,
    HOOK_IN,
    Heads,
    extensions,
    is_norm,
    module_at,
    modules_in,
    names_by_path,
    shape_of,
)
from lens_lora.families import NORM_KINDS, BridgedFamily, Place, outside_layer
from lens_lora.formats import own_forward
from lens_lora.hosts.experts import is_experts, is_router, stacks_of

# The components of usual attention and MLPs, and their kinds.
_ATTENTION = {f"attn.{kind}": kind for kind in ATTENTION_KINDS}
_GATED = {"mlp.gate": "gate", "mlp.in": "up", "mlp.out": "down"}
_UNGATED = {"mlp.in": "fc_in", "mlp.out": "fc_out"}
# The methods that take a fused projection apart, with its parts in order.
_SPLITS = {"split_qkv_matrix": ("q", "k", "v"), "split_gate_up_matrix": ("gate", "in")}
# Norms of whole rows; those of each head have other axes.
_ROW_NORMS = set(NORM_KINDS) - {"q_norm", "k_norm"}
_Homes = dict[tuple[int, str], str]
_Layouts = dict[tuple[str | int, ...], list[Tensor]]


@extensions.family_of_bridge.provide
def family_of_bridge(model: Any, heads: Heads) -> BridgedFamily:
    """Read the family of a model that has no entry; it takes no forward pass."""
    reader = _Reader(model, heads)
    for path, module, parent in modules_in(model.original_model):
        reader.module(path, module, parent)
    embeddings = (path for path, place in reader.places.items() if "embed" in place.kinds)
    is_rms = getattr(getattr(model, "ln_final", None), "uses_rms_norm", False)
    norm = "RMS" if is_rms else "LN"
    return BridgedFamily(
        architectures=(type(model.original_model).__name__,),
        layer="",
        linears={},
        ln1="",
        ln2="",
        ln_final="",
        embed=next(embeddings, ""),
        norm=norm,
        post_norm=True,
        routed=True,
        grows=False,
        places=reader.places,
        homes=reader.homes,
        turned=frozenset(reader.turned),
        shared=reader.shared,
    )


class _Reader:
    """Collects the places of a bridge's modules, one module after another.

    Attributes:
        places, homes, turned, shared: as for `BridgedFamily`.
    """

    def __init__(self, model: Any, heads: Heads) -> None:
        self.places: dict[str, Place] = {}
        self.homes: _Homes = {}
        self.turned: set[str] = set()
        self.shared: dict[str, str] = {}
        self._heads = heads
        self._n_layers = model.cfg.n_layers
        self._points = model.hook_dict
        blocks = getattr(model.adapter.component_mapping.get("blocks"), "name", "")
        self._in_block = re.compile(rf"{re.escape(blocks)}\.(\d+)\.(.+)")
        # For each module, by its identity: its name in the bridge, the component that wraps it, and
        # the first path at which it was met.
        self._names = {id(module): name for name, module in model.named_modules()}
        self._components: dict[int, str] = {}
        self._first_paths: dict[int, str] = {}
        self._layouts: _Layouts = {}
        for point in self._points:
            if point.endswith(HOOK_IN):
                name = point.removesuffix(HOOK_IN)
                self._components.setdefault(id(unwrapped(module_at(model, name))), name)

    def module(self, path: str, module: nn.Module, parent: nn.Module) -> None:
        """Read one module, or the component that replaces it.

        Args:
            path: its Hugging Face path.
            module: the module or its component.
            parent: the module that contains it.
        """
        wrapped = unwrapped(module)
        layer: int | None = None
        within = path
        match = self._in_block.match(path)
        if match is not None:
            layer = int(match[1])
            within = match[2]
        if is_linear(wrapped) or is_norm(wrapped):
            self._note_shared(path, wrapped)
            self._read_map(path, layer, within, module, parent)
        elif layer is not None and id(wrapped) in self._names:
            self._read_parameters(path, layer, within, wrapped)

    def _note_shared(self, path: str, wrapped: nn.Module) -> None:
        first = self._first_paths.setdefault(id(wrapped), path)
        if first != path:
            self.shared[path] = first
            self.shared[first] = path

    def _read_parameters(self, path: str, layer: int, within: str, wrapped: Any) -> None:
        """Read a stack of experts, or a router, whose maps are parameters of the module itself."""
        for kind, parameter in _parameters_of(wrapped, within).items():
            self.places[path.removesuffix(within) + kind] = Place(layer, (kind,), "whole")
            self.homes[layer, kind] = f"{self._names[id(wrapped)]}.{parameter}"

    def _read_map(
        self, path: str, layer: int | None, within: str, module: nn.Module, parent: nn.Module
    ) -> None:
        """Read a linear module, an embedding or a norm, or each part of a fused projection."""
        wrapped = unwrapped(module)
        own_name = self._names.get(id(module)) or f"original_model.{path}"
        is_turned = is_conv1d(wrapped) or isinstance(wrapped, nn.Embedding)
        _, _, name_in_parent = path.rpartition(".")
        parts = _parts_of(parent, name_in_parent, wrapped, self._layouts)
        is_fused = bool(parts)
        if not is_fused:
            no_rows = torch.arange(0)
            parts = [_Part(module, no_rows)]
        rows: dict[str, Tensor] = {}
        for part, index in parts:
            component = self._components.get(id(unwrapped(part)))
            name = within
            if component is not None:
                name = component.removeprefix(f"blocks.{layer}.")
            kind = _kind(name, unwrapped(part), self._heads, self._points, layer)
            rows[kind] = index
            place = layer
            if place is None:
                place = outside_layer(kind, self._n_layers)
            self.homes[place, kind] = component or own_name
            if is_turned:
                self.turned.add(kind)
        if is_linear(wrapped) or set(rows) <= _ROW_NORMS:
            if is_fused:
                self.places[path] = Place(layer, tuple(rows), "measured", rows)
            else:
                self.places[path] = Place(layer, tuple(rows), "whole", {})


def _parameters_of(module: Any, within: str) -> dict[str, str]:
    """The parameters of a module that are linear maps, by their kinds.

    Args:
        module: a module, perhaps a stack of experts or a router.
        within: its path in the block.
    """
    if is_experts(module):
        return {f"{within}.{name}": name for name in stacks_of(module)}
    if is_router(module):
        return {within: "weight"}
    return {}


@extensions.require_own_parameters.provide
def require_own_parameters(model: Any, adapter: Adapter) -> None:
    """Check that modules which were trained whole compute what their parameters say.

    A module is run, on eight tokens, only if its code is neither torch's nor transformers'.

    Raises:
        AdapterError: a module with a forward of its own, such as 0.5 W z.
    """
    trained = [key for key, update in adapter.modules.items() if isinstance(update, TrainedModule)]
    names = names_by_path(model) if trained else {}
    for key in trained:
        path = module_path(key)
        if path not in names:
            continue
        module = model.get_submodule(names[path])
        if (is_linear(module) or is_norm(module)) and has_own_code(module):
            remedy = f"Leave it out: adapter.without_modules({path!r})."
            own_forward.require_own_parameters(path, module, remedy)


def _kind(name: str, linear: Any, heads: Heads, points: Container[str], layer: int | None) -> str:
    """The kind of a component of usual attention or a usual MLP; for any other, its name.

    A component of attention whose width is not that of the heads keeps its name, so that it is not
    split by head.
    """
    if name in _ATTENTION and is_linear(linear):
        kind = _ATTENTION[name]
        out, width = shape_of(linear)
        split_over_heads = width if kind == "o" else out
        return kind if split_over_heads == heads.of(kind) * heads.d_head else name
    has_usual_mlp = f"blocks.{layer}.mlp.out{HOOK_IN}" in points
    if not has_usual_mlp:
        return name
    is_gated = f"blocks.{layer}.mlp.gate{HOOK_IN}" in points
    kinds = _GATED if is_gated else _UNGATED
    return kinds.get(name, name)


class _Part(NamedTuple):
    """A part of a fused projection.

    Attributes:
        component: computes it in the bridge.
        rows: its rows in the projection.
    """

    component: nn.Module
    rows: Tensor


def _parts_of(parent: Any, name: str, linear: nn.Module, layouts: _Layouts) -> list[_Part]:
    """The component and the rows of each part of a projection; empty if it is not taken apart.

    `layouts` keeps the rows for the same projection in further layers.
    """
    if not is_linear(linear):
        return []
    for attribute, parts in _SPLITS.items():
        split = getattr(parent, attribute, None)
        if split is None:
            continue
        key = (attribute, name, *shape_of(linear))
        if key not in layouts:
            indexed = _Indexed(parent.original_component, name, linear)
            rows = [part.weight[:, 0].long() for part in split(indexed)]
            layouts[key] = rows if indexed.is_read else []
        if layouts[key]:
            pairs = zip(parts, layouts[key], strict=True)
            return [_Part(getattr(parent, part), rows) for part, rows in pairs]
    return []


class _Indexed:
    """A stand-in for a module in which the weight of one linear module holds its row numbers.

    Attributes:
        is_read: whether that linear module was asked for.
    """

    def __init__(self, module: nn.Module, name: str, linear: nn.Module) -> None:
        self.is_read: bool = False
        self._module = module
        self._name = name
        out, width = shape_of(linear)
        index = torch.arange(out, dtype=torch.float32)[:, None].expand(out, width)
        self._linear = nn.Linear(width, out, bias=False, device="meta")
        stored = index.T if is_conv1d(linear) else index
        self._linear.weight = nn.Parameter(stored, requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._module, name)
        self.is_read = True
        return self._linear
