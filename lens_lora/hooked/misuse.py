"""What a lens says of a wrong argument, and of a model whose activations overflow."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lens_lora.adapters.adapter import Adapter
from lens_lora.errors import AdapterError, ModelStateError
from lens_lora.hooked.attaching import HookFn, attached

__all__ = ["first_non_finite", "require_kinds"]


def require_kinds(adapter: object, hf_model: object) -> None:
    """Check the types of a lens's arguments.

    Args:
        adapter: an `Adapter`; a path or a PEFT model is refused.
        hf_model: a loaded Hugging Face model, or None.

    Raises:
        AdapterError, ModelStateError: another type; names the call that makes the right one.
    """
    if not isinstance(adapter, Adapter):
        is_path = isinstance(adapter, str | os.PathLike)
        remedy = f"ll.load_adapter({str(adapter)!r})" if is_path else "ll.Adapter.from_peft(…)"
        raise AdapterError(
            f"the adapter is a {type(adapter).__name__}; LoraLens takes an ll.Adapter: {remedy}."
        )
    if hf_model is not None and not isinstance(hf_model, nn.Module):
        raise ModelStateError(
            f"hf_model is a {type(hf_model).__name__}; pass the loaded base model: "
            "AutoModelForCausalLM.from_pretrained(base)."
        )


def first_non_finite(model: Any, run: Callable[[], object]) -> str:
    """A sentence that names the first hook point with a NaN or an infinity. One forward pass.

    Args:
        model: the hooked model, with the adapter's hooks on it.
        run: one forward pass.
    """
    seen: list[str] = []

    def watch(name: str) -> HookFn:
        def check(tensor: Any, hook: Any) -> None:
            del hook
            is_float = isinstance(tensor, Tensor) and tensor.is_floating_point()
            if not seen and is_float and not torch.isfinite(tensor).all():
                seen.append(name)

        return check

    names = [name for name in model.hook_dict if "attn_scores" not in name]
    with attached(model, [(name, watch(name)) for name in names]):
        run()
    where = seen[0] if seen else "the unembedding"
    return f"non-finite activations first appear at {where}; check the model's dtype and weights."
