"""Hooks on a model for a span of time: put on, kept in order, and taken off whatever happens.

1. Only one thread at a time has hooks on a model (`locks`).
2. A hook is found by the function that it calls, so it can be taken off even if an interrupt came
   before its handle was known.
3. All hooks of a point are kept in order, including a user's own. A reader must see its input as
   the other hooks left it, so it runs last. A writer must change the output before the other hooks
   see it, so it runs first. An `Arranger` at each block's input restores this order in every
   forward pass, whenever hooks were registered.
4. A hook knows which public call has laid it (`call_under_way`). A call must not run under hooks of
   an open block, as it would take the adapted model for its base.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lens_lora import compat
from lens_lora.compat import hooks_of
from lens_lora.core.model import extensions
from lens_lora.core.model.locks import hold, lock_of
from lens_lora.core.model.modules import holds_parameter
from lens_lora.errors import ModelStateError
from lens_lora.spans import Temporary, temporary

HookFn = Callable[..., Tensor | None]


class _CurrentCall(threading.local):
    """The innermost public call of this thread; an object stands for each call."""

    token: object | None = None


CURRENT_CALL = _CurrentCall()


def call_under_way() -> object | None:
    """The object that stands for this thread's public call; None outside a call."""
    return CURRENT_CALL.token


class LaidHooks(NamedTuple):
    """Hooks on a model for a span of time.

    Attributes:
        model: the hooked model.
        call: the public call that has laid the hooks; None outside a call.
    """

    model: nn.Module
    call: object | None


@temporary
def attached(
    span: Temporary,
    model: Any,
    hooks: Sequence[tuple[str, HookFn]],
    points: Mapping[str, Any] | None = None,
) -> None:
    """Within the block these hooks are on the model, even after `model.reset_hooks()`.

    A hook may be at a hook point, at another module, or at a parameter. At a module, its method
    `at_module(args, output)` is called in place of the hook, if it has one: before all hooks that
    others put on the module, and after those of `hooks` that are listed before it. At a parameter,
    it is called with what the map of that weight reads and writes (`extensions.write_at`).

    When the block ends, in whatever way, no hook of ours is left, and those of others are.
    """
    hold(span, lock_of(model))
    span.about = LaidHooks(model, call_under_way())
    known = model.hook_dict if points is None else points
    at_points: list[_AtPoint] = []
    span.way_back(functools.partial(_take_off, at_points))
    modules: set[str] = set()
    for name, fn in hooks:
        if name in known:
            if isinstance(fn, Arranger):
                compat.add_pre_hook(span, known[name], fn)
            else:
                _add_to_point(known[name], fn, at_points)
            continue
        owner, _, parameter = name.rpartition(".")
        if holds_parameter(model, owner, parameter):
            writer: Any = getattr(fn, "at_module", fn)
            extensions.write_at(span, model.get_submodule(owner), parameter, writer)
            continue
        _add_to_module(span, model.get_submodule(name), fn, is_first=name not in modules)
        modules.add(name)


class _AtPoint(NamedTuple):
    """A hook of ours at a hook point, with the keys of the hooks that were there before it."""

    point: Any
    fn: HookFn
    others: set[int]


def _add_to_point(point: Any, fn: HookFn, at_points: list[_AtPoint]) -> None:
    forward, before, *_ = hooks_of(point)
    # It is noted first, so that it is taken off even if an interrupt comes in between.
    at_points.append(_AtPoint(point, fn, {*forward, *before}))
    point.add_hook(fn, is_permanent=True)
    point.fwd_hooks[-1].hook.remove = _refuse_removal


def _refuse_removal() -> None:
    """Replace `remove` of our handles, which `reset_hooks(including_permanent=True)` calls."""
    raise ModelStateError(
        "hooks of an open block or call of a lens are on the model, and without them it would run "
        "the base. Leave the block first; model.reset_hooks() takes off your own hooks alone."
    )


def _take_off(at_points: list[_AtPoint]) -> None:
    """Take our hooks off; if that is interrupted, a second call does the rest."""
    while at_points:
        point, fn, others = at_points[-1]
        forward, before, *_ = hooks_of(point)
        ours = {*_keys_of(forward, fn), *_keys_of(before, fn)} - others
        point.fwd_hooks = [handle for handle in point.fwd_hooks if handle.hook.id not in ours]
        for key in ours:
            forward.pop(key, None)
            before.pop(key, None)
        at_points.pop()


def _add_to_module(span: Temporary, module: nn.Module, fn: Any, *, is_first: bool) -> None:
    """Put a forward hook on a module until the span ends.

    Args:
        span: the span for which it stays.
        module: a module without hook points.
        fn: a hook of a hook point; if it has a method `at_module(args, output)`, this is called.
        is_first: whether a hook with that method comes before all others of the module.
    """
    at_module = getattr(fn, "at_module", None)

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if at_module is None:
            return fn(output, hook=module)
        return at_module(args, output)

    compat.add_forward_hook(span, module, hook, is_first=is_first and at_module is not None)


class _Counted(compat.SharedForward):
    """A forward of a module that counts how many passes are within it."""

    passes = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.passes += 1
        try:
            return self.before(*args, **kwargs)
        finally:
            self.passes -= 1


def computes(span: Temporary, module: nn.Module) -> Callable[[], bool]:
    """A function that says whether the module is being run; it is valid until the span ends."""
    counted = _Counted.until(span, module, object())
    return lambda: counted.passes > 0


class Arranger:
    """A hook at a block's input that puts the block's hooks in order: writers first, readers last.

    If a user's own pre-hook is at a point that is written, the writer becomes a pre-hook as well.

    Args:
        points: the model's hook points by name.
        writers: [(hook name, function)] of hooks that change what other hooks of the point see; the
            last of a point comes first.
        readers: [(hook name, function)] of hooks that read what all other hooks of the point leave.
        begin: called whenever the block begins.
    """

    def __init__(
        self,
        points: Mapping[str, Any],
        *,
        writers: Sequence[tuple[str, HookFn]],
        readers: Sequence[tuple[str, HookFn]],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._begin = begin
        self._writers = [(points[name], fn) for name, fn in writers]
        self._readers = [(points[name], fn) for name, fn in readers]

    def __call__(self, tensor: object, hook: object) -> None:
        """Put the hooks in order; the tensor that passes is left as it is."""
        del tensor
        self._begin()
        for point, fn in self._writers:
            forward, before, *_ = hooks_of(point)
            if before:
                _move_before_pre_hooks(point, fn)
            for key in _keys_of(forward, fn):
                forward.move_to_end(key, last=False)
        for point, fn in self._readers:
            forward, *_ = hooks_of(point)
            for key in _keys_of(forward, fn):
                # Torch has listed the hooks of the point that fires now, so it is too late to move
                # one of them.
                is_firing = point is hook
                is_last = key == next(reversed(forward))
                if is_firing and not is_last:
                    raise ModelStateError(
                        f"{point.name}: a hook after those of lens.fwd_hooks() may change what is "
                        "read there. Put it before them in the list, or use `with lens.applied():`."
                    )
                forward.move_to_end(key)


def _move_before_pre_hooks(point: Any, fn: HookFn) -> None:
    forward, before, *_ = hooks_of(point)
    for key in _keys_of(forward, fn):
        for handle in point.fwd_hooks:
            if handle.hook.id == key:
                # Removing the hook then also removes the pre-hook that takes its place.
                handle.hook.extra_dict_ref = (*handle.hook.extra_dict_ref, weakref.ref(before))
        before[key] = _Early(forward.pop(key))
    for key in _keys_of(before, fn):
        before.move_to_end(key, last=False)


class _Early:
    """A forward hook of a hook point as a pre-hook; a hook point returns its input unchanged."""

    def __init__(self, forward_hook: Callable[..., Any]) -> None:
        self.forward_hook = forward_hook

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = self.forward_hook(module, args, args[0])
        if changed is None:
            return None
        return (changed, *args[1:])


def _keys_of(hooks: Mapping[int, Any], fn: HookFn) -> list[int]:
    """The keys of those hooks of a module that call this function."""
    keys: list[int] = []
    for key, hook in list(hooks.items()):
        if compat.calls(_registered(hook), fn):
            keys.append(key)
    return keys


def functions_at(point: nn.Module) -> list[object]:
    """The functions that the hooks on a module call."""
    forward, before, *_ = hooks_of(point)
    registered = (*forward.values(), *before.values())
    return [compat.hook_function(_registered(hook)) for hook in registered]


def is_hooked(places: Iterable[nn.Module]) -> bool:
    """Whether one of these modules has a hook, other than those that libraries put there."""
    functions = itertools.chain.from_iterable(functions_at(place) for place in places)
    return any(function is not None for function in functions)


def _registered(hook: Any) -> Any:
    """The hook as it was registered, before it was turned into a pre-hook."""
    return hook.forward_hook if isinstance(hook, _Early) else hook


# --- Hooks of others that would see a wrong number

_MERGED = "run the tool on a model of the merged weights (peft_model.merge_and_unload())"


def refuse_backward_hooks(point: nn.Module | None, name: str, site: str) -> None:
    """Refuse a backward hook at a point where a site reads its input.

    Torch wraps the output of the point for backward hooks after all forward hooks have run. So they
    would see the gradient that comes through the model, but not the part that comes through δ.
    """
    if point is not None and _has_backward_hooks(point):
        raise ModelStateError(
            f"{name}: a backward hook is on the point at which {site} reads its input, and its "
            "gradient would lack what passes through the update. Keep the tensor by a forward hook "
            "that also returns it, and use torch.autograd.grad; leave this point out; or "
            f"{_MERGED}."
        )


def _has_backward_hooks(point: nn.Module) -> bool:
    hooks = hooks_of(point)
    return bool(hooks.backward or hooks.before_backward)


def never_updated_error(name: str, adapter: str) -> ModelStateError:
    """The error for a hook point that never holds the adapted model's value."""
    return ModelStateError(
        f"{name}: lies between a site's input and the point at which the update of {adapter!r} is "
        "added, so it never holds the adapted model's value. Leave it out (names_filter=…), use "
        f"the site's input or output instead (lens.sites: read, write), or {_MERGED}."
    )


class Unread:
    """A hook at a point that never holds the adapted model's value: it refuses all other hooks."""

    def __init__(self, point: nn.Module, name: str, adapter: str) -> None:
        self._point = point
        self._name = name
        self._adapter = adapter

    def __call__(self, tensor: Tensor, hook: object) -> None:
        """Raise an error if there is another hook."""
        del tensor, hook
        others = [fn for fn in functions_at(self._point) if not isinstance(fn, Unread)]
        if others or _has_backward_hooks(self._point):
            raise never_updated_error(self._name, self._adapter)


def already_applied_error(adapter: str) -> ModelStateError:
    """The error for a call on a model that already has hooks of a lens."""
    return ModelStateError(
        f"the adapter {adapter!r} is on the model already: by `with lens.applied():`, by hooks of "
        "lens.fwd_hooks(), or by another call that has not ended. This call would take that "
        "adapted model for its base. Make the call outside of the block: it applies its adapter by "
        "itself. For two adapters at once make a lens of their sum, lens.with_adapter(a + b); for "
        "one on top of another, merge the other into the base model and make a lens of that."
    )


def base_parameter_error(site: str) -> ModelStateError:
    """The error for a tool that reads a parameter which the adapter on the model changes."""
    return ModelStateError(
        f"{site}: within lens.applied() the model's weights and biases are still the base's, and "
        "what reads them here would be without the adapter. Give the tool a hooked model of "
        "peft_model.merge_and_unload() (docs/host_tools.md). The change itself is "
        f"lens.delta_w({site!r}); the base's weight can be read outside of the block."
    )
