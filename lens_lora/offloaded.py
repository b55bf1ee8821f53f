"""Weights that accelerate keeps on the CPU or on disk between calls, and brings in for each.

Its hooks put a module's parameters on the device as the module is called, and on "meta" after it.
What a lens itself reads of them (W_U, γ, the weights that an update is made of) is brought in by
the same hooks, for as long as it is read.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lens_lora.errors import ModelStateError

__all__ = [
    "brought_in",
    "drop_new_biases",
    "home_of",
    "is_offloaded",
    "refuse_offloaded",
    "refuse_out_of_reach",
]


def brought_in(module: nn.Module) -> AbstractContextManager[None]:
    """Within the block the module's own parameters are at hand, on the device where it runs.

    Args:
        module: of the base.
    """
    if not is_offloaded(module):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's own parameters elsewhere between calls.

    Args:
        module: of the base.
    """
    return bool(getattr(vars(module).get("_hf_hook"), "offload", False))


def home_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter; of one that is offloaded, where it runs.

    Args:
        model: a hooked model, or a base.
    """
    first = next(model.parameters())
    if not first.is_meta:
        return first.device
    owner = next(m for m in model.modules() if any(p is first for p in m.parameters(recurse=False)))
    return torch.device(_hook_of(owner).execution_device)


def refuse_offloaded(model: nn.Module) -> None:
    """Check that no weight is offloaded, for a class of hooked models that copies them.

    Args:
        model: the base that one is made from.

    Raises:
        ModelStateError: one is.
    """
    if any(is_offloaded(module) for module in model.modules()):
        raise ModelStateError(
            "a HookedTransformer copies its weights, and some of these are offloaded; take a "
            "TransformerBridge (transformer-lens 3 or newer), which wraps the model itself."
        )


def refuse_out_of_reach(model: nn.Module) -> None:
    """Check that each weight lies on a device, or is brought to one by accelerate's hooks.

    Args:
        model: a hooked model, or the base that one is made from.

    Raises:
        ModelStateError: naming one that is nowhere.
    """
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if not is_offloaded(module) and weight.is_meta:
                raise ModelStateError(
                    f"{path}.{name} is on the device 'meta', and no hook of accelerate's brings it "
                    "in when its module is called. Load the model so that it fits: in 4 bit "
                    "(ll.load(…, load_in_4bit=True)), in bfloat16, over more GPUs "
                    "(device_map='balanced'), or on the CPU alone (device='cpu')."
                )
            if is_offloaded(module) and not _knows(module, name):
                raise ModelStateError(
                    f"{path}.{name} was added after accelerate offloaded its module, by the bridge "
                    "perhaps, and cannot be brought in. Set it to None if it is zero, or let "
                    "ll.load make the bridge, which does."
                )


def drop_new_biases(bridge: Any) -> None:
    """Take away the bias of zeros that a bridge gives a head without one.

    Accelerate's hooks, put on before, know no such parameter, and fail when they bring it in.

    Args:
        bridge: a TransformerBridge.
    """
    head = bridge.unembed.original_component
    if is_offloaded(head) and head.bias is not None and not _knows(head, "bias"):
        head.bias = None


def _knows(module: nn.Module, name: str) -> bool:
    try:
        return _hook_of(module).weights_map[name] is not None
    except KeyError:
        return False


def _hook_of(module: nn.Module) -> Any:
    return module._hf_hook
