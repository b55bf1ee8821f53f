"""First-order changes of every activation: the tangent of the forward pass along the adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from lens_lora.engine.forward import JointInject, dual_forward
from lens_lora.errors import SiteError
from lens_lora.hooked.gates import attached
from lens_lora.lens import LoraLens, Scale
from lens_lora.readouts.prompts import PromptsLike

if TYPE_CHECKING:
    from transformer_lens import ActivationCache

__all__ = ["tangents"]

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


def tangents(
    lens: LoraLens,
    prompts: PromptsLike,
    names_filter: NamesFilter = None,
    *,
    scale: Scale = 1.0,
    at: float = 0.0,
) -> ActivationCache:
    """d/dt of every hooked activation along ε = at + t·scale, at t = 0. One dual forward pass.

    Args:
        names_filter: as in `run_with_cache`: a hook name, names, or a predicate.
        scale: the direction: 1 for the whole adapter, {site or glob: 1} for some sites.
        at: the gate value at which the tangent is taken.

    Returns:
        ActivationCache of tangents, shaped as the activations; at padding they mean nothing.

    Raises:
        SiteError: names_filter leaves no hook point.
    """
    ready = lens.prompts(prompts)
    wanted = _predicate(names_filter)
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook_fn(tensor: Any, hook: Any) -> None:
            del hook
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                primal, tangent = fwad.unpack_dual(tensor)
                kept[name] = torch.zeros_like(primal) if tangent is None else tangent.clone()

        return hook_fn

    hooks = [(name, keep(name)) for name in lens.model.hook_dict if wanted(name)]
    if not hooks:
        known = ", ".join(list(lens.model.hook_dict)[:3])
        raise SiteError(
            f"names_filter={names_filter!r} names no hook point of the model; its hook points are "
            f"like {known}."
        )
    inject = JointInject(lens, lens.gates(at), lens.gates(scale))
    with dual_forward(), lens.injected(inject), attached(lens.model, hooks):
        lens.run(ready)
    from transformer_lens.ActivationCache import ActivationCache

    return ActivationCache(kept, lens.model)


def _predicate(names_filter: NamesFilter) -> Callable[[str], bool]:
    if names_filter is None:
        return lambda name: True
    if isinstance(names_filter, str):
        return lambda name: name == names_filter
    if callable(names_filter):
        return names_filter
    names = set(names_filter)
    return names.__contains__
