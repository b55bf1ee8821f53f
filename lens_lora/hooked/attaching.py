"""Hooks on a model for a span of time: put on, kept in order, taken off whatever happens.

1. One thread at a time has hooks on a model: the lock is the model's, and a thread that has it may
   take it again (`held_by_this_thread`).
2. Each hook is found again by what it calls, so it can be taken off before its handle is known.
3. Order matters among all hooks of a point, a user's own included. What reads must see its input as
   the others left it, so it runs last; what writes must do so before the others see the output, so
   it runs first. An `Arranger` at each block's input puts them in this order at every forward pass,
   whenever they were registered.
"""

from __future__ import annotations

import functools
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from lens_lora.errors import ModelStateError
from lens_lora.temporary import Temporary

__all__ = [
    "ONE_IN_A_PROCESS",
    "Arranger",
    "AtModule",
    "HookFn",
    "add_pre_hook",
    "attach",
    "attached",
    "hold",
    "lock_of",
]

HookFn = Callable[..., Tensor | None]
_PATIENCE = 60.0
# For what a process has once: torch's dual level and its choice of attention kernels. A thread that
# takes it has its model's lock already.
ONE_IN_A_PROCESS: Any = threading.RLock()
_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@runtime_checkable
class AtModule(Protocol):
    """A hook that can stand at a module without hook points, and sees the module's arguments."""

    def at_module(self, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The new output, or None to leave it as it is."""
        ...


def attached(
    model: Any, hooks: Sequence[tuple[str, HookFn]], points: Mapping[str, Any] | None = None
) -> AbstractContextManager[None]:
    """The hooks on the model for the block's duration, also through `model.reset_hooks()`.

    On leaving, whatever happened, each hook point holds what others put there and nothing of ours.

    Args:
        model: the hooked model.
        hooks: (name of a hook point or module, function).
        points: the model's `hook_dict`, if the caller has it already.
    """
    return Temporary(lambda span: attach(span, model, hooks, points))


def attach(
    span: Temporary,
    model: Any,
    hooks: Sequence[tuple[str, HookFn]],
    points: Mapping[str, Any] | None = None,
) -> None:
    """The same, until the span ends.

    Args:
        span: how long.
        model, hooks, points: as for `attached`.
    """
    hold(span, lock_of(model))
    known = model.hook_dict if points is None else points
    places = [
        _AtPoint(known[name], fn) if name in known else _AtModule(model.get_submodule(name), fn)
        for name, fn in hooks
    ]
    span.way_back(functools.partial(_take_off, places[:]))
    for place in places:
        place.put_on()


def _take_off(places: list[_AtPoint | _AtModule]) -> None:
    """Those that were put on; a second call does what the first did not."""
    while places:
        places[-1].take_off()
        places.pop()


class _AtPoint:
    """A hook of ours at a hook point."""

    def __init__(self, point: Any, fn: HookFn) -> None:
        self._point, self._fn = point, fn
        self._others = frozenset([*point._forward_hooks, *point._forward_pre_hooks])

    def put_on(self) -> None:
        if isinstance(self._fn, Arranger):
            self._point.register_forward_pre_hook(self._fn)
        else:
            self._point.add_hook(self._fn, is_permanent=True)

    def take_off(self) -> None:
        point = self._point
        both = (point._forward_hooks, point._forward_pre_hooks)
        ours = [
            key for hooks in both for key in _keys_of(hooks, self._fn) if key not in self._others
        ]
        point.fwd_hooks = [handle for handle in point.fwd_hooks if handle.hook.id not in ours]
        for hooks in both:
            for key in ours:
                hooks.pop(key, None)


class _AtModule:
    """A hook of ours at a module without hook points."""

    def __init__(self, module: nn.Module, fn: HookFn) -> None:
        self._module, self._fn = module, fn

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if isinstance(self._fn, AtModule):
            return self._fn.at_module(args, output)
        return self._fn(output, hook=module)

    def put_on(self) -> None:
        self._module.register_forward_hook(self)

    def take_off(self) -> None:
        _remove(self._module._forward_hooks, self)


def add_pre_hook(
    module: nn.Module, hook: Callable[..., Any], span: Temporary, *, with_kwargs: bool = False
) -> None:
    """A forward pre-hook, until the span ends.

    Args:
        module: any.
        hook: called with the module and its positional arguments; registered nowhere else.
        span: how long.
        with_kwargs: call it with the keyword arguments too.
    """
    also = module._forward_pre_hooks_with_kwargs
    span.way_back(functools.partial(_remove, module._forward_pre_hooks, hook, also))
    module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)


def _remove(hooks: dict[int, Any], hook: object, *also: dict[int, Any]) -> None:
    for key in [key for key, other in hooks.items() if other is hook]:
        for held in (*also, hooks):
            held.pop(key, None)


def lock_of(model: nn.Module) -> Any:
    """The model's lock, to be taken with `hold`."""
    return _LOCKS.setdefault(model, threading.RLock())


def hold(span: Temporary, lock: Any) -> None:
    """The lock is this thread's until the span ends, or an outer one of the same lock.

    Args:
        span: how long.
        lock: a `threading.RLock`, taken once by a thread, however many spans of it are open.
    """
    if lock._is_owned():
        return
    span.way_back(functools.partial(_let_go, lock))
    if not lock.acquire(timeout=_PATIENCE):
        warnings.warn(
            f"{threading.current_thread().name} has waited a minute for a thread that runs a lens "
            "on the same model. If that thread waits for this one, neither will go on: leave its "
            "`with lens.applied():` first.",
            stacklevel=2,
        )
        lock.acquire()


def _let_go(lock: Any) -> None:
    if lock._is_owned():
        lock.release()


class Arranger:
    """At a block's input: what reads runs last, what writes first, among all hooks of its point.

    Where a user's own pre-hook stands at a point that is written, the writer becomes one too.

    Args:
        points: the model's `hook_dict`.
        hooks: (name, function, whether it reads).
        begin: called first, as a block begins.
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
        """Arrange, as a hook of TransformerLens or as torch's pre-hook: what passes stays as it is.

        Raises:
            ModelStateError: this hook and what reads are at one point, where it is too late.
        """
        del tensor
        self._begin()
        for point, fn, reads in self._hooks:
            if point._forward_pre_hooks and not reads:
                _move_before_pre_hooks(point, fn)
            for key in _keys_of(point._forward_hooks, fn):
                if point is hook and reads and key != next(reversed(point._forward_hooks)):
                    raise ModelStateError(
                        f"{point.name}: a hook after those of lens.fwd_hooks() may change what is "
                        "read there. Put it before them in the list, or use `with lens.applied():`."
                    )
                point._forward_hooks.move_to_end(key, last=reads)


def _move_before_pre_hooks(point: Any, fn: HookFn) -> None:
    before = point._forward_pre_hooks
    for key in _keys_of(point._forward_hooks, fn):
        for handle in point.fwd_hooks:
            if handle.hook.id == key:  # who removes the hook removes what stands for it
                handle.hook.extra_dict_ref = (*handle.hook.extra_dict_ref, weakref.ref(before))
        before[key] = _Early(point._forward_hooks[key])
        del point._forward_hooks[key]
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
    return [key for key, hook in list(hooks.items()) if _calls(hook, fn)]


def _calls(hook: Any, fn: HookFn) -> bool:
    """Whether a registered hook is this function, or TransformerLens' wrapper of it.

    A user's own may be anything that can be called: a partial, an object, a builtin, a closure
    whose cells are empty.
    """
    hook = hook.forward_hook if isinstance(hook, _Early) else hook
    if hook is fn:
        return True
    if not isinstance(hook, types.FunctionType):
        return False
    for cell in hook.__closure__ or ():
        try:
            if cell.cell_contents is fn:
                return True
        except ValueError:  # an empty cell
            continue
    return False
