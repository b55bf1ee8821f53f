"""The layers of a live PeftModel: an adapter's tensors, and the base model under them.

PEFT's `get_peft_model_state_dict` leaves out modules whose path contains another adapter's name. So
every LoRA layer is read directly, with the scale that it applies now. So are PEFT's wrappers of
trained modules and rows, and with bias="all" every bias.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lens_lora.compat import in_whole
from lens_lora.core import ModuleUpdate
from lens_lora.core.adapter import (
    PREFIX,
    by_module,
    head_follows,
    is_plain_lora,
    lora_factors,
    of_experts,
    parameter_holder,
    parameter_path,
    saved_keys,
    trained_module,
)
from lens_lora.errors import AdapterError, ArgumentError, UnsupportedAdapterError, located

# Initialisations of LoRA under which PEFT leaves the base's weights as they are.
_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


def configs_and_base(model: Any) -> tuple[dict[str, Any], nn.Module]:
    """The config of each adapter by name, and the model that holds the layers.

    Args:
        model: a PeftModel, or a transformers model with adapters of its own.

    Raises:
        ArgumentError: a model without an adapter.
        UnsupportedAdapterError: a PeftMixedModel.
    """
    from peft import PeftMixedModel

    if isinstance(model, PeftMixedModel):
        raise UnsupportedAdapterError(
            "a PeftMixedModel, whose adapters may change each other's layers. Merge it and compare "
            "with the base: ll.Adapter.between(base, mixed_model.merge_and_unload())."
        )
    configs = getattr(model, "peft_config", None)
    if not isinstance(model, nn.Module) or not isinstance(configs, dict):
        raise ArgumentError(
            f"from_peft takes a PeftModel, and this is a {type(model).__name__} without an "
            "adapter. Use ll.load_adapter(folder), or Adapter.between(base, tuned) for two models."
        )
    unwrap = getattr(model, "get_base_model", None)
    if unwrap is None:
        return configs, model
    return configs, unwrap()


# --- The base model


def base_within(peft_model: Any) -> nn.Module:
    """The base model of a PeftModel, as new modules over the same tensors.

    Raises:
        UnsupportedAdapterError: a PeftModel that no longer holds its base.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    configs, live = configs_and_base(peft_model)
    require_unmerged(live)
    for name, config in configs.items():
        _require_unchanged_base(name, config)

    # `copy.deepcopy` takes what its memo holds for an object as the copy of it. Here that is the
    # tensor itself for a tensor, and the wrapped module for a layer of PEFT: so no tensor is
    # copied, and no layer of PEFT is in the copy.
    tensors = itertools.chain(live.parameters(), live.buffers())
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    wrappers = BaseTunerLayer | ModulesToSaveWrapper | TrainableTokensWrapper
    for module in live.modules():
        inner: Any = module
        while isinstance(inner, wrappers):
            is_layer = isinstance(inner, BaseTunerLayer)
            inner = inner.get_base_layer() if is_layer else inner.original_module
        if inner is not module:
            memo[id(module)] = copy.deepcopy(inner, memo)
    return copy.deepcopy(live, memo)


def require_unmerged(live: nn.Module) -> None:
    """Refuse a model with an adapter merged into its weights.

    Raises:
        UnsupportedAdapterError: an adapter is merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules: list[Any] = list(live.modules())
    if any(module.merged for module in modules if isinstance(module, BaseTunerLayer)):
        raise _without_base("an adapter is merged into it. Run peft_model.unmerge_adapter().")


def _require_unchanged_base(name: str, config: Any) -> None:
    if getattr(config, "bias", "none") != "none":
        raise _without_base(
            f"{name!r} trains biases in place. Pass the base by name: "
            "ll.load(base, ll.Adapter.from_peft(peft_model))."
        )
    initialisation = getattr(config, "init_lora_weights", True)
    if initialisation not in _KEEP_THE_BASE:
        raise _without_base(
            f"init_lora_weights={initialisation!r} of {name!r} changed its weights. Compare with "
            "the true base: ll.load(base, ll.Adapter.between(base, peft_model.merge_and_unload()))."
        )


def _without_base(why: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(f"the PeftModel no longer holds its base: {why}")


# --- An adapter's tensors


@dataclasses.dataclass(frozen=True)
class _LiveState:
    """The tensors of one adapter in the layers of a live model, and how they are to be read.

    Attributes:
        tensors: the tensors, by the keys of a live model.
        scales: s of each LoRA layer, by module path.
        ids: the ids of trained rows, by module path.
        experts: how many a parameter holds, by its path.
    """

    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict[str, Tensor])
    scales: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    ids: dict[str, list[int]] = dataclasses.field(default_factory=dict[str, list[int]])
    experts: dict[str, int] = dataclasses.field(default_factory=dict[str, int])

    def add(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Add the tensors of a module, by their keys within it."""
        for key, tensor in tensors.items():
            if tensor.is_meta:
                raise AdapterError(
                    f"{path}.{key} is on the device 'meta', where a tensor holds no numbers. Load "
                    "the PeftModel with its weights, or read the folder: ll.load_adapter(folder)."
                )
            self.tensors[f"{path}.{key}"] = tensor


def updates_of_layers(base: nn.Module, name: str, config: Any) -> dict[str, ModuleUpdate]:
    """Copies of the updates of LoRA layers, and of modules and rows that were trained with them.

    Layers of other methods than LoRA are left out.

    Args:
        base: the model that holds the layers.
        name: the name of the adapter.
        config: the adapter's configuration.

    Raises:
        AdapterError: tensors that are inconsistent.
    """
    live = _live_state(base, name, config)
    copies = {PREFIX + key: _copy(tensor) for key, tensor in live.tensors.items()}
    state, _ = saved_keys(copies)
    modules, left_over = by_module(state)
    if left_over:
        raise AdapterError(f"unknown tensors {left_over[:5]}.")
    updates: dict[str, ModuleUpdate] = {}
    for path, roles in modules.items():
        with located(f"module {path}"):
            if path not in live.scales:
                tokens = torch.tensor(live.ids[path]) if path in live.ids else None
                tied = path in live.ids and head_follows(path, live.ids)
                updates[path] = trained_module(roles, tokens, tied=tied)
                continue
            factors = lora_factors(roles, live.scales[path])
            experts = live.experts.get(path)
            updates[path] = of_experts(factors, experts) if experts else factors
    return updates


def _live_state(base: nn.Module, name: str, config: Any) -> _LiveState:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    bias = getattr(config, "bias", "none")
    is_lora = is_plain_lora(config)
    live = _LiveState()
    if bias == "all":
        live.tensors.update(_biases(base))
    module: Any
    for path, module in base.named_modules():
        if isinstance(module, ParamWrapper):
            path = parameter_path(parameter_holder(path), module.parameter_name)
            live.experts[path] = module.num_experts
        if isinstance(module, LoraLayer) and is_lora and _has_adapter(module, name):
            live.scales[path] = module.scaling[name]
            live.add(path, _layer_state(module, name, bias))
        elif isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            live.add(path, module.modules_to_save[name].state_dict())
        elif isinstance(module, TrainableTokensWrapper):
            rows = module.token_adapter
            deltas = rows.trainable_tokens_delta
            if rows.tied_adapter is None and name in deltas:
                path = path.removesuffix(".base_layer")
                live.ids[path] = rows.token_indices[name]
                live.add(path, {f"token_adapter.trainable_tokens_delta.{name}": deltas[name]})
    return live


def _has_adapter(layer: Any, name: str) -> bool:
    return name in layer.lora_A or name in layer.lora_embedding_A


def _layer_state(layer: Any, name: str, bias: str) -> dict[str, Tensor]:
    """One LoRA layer's tensors of this adapter, and its module's bias if that was trained."""
    state: dict[str, Tensor] = {}
    for key, tensor in layer.state_dict().items():
        # Such as lora_A.default.weight.
        if key.startswith("lora_"):
            _, adapter_name, *_ = key.split(".")
            if adapter_name == name:
                state[key] = tensor
    trained_bias = getattr(layer.get_base_layer(), "bias", None)
    if bias in ("lora_only", "all") and trained_bias is not None:
        state["base_layer.bias"] = trained_bias
    return state


def _biases(base: nn.Module) -> dict[str, Tensor]:
    """The biases of modules without a LoRA layer or wrapper of PEFT, by their names."""
    prefixes: list[str] = []
    for path, module in base.named_modules():
        if type(module).__module__.startswith("peft."):
            prefixes.append(f"{path}.")
    biases: dict[str, Tensor] = {}
    for name, parameter in base.named_parameters():
        if name.endswith(".bias") and not name.startswith(tuple(prefixes)):
            biases[name] = parameter
    return biases


def _copy(tensor: Tensor) -> Tensor:
    return in_whole(tensor.detach()).clone().cpu()
