"""Whether a hooked model computes what its Hugging Face base does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora.errors import ModelStateError

__all__ = ["require_same_base"]

_CHECKED_TOKENS, _AGREEMENT = 8, 1e-3
_Logits = Float[Tensor, "batch pos d_vocab"]


def require_same_base(
    logits_of: Callable[[Int[Tensor, "batch pos"]], _Logits], hf_model: nn.Module, class_name: str
) -> None:
    """Refuse a hooked model that is not its base: the host library can be wrong about one.

    `logits_of` gives the hooked model's, without the adapter. One forward pass of each.

    Raises:
        ModelStateError: their logits differ by more than a thousandth of their range.
    """
    tokens = torch.arange(1, 1 + _CHECKED_TOKENS)[None]
    with torch.no_grad(), _adapters_off(hf_model):
        expected = hf_model(tokens.to(next(hf_model.parameters()).device)).logits
    found = logits_of(tokens).to(expected)
    found, expected = (logits - logits.mean(-1, keepdim=True) for logits in (found, expected))
    off, span = float((found - expected).abs().max()), float(expected.max() - expected.min())
    if not off <= _AGREEMENT * span:
        raise ModelStateError(
            f"without the adapter this {class_name} computes other logits than hf_model: "
            f"{off:.2g} off, of a range of {span:.2g}. Either hf_model is not its base, or "
            "transformer-lens builds this family wrongly (2.18 ignores Llama's rope_theta, and "
            "misfolds Mixtral); try another version, or its TransformerBridge."
        )


@contextlib.contextmanager
def _adapters_off(hf_model: nn.Module) -> Generator[None]:
    """PEFT layers inside the model, if any, switched off and back on as they were."""
    layers: list[Any] = [m for m in hf_model.modules() if hasattr(m, "enable_adapters")]
    active = [layer for layer in layers if not layer.disable_adapters]
    try:
        for layer in active:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in active:
            layer.enable_adapters(True)
