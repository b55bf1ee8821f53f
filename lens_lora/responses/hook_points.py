"""First-order changes at every hook point, Δh; and the other way about, ∂g/∂h.

1. `tangents`: one dual forward pass, every gate moving along `scale`; at each hook point asked for,
   the derivative that the dual activation carries is kept.
2. `gradients`: one forward and one backward pass. ⟨∂g/∂h, ∂h⟩ over a point that all of some sites'
   updates pass is what these sites have of first order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lens_lora.arguments import number
from lens_lora.core import (
    HookFn,
    LoraLens,
    Names,
    PromptsLike,
    Readout,
    Scale,
    ScaleInject,
    alone,
    attached,
    tangent_of,
)
from lens_lora.core.function import derivatives
from lens_lora.core.function.asked import ask, ask_prompts
from lens_lora.core.function.duals import dual_forward
from lens_lora.core.function.forward import read_for_slopes, require_finite
from lens_lora.core.function.memory import require_graph, require_tangents
from lens_lora.core.model.sites import require_fired, resolved
from lens_lora.errors import ArgumentError, ModelStateError

if TYPE_CHECKING:
    from transformer_lens import ActivationCache


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
        scale: the direction: 1 for the whole adapter, {site or glob: 1} for single sites.
        at: the gate value at which the tangent is taken.
        max_memory: bytes for the tangents; by default the bound of the lens, if it has one.

    Returns:
        ActivationCache of tangents, shaped as the activations; at padding they mean nothing.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names.
        ModelStateError: the model has an operation without a forward-mode derivative, or a point
            named in full never holds the adapted model's value (other names leave it out).
        ArgumentError: a scale or `at` that is no number, or tangents beyond the bound.
    """
    asked, at = ask_prompts(lens, prompts, max_memory), number("at", at)
    in_full, wanted = _points(lens, names)
    lens.plan.require_update(in_full)
    wanted = [name for name in wanted if name not in lens.plan.points_without_update]
    require_tangents(asked.lens, asked.prompts, [names[0] for names in _aliases(lens, wanted)])
    kept: dict[str, Tensor] = {}

    def keep(names: list[str], tensor: Tensor) -> None:
        kept.update(dict.fromkeys(names, tangent_of(tensor)))

    with dual_forward():
        inject = derivatives.JointInject(lens, lens.gates(at), lens.gates(scale))
        with lens.injected(inject), attached(lens.model, _seen_by(keep, _aliases(lens, wanted))):
            lens.run(asked.prompts)
    return _cache(lens, wanted, kept)


@alone
def gradients(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    names: Names | None = None,
    *,
    at: float = 0.0,
    max_memory: float | None = None,
) -> ActivationCache:
    """∂g/∂h of every hooked activation, at ε = at. One forward and one backward pass.

    What is held within memory is the whole graph, and a tensor for each hook point.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: of one row a prompt: any but `AnswerMargin`. With a response, a row is the prompt
            and the response without its last token, after which nothing is read.
        names: a hook point, several, globs, or a predicate; None for every one.
        at: the gate value at which the model runs: 0 the base, 1 the adapted model.
        max_memory: bytes for graph and gradients; by default the bound of the lens, if it has one.

    Returns:
        ActivationCache of gradients, in the readout's units per unit of the activation, shaped as
        the activations are; zero at padding. Points of which g is no function are not in it; one
        that fires several times in a pass (ln1 for q, k and v) has the sum.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names.
        ModelStateError: a point named in full never fires, or g does not depend on what it shows.
        ArgumentError: a KL at 0, where its gradient is zero, two rows a prompt, an `at` that is no
            number, or a graph or gradients beyond the bound.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a gradient that is not finite.
    """
    asked, at = ask(lens, prompts, readout, max_memory), number("at", at)
    reading, rows = (asked if at else asked.require_slope_at_base()).reading, asked.prompts.batch
    if len(reading.owner) != rows:
        raise ArgumentError(
            f"{readout.label} reads {len(reading.owner)} rows of {rows} prompts, and a gradient is "
            "that of one row a prompt; take the gradients of ll.AnswerLogProb of either answer."
        )
    in_full, wanted = _points(lens, names)
    aliases = _aliases(lens, wanted)
    require_tangents(asked.lens, reading.prompts, [known_as[0] for known_as in aliases])
    require_graph(asked.lens, reading)
    lens.plan.check_backward(once=False)  # hooks are off by then, and a block would run without
    seen: list[tuple[list[str], Tensor]] = []

    def keep(known_as: list[str], tensor: Tensor) -> Tensor:
        # A node of its own: what reads the tensor past this point counts elsewhere. Where nothing
        # before it has a gradient, the graph begins here.
        is_graphed = tensor.requires_grad
        moved = tensor.view_as(tensor) if is_graphed else tensor.detach().requires_grad_()
        seen.append((known_as, moved))
        return moved

    inject, hooks = ScaleInject(lens.plan, lens.gates(at)), _seen_by(keep, aliases)
    with torch.enable_grad(), lens.injected(inject), attached(lens.model, hooks):
        values = read_for_slopes(lens, reading)
    require_fired(lens, [name for known_as, _ in seen for name in known_as], in_full, wanted)
    points, slopes = [tensor for _, tensor in seen], tuple[Tensor | None, ...]()
    if values.requires_grad:  # else g depends on none of them
        slopes += torch.autograd.grad(values.sum(), points, allow_unused=True)
    kept: dict[str, Tensor] = {}
    for (known_as, _), slope in zip(seen, slopes, strict=False):
        if slope is not None:  # the sum, where a point fires more than once: ln1, for q, k and v
            kept.update({name: kept[name] + slope if name in kept else slope for name in known_as})
    for name in in_full:
        if name not in kept:
            raise ModelStateError(
                f"{name}: {readout.label} does not depend on the tensor that this point shows (a "
                "copy, or not on the way to what is read); name another point."
            )
    for name, slope in kept.items():
        require_finite(slope, f"the gradient at {name}")
    return _cache(lens, wanted, kept)


def _points(lens: LoraLens, names: Names | None) -> tuple[tuple[str, ...], Sequence[str]]:
    """The names given in full, and all that are wanted."""
    return ((), tuple(lens.model.hook_dict)) if names is None else resolved(lens, names)


def _aliases(lens: LoraLens, names: Sequence[str]) -> list[list[str]]:
    """The names of each hook point."""
    # A TransformerBridge puts its hook points together anew whenever they are asked for.
    points, aliases = lens.model.hook_dict, dict[int, list[str]]()
    for name in names:
        aliases.setdefault(id(points[name]), []).append(name)
    return list(aliases.values())


def _seen_by(
    see: Callable[[list[str], Tensor], Tensor | None], aliases: Sequence[list[str]]
) -> list[tuple[str, HookFn]]:
    """Hooks that show what is a number at each point, with all names of that point."""

    def hook_of(names: list[str]) -> HookFn:
        def hook_fn(tensor: Any, hook: Any) -> Tensor | None:
            del hook
            is_number = isinstance(tensor, Tensor) and tensor.is_floating_point()
            return see(names, tensor) if is_number else None

        return hook_fn

    return [(names[0], hook_of(names)) for names in aliases]


def _cache(lens: LoraLens, names: Sequence[str], kept: Mapping[str, Tensor]) -> ActivationCache:
    from transformer_lens.ActivationCache import ActivationCache

    return ActivationCache({name: kept[name] for name in names if name in kept}, lens.model)
