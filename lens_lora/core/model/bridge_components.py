"""The components of a TransformerBridge: which there are, and how they are named."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from lens_lora import compat
from lens_lora.core.model import extensions
from lens_lora.core.model.modules import module_at
from lens_lora.core.model.sites import Heads, site_name
from lens_lora.errors import ModelStateError
from lens_lora.families import Family, Place, find_family, listed_family

# The bridge's names of an MLP's components, where they are others than the kinds.
COMPONENTS = {"up": "in", "fc_in": "in", "down": "out", "fc_out": "out"}


def attentions(model: Any) -> list[Any]:
    """The attentions of a bridge's blocks, where they have the usual name."""
    blocks = getattr(model, "blocks", ())
    return [block.attn for block in blocks if hasattr(block, "attn")]


def has_fused_attention(model: Any) -> bool:
    """Whether `fuse_attention` was called on this TransformerBridge."""
    found = attentions(model)
    return bool(found) and all(compat.own_forward(attention) is not None for attention in found)


def family_of(model: Any, heads: Heads) -> tuple[Family, Mapping[tuple[int, str], str]]:
    """The family, and by layer and kind the names of what was read from the model itself.

    Where no family is listed, all of it is read from the model; where one is, only the stacks of
    experts and routers are.
    """
    listed = listed_family(model.original_model)
    if compat.is_processed(model):
        if listed is None:
            _refuse_processed(type(model.original_model).__name__)
        return listed, {}
    if listed is not None and not extensions.experts_by_layer(model):
        return listed, {}
    read = extensions.family_of_bridge(model, heads)
    if listed is None:
        return read, read.homes
    homes: dict[tuple[int, str], str] = {}
    for place, name in read.homes.items():
        if isinstance(module_at(model, name), nn.Parameter):
            homes[place] = name
    stacks: dict[str, Place] = {}
    for path, place in read.places.items():
        if (place.layer, *place.kinds) in homes:
            stacks[path] = place
    return dataclasses.replace(listed, stacks=stacks), homes


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


def usual_name(layer: int, kind: str) -> str:
    """The bridge's name of a linear map, an embedding or a norm of usual attention or MLPs."""
    name = COMPONENTS.get(kind)
    return site_name(layer, kind) if name is None else f"blocks.{layer}.mlp.{name}"
