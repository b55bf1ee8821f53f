"""First-order changes at every hook point, ∂h/∂ε, and the gradients of g there, ∂g/∂h.

1. `tangents`: one dual forward pass, in which every gate moves along `scale`. At each chosen hook
   point, the derivative that the dual activation carries is kept.
2. `gradients`: one forward and one backward pass. If all updates of some sites pass through a hook
   point, ⟨∂g/∂h, ∂h/∂ε⟩ there is the first-order shift of these sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from lens_lora.arguments import number
from lens_lora.core import (
    Evaluations,
    Function,
    HookFn,
    LoraLens,
    Names,
    PromptsLike,
    Readout,
    Scale,
    alone,
    tangent_of,
)
from lens_lora.errors import ArgumentError, ModelStateError, named, require_finite, worded

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
    """The derivative d/dt of every hooked activation along ε = at + t·scale, at t = 0.

    Cost: one dual forward pass.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        names: a hook point, several, globs, or a predicate; None for all hook points.
        scale: the direction: 1 for the whole adapter, {site or glob: 1} for single sites.
        at: the gate value at which the tangent is taken.
        max_memory: bytes for the tangents; by default the bound of the lens, if it has one.

    Returns:
        An ActivationCache of tangents, shaped as the activations; at padding they mean nothing.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names.
        ModelStateError: the model has an operation without a forward-mode derivative, or a hook
            point that is named in full never has the adapted model's value (globs leave such
            points out).
        ArgumentError: a scale or `at` that is no number, or tangents that exceed the bound.
    """
    bounded = lens if max_memory is None else lens.within(max_memory)
    f = bounded.function(prompts)
    strength = number("at", at)
    points = lens.points(names)
    lens.require_update(points.in_full)
    wanted = [name for name in points.wanted if name not in lens.plan.points_without_update]
    aliases = _aliases(lens, wanted)
    _require_room(f, "tangents", [known_as[0] for known_as in aliases])
    kept: dict[str, Tensor] = {}

    def keep(known_as: list[str], tensor: Tensor) -> None:
        kept.update(dict.fromkeys(known_as, tangent_of(tensor)))

    hooks = _hooks_that_show(keep, aliases)
    f.passes.observe_tangents(scale, strength, under=lens.hooked(hooks))
    return _cache(lens, points.wanted, kept)


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
    """The gradient ∂g/∂h of every hooked activation, at ε = at.

    Cost: one forward and one backward pass. The memory bound covers the whole graph, and a tensor
    for each hook point.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: a readout of one row per prompt: any except `AnswerMargin`. With a response, a row
            is the prompt and the response without its last token, after which nothing is read.
        names: a hook point, several, globs, or a predicate; None for all hook points.
        at: the gate value at which the model runs: 0 the base, 1 the adapted model.
        max_memory: bytes for graph and gradients; by default the bound of the lens, if it has one.

    Returns:
        An ActivationCache of gradients, in the readout's units per unit of the activation, shaped
        as the activations; zero at padding. Hook points that g does not depend on are not in it. A
        point that fires several times in a pass (ln1 for q, k and v) has the sum.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names.
        ModelStateError: a hook point that is named in full never fires, or g does not depend on it.
        ArgumentError: a KL at 0, where its gradient is zero, two rows per prompt, an `at` that is
            no number, or a graph or gradients that exceed the bound.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a gradient is not finite.
    """
    strength = number("at", at)
    bounded = lens if max_memory is None else lens.within(max_memory)
    f = bounded.function(prompts)
    g = Evaluations(f.about(Readout.required(readout)))
    if strength == 0:
        g.require_slope_at_base()
    _require_one_row_each(g)
    points = lens.points(names)
    aliases = _aliases(lens, points.wanted)
    _require_room(g, "gradients", [known_as[0] for known_as in aliases])
    nodes, values = _nodes_in_graph(g, strength, aliases)
    fired: list[str] = []
    for node in nodes:
        fired += node.known_as
    points.fired(fired)
    kept = _gradients_at(nodes, values)
    for name in points.in_full:
        if name not in kept:
            raise ModelStateError(
                f"{name}: {readout.label} does not depend on the tensor that this point shows (a "
                "copy, or not on the way to what is read)",
                remedy="name another point.",
            )
    for name, gradient in kept.items():
        require_finite(gradient, f"the gradient at {name}")
    return _cache(lens, points.wanted, kept)


def _require_room(f: Function, kept: str, names: Sequence[str]) -> None:
    """Refuse to keep a tensor at each of these hook points if that exceeds the memory bound.

    Args:
        f: the function.
        kept: what is kept: 'tangents' or 'gradients'.
        names: the hook points, each under one name.
    """
    lens = f.lens
    if lens.max_memory is None:
        return
    cfg = lens.model.cfg
    longest = f.rows.tokens.shape[1]
    widest = max(int(cfg.d_model), int(getattr(cfg, "d_mlp", None) or 0))
    patterns = [name for name in names if name.endswith(("hook_pattern", "hook_attn_scores"))]
    others = len(names) - len(patterns)
    entries_of_token = others * widest + len(patterns) * int(cfg.n_heads) * longest
    needed = f.rows.tokens.numel() * lens.dtype.itemsize * entries_of_token
    if needed > lens.max_memory:
        raise ArgumentError(
            f"{named('max_memory')}{worded('=', ' ')}{lens.max_memory:.3g} bytes, and the {kept} "
            f"of {len(names)} hook points take about {needed:.3g}; name fewer, as in "
            "names='blocks.*.hook_resid_post', or allow more."
        )


def _require_one_row_each(g: Function) -> None:
    """Refuse a readout that reads several rows of each prompt."""
    if g.rows.batch != g.prompts.batch:
        assert g.readout is not None, "gradients are of a readout"
        raise ArgumentError(
            f"{g.readout.label} reads {g.rows.batch} rows of {g.prompts.batch} prompts, and "
            "gradients need one row per prompt",
            remedy="take the gradients of ll.AnswerLogProb of either answer.",
        )


class _Node(NamedTuple):
    """An activation as a node of the graph.

    Attributes:
        known_as: the names of its hook point.
        activation: the tensor that the point showed.
    """

    known_as: list[str]
    activation: Tensor


def _nodes_in_graph(
    g: Function, at: float, aliases: Sequence[list[str]]
) -> tuple[list[_Node], Tensor]:
    """The activations at these points as nodes of one graph, and g at its end; a forward pass."""
    nodes: list[_Node] = []

    def keep(known_as: list[str], tensor: Tensor) -> Tensor:
        # The node is a new one, so that modules which read the tensor without passing this point do
        # not count. If nothing before it has a gradient, the graph begins here.
        is_in_graph = tensor.requires_grad
        node = tensor.view_as(tensor) if is_in_graph else tensor.detach().requires_grad_()
        nodes.append(_Node(known_as, node))
        return node

    hooks = _hooks_that_show(keep, aliases)
    values = g.passes.with_graph(at, under=g.lens.hooked(hooks))
    return nodes, values


def _gradients_at(nodes: Sequence[_Node], values: Tensor) -> dict[str, Tensor]:
    """∂g/∂h by name, for the points that g depends on, from one backward pass.

    A point that fires more than once, such as ln1 for q, k and v, has the sum.
    """
    if not values.requires_grad:
        return {}
    activations = [node.activation for node in nodes]
    # Points that g does not depend on have None.
    of_activations = torch.autograd.grad(values.sum(), activations, allow_unused=True)
    gradients = cast("tuple[Tensor | None, ...]", of_activations)
    sums: dict[str, Tensor] = {}
    for node, gradient in zip(nodes, gradients, strict=True):
        if gradient is None:
            continue
        for name in node.known_as:
            if name in sums:
                sums[name] = sums[name] + gradient
            else:
                sums[name] = gradient
    return sums


def _aliases(lens: LoraLens, names: Sequence[str]) -> list[list[str]]:
    """The names of each hook point, which may have several."""
    # A TransformerBridge builds this dictionary anew at each access, so it is read only once.
    points = lens.model.hook_dict
    aliases: dict[int, list[str]] = {}
    for name in names:
        aliases.setdefault(id(points[name]), []).append(name)
    return list(aliases.values())


def _hooks_that_show(
    show: Callable[[list[str], Tensor], Tensor | None], aliases: Sequence[list[str]]
) -> list[tuple[str, HookFn]]:
    """Hooks that show the floating-point tensor at each point, with all names of that point."""

    def hook_of(known_as: list[str]) -> HookFn:
        def hook_fn(tensor: Any, hook: Any) -> Tensor | None:
            del hook
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                return None
            return show(known_as, tensor)

        return hook_fn

    return [(known_as[0], hook_of(known_as)) for known_as in aliases]


def _cache(lens: LoraLens, names: Sequence[str], kept: Mapping[str, Tensor]) -> ActivationCache:
    """The tensors as TransformerLens's own class, in the order of the names."""
    from transformer_lens.ActivationCache import ActivationCache

    return ActivationCache({name: kept[name] for name in names if name in kept}, lens.model)
