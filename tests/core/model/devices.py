"""Accelerators that are not there: real numbers on the CPU, each tensor with the device it claims.

A tensor of device "toy:0" or "toy:1" holds a CPU tensor. What CUDA refuses to mix is recorded, and
raised at the end of the block: an exception out of a backward pass aborts the interpreter here. So
is float64 on a device without it, as MPS is.
Load adapters before the block, as safetensors cannot be read under a mode.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import backend_registration as backends
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
SYNCS = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select)
syncs: list[str] = []
mixed: list[str] = []
crossings: list[str] = []
lacking: set[torch.dtype] = set()


class _Module(backends._DummyBackendModule):
    def device_count(self):
        return 2

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def empty_cache(self):
        pass


def _empty_no_cache() -> None:
    """Do nothing: torch expects an allocator of every accelerator, and "toy" has none."""


backends._setup_privateuseone_for_python_backend("toy", backend_module=_Module())
# The backend stays registered when this module's tests have run, and accelerate empties the cache
# of whatever accelerator is there.
torch.accelerator.empty_cache = _empty_no_cache


class Placed(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, device):
        new = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        new.held = held
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    __array__ = numpy

    def __repr__(self):
        return f"Placed({self.held}, {self.device})"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Those in an operation's arguments or results, which nest lists, tuples and one dict."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors([*value.values()])


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """The same with each tensor changed; torch's own pytrees take ten times as long."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(change, part) for part in value])
    if isinstance(value, dict):
        return {name: _mapped(change, part) for name, part in value.items()}
    return value


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, Placed) else tensor


def _run(func, args, kwargs):
    op = func.overloadpacket
    tensors = list(_tensors((args, kwargs)))
    away = [t.device for t in tensors if t.device.type == "toy"]
    home = away[0] if away else torch.device("cpu")
    met = {t.device for t in tensors if t.ndim or t.device.type == "toy"}
    if op in INDEXING:  # an index may lie on the CPU
        home = args[0].device
        at = {t.device for t in _tensors(args[1])}
        met = {home, *(at - {torch.device("cpu")}), *(t.device for t in args[2:3] if t.ndim)}
    if op is aten.copy_:
        met = set()
        home = args[0].device
    if len(met) > 1:
        # Kept, not raised: an exception out of a backward pass aborts the interpreter here.
        mixed.append(f"{func} on {sorted(map(str, met))} at {_own_line()}")
    if kwargs.get("device") is not None:
        home = torch.device(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}
        home = torch.device("toy:0") if str(home) == "toy" else home
    if away and (op in SYNCS or (op in (aten._to_copy, aten.copy_) and home.type == "cpu")):
        syncs.append(str(func))
    if op in (aten._to_copy, aten.copy_):
        source = tensors[-1].device
        if source.type == home.type == "toy" and source != home:
            crossings.append(f"{source} → {home}, {tuple(tensors[-1].shape)} at {_own_line()}")
    if op is aten._efficientzerotensor:
        func = aten.zeros.default
    out = func(*_mapped(_held, args), **_mapped(_held, kwargs))
    if home.type == "toy":
        if any(t.dtype in lacking for t in _tensors(out)):
            mixed.append(f"{func}: no such dtype on {home} at {_own_line()}")
        out = _mapped(lambda t: Placed(t, home), out)
    return return_and_correct_aliasing(func, args, kwargs, out) if tensors else out


def _own_line() -> str:
    """The innermost line of the package under way."""
    frame = sys._getframe()
    while frame is not None and "/lens_lora/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


# torch.tensor, new_tensor and an index that is a list build on the device below every mode.
_kernels = torch.library.Library("aten", "IMPL")
_kernels.impl(
    "empty_strided",
    lambda size, stride, dtype=None, layout=None, device=None, pin_memory=None: Placed(
        torch.empty_strided(size, stride, dtype=dtype), device
    ),
    "PrivateUse1",
)


def _copy_from(source, target, non_blocking=False):
    target.held.copy_(getattr(source, "held", source))
    return target


_kernels.impl("_copy_from", _copy_from, "PrivateUse1")


@contextlib.contextmanager
def tracked(*, without_float64: bool = False):
    """Within the block "toy:0" and "toy:1" are devices. Backward passes stay on this thread."""
    syncs.clear(), mixed.clear(), lacking.clear(), crossings.clear()
    lacking.update([torch.float64] if without_float64 else [])
    with torch.autograd.set_multithreading_enabled(False), _Mode():
        yield syncs
    assert not mixed, "\n".join(dict.fromkeys(mixed))
