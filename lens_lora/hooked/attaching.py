"""Hooks on a model for the length of a block: put on, kept in order, taken off whatever happens.

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
    "attached",
    "hold",
    "lock_of",
]

HookFn = Callable[..., Tensor | None]
_PATIENCE = 60.0
# For what torch has once in a process: the dual level, and the choice of attention kernels. A
# thread that takes it has its model's lock already.
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

    def attach(block: Temporary) -> None:
        hold(block, lock_of(model))
        known = model.hook_dict if points is None else points
        for name, fn in hooks:
            if name in known:
                _attach_to_point(known[name], fn, block)
            else:
                _attach_to_module(model.get_submodule(name), fn, block)

    return Temporary(attach)


def _attach_to_point(point: Any, fn: HookFn, block: Temporary) -> None:
    others = frozenset([*point._forward_hooks, *point._forward_pre_hooks])
    block.way_back(functools.partial(_detach, point, fn, others))
    point.add_hook(fn, is_permanent=True)


def _detach(point: Any, fn: HookFn, others: frozenset[int]) -> None:
    both = (point._forward_hooks, point._forward_pre_hooks)
    ours = {key for hooks in both for key in _keys_of(hooks, fn) if key not in others}
    point.fwd_hooks = [handle for handle in point.fwd_hooks if handle.hook.id not in ours]
    for hooks in both:
        for key in ours:
            hooks.pop(key, None)


def _attach_to_module(module: nn.Module, fn: HookFn, block: Temporary) -> None:
    def hook_fn(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if isinstance(fn, AtModule):
            return fn.at_module(args, output)
        return fn(output, hook=module)

    block.way_back(functools.partial(_remove, module._forward_hooks, hook_fn))
    module.register_forward_hook(hook_fn)


def add_pre_hook(module: nn.Module, hook: Callable[..., Any], block: Temporary) -> None:
    """A forward pre-hook for the length of the block.

    Args:
        module: any.
        hook: called with the module and its positional arguments; registered nowhere else.
        block: the length of time.
    """
    block.way_back(functools.partial(_remove, module._forward_pre_hooks, hook))
    module.register_forward_pre_hook(hook)


def _remove(hooks: dict[int, Any], hook: object) -> None:
    for key in [key for key, other in hooks.items() if other is hook]:
        hooks.pop(key, None)


def lock_of(model: nn.Module) -> Any:
    """The model's lock, to be taken with `hold`."""
    return _LOCKS.setdefault(model, threading.RLock())


def hold(block: Temporary, lock: Any) -> None:
    """The lock is this thread's until the block ends, or until an outer block of it ends.

    Args:
        block: the length of time.
        lock: a `threading.RLock`, taken once by a thread, however many blocks of it are open.
    """
    if lock._is_owned():
        return
    block.way_back(functools.partial(_let_go, lock))
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
        takes_off: whether hooks are taken off by `attached`, which finds pre-hooks too.
    """

    def __init__(
        self,
        points: Mapping[str, Any],
        hooks: Sequence[tuple[str, HookFn, bool]],
        *,
        takes_off: bool,
    ) -> None:
        self._hooks = [(name, points[name], fn, reads) for name, fn, reads in hooks]
        self._takes_off = takes_off

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        """Arrange; the tensor is left as it is."""
        del tensor, hook
        for name, point, fn, reads in self._hooks:
            if point._forward_pre_hooks and not reads:
                self._move_before_pre_hooks(name, point, fn)
            for key in _keys_of(point._forward_hooks, fn):
                point._forward_hooks.move_to_end(key, last=reads)

    def _move_before_pre_hooks(self, name: str, point: Any, fn: HookFn) -> None:
        if not self._takes_off:
            raise ModelStateError(
                f"{name} has a forward pre-hook, which would see the output without δ, and a list "
                "of hooks runs after it; use `with lens.applied():`, or register_forward_hook."
            )
        for key in _keys_of(point._forward_hooks, fn):
            point._forward_pre_hooks[key] = _Early(point._forward_hooks[key])
            del point._forward_hooks[key]
        for key in _keys_of(point._forward_pre_hooks, fn):
            point._forward_pre_hooks.move_to_end(key, last=False)


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
    """Whether a registered hook is TransformerLens' wrapper of this function.

    A user's own may be anything that can be called: a partial, an object, a builtin, a closure
    whose cells are empty.
    """
    hook = hook.forward_hook if isinstance(hook, _Early) else hook
    if not isinstance(hook, types.FunctionType):
        return False
    return any(_contents(cell) is fn for cell in hook.__closure__ or ())


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None
