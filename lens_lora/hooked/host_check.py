"""Whether a hooked model can be trusted: its state, and its logits compared with its base's.

1. `refuse_unusable`: no active dropout, no unknown quantisation, no adapter in it already, and
   every weight within reach.
2. `base_logits`, then `require_same_logits`: without the adapter it computes what its Hugging Face
   base does. The host libraries build some families wrongly, without a warning. The base is run
   first, because a TransformerBridge wraps and changes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora.errors import ModelStateError
from lens_lora.hooked.quantised import quantised_name
from lens_lora.offloaded import home_of, refuse_out_of_reach

__all__ = [
    "OF_A_GIVEN_BASE",
    "base_logits",
    "refuse_dropout",
    "refuse_unusable",
    "require_same_logits",
]

_CHECKED_TOKENS = 8
# Of the logits' range. Rounding takes 1e-5 in float32, and 1e-7 in float64, as weights are folded
# in float32.
_AGREEMENT = 1e-4
OF_A_GIVEN_BASE = (
    "Either hf_model is not its base, or transformer-lens builds this family wrongly (2.18 ignores "
    "Llama's rope_theta, and misfolds Mixtral); try another version, or its TransformerBridge."
)
_Logits = Float[Tensor, "batch pos d_vocab"]


def refuse_unusable(model: nn.Module) -> None:
    """Check for injected adapters, active dropout, missing weights, and unknown quantisation.

    Args:
        model: a hooked model, or the base that one is made from.

    Raises:
        ModelStateError: naming the module or parameter.
    """
    refuse_dropout(model)
    refuse_out_of_reach(model)
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise ModelStateError(
                f"{name or type(module).__name__} already carries a PEFT adapter, which would be "
                "applied twice; build the hooked model from the bare base (peft_model.unload())."
            )
    _refuse_unknown_quantisation(model)


def _refuse_unknown_quantisation(model: nn.Module) -> None:
    config = getattr(getattr(model, "original_model", model), "config", None)
    method = _method(getattr(config, "quantization_config", None))
    if method not in (None, "bitsandbytes"):
        raise ModelStateError(
            f"the base is quantised by {method}, whose products have no derivative that is known "
            "here; load it by bitsandbytes (load_in_4bit or load_in_8bit) or in bfloat16."
        )
    for path, module in model.named_modules():
        if quantised_name(module) is not None:
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            if type(parameter.data).__module__.startswith("torchao."):
                raise ModelStateError(
                    f"{name} is quantised by torchao, whose products have no derivative that is "
                    "known here; load the base by bitsandbytes (load_in_4bit or load_in_8bit) or "
                    "in bfloat16."
                )
            if not parameter.is_floating_point():
                raise ModelStateError(
                    f"{name} is {parameter.dtype}, and {type(module).__name__} is no linear module "
                    "of bitsandbytes; load the model in a floating-point dtype, or by bitsandbytes "
                    "as a TransformerBridge."
                )


def _method(config: Any) -> str | None:
    """'bitsandbytes', 'gptq', …, of a configuration as an object or as a mapping."""
    if config is None:
        return None
    held = config if isinstance(config, dict) else vars(config)
    method = held.get("quant_method", "an unnamed method")
    return str(getattr(method, "value", method))


def refuse_dropout(model: nn.Module) -> None:
    """Check for active dropout: in modules, and in a Hugging Face config in train mode.

    Args:
        model: a hooked model, or the base that one is made from.

    Raises:
        ModelStateError: naming the module or the field of the config.
    """
    if not model.training:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise ModelStateError(
                f"{name}: dropout {module.p} is active, so no two runs agree; call model.eval()."
            )
    config = getattr(getattr(model, "original_model", None), "config", None)
    for name, value in (config.to_dict() if config is not None else {}).items():
        if ("drop" in name) and isinstance(value, float) and value > 0:
            raise ModelStateError(
                f"{name}={value} is active in train mode, so no two runs agree; call model.eval()."
            )


def base_logits(hf_model: nn.Module, dtype: torch.dtype) -> _Logits | None:
    """Logits of the base on eight tokens, its adapters off. One forward pass.

    None in half precision, where rounding moves logits by as much as the errors that the
    comparison should find.

    Args:
        hf_model: the Hugging Face base.
        dtype: of the hooked model.
    """
    own = next(p.dtype for p in hf_model.parameters() if p.is_floating_point())
    if min(torch.finfo(own).bits, torch.finfo(dtype).bits) < 32:
        return None
    with torch.no_grad(), _adapters_off(hf_model):
        return hf_model(_checked_tokens().to(home_of(hf_model))).logits


def require_same_logits(
    expected: _Logits | None,
    logits_of: Callable[[Int[Tensor, "batch pos"]], _Logits],
    words: tuple[str, str, str],
) -> None:
    """Check that a hooked model's logits equal its base's. One forward pass.

    A constant at each position does not count, as a centred unembedding removes it.

    Args:
        expected: from `base_logits`; with None nothing is run or checked.
        logits_of: gives the hooked model's logits without the adapter.
        words: for the error: what computes, what it is compared with, and the remedy.

    Raises:
        ModelStateError: they differ by more than a ten-thousandth of their range.
    """
    if expected is None:
        return
    with torch.no_grad():
        found = logits_of(_checked_tokens().to(expected.device)).to(expected)
    found, expected = (logits - logits.mean(-1, keepdim=True) for logits in (found, expected))
    off, span = float((found - expected).abs().max()), float(expected.max() - expected.min())
    if not off <= _AGREEMENT * span:
        what, base, remedy = words
        raise ModelStateError(
            f"{what} computes other logits than {base}: {off:.2g} off, of a range of {span:.2g}. "
            f"{remedy}"
        )


def _checked_tokens() -> Int[Tensor, "batch pos"]:
    return torch.arange(1, 1 + _CHECKED_TOKENS)[None]


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
