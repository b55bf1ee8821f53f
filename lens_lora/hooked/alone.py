"""A public call on a lens: alone on its model, in torch's plain settings, leaving nothing behind.

1. One thread at a time works with a model; a second one waits.
2. Inference mode, autocast, anomaly detection and a default device are off within the call,
   whatever they are around it: within inference mode no derivative exists, autocast rounds to half
   precision, anomaly detection stops derivatives that are taken as one batch, and small tensors
   are made on the CPU.
3. Within a torch.func transform a call is refused, as its own derivatives would be taken there.
4. Where memory runs out, the error names what bounds it.
5. At the end, whatever interrupts the call, its hooks, grad mode and all else that it changed are
   as before (`lens_lora/temporary.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from traceback import clear_frames
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch._C._functorch import get_interpreter_stack

from lens_lora.errors import LensLoraError, ModelStateError, OutOfMemoryError
from lens_lora.hooked.attaching import hold, lock_of
from lens_lora.hooked.quantised import differentiable_products
from lens_lora.temporary import Temporary, close_but, open_spans

__all__ = ["alone", "is_memory_short"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_DEVICES = ("cpu", "cuda", "mps", "xpu")


def alone(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function whose first argument is a lens, or a method of a lens.

    Args:
        call: what is to run alone on the lens's model.
    """

    @functools.wraps(call)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        lens: Any = kwargs.get("lens", args[0] if args else None)
        others, span = open_spans(), Temporary(functools.partial(_prepare, lens))
        try:
            try:
                span.__enter__()
                return call(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, LensLoraError):
                    raise
                if is_memory_short(error):
                    clear_frames(error.__traceback__)  # which hold what takes the memory
                    raise OutOfMemoryError(_too_much(lens, error)) from error
                if "nference tensor" not in str(error):
                    raise
                raise ModelStateError(f"{_made_there(lens)} Torch says: {error}") from error
            finally:
                close_but(others)
        finally:
            close_but(others)

    return run


def _prepare(lens: Any, span: Temporary) -> None:
    if get_interpreter_stack():
        raise ModelStateError(
            "this is within a torch.func transform (grad, jvp, vmap, …), and the call takes "
            "derivatives of its own. Call it outside; to differentiate through the adapted model, "
            "run the model itself within `with lens.applied(gates):`."
        )
    model = getattr(lens, "model", None)
    if isinstance(model, nn.Module):
        hold(span, lock_of(model))
    plan = getattr(lens, "_plan", None)
    if plan is not None:
        differentiable_products(span, plan.quantised)
    span.way_back(functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    if torch.is_inference_mode_enabled():
        span.enter_context(torch.inference_mode(False))
    for device in _DEVICES:
        if torch.is_autocast_enabled(device):
            span.enter_context(torch.autocast(device, enabled=False))
    if torch.get_default_device().type != "cpu":
        span.enter_context(torch.device("cpu"))
    if torch.is_anomaly_enabled():
        span.enter_context(torch.autograd.set_detect_anomaly(False))


def is_memory_short(error: BaseException) -> bool:
    """Whether this says that memory ran out, on any device.

    Args:
        error: of torch, NumPy or Python.
    """
    says = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in says for words in ("out of memory", "not enough memory", "can't allocate memory")
    )


def _too_much(lens: Any, error: BaseException) -> str:
    bound = getattr(lens, "max_memory", None)
    now = "no bound is set" if bound is None else f"max_memory is {bound:.3g} bytes"
    says = str(error).strip() or "no more memory"
    return (
        f"memory ran out ({says.splitlines()[0]}), and {now}. Bound it: "
        "lens.within(max_memory=…), in bytes, for every analysis of the lens that it returns; or "
        "pass fewer or shorter prompts, fewer tokens=, or fewer hook points in names=. Attention "
        "patterns of long prompts take most: ll.load(…, attn='sdpa') makes none."
    )


def _made_there(lens: Any) -> str:
    model = getattr(lens, "model", None)
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    weights = [f"the weight {name}" for name, weight in named if weight.is_inference()]
    what = next(iter(weights), "what the adapter, a readout or a hook holds")
    return (
        f"{what} was made within torch.inference_mode(), where no tensor keeps what a derivative "
        "needs. Load or make it outside of that mode (torch.no_grad() has no such effect), or pass "
        "its clone()."
    )
