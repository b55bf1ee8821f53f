"""A run's activations at the hook points that are named, for each time they fire."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lens_lora.engine.memory import rows_of_pass
from lens_lora.engine.read import read_logits
from lens_lora.errors import ModelStateError
from lens_lora.hooked.attaching import HookFn, attached
from lens_lora.lens import LoraLens, Scale
from lens_lora.readouts.prompts import Prompts

__all__ = ["Recording", "record"]


@dataclasses.dataclass(frozen=True)
class Recording:
    """A run's activations.

    Attributes:
        firings: per hook point that fired, its tensor at each firing.
        layers: per hook point, the block in which it first fires; −1 before the blocks.
    """

    firings: dict[str, list[Tensor]]
    layers: dict[str, int]


def record(lens: LoraLens, prompts: Prompts, scale: Scale, names: Iterable[str]) -> Recording:
    """The activations at these hook points with the adapter at `scale`. One forward pass.

    Args:
        lens: the adapter over the model.
        prompts: what is run; within the bound of the lens, some of them at a time.
        scale: the adapter's strength.
        names: of hook points.

    Raises:
        ModelStateError: a point whose value is not activations with the batch as first axis.
    """
    count, names = prompts.batch, list(names)
    step = rows_of_pass(lens, prompts) or count
    if step >= count:
        return _recorded(lens, prompts, scale, names)
    some = [prompts.cut(start, start + step) for start in range(0, count, step)]
    return _joined([_recorded(lens, each, scale, names) for each in some], step)


def _joined(parts: list[Recording], rows: int) -> Recording:
    """Runs of so many rows each, as one; what the rows of a run share is kept once."""

    def joined(same: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(same) if len(same[0]) == rows else same[0]

    firings = {
        name: [joined(same) for same in zip(*(part.firings[name] for part in parts), strict=True)]
        for name in parts[0].firings
    }
    return Recording(firings, parts[0].layers)


def _recorded(lens: LoraLens, prompts: Prompts, scale: Scale, names: list[str]) -> Recording:
    found, now = Recording({}, {}), [-1]

    def enter(layer: int) -> HookFn:
        def hook_fn(tensor: Any, hook: Any) -> None:
            del tensor, hook
            now[0] = layer

        return hook_fn

    def keep(name: str) -> HookFn:
        def hook_fn(tensor: Any, hook: Any) -> None:
            del hook
            _require_activation(name, tensor, prompts.batch)
            found.firings.setdefault(name, []).append(tensor.detach().clone())
            found.layers.setdefault(name, now[0])

        return hook_fn

    view = lens.plan.host
    hooks = [(view.block_input(layer), enter(layer)) for layer in range(view.n_layers)]
    hooks += [(name, keep(name)) for name in names]
    with torch.no_grad(), lens.applied(scale), attached(lens.model, hooks):
        read_logits(lens, prompts)
    return found


def _require_activation(name: str, tensor: Any, rows: int) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ModelStateError(f"{name} holds {what}, no activations; leave it out.")
    if tensor.ndim < 3 or tensor.shape[0] not in (1, rows):
        raise ModelStateError(
            f"{name} holds a tensor {tuple(tensor.shape)} for {rows} rows: its prompts are not "
            "apart on a first axis of their own, so one cannot be patched alone; leave it out."
        )
