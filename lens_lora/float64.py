"""float64 where a device has none: on the CPU.

Maps are built, and statistics taken, in float64, whatever the model's dtype. MPS has no such dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["float64_device", "in_float64"]

_WITHOUT = {"mps"}


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU where it has no float64.

    Args:
        device: of a tensor.
    """
    return torch.device("cpu") if device.type in _WITHOUT else device


def in_float64(tensor: Tensor) -> Tensor:
    """In float64, on its own device if that has it, else on the CPU.

    Args:
        tensor: of any dtype, on any device.
    """
    return tensor.to(float64_device(tensor.device)).double()
