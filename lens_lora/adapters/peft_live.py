"""A live model's adapter → factors by module path, read from PEFT's own layers.

PEFT's `get_peft_model_state_dict` leaves out modules whose path contains another adapter's name, so
each LoRA layer is read itself: its tensors, and the scale that it applies now.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.peft_paths import PREFIX, by_module
from lens_lora.adapters.peft_read import base_of, module_factors, renamed
from lens_lora.adapters.peft_variants import refuse_variants
from lens_lora.errors import AdapterError, ArgumentError, UnsupportedAdapterError

__all__ = ["live_factors"]


def live_factors(model: Any, adapter_name: str) -> tuple[dict[str, LoRAFactors], str | None]:
    """(factors by module path, the base it names) of one adapter of a live model; copies.

    Args:
        model: a PeftModel, or a transformers model to which adapters were added.
        adapter_name: which of its adapters.

    Raises:
        ArgumentError: the model has no adapters.
        AdapterError: no adapter of this name, or its tensors are inconsistent.
        UnsupportedAdapterError: not plain LoRA, or a PeftMixedModel.
    """
    configs, base = _configs_and_base(model)
    if not isinstance(adapter_name, str) or adapter_name not in configs:
        raise AdapterError(
            f"the PeftModel has no adapter {adapter_name!r}; it has {sorted(configs)}."
        )
    config, source = configs[adapter_name], f"PeftModel[{adapter_name!r}]"
    refuse_variants(config, source)
    modules = {
        path: _factors(path, layer, adapter_name, config.bias == "lora_only", source)
        for path, layer in _layers(base, adapter_name).items()
    }
    if not modules:
        raise AdapterError(f"{source}: no LoRA layer of the model has this adapter.")
    return renamed(modules, source), base_of(config, source)


def _configs_and_base(model: Any) -> tuple[dict[str, Any], nn.Module]:
    from peft import PeftMixedModel

    if isinstance(model, PeftMixedModel):
        raise UnsupportedAdapterError(
            "a PeftMixedModel, whose adapters may be of several kinds; only LoRA is read. Merge it "
            "and compare with the base: ll.Adapter.between(base, mixed_model.merge_and_unload())."
        )
    configs = getattr(model, "peft_config", None)
    if not isinstance(model, nn.Module) or not isinstance(configs, dict):
        raise ArgumentError(
            f"from_peft takes a PeftModel, and this is a {type(model).__name__} without an "
            "adapter. From a folder: ll.load_adapter(path); of a merged or fine-tuned model: "
            "ll.Adapter.between(base, tuned)."
        )
    unwrap = getattr(model, "get_base_model", None)
    return configs, model if unwrap is None else unwrap()


def _layers(base: nn.Module, name: str) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {
        path: module
        for path, module in base.named_modules()
        if isinstance(module, LoraLayer)
        and (name in module.lora_A or name in module.lora_embedding_A)
    }


def _factors(path: str, layer: Any, name: str, has_trained_bias: bool, source: str) -> LoRAFactors:
    state: dict[str, Tensor] = {}
    for key, tensor in layer.state_dict().items():
        kind, _, rest = key.partition(".")
        own, _, end = rest.partition(".")
        if own == name and kind.startswith("lora_"):
            end = "" if kind == "lora_magnitude_vector" else end
            state[f"{PREFIX}{path}.{kind}" + (f".{end}" if end else "")] = tensor
    bias = getattr(layer.get_base_layer(), "bias", None)
    if has_trained_bias and bias is not None:
        state[f"{PREFIX}{path}.base_layer.bias"] = bias
    state = {key: tensor.detach().clone().cpu() for key, tensor in state.items()}
    found, left_over = by_module(state)
    if left_over:
        raise AdapterError(f"{source}, module {path}: unknown tensors {left_over}.")
    return module_factors(path, found.get(path, {}), layer.scaling[name], source)
