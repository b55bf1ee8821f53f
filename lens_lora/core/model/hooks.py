"""Hooks on a model for a span of time, and public calls, which leave nothing behind.

**Hooks** are put on, kept in order, and taken off whatever happens.

1. One thread at a time has hooks on a model: the lock is the model's, and a thread that has it may
   take it again (`hold`).
2. Each hook is found again by what it calls, so it can be taken off before its handle is known.
3. Order matters among all hooks of a point, a user's own included. What reads must see its input as
   the others left it, so it runs last; what writes must do so before the others see the output, so
   it runs first. An `Arranger` at each block's input puts them in this order at every forward pass,
   whenever they were registered.

**A public call** (`alone`) runs by itself on its model, in torch's plain settings.

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

**Logits** are computed in float32 or better where they are read. In half precision each would be
rounded to 8 or 11 bits at the end, and what is read is a difference of two that are nearly equal.
Slopes have no such difference: theirs are the model's own.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from traceback import clear_frames
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lens_lora import compat
from lens_lora.compat import Temporary, close_but, hooks_of, open_spans, temporary
from lens_lora.core.model import extensions
from lens_lora.core.model.modules import is_weight
from lens_lora.errors import (
    ArgumentError,
    LensLoraError,
    ModelStateError,
    OutOfMemoryError,
    named,
    warn,
)

HookFn = Callable[..., Tensor | None]
# Seconds until a thread that waits for another one says so.
_PATIENCE = 60.0


class Lock:
    """Held by one thread at a time, in any number of spans: {a token of each: the thread}."""

    def __init__(self) -> None:
        self.changed: threading.Condition = threading.Condition()
        self.holders: dict[object, int] = {}


# For what a process has once: torch's dual level and its choice of attention kernels. A thread that
# takes it has its model's lock already.
ONE_IN_A_PROCESS = Lock()
_LOCKS: weakref.WeakKeyDictionary[nn.Module, Lock] = weakref.WeakKeyDictionary()


class _Call(threading.local):
    """The innermost public call that is under way in this thread, as an object of its own."""

    token: object | None = None


class _Laid(NamedTuple):
    """On which model a span has hooks, and the call that has laid them."""

    model: nn.Module
    call: object | None


_CALL = _Call()


@temporary
def attached(
    span: Temporary,
    model: Any,
    hooks: Sequence[tuple[str, HookFn]],
    points: Mapping[str, Any] | None = None,
) -> None:
    """The hooks on the model for the block's duration, also through `model.reset_hooks()`.

    At a module without hook points the method `at_module(args, output)` of a hook is called, where
    it has one, in place of the hook itself: before the hooks that others put on the module, and
    after those of this call that stand before it. At a parameter it is called with what the map of
    that weight reads and makes (`extensions.write_at`).

    On leaving, whatever happened, each hook point holds what others put there and nothing of ours.
    """
    hold(span, lock_of(model))
    span.about = _Laid(model, _CALL.token)
    known = model.hook_dict if points is None else points
    places: list[tuple[Any, HookFn, set[int]]] = []
    span.way_back(functools.partial(_take_off, places))
    modules: set[str] = set()
    for name, fn in hooks:
        if name not in known:
            owner, _, parameter = name.rpartition(".")
            if is_weight(model, owner, parameter):
                at_module: Any = getattr(fn, "at_module", fn)
                extensions.write_at(span, model.get_submodule(owner), parameter, at_module)
                continue
            add_to_module(span, model.get_submodule(name), fn, is_first=name not in modules)
            modules.add(name)
        elif isinstance(fn, Arranger):
            add_pre_hook(span, known[name], fn)
        else:
            forward, before, *_ = hooks_of(known[name])
            places.append((known[name], fn, {*forward, *before}))
            known[name].add_hook(fn, is_permanent=True)
            known[name].fwd_hooks[-1].hook.remove = _refuse_removal


def _refuse_removal() -> None:  # which `reset_hooks(including_permanent=True)` asks for
    raise ModelStateError(
        "hooks of an open block or call of a lens are on the model, and without them it would run "
        "the base. Leave the block first; model.reset_hooks() takes off your own hooks alone."
    )


def _take_off(places: list[tuple[Any, HookFn, set[int]]]) -> None:
    """Hooks at points that had others' before; a second call does what the first did not."""
    while places:
        point, fn, others = places[-1]
        forward, before, *_ = hooks_of(point)
        ours = {key for hooks in (forward, before) for key in _keys_of(hooks, fn)} - others
        point.fwd_hooks = [handle for handle in point.fwd_hooks if handle.hook.id not in ours]
        for key in ours:
            forward.pop(key, None)
            before.pop(key, None)
        places.pop()


def add_to_module(span: Temporary, module: nn.Module, fn: Any, *, is_first: bool) -> None:
    """A forward hook, until the span ends; `attached` says what of it is called."""
    at_module = getattr(fn, "at_module", None)

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return fn(output, hook=module) if at_module is None else at_module(args, output)

    span.way_back(functools.partial(_remove, hooks_of(module).forward, hook))
    module.register_forward_hook(hook, prepend=is_first and at_module is not None)


def add_pre_hook(
    span: Temporary, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False
) -> None:
    """A forward pre-hook, until the span ends."""
    hooks = hooks_of(module)
    span.way_back(functools.partial(_remove, hooks.before, hook, hooks.takes_kwargs))
    module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)


class _Counted(compat.SharedForward):
    passes = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.passes += 1
        try:
            return self.before(*args, **kwargs)
        finally:
            self.passes -= 1


def computes(span: Temporary, module: nn.Module) -> Callable[[], bool]:
    """Whether the module is within its own pass, to be asked until the span ends."""
    counted = _Counted.until(span, module, object())
    return lambda: counted.passes > 0


def _remove(hooks: dict[int, Any], hook: object, *also: dict[int, Any]) -> None:
    for key in [key for key, other in hooks.items() if other is hook]:
        for table in (*also, hooks):
            table.pop(key, None)


def lock_of(model: nn.Module) -> Lock:
    """The model's lock, to be taken with `hold`."""
    return _LOCKS.setdefault(model, Lock())


def hold(span: Temporary, lock: Lock) -> None:
    """The lock is this thread's until the last of its spans that asked for it ends."""
    token = object()

    def is_free() -> bool:
        return {*lock.holders.values()} <= {threading.get_ident()}

    # A span may end in another thread: that of the garbage collector, or the next one of a server
    # that resumes a suspended generator in whichever is free.
    def leave() -> None:
        with lock.changed:
            lock.holders.pop(token, None)
            lock.changed.notify_all()

    span.way_back(leave)
    with lock.changed:
        while not lock.changed.wait_for(is_free, _PATIENCE):
            warn(
                f"{threading.current_thread().name} has waited a minute for a thread that runs a "
                "lens on the same model. If that thread waits for this one, neither will go on: "
                "leave its `with lens.applied():` first."
            )
        lock.holders[token] = threading.get_ident()


class Arranger:
    """At a block's input: what reads runs last, what writes first, among all hooks of its point.

    Where a user's own pre-hook stands at a point that is written, the writer becomes one too.
    """

    def __init__(
        self,
        points: Mapping[str, Any],
        hooks: Sequence[tuple[str, HookFn, bool]],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._begin = begin
        self._hooks = [(points[name], fn, reads) for name, fn, reads in hooks]

    def __call__(self, tensor: object, hook: object) -> None:
        """Arrange, as a hook of TransformerLens or torch's pre-hook; what passes stays as it is."""
        del tensor
        self._begin()
        for point, fn, reads in self._hooks:
            forward, before, *_ = hooks_of(point)
            if before and not reads:
                _move_before_pre_hooks(point, fn)
            for key in _keys_of(forward, fn):
                if point is hook and reads and key != next(reversed(forward)):
                    raise ModelStateError(
                        f"{point.name}: a hook after those of lens.fwd_hooks() may change what is "
                        "read there. Put it before them in the list, or use `with lens.applied():`."
                    )
                forward.move_to_end(key, last=reads)


def _move_before_pre_hooks(point: Any, fn: HookFn) -> None:
    forward, before, *_ = hooks_of(point)
    for key in _keys_of(forward, fn):
        for handle in point.fwd_hooks:
            if handle.hook.id == key:  # who removes the hook removes what stands for it
                handle.hook.extra_dict_ref = (*handle.hook.extra_dict_ref, weakref.ref(before))
        before[key] = _Early(forward.pop(key))
    for key in _keys_of(before, fn):
        before.move_to_end(key, last=False)


class _Early:
    """The forward hook of a hook point, which returns its input, as a pre-hook."""

    def __init__(self, forward_hook: Callable[..., Any]) -> None:
        self.forward_hook = forward_hook

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        out = self.forward_hook(module, args, args[0])
        return None if out is None else (out, *args[1:])


def _keys_of(hooks: Mapping[int, Any], fn: HookFn) -> list[int]:
    """Where this function stands among a module's hooks."""
    return [key for key, hook in list(hooks.items()) if compat.calls(_registered(hook), fn)]


def functions_at(point: nn.Module) -> list[object]:
    """What the hooks on a module call."""
    forward, before, *_ = hooks_of(point)
    registered = map(_registered, (*forward.values(), *before.values()))
    return list(map(compat.hook_function, registered))


def is_hooked(places: Iterable[nn.Module]) -> bool:
    """Whether one of them has a hook that no library hung there by itself."""
    return any(fn is not None for place in places for fn in functions_at(place))


def _registered(hook: Any) -> Any:
    return hook.forward_hook if isinstance(hook, _Early) else hook


# --- Hooks of others that would be shown a wrong number

_MERGED = "run the tool on a model of the merged weights (peft_model.merge_and_unload())"


def refuse_backward_hooks(point: nn.Module | None, name: str, site: str) -> None:
    """Refuse backward hooks where a site reads its input.

    Torch wraps a module's output for them after all forward hooks: theirs would be the gradient of
    what the model itself makes of it, without that of δ.
    """
    if point is not None and any(hooks_of(point)[2:4]):
        raise ModelStateError(
            f"{name}: a backward hook is on the point at which {site} reads its input, and its "
            "gradient would lack what passes through the update. Keep the tensor by a forward hook "
            "that also returns it, and use torch.autograd.grad; leave this point out; or "
            f"{_MERGED}."
        )


def without_update(name: str, adapter: str) -> ModelStateError:
    """The error of a hook point that never holds the adapted model's value."""
    return ModelStateError(
        f"{name}: lies between a site's input and the point at which the update of {adapter!r} is "
        "added, so it never holds the adapted model's value. Leave it out (names_filter=…), use "
        f"the site's input or output instead (lens.sites: read, write), or {_MERGED}."
    )


class Unread:
    """At such a point: refuses all hooks but its own kind."""

    def __init__(self, point: nn.Module, name: str, adapter: str) -> None:
        self._point, self._name, self._adapter = point, name, adapter

    def __call__(self, tensor: Tensor, hook: object) -> None:
        """Raise an error if there is another hook."""
        del tensor, hook
        others = [fn for fn in functions_at(self._point) if not isinstance(fn, Unread)]
        if others or any(hooks_of(self._point)[2:4]):
            raise without_update(self._name, self._adapter)


# --- A public call


_P = ParamSpec("_P")
_R = TypeVar("_R")
_DEVICES = ("cpu", "cuda", "mps", "xpu")


def alone(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function whose first argument is a lens, or a method of a lens."""
    first_parameter = next(iter(inspect.signature(call).parameters))

    @functools.wraps(call)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        lens: Any = kwargs.get("lens", args[0] if args else None)
        if first_parameter == "lens" and (args or "lens" in kwargs):
            _require_lens(lens)
        others, span = open_spans(), Temporary(functools.partial(_prepare, lens))
        try:
            try:
                span.__enter__()
                result = call(*args, **kwargs)
                # What is open still is the caller's own, such as a block in a suspended generator.
                others = [other for other in open_spans() if other is not span]
                return result
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, LensLoraError):
                    raise
                if compat.is_memory_short(error):
                    clear_frames(error.__traceback__)  # which hold what takes the memory
                    raise _too_much(lens, error) from error
                if "nference tensor" not in str(error):
                    raise
                raise ModelStateError(f"{_made_there(lens)} Torch says: {error}") from error
            finally:
                close_but(others)
        finally:
            close_but(others)

    return run


def _require_lens(lens: object) -> None:
    """Refuse what is no lens, such as an adapter or the model, before anything is asked of it."""
    if not hasattr(lens, "plan"):
        raise ArgumentError(
            f"the lens is a {type(lens).__name__}; make one: ll.LoraLens(model, adapter)."
        )


def call_under_way() -> object | None:
    """What tells the hooks of this call from all others; None outside of a call."""
    return _CALL.token


def require_own_hooks(laid_by: object | None, adapter: str) -> None:
    """Check that the call that is under way, if any, has laid the hook that runs now."""
    if _CALL.token not in (None, laid_by):
        raise open_block(adapter)


def open_block(adapter: str) -> ModelStateError:
    """The error of a call on a model on which hooks of a lens are already."""
    return ModelStateError(
        f"the adapter {adapter!r} is on the model already: by `with lens.applied():`, by hooks of "
        "lens.fwd_hooks(), or by another call that has not ended. This call would take that "
        "adapted model for its base. Make the call outside of the block: it applies its adapter by "
        "itself. For two adapters at once make a lens of their sum, lens.with_adapter(a + b); for "
        "one on top of another, merge the other into the base model and make a lens of that."
    )


def of_the_base(site: str) -> ModelStateError:
    """The error of a tool that reads a parameter which the adapter on the model changes."""
    return ModelStateError(
        f"{site}: within lens.applied() the model's weights and biases are still the base's, and "
        "what reads them here would be without the adapter. Give the tool a hooked model of "
        "peft_model.merge_and_unload() (docs/your_model.md). The change itself is "
        f"lens.delta_w({site!r}); the base's weight can be read outside of the block."
    )


def _prepare(lens: Any, span: Temporary) -> None:
    if compat.is_within_transform():
        raise ModelStateError(
            "this is within a torch.func transform (grad, jvp, vmap, …), and the call takes "
            "derivatives of its own. Call it outside; to differentiate through the adapted model, "
            "run the model itself within `with lens.applied(gates):`."
        )
    model = getattr(lens, "model", None)
    if isinstance(model, nn.Module):
        hold(span, lock_of(model))
    for laid in (other.about for other in open_spans()):
        if isinstance(laid, _Laid) and laid.model is model and laid.call is not None:
            raise ModelStateError(
                "this call is made within another one, by a hook or a readout of yours, while "
                "hooks of that call are on the model, which would change the numbers. Make it "
                "beforehand, and let the hook or the readout use what it returned."
            )
    span.way_back(functools.partial(setattr, _CALL, "token", _CALL.token))
    _CALL.token = object()
    plan = getattr(lens, "_plan", None)
    if plan is not None and plan.quantised:
        span.enter_context(extensions.differentiable_products(plan.quantised))
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


def _too_much(lens: Any, error: BaseException) -> OutOfMemoryError:
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


def _made_there(lens: Any) -> str:
    model = getattr(lens, "model", None)
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    weights = [f"the weight {name}" for name, weight in named if weight.is_inference()]
    holder = next(iter(weights), "what the adapter, a readout or a hook holds")
    return (
        f"{holder} was made within torch.inference_mode(), where no tensor keeps what a derivative "
        "needs. Load or make it outside of that mode (torch.no_grad() has no such effect), or pass "
        "its clone()."
    )


# --- The unembedding


# Rows of W_U that are cast at a time, so that no copy of all of it is held.
_CAST_ROWS = 4096


@temporary
def unembedded_only(span: Temporary, model: Any, select: Callable[[Tensor], Tensor]) -> None:
    """Within the block, only what `select` takes of the final residual stream is unembedded."""

    def selected(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        return (select(unrounded(args[0])), *args[1:])

    add_pre_hook(span, model.unembed, selected)


def unrounded(residual: Tensor) -> Tensor:
    """The same, unless the model's own forward pass turned autocast on."""
    if torch.is_autocast_enabled(residual.device.type):
        raise ModelStateError(
            "the model turns autocast on in its forward pass (a model prepared by accelerate for "
            "mixed precision does), which rounds to half precision. Take the wrapper off: "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
        )
    return residual


def unembed(residual: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """residual · W_Uᵀ + b_U, summed in `dtype`, with the derivative of the model's own product."""
    if weight.dtype == residual.dtype == dtype:
        return linear(residual, weight, bias)
    native = None
    if torch.is_grad_enabled() and residual.requires_grad:
        native = linear(residual.to(weight.dtype), weight, bias).to(dtype)
        residual = residual.detach()
    wide = residual.to(dtype)
    logits = torch.cat([linear(wide, rows.to(dtype)) for rows in weight.split(_CAST_ROWS)], -1)
    logits = logits if bias is None else logits + bias.to(dtype)
    return logits if native is None else native + (logits - native.detach())
