"""A live model's adapter → updates by module path, read from PEFT's own layers.

1. PEFT's `get_peft_model_state_dict` leaves out modules whose path contains another adapter's name,
   so each LoRA layer is read itself: its tensors, and the scale that it applies now.
2. So are its wrappers of modules and rows that were trained, as they are used now, and with
   bias="all" every bias of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.peft_paths import PREFIX, by_module
from lens_lora.adapters.peft_read import base_of, module_factors, renamed
from lens_lora.adapters.peft_trained import head_follows, trained_module
from lens_lora.adapters.peft_variants import refuse_variants
from lens_lora.adapters.trained import ModuleUpdate, TrainedModule
from lens_lora.errors import AdapterError, ArgumentError, UnsupportedAdapterError

__all__ = ["live_updates"]


def live_updates(model: Any, adapter_name: str) -> tuple[dict[str, ModuleUpdate], str | None]:
    """(updates by module path, the base it names) of one adapter of a live model; copies.

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
    modules: dict[str, ModuleUpdate] = {
        path: _factors(path, layer, adapter_name, config.bias in ("lora_only", "all"), source)
        for path, layer in _layers(base, adapter_name).items()
    }
    for path, trained in _trained(base, adapter_name, source):
        if path in modules:
            raise AdapterError(f"{source}, module {path}: it has two updates of this adapter.")
        modules[path] = trained
    if config.bias == "all":
        modules = {**dict(_biases(base)), **modules}
    if not modules:
        raise AdapterError(f"{source}: no layer of the model has this adapter.")
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


def _trained(base: nn.Module, name: str, source: str) -> Iterator[tuple[str, TrainedModule]]:
    """Modules and rows of tokens that were trained, as PEFT's wrappers hold them."""
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    rows_of = {
        path: module.token_adapter.token_indices.get(name)
        for path, module in base.named_modules()
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is None
    }
    for path, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            yield from _copied(path, module.modules_to_save[name], source)
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is None:
            rows: Any = module.token_adapter
            if name in rows.trainable_tokens_delta:
                path = path.removesuffix(".base_layer")
                own = {"token_rows": _copy(rows.trainable_tokens_delta[name])}
                ids = torch.tensor(rows.token_indices[name])
                tied = head_follows(path, rows_of)
                yield path, trained_module(path, own, ids, tied, source)


def _copied(path: str, module: nn.Module, source: str) -> Iterator[tuple[str, TrainedModule]]:
    state = {f"{PREFIX}{path}.{key}": _copy(tensor) for key, tensor in module.state_dict().items()}
    found, left_over = by_module(state)
    if left_over or any({"A", "B"} & set(own) for own in found.values()):
        raise AdapterError(f"{source}, module {path}: unknown tensors {sorted(state)[:5]}.")
    for inner, own in found.items():
        yield inner, trained_module(inner, own, None, False, source)


def _biases(base: nn.Module) -> Iterator[tuple[str, TrainedModule]]:
    """Those of modules without a LoRA layer or wrapper of PEFT."""
    inside = [path for path, m in base.named_modules() if type(m).__module__.startswith("peft.")]
    for key, parameter in base.named_parameters():
        path = key.removesuffix(".bias")
        if path != key and not any(f"{path}.".startswith(f"{other}.") for other in inside):
            yield path, TrainedModule(bias=_copy(parameter))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().cpu()


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
    state = {key: _copy(tensor) for key, tensor in state.items()}
    found, left_over = by_module(state)
    if left_over:
        raise AdapterError(f"{source}, module {path}: unknown tensors {left_over}.")
    return module_factors(path, found.get(path, {}), layer.scaling[name], source)
