"""A public call runs by itself on its model, in torch's plain settings, and leaves nothing behind.

1. A second thread waits for it.
2. Inference mode, autocast, anomaly detection and a default device are off within the call,
   whatever they are around it: within inference mode no derivative exists, autocast rounds to half
   precision, anomaly detection stops derivatives that are taken as one batch, and small tensors
   are made on the CPU.
3. Within a torch.func transform a call is refused, as its own derivatives would be taken there.
4. Only hooks that the call itself has laid may take part in the model's passes: those of an open
   block would make its adapted model the call's base (`require_own_hooks`). A call from a hook or
   readout of the caller's within another call is refused where that one's hooks are on the model.
5. Where memory runs out, the error names what bounds it.
6. At its end, whatever interrupts it, its hooks, grad mode and all else that it changed are as
   before (`Temporary`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from traceback import clear_frames
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from lens_lora import compat
from lens_lora.core.model import extensions
from lens_lora.core.model.hooks import CURRENT_CALL, LaidHooks, already_applied_error
from lens_lora.core.model.locks import hold, lock_of
from lens_lora.errors import (
    ArgumentError,
    LensLoraError,
    ModelStateError,
    OutOfMemoryError,
    named,
)
from lens_lora.guesses import require_fitting
from lens_lora.spans import Temporary, close_but, open_spans

# What to do where something else was given in place of a lens.
HOW_TO_MAKE_A_LENS = (
    "make one: ll.LoraLens(model, adapter), or ll.load(base, adapter) of a Hugging Face model."
)

_P = ParamSpec("_P")
_R = TypeVar("_R")
_DEVICES = ("cpu", "cuda", "mps", "xpu")
# A `LoraLens`, or what has its `model`, such as a bank of readouts. It is not checked by type:
# `LoraLens.__init__` is a public call as well, and its lens has no attribute yet. So each attribute
# is asked for with a default.
_LensLike = Any


def alone(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function whose first argument is a lens, or a method of a lens, as a public call.

    What has a lens in another place calls `run_alone`.
    """
    signature = inspect.signature(call)
    first_parameter = next(iter(signature.parameters))

    @functools.wraps(call)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first_argument = args[0] if args else None
        lens: _LensLike = kwargs.get("lens", first_argument)
        is_given = bool(args) or "lens" in kwargs
        if first_parameter == "lens" and is_given:
            _require_lens(lens, args, call.__name__)
        require_fitting(call.__name__, signature, args, kwargs)
        return run_alone(lens, functools.partial(call, *args, **kwargs))

    return run


def run_alone(lens: _LensLike, work: Callable[[], _R]) -> _R:
    """Do some work as a public call does it: by itself on the lens's model, in plain settings.

    Args:
        lens: the lens. One that is still being made has no model yet, so no thread waits for it.
        work: the work, which takes no argument.
    """
    others = open_spans()
    span = Temporary(functools.partial(_prepare, lens))
    # Twice, as an interrupt may come while the first one closes what the call has opened.
    try:
        try:
            span.__enter__()
            result = work()
            # What is still open is the caller's own, such as a block in a suspended generator.
            others = [other for other in open_spans() if other is not span]
            return result
        except (RuntimeError, MemoryError) as error:
            clearer = _with_its_cause(error, lens)
            if clearer is None:
                raise
            raise clearer from error
        finally:
            close_but(others)
    finally:
        close_but(others)


def _require_lens(lens: object, args: Sequence[object], name: str) -> None:
    """Refuse what is no lens, such as an adapter or the model, before anything is asked of it."""
    if hasattr(lens, "plan"):
        return
    fact = f"the lens is a {type(lens).__name__}"
    if any(hasattr(other, "plan") for other in args[1:]):
        raise ArgumentError(fact, remedy=f"it comes first: {name}(lens, …).")
    raise ArgumentError(fact, remedy=HOW_TO_MAKE_A_LENS)


def require_own_hooks(laid_by: object | None, adapter: str) -> None:
    """Check that the call that is under way, if any, has laid the hook that runs now."""
    if CURRENT_CALL.token not in (None, laid_by):
        raise already_applied_error(adapter)


def _prepare(lens: _LensLike, span: Temporary) -> None:
    """Take the model for this call, and torch's plain settings, until the span ends."""
    if compat.is_within_transform():
        raise ModelStateError(
            "this is within a torch.func transform (grad, jvp, vmap, …), and the call takes "
            "derivatives of its own. Call it outside; to differentiate through the adapted model, "
            "run the model itself within `with lens.applied(gates):`."
        )
    model = getattr(lens, "model", None)
    if isinstance(model, nn.Module):
        hold(span, lock_of(model))
    _refuse_calls_within(model)
    span.way_back(functools.partial(setattr, CURRENT_CALL, "token", CURRENT_CALL.token))
    CURRENT_CALL.token = object()
    plan = getattr(lens, "_plan", None)
    if plan is not None and plan.quantised:
        span.enter_context(extensions.differentiable_products(plan.quantised))
    _take_plain_settings(span)


def _refuse_calls_within(model: object) -> None:
    """Refuse a call within another one whose hooks are on the model."""
    for span in open_spans():
        laid = span.about
        if isinstance(laid, LaidHooks) and laid.model is model and laid.call is not None:
            raise ModelStateError(
                "this call is made within another one, by a hook or a readout of yours, while "
                "hooks of that call are on the model, which would change the numbers. Make it "
                "beforehand, and let the hook or the readout use what it returned."
            )


def _take_plain_settings(span: Temporary) -> None:
    """Switch off what is on around the call, until the span ends."""
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


def _with_its_cause(error: BaseException, lens: _LensLike) -> LensLoraError | None:
    """The error that names the cause of one of torch's; None where there is no clearer one."""
    if isinstance(error, LensLoraError):
        return None
    if compat.is_memory_short(error):
        clear_frames(error.__traceback__)  # its frames hold what takes the memory
        return _out_of_memory(lens, error)
    if "nference tensor" in str(error):
        return ModelStateError(f"{_made_in_inference_mode(lens)} Torch says: {error}")
    return None


def _out_of_memory(lens: _LensLike, error: BaseException) -> OutOfMemoryError:
    """The error of memory that ran out, which says what bounds it."""
    bound = getattr(lens, "max_memory", None)
    now = f"{named('max_memory')} is {bound:.3g} bytes" if bound else "no bound is set"
    says = str(error).strip() or "no more memory"
    return OutOfMemoryError(
        f"memory ran out ({says.splitlines()[0]}), and {now}.",
        remedy="Bound it: lens.within(max_memory=…), in bytes, for every analysis of the lens that "
        "it returns; or pass fewer or shorter prompts, fewer tokens=, or fewer hook points in "
        "names=. Attention patterns of long prompts take most: ll.load(…, attn='sdpa') makes none.",
        in_shell="Bound it: --max-memory, in bytes; or pass fewer or shorter prompts. Attention "
        "patterns of long prompts take most: --attn sdpa makes none.",
    )


def _made_in_inference_mode(lens: _LensLike) -> str:
    """A sentence that names the tensor of which no derivative exists."""
    holder = "what the adapter, a readout or a hook holds"
    model = getattr(lens, "model", None)
    if isinstance(model, nn.Module):
        for name, weight in model.named_parameters():
            if weight.is_inference():
                holder = f"the weight {name}"
                break
    return (
        f"{holder} was made within torch.inference_mode(), where no tensor keeps what a derivative "
        "needs. Load or make it outside of that mode (torch.no_grad() has no such effect), or pass "
        "its clone()."
    )
