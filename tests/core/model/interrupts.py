"""An interrupt at a chosen line of the package, and all that an interrupted call may leave behind.

Lines are counted as they run, so a number names the same moment of every run. Of lines that run
many times, called from the same lines, the first and the last time are taken.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch._C import _len_torch_function_stack
from torch.nn.attention import _cur_sdpa_kernel_backends

import lens_lora
from lens_lora.core.model.hooks import call_under_way
from lens_lora.core.model.locks import ONE_IN_A_PROCESS, lock_of

PACKAGE = str(Path(lens_lora.__file__).parent)
Call = Callable[[], object]
_KINDS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


Place = tuple[tuple[str, int], ...]


class _Lines:
    """A trace function that interrupts before the package's line of a number."""

    def __init__(self, stop: int) -> None:
        self._stop = stop
        self._count = 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            if self._count == self._stop:
                raise KeyboardInterrupt
            self._count += 1
        return self._line


class _Places:
    """A trace function that lists the package's lines, and at which lines of it each is called."""

    def __init__(self) -> None:
        self.places: list[Place] = []

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        # What called a frame stays at its line until the frame is left.
        name = frame.f_code.co_filename[len(PACKAGE) + 1 :]
        callers = _place(frame.f_back)

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            if event == "line":
                self.places.append(((name, frame.f_lineno), *callers))
            return line

        return line


def _place(frame: FrameType | None) -> Place:
    """The line, and the package's lines that called it."""
    found = []
    while frame is not None and frame.f_code is not _traced.__code__:
        if frame.f_code.co_filename.startswith(PACKAGE):
            found.append((frame.f_code.co_filename[len(PACKAGE) + 1 :], frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def _traced(call: Call, lines: _Lines | _Places) -> BaseException | None:
    before = sys.gettrace()
    sys.settrace(lines)
    try:
        call()
    except KeyboardInterrupt as interrupt:
        return interrupt
    finally:
        sys.settrace(before)
    return None


def points_of(call: Call) -> dict[int, str]:
    """Where a call can be interrupted, as numbers of lines, and which line that is."""
    call()
    lines = _Places()
    _traced(call, lines)
    first: dict[Any, int] = {}
    for number, place in enumerate(lines.places):
        first.setdefault(place, number)
    last = {place: number for number, place in enumerate(lines.places)}
    chosen = sorted({*first.values(), *last.values()})
    return {number: "{}:{}".format(*lines.places[number][0]) for number in chosen}


def left_by(call: Call, model: Any, number: int) -> list[str]:
    """What an interrupt there leaves behind, while its traceback is held as notebooks hold it."""
    before = held(model)
    interrupt = _traced(call, _Lines(number))
    after = held(model)
    del interrupt
    return [name for name in before if before[name] != after[name]]


def held(model: Any) -> dict[str, Any]:
    """Hooks by identity, replaced methods, locks, and the state of torch and of warnings."""
    modules = [*model.named_modules(), *model.hook_dict.items()]
    bloom: Any = sys.modules.get("transformers.models.bloom.modeling_bloom")
    return {
        "hooks": [
            (name, kind, list(getattr(module, kind).items()))
            for name, module in modules
            for kind in _KINDS
            if getattr(module, kind)
        ],
        "listed hooks": [
            (name, list(map(id, point.fwd_hooks)), list(map(id, point.bwd_hooks)))
            for name, point in model.hook_dict.items()
            if point.fwd_hooks or point.bwd_hooks
        ],
        "replaced forward": [name for name, module in modules if "forward" in vars(module)],
        "replaced GELU": bloom and bloom.BloomGelu.forward,
        "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
        "grad mode": (torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly": torch.is_anomaly_enabled(),
        "default device": torch.get_default_device(),
        "function modes": _len_torch_function_stack(),
        "dual level": fwad._current_level,
        "attention kernels": _cur_sdpa_kernel_backends(),
        "warnings": list(warnings.filters),
        "public call": call_under_way(),
        "locks": (len(lock_of(model).holders), len(ONE_IN_A_PROCESS.holders)),
    }
