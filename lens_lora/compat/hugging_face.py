"""Models of transformers, weights of bitsandbytes, and the rule by which PEFT finds modules."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import Tensor, nn

from lens_lora.spans import Temporary


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear module or an embedding of Hugging Face's."""
    return isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear module, which holds its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"


def gated(experts: Any, hidden: Tensor) -> Tensor:
    """Compute act(gate) · up from the output of the first stack, as each family does.

    There is no public name for it.
    """
    return experts._apply_gate(hidden)


def experts_implementation(experts: Any) -> str | None:
    """The kernel by which experts are computed; there is a public setter for it, but no getter."""
    return experts.config._experts_implementation


def is_split_over_processes(experts: nn.Module) -> bool:
    """Whether each process holds only some of the experts; transformers sets a private flag."""
    return bool(getattr(experts, "_is_expert_parallel", False))


def supports_sdpa(hf_model: Any) -> bool:
    """Whether transformers has a fused kernel for this family; there is no public name for it."""
    return bool(hf_model._supports_sdpa)


def attention_of(hf_model: Any) -> str | None:
    """The kernel by which a model was loaded to compute attention: 'eager', 'sdpa', …"""
    return getattr(hf_model.config, "_attn_implementation", None)


def fields_of(config: Any) -> dict[str, Any]:
    """A configuration as it is saved, plus the attention that it was loaded with."""
    attention = getattr(config, "_attn_implementation", None)
    return {**config.to_dict(), "_attn_implementation": attention}


def plain_bloom_gelu(span: Temporary) -> None:
    """Let Bloom compute GELU from its formula until the span ends.

    Its own GELU is wrapped in a Function that has no forward-mode derivative.
    """
    bloom: Any = sys.modules.get("transformers.models.bloom.modeling_bloom")
    if bloom is not None:
        wrapped = bloom.BloomGelu.forward
        span.way_back(functools.partial(setattr, bloom.BloomGelu, "forward", wrapped))
        bloom.BloomGelu.forward = lambda self, x: bloom.bloom_gelu_forward(x)


def unpacked_4bit(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """4-bit weights as they were before bitsandbytes packed them for a CPU, by its own inverse."""
    from bitsandbytes import functional

    return functional._convert_weight_packed_for_cpu_inverse(packed, state)


def peft_adapts(config: Any, path: str) -> bool:
    """Whether PEFT adapts this module under these targets; it does not export the rule."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(config, path))
