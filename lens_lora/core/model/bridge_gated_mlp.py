"""A gated MLP with processed weights, which a TransformerBridge computes by itself.

Elsewhere a linear map is computed by the module within its component. In such an MLP the bridge
multiplies by the weights itself, and so

1. what gate and up read is at the MLP's `hook_in`, as `hook_in` of both components is passed over;
2. the weights are those that the MLP holds (transformer-lens 3), or those of the components of
   gate, up and down (transformer-lens 4), which each pass then reads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lens_lora import compat
from lens_lora.core.model.bridge_components import name_in_mlp


def computes_gated_mlp(bridge: Any, layer: int) -> bool:
    """Whether the bridge itself computes the MLP of this layer."""
    mlp = bridge.blocks[layer].mlp
    return compat.uses_processed_weights(mlp) and hasattr(mlp, "gate")


def reads_at_mlp(bridge: Any, layer: int, kind: str) -> bool:
    """Whether `hook_in` of the MLP shows what this map reads, and that of its component does not.

    Args:
        bridge: the bridge.
        layer: the number of the block.
        kind: the kind of any map.
    """
    return kind in ("gate", "up") and computes_gated_mlp(bridge, layer)


def held_weight(bridge: Any, layer: int, kind: str) -> Tensor | None:
    """The weight that the MLP holds itself, [out, in]; None where its component has the weight.

    Args:
        bridge: the bridge.
        layer: the number of the block.
        kind: the kind of any map.
    """
    if kind not in ("gate", "up", "down") or not computes_gated_mlp(bridge, layer):
        return None
    weight = compat.processed_weight(bridge.blocks[layer].mlp, name_in_mlp(kind))
    return None if weight is None else weight.detach()
