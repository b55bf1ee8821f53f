"""Attention of a TransformerBridge: by its formula, or by torch's fused kernels.

For most families a bridge computes attention itself, by the formula and the settings of the config,
so that patterns have hook points. This has two consequences:

- `fuse_attention` makes each block use Hugging Face's own attention with torch's fused kernel,
  which keeps no tensor [head, query, key]. Hook points of scores, patterns and rotated q and k then
  never fire. If any code has put a hook there, a warning says so when a pass begins.
- Gemma 3's attention holds `attn_logit_softcapping` but does not use it, and the bridge does. So
  such a cap is removed (`drop_unused_caps`), or refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lens_lora import compat
from lens_lora.core.model import attentions
from lens_lora.errors import ModelStateError, setting, warn

# --- Attention by torch's fused kernels

_CAP = "attn_logit_softcapping"
# The hook points that never fire with a fused kernel.
_DEAD = ("hook_attn_scores", "hook_pattern", "hook_rot_q", "hook_rot_k")
# Bridges whose q, k and v are modules of Hugging Face's own attention.
_SEPARATE = ("AttentionBridge", "PositionEmbeddingsAttentionBridge")


def fuse_attention(model: Any) -> None:
    """Make every block use Hugging Face's own attention, with the kernel 'sdpa', for good."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    components = attentions(model)
    why = None
    if len(components) < len(model.blocks):
        why = "some layers have no attention"
    elif any(type(attention).__name__ not in _SEPARATE for attention in components):
        why = "q, k and v are one module"
    elif any(getattr(part.original_component, _CAP, None) is not None for part in components):
        why = "attention scores are capped"
    elif not compat.supports_sdpa(model.original_model):
        why = "transformers has none for this family"
    if why is not None:
        raise ModelStateError(
            f"{setting('attn', 'sdpa')}: {why}, so a TransformerBridge of "
            f"{type(model.original_model).__name__} cannot use a fused kernel.",
            remedy="Leave attn out, and bound the memory of long prompts by "
            "lens.within(max_memory).",
            in_shell="Leave --attn out, and bound the memory of long prompts by --max-memory.",
        )
    model.original_model.set_attn_implementation("sdpa")
    for attention in components:
        compat.set_forward(attention, functools.partial(_fused, AttentionBridge.forward, attention))


def _fused(forward: Callable[..., Any], attention: Any, *args: Any, **kwargs: Any) -> Any:
    """Run Hugging Face's attention inside a bridge, and warn about hooks that never fire."""
    hooked = [name for name in _DEAD if _has_hooks(getattr(attention, name, None))]
    if hooked:
        warn(
            f"{hooked[0]}: attn='sdpa' makes no attention scores, patterns or rotated q and k, so "
            "hooks there never fire. Load the model with attn='eager'."
        )
    return forward(attention, *args, **kwargs)


def _has_hooks(point: Any) -> bool:
    if point is None:
        return False
    hooks = compat.hooks_of(point)
    return bool(hooks.forward or hooks.before or hooks.backward)


def replaced_attentions(model: Any) -> list[str]:
    """The names of attentions in a bridge whose Hugging Face module has a forward of its own."""
    replaced: list[str] = []
    for layer, block in enumerate(getattr(model, "blocks", ())):
        attention = getattr(getattr(block, "attn", None), "original_component", None)
        if compat.is_forward_replaced(attention):
            replaced.append(f"blocks.{layer}.attn")
    return replaced


# --- Soft-caps of attention scores that Hugging Face never computes


def drop_unused_caps(hf_model: nn.Module) -> None:
    """Remove soft-caps that are not used; what Hugging Face computes stays the same."""
    for attention in _with_unused_cap(hf_model.modules()):
        setattr(attention, _CAP, None)


def refuse_unused_caps(modules: Iterable[nn.Module]) -> None:
    """Check that a bridge of these modules computes no soft-cap that Hugging Face leaves out."""
    with_cap = _with_unused_cap(modules)
    if not with_cap:
        return
    first = with_cap[0]
    raise ModelStateError(
        f"{type(first).__name__}.{_CAP} = {getattr(first, _CAP)}: the TransformerBridge caps "
        "attention scores by it, and transformers ignores it, so their logits differ. Set it to "
        "None on the Hugging Face model's attention modules (and in its config), or load by "
        "ll.load, which does."
    )


def _with_unused_cap(modules: Iterable[nn.Module]) -> list[Any]:
    """The modules with a soft-cap that their forward pass does not read."""
    with_cap: list[Any] = []
    for module in modules:
        cap = getattr(module, "__dict__", {}).get(_CAP)
        if cap is not None and not _uses_cap(type(module)):
            with_cap.append(module)
    return with_cap


def _uses_cap(attention: type[nn.Module]) -> bool:
    """Whether the code of the forward pass names the soft-cap."""
    code = getattr(inspect.unwrap(attention.forward), "__code__", None)
    return code is None or _CAP in code.co_names
