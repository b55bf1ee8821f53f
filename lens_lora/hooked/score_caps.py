"""Soft-caps of attention scores that a configuration names and Hugging Face never computes.

Gemma 3's attention holds `attn_logit_softcapping` and leaves it out of its forward pass; a
TransformerBridge computes it. So with a cap in the configuration the two are different functions.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lens_lora.errors import ModelStateError

__all__ = ["drop_unused_caps", "refuse_unused_caps"]

_CAP = "attn_logit_softcapping"


def drop_unused_caps(hf_model: nn.Module) -> None:
    """Take the caps away; what Hugging Face computes stays the same.

    Args:
        hf_model: the base that a bridge is made from.
    """
    for attention in _with_unused_cap(hf_model):
        setattr(attention, _CAP, None)


def refuse_unused_caps(bridge: nn.Module) -> None:
    """Check that the bridge computes no cap that its Hugging Face model leaves out.

    Args:
        bridge: a TransformerBridge.

    Raises:
        ModelStateError: it does.
    """
    found = _with_unused_cap(bridge)
    if found:
        raise ModelStateError(
            f"{type(found[0]).__name__}.{_CAP} = {getattr(found[0], _CAP)}: the TransformerBridge "
            "caps attention scores by it, and transformers ignores it, so their logits differ. "
            f"Set it to None on the Hugging Face model's attention modules (and in its config), or "
            "load by ll.load, which does."
        )


def _with_unused_cap(model: nn.Module) -> list[Any]:
    return [
        module
        for module in model.modules()
        if getattr(module, "__dict__", {}).get(_CAP) is not None and not _uses_cap(type(module))
    ]


def _uses_cap(attention: type[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(attention.forward), "__code__", None)
    return code is None or _CAP in code.co_names
