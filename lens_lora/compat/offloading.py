"""Weights that accelerate keeps on the CPU or on disk between calls.

Its hooks put a module's parameters on the device as the module is called, and on "meta" after it.
What a lens reads of them itself (W_U, γ, the weights that an update is made of) is brought in by
the same hooks, for as long as it is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lens_lora.compat.torch_models import is_sharded
from lens_lora.compat.torch_modules import own_parameters
from lens_lora.errors import ModelStateError


def brought_in(module: nn.Module) -> AbstractContextManager[None]:
    """Within the block the module's own parameters are at hand, on the device where it runs."""
    if not is_offloaded(module):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's own parameters elsewhere between calls."""
    return bool(getattr(_hook_of(module), "offload", False))


def home_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter; if that is offloaded, the one on which it runs."""
    first = next(model.parameters())
    if not first.is_meta:
        return first.device
    for module in model.modules():
        if any(parameter is first for parameter in module.parameters(recurse=False)):
            return torch.device(_hook_of(module).execution_device)
    raise AssertionError("a parameter of no module")


def refuse_out_of_reach(modules: Mapping[nn.Module, str]) -> None:
    """Refuse weights that lie on no device and are not brought to one by accelerate's hooks.

    Args:
        modules: a model's modules, with their names.
    """
    for module, path in modules.items():
        for name, weight in own_parameters(module).items():
            if not is_offloaded(module) and weight.is_meta:
                raise ModelStateError(
                    f"{path}.{name} is on the device 'meta', and no hook of accelerate's brings it "
                    "in when its module is called.",
                    remedy="Load the model so that it fits: in 4 bit (ll.load(…, "
                    "load_in_4bit=True)), in bfloat16, over more GPUs (device_map='balanced'), or "
                    "on the CPU alone (device='cpu').",
                    in_shell="Load the model so that it fits: --load-in-4bit, --dtype bfloat16, "
                    "over more GPUs with --device-map balanced, or --device cpu alone.",
                )
            if is_offloaded(module) and not _knows(module, name):
                raise ModelStateError(
                    f"{path}.{name} was added after accelerate offloaded its module, by the bridge "
                    "perhaps, and cannot be brought in. Set it to None if it is zero, or let "
                    "ll.load make the bridge, which does."
                )


def drop_new_biases(bridge: Any) -> None:
    """Take away the bias of zeros that a bridge gives a head without one.

    Accelerate's hooks, put on before, know no such parameter, and fail when they bring it in. In a
    head that is split over processes it would be no part of what a process computes.
    """
    head = bridge.unembed.original_component
    if head.bias is None:
        return
    is_unknown = is_offloaded(head) and not _knows(head, "bias")
    is_whole_beside_part = is_sharded(head.weight) and not is_sharded(head.bias)
    if is_unknown or is_whole_beside_part:
        head.bias = None


def _knows(module: nn.Module, name: str) -> bool:
    """Whether accelerate's hook on a module knows a parameter."""
    try:
        return _hook_of(module).weights_map[name] is not None
    except KeyError:
        return False


def _hook_of(module: nn.Module) -> Any:
    """Accelerate's hook on this very module, None without one.

    `accelerate.utils.has_offloaded_params` asks by attribute, which a bridge's component passes on
    to the module that it wraps; and nothing public tells the device, or which weights are known.
    """
    return vars(module).get("_hf_hook")
