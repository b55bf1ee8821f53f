"""`Components`: the component of a TransformerBridge for each layer and kind of map.

A bridge puts a component around each module of its Hugging Face model, and splits a fused
projection into components of q, k and v.

1. Where `families` lists the class of the Hugging Face model, components have their usual names,
   such as 'blocks.3.attn.q' or 'blocks.3.mlp.in'.
2. Where it does not, places and names are read from the model (`extensions.family_of_bridge`).
3. A stack of experts, or a router, is a parameter and has no component. It is named by its path,
   and is always read from the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from lens_lora import compat
from lens_lora.compat import unwrapped
from lens_lora.core.model import extensions
from lens_lora.core.model.modules import module_at
from lens_lora.core.model.sites import USUAL_KINDS, Heads, site_name
from lens_lora.errors import ModelStateError
from lens_lora.families import BridgedFamily, Family, Place, find_family, listed_family

# The bridge's names of an MLP's components, where they are others than the kinds.
_NAMES_IN_MLP = {"up": "in", "fc_in": "in", "down": "out", "fc_out": "out"}


def attentions(bridge: Any) -> list[Any]:
    """The attentions of a bridge's blocks, where they have the usual name."""
    blocks = getattr(bridge, "blocks", ())
    return [block.attn for block in blocks if hasattr(block, "attn")]


def has_fused_attention(bridge: Any) -> bool:
    """Whether `fuse_attention` was called on this TransformerBridge."""
    found = attentions(bridge)
    return bool(found) and all(compat.own_forward(attention) is not None for attention in found)


def name_in_mlp(kind: str) -> str:
    """The bridge's name of a map within its MLP, such as 'in' for up."""
    return _NAMES_IN_MLP.get(kind, kind)


@dataclasses.dataclass(frozen=True, eq=False)
class Components:
    """The components of a bridge, by layer and kind.

    Attributes:
        bridge: the bridge.
        family: how its Hugging Face model is built: a listed family, or what the model shows.
        read_names: the names that were read from the model, by layer and kind.
    """

    bridge: Any
    family: Family
    read_names: Mapping[tuple[int, str], str]

    @classmethod
    def of(cls, bridge: Any, heads: Heads) -> Components:
        """Find the family of a bridge, and read from the model what the family does not say.

        Raises:
            ModelStateError: the family is not listed, and the weights were processed.
        """
        listed = listed_family(bridge.original_model)
        if compat.is_processed(bridge):
            if listed is None:
                _refuse_processed(type(bridge.original_model).__name__)
            return cls(bridge, listed, {})
        if listed is None:
            family = extensions.family_of_bridge(bridge, heads)
            return cls(bridge, family, family.homes)
        if extensions.experts_by_layer(bridge):
            return _with_parameters(bridge, listed, extensions.family_of_bridge(bridge, heads))
        return cls(bridge, listed, {})

    @property
    def is_listed(self) -> bool:
        """Whether the family is listed, so that it is known what its blocks compute."""
        return not isinstance(self.family, BridgedFamily)

    def name(self, layer: int, kind: str) -> str:
        """The name, in the bridge, of a linear map, an embedding or a norm."""
        read_name = self.read_names.get((layer, kind))
        if read_name:
            return read_name
        if kind in _NAMES_IN_MLP:
            return f"blocks.{layer}.mlp.{name_in_mlp(kind)}"
        return site_name(layer, kind)

    def may_flatten_rows(self, kind: str) -> bool:
        """Whether a module of this kind may see the tokens of all rows as one axis."""
        return bool(self.read_names) and kind not in USUAL_KINDS

    def at(self, layer: int, kind: str) -> Any:
        """The component, or the parameter; None where the bridge has neither."""
        return module_at(self.bridge, self.name(layer, kind))

    def wrapped(self, layer: int, kind: str) -> Any:
        """The Hugging Face module of the component, or the parameter; None where there is none."""
        return unwrapped(self.at(layer, kind))

    def owner_of(self, layer: int, kind: str) -> tuple[nn.Module, str]:
        """The module that holds a parameter without a component, and the parameter's name there."""
        path, _, name = self.name(layer, kind).rpartition(".")
        return module_at(self.bridge, path), name


def _with_parameters(bridge: Any, listed: Family, read: BridgedFamily) -> Components:
    """Add to a listed family the stacks of experts and the routers that the model shows."""
    names: dict[tuple[int, str], str] = {}
    for layer_and_kind, name in read.homes.items():
        if isinstance(module_at(bridge, name), nn.Parameter):
            names[layer_and_kind] = name
    stacks: dict[str, Place] = {}
    for path, place in read.places.items():
        if (place.layer, *place.kinds) in names:
            stacks[path] = place
    return Components(bridge, dataclasses.replace(listed, stacks=stacks), names)


def _refuse_processed(architecture: str) -> NoReturn:
    """Raise the error of a model without an entry whose weights were processed."""
    family = find_family(architecture)
    raise ModelStateError(
        f"{architecture}: this model has no {family.ln_final}, or an embedding of another width "
        "than its residual stream, so what TransformerLens does to the weights of others of its "
        "class is not known to be right.",
        remedy="Use the TransformerBridge as boot_transformers makes it, before "
        "enable_compatibility_mode(), or let ll.load make one.",
    )
