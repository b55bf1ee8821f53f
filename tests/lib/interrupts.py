"""An interrupt at a chosen line of the package, and all that an interrupted call may leave behind.

Lines are counted as they run, so the same number names the same moment of every run.
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
from torch.nn.attention import _cur_sdpa_kernel_backends
from torch.overrides import _len_torch_function_stack

import lens_lora

PACKAGE = str(Path(lens_lora.__file__).parent)
Call = Callable[[], object]


class _Counter:
    """A trace function that numbers the package's lines; at one of them it interrupts."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.places = stop, []

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.places.append((frame.f_code.co_filename[len(PACKAGE) + 1 :], frame.f_lineno))
            if len(self.places) - 1 == self.stop:
                raise KeyboardInterrupt
        return self._line


def _traced(call: Call, counter: _Counter) -> BaseException | None:
    before = sys.gettrace()
    sys.settrace(counter)
    try:
        call()
    except KeyboardInterrupt as interrupt:
        return interrupt
    finally:
        sys.settrace(before)
    return None


def lines_of(call: Call) -> list[tuple[str, int]]:
    """The package's lines that a call runs, in order; called twice, as caches fill."""
    call()
    counter = _Counter()
    _traced(call, counter)
    return counter.places


def left_by(call: Call, model: Any, line: int) -> list[str]:
    """What an interrupt at this line leaves behind, while the traceback is still held."""
    before = held(model)
    counter = _Counter(line)
    interrupt = _traced(call, counter)
    after = held(model)
    left = [name for name in before if before[name] != after[name]]
    del interrupt
    return left


def held(model: Any) -> dict[str, Any]:
    """Hooks by identity, methods, and the state of torch in this thread."""
    hooks = {
        (name, kind): list(getattr(module, kind))
        for name, module in model.named_modules()
        for kind in _KINDS
        if getattr(module, kind)
    }
    listed = {
        (name, kind): [id(handle) for handle in getattr(point, kind)]
        for name, point in model.hook_dict.items()
        for kind in ("fwd_hooks", "bwd_hooks")
        if getattr(point, kind)
    }
    bloom: Any = sys.modules.get("transformers.models.bloom.modeling_bloom")
    return {
        "hooks": hooks,
        "listed hooks": listed,
        "replaced forward": [n for n, m in model.named_modules() if "forward" in vars(m)],
        "bloom": bloom and bloom.BloomGelu.forward,
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "function modes": _len_torch_function_stack(),
        "dual level": fwad._current_level,
        "sdpa": _cur_sdpa_kernel_backends(),
        "warnings": list(warnings.filters),
        "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
        "lock": _is_free_for_others(model),
    }


_KINDS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def _is_free_for_others(model: Any) -> bool:
    return True
