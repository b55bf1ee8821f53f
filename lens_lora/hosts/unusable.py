"""Models over which no lens can be laid, because of their weights or their code.

1. Weights that are split over processes, or quantised by a method whose derivative is not known
   here (`refuse_unusable_weights`).
2. A bridge that computes another function than its Hugging Face model, or cannot run
   (`refuse_unusable_bridge`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lens_lora import compat
from lens_lora.core.model import extensions
from lens_lora.errors import ModelStateError, named
from lens_lora.hosts import over_ranks
from lens_lora.hosts.attention import refuse_unused_caps
from lens_lora.hosts.experts import refuse_without_float64
from lens_lora.hosts.quantised import quantised_name


@extensions.refuse_unusable_weights.provide
def refuse_unusable_weights(model: nn.Module, modules: Mapping[nn.Module, str]) -> None:
    """Refuse weights that are split over processes, or quantised by an unknown method."""
    _refuse_sharded(model, modules)
    _refuse_unknown_quantisation(model, modules)


@extensions.refuse_unusable_bridge.provide
def refuse_unusable_bridge(model: Any, modules: Mapping[nn.Module, str]) -> None:
    """Refuse a TransformerBridge that computes another function than its Hugging Face model."""
    refuse_unused_caps(modules)
    if any(compat.wraps_nothing(module) for module in modules):
        refuse_empty_components(model)
    refuse_without_float64(modules)


def _refuse_sharded(model: nn.Module, modules: Mapping[nn.Module, str]) -> None:
    """Refuse modules that compute with a part of a weight.

    Under FSDP2 a module gathers its whole weight, and a module that `make_maps_whole` has changed
    writes its whole output: these are not refused.
    """
    hf_model = getattr(model, "original_model", model)
    is_split = over_ranks.is_split(hf_model)
    if is_split and hf_model is model:
        over_ranks.split_maps(model)  # They are made whole once a bridge is made.
        return
    gathered = compat.gathered_modules(modules)
    for module, path in modules.items():
        for name, parameter in compat.own_parameters(module).items():
            if not compat.is_sharded(parameter):
                continue
            mesh = parameter.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
            is_gathered = module in gathered and mesh.ndim == 1
            is_whole = is_split and over_ranks.computes_whole(module)
            if not is_gathered and not is_whole:
                raise over_ranks.split_otherwise(f"{_within(path, name)} is a DTensor")


def _refuse_unknown_quantisation(model: nn.Module, modules: Mapping[nn.Module, str]) -> None:
    """Refuse weights that are quantised by any library but bitsandbytes."""
    config = getattr(getattr(model, "original_model", model), "config", None)
    method = _method(getattr(config, "quantization_config", None))
    if method not in (None, "bitsandbytes"):
        raise _unknown_quantisation("the base", method)
    for module, path in modules.items():
        if quantised_name(module) is not None:
            continue
        for name, parameter in compat.own_parameters(module).items():
            if type(parameter.data).__module__.startswith("torchao."):
                raise _unknown_quantisation(_within(path, name), "torchao")
            if not parameter.is_floating_point():
                raise ModelStateError(
                    f"{_within(path, name)} is {parameter.dtype}, and {type(module).__name__} is "
                    "no linear module of bitsandbytes; load the model in a floating-point dtype, "
                    "or by bitsandbytes as a TransformerBridge."
                )


def _within(path: str, name: str) -> str:
    """The name of a parameter of the module at this path."""
    return f"{path}.{name}" if path else name


def _unknown_quantisation(quantised: str, method: str | None) -> ModelStateError:
    """The error for weights whose products have no derivative that is known here."""
    return ModelStateError(
        f"{quantised} is quantised by {method}, whose products have no derivative that is known "
        f"here; load the base by bitsandbytes ({named('load_in_4bit')} or "
        f"{named('load_in_8bit')}) or in bfloat16."
    )


def _method(config: Any) -> str | None:
    """The method that a quantisation's configuration names, such as 'gptq'; None without one."""
    if config is None:
        return None
    settings = config if isinstance(config, dict) else vars(config)
    method = settings.get("quant_method", "an unnamed method")
    return str(getattr(method, "value", method))


def refuse_empty_components(model: Any) -> None:
    """Refuse a bridge with a component that wraps no module, because that component cannot run."""
    for name, component in model.original_model.named_modules():
        if compat.wraps_nothing(component):
            kind = type(model.original_model).__name__
            raise ModelStateError(
                f"{name}: this {kind} has no such module, and TransformerLens has put a "
                f"{type(component).__name__} there, which cannot run.",
                remedy="Let ll.load make the bridge, which leaves that place empty: "
                "ll.load(hf_model, adapter).",
            )
