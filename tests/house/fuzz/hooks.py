"""Hooks of users, in every form that Python has: as on the merged model, and none is left.

The oracle is the hooked model of PEFT's merged weights under the same hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cases
import model_state
import models
import torch

from fuzz.guard import Case, Chance, UsersOwn, Wrong, require_close

IDS = models.tokens(2, 5)
Change = Callable[[torch.Tensor], "torch.Tensor | None"]
World = dict[str, tuple[cases.Case, Any]]
_PLACES = ("hook_resid", "hook_z", "attn.hook_k", "hook_mlp_out", "hook_attn_out", "hook_embed")


def world() -> World:
    """A lens and the merged model of each class; within `models.lifted()`."""
    return {
        cls: (cases.case("llama", cls, "raw"), model_state.merged_model("llama", cls, "raw"))
        for cls in models.MAKERS
    }


class Hook:
    """A callable object, and a bound method."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def __call__(self, tensor: torch.Tensor, hook: Any = None) -> torch.Tensor | None:
        return self.change(tensor)

    def method(self, tensor: torch.Tensor, hook: Any = None) -> torch.Tensor | None:
        return self.change(tensor)


class TorchHook:
    """The same in torch's own signature."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def __call__(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return self.change(output)

    def method(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return self.change(output)


def _plain(tensor: torch.Tensor, *, hook: Any, change: Change) -> torch.Tensor | None:
    return change(tensor)


def _torch_plain(change: Change, module: Any, args: Any, output: torch.Tensor) -> Any:
    return change(output)


def _with_empty_cell(change: Change | None) -> Callable[..., Any]:
    """A closure over a name that has no value yet, and needs none."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> Any:
        return change(output) if change is not None else later

    if change is None:
        later = None
    return hook


def _changes(chance: Chance) -> dict[str, Change]:
    factor = chance.uniform(-2, 2)

    def fails(tensor: torch.Tensor) -> None:
        raise UsersOwn

    def in_place(tensor: torch.Tensor) -> None:
        tensor.mul_(factor)

    return {
        "scales": lambda t: t * factor,
        "adds": lambda t: t + factor,
        "zeroes": torch.zeros_like,
        "looks": lambda t: None,
        "copies": lambda t: t.clone(),
        "reverses": lambda t: t.flip(1),
        "changes in place": in_place,
        "fails": fails,
    }


_FORMS: dict[str, Callable[[Change], Callable[..., Any]]] = {
    "a lambda": lambda change: lambda tensor, hook: change(tensor),
    "a partial": lambda change: functools.partial(_plain, change=change),
    "a callable object": Hook,
    "a bound method": lambda change: Hook(change).method,
    "a partial of an object": lambda change: functools.partial(Hook(change)),
}
_TORCH_FORMS: dict[str, Callable[[Change], Callable[..., Any]]] = {
    "torch's, a partial": lambda change: functools.partial(_torch_plain, change),
    "torch's, a callable object": TorchHook,
    "torch's, a bound method": lambda change: TorchHook(change).method,
    "torch's, an empty closure": _with_empty_cell,
}


@contextmanager
def _hooked(model: Any, way: str, hooks: list[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
    if way == "model.hooks":
        with model.hooks(fwd_hooks=hooks):
            yield
        return
    handles: list[Any] = []
    try:
        for name, fn in hooks:
            point = model.hook_dict[name]
            if way == "add_hook":
                point.add_hook(fn)
            else:
                handles.append(point.register_forward_hook(fn))
        yield
    finally:
        for handle in handles:
            handle.remove()
        if way == "add_hook":
            model.reset_hooks()


def _count(model: Any) -> int:
    modules = list(model.modules())
    listed = sum(len(getattr(module, "fwd_hooks", ())) for module in modules)
    return listed + sum(len(module._forward_hooks) for module in modules)


def case(world: World, chance: Chance, scratch: Path) -> Case:
    """Hooks before the adapter's own, or after them, on one to three hook points."""
    name = chance.choice(sorted(world))
    lens_case, merged = world[name]
    form = chance.choice(sorted({**_FORMS, **_TORCH_FORMS}))
    way = "torch" if form in _TORCH_FORMS else chance.choice(["model.hooks", "add_hook"])
    make = {**_FORMS, **_TORCH_FORMS}[form]
    points = [
        point
        for point in sorted(lens_case.model.hook_dict)
        if point in merged.hook_dict
        and any(part in point for part in _PLACES)
        and "_input" not in point  # transformer-lens refuses these while a flag is off
    ]
    changes = _changes(chance)
    words = [chance.choice(sorted(changes)) for _ in range(chance.randint(1, 3))]
    hooks = [(chance.choice(points), make(changes[word])) for word in words]
    is_before = chance.maybe(0.5)
    before = _count(lens_case.model)

    def act() -> torch.Tensor:
        lens = lens_case.lens
        model = lens_case.model
        with torch.no_grad():
            if is_before:
                with _hooked(model, way, hooks), lens.applied():
                    return model(IDS)
            with lens.applied(), _hooked(model, way, hooks):
                return model(IDS)

    def judge(found: torch.Tensor) -> None:
        if _count(lens_case.model) != before:
            raise Wrong(f"hooks are left on {name}: {_count(lens_case.model) - before}")
        with torch.no_grad(), _hooked(merged, way, hooks):
            wanted = merged(IDS)
        require_close(found, wanted, shown)

    order = "before" if is_before else "after"
    places = [f"{word} {point}" for word, (point, _) in zip(words, hooks, strict=True)]
    shown = f"{form} by {way}, {order} the adapter's, {places}, on {name}"
    return Case("hooks of users", form, act, judge, shown)
