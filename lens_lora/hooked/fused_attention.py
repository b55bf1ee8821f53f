"""Attention of a TransformerBridge by torch's fused kernels, which make no [head, query, key].

A bridge of most families computes attention itself, from its formula and whatever the config says,
so that patterns have hook points. Here each block's attention is Hugging Face's own, between the
bridge's hook points of q, k, v, the output and the whole. Those of scores, patterns and rotated q
and k never fire: a hook there is warned of when a pass begins, whoever put it on.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from lens_lora.errors import ModelStateError

__all__ = ["fuse_attention", "has_fused_attention"]

# Whose q, k and v are modules of Hugging Face's own attention.
_DEAD = ("hook_attn_scores", "hook_pattern", "hook_rot_q", "hook_rot_k")
_SEPARATE = ("AttentionBridge", "PositionEmbeddingsAttentionBridge")


def fuse_attention(model: Any) -> None:
    """Let every block's attention be Hugging Face's own, by the kernel 'sdpa'. For good.

    Args:
        model: a TransformerBridge, unprocessed.

    Raises:
        ModelStateError: a family whose attention has no such form.
    """
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    attentions, why = [block.attn for block in model.blocks], None
    if any(type(attention).__name__ not in _SEPARATE for attention in attentions):
        why = "q, k and v are one module"
    elif any(_caps_scores(attention) for attention in attentions):
        why = "attention scores are capped"
    elif not model.original_model._supports_sdpa:
        why = "transformers has none for this family"
    if why is not None:
        raise ModelStateError(
            f"attn='sdpa': {why}, so a TransformerBridge of {type(model.original_model).__name__} "
            "cannot use a fused kernel. Leave attn out, and bound the memory of long prompts by "
            "lens.within(max_memory)."
        )
    model.original_model.set_attn_implementation("sdpa")
    for attention in attentions:
        vars(attention)["forward"] = functools.partial(_fused, AttentionBridge.forward, attention)


def _fused(forward: Callable[..., Any], attention: Any, *args: Any, **kwargs: Any) -> Any:
    hooked = [name for name in _DEAD if _has_hooks(getattr(attention, name, None))]
    if hooked:
        warnings.warn(
            f"{hooked[0]}: attn='sdpa' makes no attention scores, patterns or rotated q and k, so "
            "hooks there never fire. Load the model with attn='eager'.",
            stacklevel=2,
        )
    return forward(attention, *args, **kwargs)


def _has_hooks(point: Any) -> bool:
    return point is not None and bool(
        point._forward_hooks or point._forward_pre_hooks or point._backward_hooks
    )


def _caps_scores(attention: Any) -> bool:
    return getattr(attention.original_component, "attn_logit_softcapping", None) is not None


def has_fused_attention(model: Any) -> bool:
    """Whether `fuse_attention` was called on this TransformerBridge.

    Args:
        model: a TransformerBridge.
    """
    return all("forward" in vars(block.attn) for block in model.blocks)
