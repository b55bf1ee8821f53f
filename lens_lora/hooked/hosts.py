"""Which host fits a hooked model."""

from __future__ import annotations

from typing import Any

from lens_lora.errors import ModelStateError
from lens_lora.hooked.host import Host
from lens_lora.hooked.host_bridge import BridgeHost
from lens_lora.hooked.host_check import refuse_unusable
from lens_lora.hooked.host_hooked_transformer import HookedTransformerHost
from lens_lora.hooked.quantised import quantised_linears

__all__ = ["host_of"]


def host_of(model: Any) -> Host:
    """The host that fits the model's class. No forward pass.

    Args:
        model: a HookedTransformer or a TransformerBridge.

    Raises:
        ModelStateError: another class, or a state in which an adapter cannot be applied exactly.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    for host in (HookedTransformerHost, BridgeHost):
        if host.class_name in names:
            refuse_unusable(model)
            found = host(model)
            if found.needs_base() and quantised_linears(model):
                raise ModelStateError(
                    f"this {host.class_name} is quantised and processed: folding needs the weights "
                    "themselves. Use it before enable_compatibility_mode(), or load the base in "
                    "bfloat16 or float32."
                )
            return found
    raise ModelStateError(
        f"{type(model).__name__} has no hook points; pass a HookedTransformer or a "
        "TransformerBridge."
    )
