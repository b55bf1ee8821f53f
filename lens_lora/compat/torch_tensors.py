"""Tensors of torch: memory, rounding, derivatives, kernels of attention, and float64.

Maps and statistics are computed in float64, whatever the model's dtype. MPS has no float64, so
there they are computed on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack, is_functorch_wrapped_tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, _sdpa_kernel
from torch.overrides import TorchFunctionMode, _pop_mode

from lens_lora.spans import Temporary


def is_memory_short(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return any(word in text for word in words)


def give_back_freed_memory() -> None:
    """Let glibc return to the system the memory that torch has freed on the CPU.

    glibc keeps the memory of tensors below 32 MiB for later ones, and larger tensors cannot use it.
    With another C library nothing is done.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    library.malloc_trim(0)


# The bytes that a pass keeps between two times that freed memory is given back.
_KEPT = 2**24


class FreedMemory:
    """Gives freed memory back now and then while a pass keeps some tensors and frees others.

    Otherwise the process holds most of what was freed in between: torch aligns tensors, and glibc
    seldom finds room for an aligned tensor where one of the same size was. It takes milliseconds,
    each time that 16 MiB were kept.
    """

    def __init__(self) -> None:
        self._kept: int = 0

    def note_kept(self, tensor: Tensor) -> None:
        """Note that a tensor is kept until the pass ends."""
        if tensor.device.type == "cpu":
            self._kept += tensor.nbytes
        if self._kept > _KEPT:
            give_back_freed_memory()
            self._kept = 0


def float32_products() -> tuple[str, ...]:
    """How torch lets backends round float32 products, in its own words.

    The only public function, `torch.get_float32_matmul_precision`, raises an error from torch 2.9
    on if a program has set only one backend. 'none' means that nothing was set for the product, its
    backend or torch as a whole: products are then rounded as with 'ieee', so 'ieee' is returned.
    """
    backends: Any = torch.backends.cuda, torch.backends.mkldnn
    products: list[Any] = [getattr(backend, "matmul", None) for backend in backends]
    if all(hasattr(product, "fp32_precision") for product in products):
        return tuple(_as_ieee(product.fp32_precision) for product in products)
    return (torch.get_float32_matmul_precision(),)


def _as_ieee(setting: str) -> str:
    return "ieee" if setting == "none" else setting


# Environment variables that let oneDNN round the factors of float32 products on the CPU.
_ROUND_ON_CPU = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")


def may_round_on_cpu() -> bool:
    """Whether the factors of float32 products may be rounded to fewer bits on the CPU.

    They are not rounded unless a setting of torch, or of oneDNN beneath it, allows it.
    """
    is_told_by_torch = any(setting not in ("ieee", "highest") for setting in float32_products())
    modes = [os.environ.get(name, "") for name in _ROUND_ON_CPU]
    is_told_by_name = any(mode.upper() not in ("", "STRICT") for mode in modes)
    return is_told_by_torch or is_told_by_name


def activation_checkpointing(modules: Iterable[nn.Module]) -> str | None:
    """How transformers reruns blocks in backward passes: 'reentrant', 'not reentrant', or None.

    A module does so only in training mode. If nothing is set, torch's default, reentrant, holds. No
    public name tells.
    """
    for module in modules:
        if module.training and getattr(module, "gradient_checkpointing", False) is True:
            function = getattr(module, "_gradient_checkpointing_func", None)
            keywords = getattr(function, "keywords", {})
            return "reentrant" if keywords.get("use_reentrant", True) else "not reentrant"
    return None


def edits_of(tensor: Tensor) -> int:
    """How often a tensor was edited in place; torch counts it under a private name."""
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Whether this is a view of another tensor: a part of it, or the same entries reshaped."""
    return tensor._is_view()


def is_within_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, …) is under way; only torch's C++ knows."""
    return bool(get_interpreter_stack())


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func hides the tensor's values; only torch's C++ knows."""
    return is_functorch_wrapped_tensor(tensor)


def allow_forward_mode(span: Temporary) -> None:
    """Allow forward-mode derivatives until the span ends, even if they were turned off.

    Inference mode turns them off, and the public switches of grad mode do not turn them on.
    """
    is_allowed = torch._C._is_fwd_grad_enabled()
    span.way_back(functools.partial(torch._C._set_fwd_grad_enabled, is_allowed))
    torch._C._set_fwd_grad_enabled(True)


def enter_mode(span: Temporary, mode: TorchFunctionMode) -> None:
    """Enter a mode of torch functions until the span ends.

    The mode's own `__exit__` pops the innermost mode, whichever it is. After an interrupt before
    `__enter__` it would pop another one. The depth of torch's stack has no public name.
    """
    depth = torch._C._len_torch_function_stack()

    def pop() -> None:
        while torch._C._len_torch_function_stack() > depth:
            _pop_mode()

    span.way_back(pop)
    mode.__enter__()


def attention_kernels() -> list[SDPBackend]:
    """The kernels that attention may use now; the public `sdpa_kernel` only sets them."""
    return _cur_sdpa_kernel_backends()


def use_attention_kernels(span: Temporary, kernels: Sequence[SDPBackend]) -> None:
    """Let attention use one of these kernels until the span ends.

    The public `sdpa_kernel` is a generator, which would stay suspended (see `spans.py`).
    """
    span.way_back(functools.partial(_sdpa_kernel, attention_kernels()))
    _sdpa_kernel(kernels)


# The types of devices that have no float64.
_WITHOUT = {"mps"}


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU if the device has no float64."""
    return torch.device("cpu") if device.type in _WITHOUT else device


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64, on its own device if that has it, else on the CPU."""
    return tensor.to(float64_device(tensor.device)).double()
