"""Modules of torch: their hooks, their parameters, and what they compute as their forward."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from lens_lora.spans import Temporary


class Hooks(NamedTuple):
    """A module's own dictionaries of hooks by key, in the order in which they run.

    Attributes:
        forward: forward hooks; an OrderedDict, although torch annotates a dict.
        before: forward pre-hooks; an OrderedDict as well.
        backward: backward hooks.
        before_backward: backward pre-hooks.
        takes_kwargs: which of the forward pre-hooks take keyword arguments.
    """

    forward: Any
    before: Any
    backward: dict[int, Any]
    before_backward: dict[int, Any]
    takes_kwargs: dict[int, bool]


def hooks_of(module: nn.Module) -> Hooks:
    """All hooks on a module: torch has functions that add a hook, but none that lists hooks."""
    return Hooks(
        forward=module._forward_hooks,
        before=module._forward_pre_hooks,
        backward=module._backward_hooks,
        before_backward=module._backward_pre_hooks,
        takes_kwargs=module._forward_pre_hooks_with_kwargs,
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has any hook; faster than `hooks_of`, for thousands of modules."""
    has_forward = module._forward_hooks or module._forward_pre_hooks
    return bool(has_forward or module._backward_hooks or module._backward_pre_hooks)


def add_forward_hook(
    span: Temporary, module: nn.Module, hook: Callable[..., Any], *, is_first: bool = False
) -> None:
    """Put a forward hook on a module until the span ends.

    Args:
        span: the span after which the hook is removed.
        module: any module.
        hook: takes the module, its arguments and its output.
        is_first: whether it comes before the hooks that the module has.
    """
    span.way_back(functools.partial(_remove, hooks_of(module).forward, hook))
    module.register_forward_hook(hook, prepend=is_first)


def add_pre_hook(
    span: Temporary, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False
) -> None:
    """Put a forward pre-hook on a module until the span ends."""
    hooks = hooks_of(module)
    span.way_back(functools.partial(_remove, hooks.before, hook, hooks.takes_kwargs))
    module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)


def _remove(hooks: dict[int, Any], hook: object, *also: dict[int, Any]) -> None:
    """Remove a hook from a module's hooks, and its key from other tables with the same keys."""
    keys = [key for key, other in hooks.items() if other is hook]
    for key in keys:
        for table in (*also, hooks):
            table.pop(key, None)


def parameters_in(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own dictionary of parameters; looking into it is faster than `getattr`."""
    return module._parameters


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module itself has, by name."""
    parameters = parameters_in(module)
    # Most modules of a bridge are hook points, which have no parameters.
    if not parameters:
        return {}
    return {name: parameter for name, parameter in parameters.items() if parameter is not None}


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children of a module by name, from its own dictionary, which is faster than `getattr`."""
    return module._modules


def replace_forward(span: Temporary, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let the module compute `forward` until the span ends.

    A hook cannot keep a module from computing. The change is made in the module's own dictionary,
    because a bridge's component forwards attributes to the module that it wraps.
    """
    attributes = vars(module)
    span.way_back(functools.partial(_put_back, attributes, "forward", attributes.get("forward")))
    attributes["forward"] = forward


def _put_back(attributes: dict[str, Any], name: str, before: object) -> None:
    """Restore an attribute; `before` is None if there was none."""
    if before is None:
        attributes.pop(name, None)
    else:
        attributes[name] = before


class SharedForward:
    """A replaced forward that several spans share, in place until the last of them ends.

    The spans may end in any order.

    Args:
        module: the module.
        name: the attribute that computes, 'forward' in most modules.

    Attributes:
        module: the module.
        before: the forward that it replaces.
        asked: an entry for each span that asked for it.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module: nn.Module = module
        self._name = name
        self._own = vars(module).get(name)
        of_class = functools.partial(type(module).forward, module)
        self.before: Callable[..., Any] = self._own or of_class
        self.asked: list[Any] = []

    @classmethod
    def until(cls, span: Temporary, module: nn.Module, entry: object, name: str = "forward") -> Any:
        """Let the module compute this, with `entry` in `asked`, until the span ends.

        If the module already computes one of this class, that one is shared.
        """
        shared = vars(module).get(name)
        if not isinstance(shared, cls):
            shared = cls(module, name)
        span.way_back(functools.partial(shared._leave, entry))
        shared.asked.append(entry)
        vars(module)[name] = shared
        return shared

    def _leave(self, entry: object) -> None:
        self.asked[:] = [other for other in self.asked if other is not entry]
        if not self.asked:
            _put_back(vars(self.module), self._name, self._own)


class _Guard(NamedTuple):
    """Attributes of a module that may not be read.

    Attributes:
        names: the names of the attributes.
        why: makes the error.
        unless: tells whether they may be read at this moment.
    """

    names: frozenset[str]
    why: Callable[[], Exception]
    unless: Callable[[], bool]


# For each module that has guards, its own class and the guards.
_Guarded: TypeAlias = weakref.WeakKeyDictionary[nn.Module, tuple[type, list[_Guard]]]

_GUARDED: _Guarded = weakref.WeakKeyDictionary()


def refuse_reading(
    span: Temporary,
    module: nn.Module,
    names: Sequence[str],
    why: Callable[[], Exception],
    unless: Callable[[], bool] = lambda: False,
) -> None:
    """Let reading attributes of these names raise an error, until the span ends.

    No hook sees that a weight is read, but a property does. A property belongs to a class, so the
    module gets another class for a while. A bridge's component forwards attributes to what it
    wraps.
    """
    known = _GUARDED.get(module)
    if known is None or not known[1]:
        known = type(module), []
        _GUARDED[module] = known
    kind, guards = known
    guard = _Guard(frozenset(names), why, unless)

    def guard_by(others: list[_Guard]) -> None:
        # Spans may end in any order, so only this span's guard is removed.
        guards[:] = [other for other in guards if other is not guard] + others
        every = frozenset[str]().union(*(other.names for other in guards))
        guarded = _guarded(kind, every) if guards else kind
        object.__setattr__(module, "__class__", guarded)

    span.way_back(functools.partial(guard_by, []))
    guard_by([guard])


@functools.cache  # A new class for each span would keep the garbage collector busy.
def _guarded(kind: type, names: frozenset[str]) -> type:
    def guard(name: str) -> property:
        def read(component: nn.Module) -> Any:
            # A copy of a component has no guards of its own.
            _, guards = _GUARDED.get(component, (kind, []))
            for guarded, why, unless in guards:
                if name in guarded and not unless():
                    raise why()
            # K and V of grouped heads are properties of the class.
            of_class = getattr(kind, name, None)
            return of_class.__get__(component) if of_class else component.__getattr__(name)

        return property(read)

    return type(kind.__name__, (kind,), {name: guard(name) for name in names})


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let the module compute `forward` for good."""
    vars(module)["forward"] = forward


# The beginnings of the names of modules whose code is known to compute W z + b in the dtype of W.
_KNOWN_CODE = ("torch.", "transformers.", "peft.", "bitsandbytes.", "transformer_lens.")


def is_forward_replaced(module: Any) -> bool:
    """Whether a module was given another forward than its class's; accelerate's does not count."""
    if not isinstance(module, nn.Module):
        return False
    forward = vars(module).get(computing_attribute(module))
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def has_own_code(module: nn.Module) -> bool:
    """Whether the forward of a module is neither torch's nor one of the known libraries'."""
    is_replaced = "forward" in vars(module)
    has_hooks = bool(module._forward_hooks)
    code = type(module).forward.__module__
    return is_replaced or has_hooks or not code.startswith(_KNOWN_CODE)


def own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The function that a module computes in place of its class's `forward`; None without one."""
    return vars(module).get("forward")


def computing_attribute(module: nn.Module) -> str:
    """The attribute that computes: 'forward', or accelerate's own one in a module that it hooked.

    Accelerate's hooks read a module's computation there, and no setter is public.
    """
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"
