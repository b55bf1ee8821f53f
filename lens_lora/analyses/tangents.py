"""First-order changes of every activation: the tangent of the forward pass along the adapter.

1. One dual forward pass, every gate moving along `scale` (`engine/forward.py`).
2. At each hook point asked for, the derivative that the dual activation carries is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lens_lora.analyses.hook_points import Names, resolved
from lens_lora.arguments import number
from lens_lora.engine.asked import ask_prompts
from lens_lora.engine.dual_pass import dual_forward, tangent_of
from lens_lora.engine.forward import JointInject
from lens_lora.engine.memory import require_tangents
from lens_lora.hooked.alone import alone
from lens_lora.hooked.attaching import attached
from lens_lora.lens import LoraLens, Scale
from lens_lora.readouts.prompts import PromptsLike

if TYPE_CHECKING:
    from transformer_lens import ActivationCache

__all__ = ["tangents"]


@alone
def tangents(
    lens: LoraLens,
    prompts: PromptsLike,
    names: Names | None = None,
    *,
    scale: Scale = 1.0,
    at: float = 0.0,
    max_memory: float | None = None,
) -> ActivationCache:
    """d/dt of every hooked activation along ε = at + t·scale, at t = 0. One dual forward pass.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        names: a hook point, several, globs, or a predicate; None for every one.
        scale: the direction: 1 for the whole adapter, {site or glob: 1} for some sites.
        at: the gate value at which the tangent is taken.
        max_memory: bytes for the tangents; by default the bound of the lens, if it has one.

    Returns:
        ActivationCache of tangents, shaped as the activations; at padding they mean nothing.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names.
        ModelStateError: the model has an operation without a forward-mode derivative.
        ArgumentError: a scale or `at` that is no number, or tangents beyond the bound.
    """
    asked, at = ask_prompts(lens, prompts, max_memory), number("at", at)
    points = lens.model.hook_dict
    wanted = list(points) if names is None else resolved(lens, names)[1]
    by_point: dict[int, list[str]] = {}
    for name in wanted:
        by_point.setdefault(id(points[name]), []).append(name)
    require_tangents(asked.lens, asked.prompts, [own[0] for own in by_point.values()])
    kept: dict[str, Tensor] = {}

    def keep(own: list[str]) -> Callable[..., None]:
        def hook_fn(tensor: Any, hook: Any) -> None:
            del hook
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                kept.update(dict.fromkeys(own, tangent_of(tensor)))

        return hook_fn

    inject = JointInject(lens, lens.gates(at), lens.gates(scale))
    hooks = [(own[0], keep(own)) for own in by_point.values()]
    with dual_forward(), lens.injected(inject), attached(lens.model, hooks):
        lens.run(asked.prompts)
    from transformer_lens.ActivationCache import ActivationCache

    return ActivationCache({name: kept[name] for name in wanted if name in kept}, lens.model)
