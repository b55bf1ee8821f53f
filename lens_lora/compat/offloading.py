"""Weights that accelerate keeps on the CPU or on disk between calls.

Its hooks put a module's parameters on the device when the module is called, and on "meta"
afterwards. The parameters that a lens itself reads (W_U, γ, the weights that an update is made of)
are brought in by the same hooks, for as long as they are read.
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
    """Within the block, the module's own parameters are on the device where it runs."""
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
    raise AssertionError("every parameter belongs to a module")


def refuse_out_of_reach(modules: Mapping[nn.Module, str]) -> None:
    """Refuse weights on the device 'meta' that accelerate's hooks do not bring in.

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
                    "only on the CPU (device='cpu').",
                    in_shell="Load the model so that it fits: --load-in-4bit, --dtype bfloat16, "
                    "over more GPUs with --device-map balanced, or only on the CPU with --device "
                    "cpu.",
                )
            if is_offloaded(module) and not _knows(module, name):
                raise ModelStateError(
                    f"{path}.{name} was added after accelerate offloaded its module, perhaps by "
                    "the bridge, and cannot be brought in. Set it to None if it is zero, or let "
                    "ll.load make the bridge, which does so."
                )


def drop_new_biases(bridge: Any) -> None:
    """Remove the bias of zeros that a bridge gives to a head without a bias.

    Accelerate's hooks, which were added before, do not know this parameter, and fail when they
    bring it in. In a head that is split over processes, its size is not that of a process's part.
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
    """Accelerate's hook on this very module; None if it has none.

    `accelerate.utils.has_offloaded_params` reads an attribute, and a bridge's component forwards
    attributes to the module that it wraps. Nothing public tells the device, or the known weights.
    """
    return vars(module).get("_hf_hook")
