"""`lens.ablate_directions` ablates directions of activations: h becomes h − m V Vᵀh.

1. V is an orthonormal basis of the directions in the space of each hook point. The mask m is 1 at
   the tokens where they are ablated, and 0 elsewhere, where no bit of h changes
   (`directions/where.py`).
2. A hook sees a tensor, and does not know which of the prompt's tokens it holds. So it asks the
   running pass (`directions/passes.py`), unless directions are ablated at every token.
3. The hooks run where a user's own hooks would: they see the adapted model's h, and later modules
   read the h that they return.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Generator
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lens_lora.compat import computing_attribute
from lens_lora.core import ForwardPass, HookFn, LoraLens, Names, OpenBlock, Positions
from lens_lora.core.model import extensions
from lens_lora.directions.passes import Watched
from lens_lora.directions.where import Where
from lens_lora.errors import ArgumentError, ModelStateError, first_few
from lens_lora.formats.directions import Directions, directions_of, home_points, is_residual
from lens_lora.spans import Temporary

# Every point of the residual stream.
STREAM_POINTS = "blocks.*.hook_resid_*"


class HookState:
    """The state that the hooks of one block share.

    This is no dataclass on purpose: a sweep's fingerprint of a hook holds the fields of a
    dataclass, but only the class of another object, and neither attribute belongs in it.

    Attributes:
        module: the module whose forward pass is a pass of the whole model.
        is_on: whether the hooks ablate anything at the moment.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.is_on = True


@dataclasses.dataclass(frozen=True, eq=False)
class Ablation(OpenBlock):
    """An open block of `lens.ablate_directions`.

    Attributes:
        where: the tokens at which directions are ablated.
        state: the state that the block's hooks share.
    """

    where: Where
    state: HookState


def open_ablations(model: nn.Module) -> list[Ablation]:
    """The blocks of this thread that are open on a model, the innermost last.

    Args:
        model: the hooked model.
    """
    return [block for block in OpenBlock.open_on(model) if isinstance(block, Ablation)]


@contextlib.contextmanager
def without_ablations(model: nn.Module) -> Generator[None]:
    """Within the block, nothing is ablated in the model.

    Args:
        model: the hooked model.
    """
    # Hooks that an enclosing `without_ablations` switched off stay off when this block ends.
    states = [ablation.state for ablation in open_ablations(model) if ablation.state.is_on]
    try:
        for state in states:
            state.is_on = False
        yield
    finally:
        for state in states:
            state.is_on = True


@extensions.ablate.provide
def ablate(
    span: Temporary,
    lens: LoraLens,
    source: Any,
    names: Names | None,
    positions: Positions,
    sinks: bool,
) -> Any:
    """Ablate directions at hook points until the span ends. One forward pass of one token.

    Args:
        span: the block; the directions are back when it ends.
        lens: the adapter over the model.
        source: the directions, in any form that `directions_of` takes.
        names: the hook points; None for the points that the directions belong to.
        positions, sinks: the tokens, as for `lens.ablate_directions`.

    Returns:
        The model.

    Raises:
        ArgumentError: the positions mean no tokens; directions have another width or space.
        SiteError: the model lacks a hook point.
        ModelStateError: a point never fires, or holds no activations by position.
    """
    where = Where.of(positions, sinks)
    lens.hold(span)
    if names is None:
        names = _home_points(source)
    named = lens.points(names)
    widths = _widths_by_position(lens, named)
    # A point whose value the adapted model never computes is refused.
    points = named.fired(widths, updated=True)
    module = ForwardPass.module_of(lens.model)
    state = HookState(module)
    by_point: dict[str, Directions] = {}
    hooks: list[tuple[str, HookFn]] = []
    for name in points:
        directions = directions_of(source, name).at(name, widths[name])
        by_point[name] = directions
        hooks.append((name, _ablating_hook(lens, directions, name, where, state)))
    if not where.is_everywhere:
        entry = object()  # This block's own entry, by which it is taken off again.
        Watched.until(span, module, entry, computing_attribute(module))
    span.enter_context(lens.hooked(hooks))
    # Every point has equally many: one of a Contrast, and otherwise all that the source holds.
    count = len(by_point[points[0]].rows)
    says = f"{count} of {type(source).__name__} at {first_few(points)}, {where}"
    span.about = Ablation(lens.model, says, where, state)
    return lens.model


def _home_points(source: Any) -> Names:
    """The hook points at which directions are ablated if the caller names none.

    A direction of the residual stream is ablated at every point of the stream, even if it was found
    at one of them. The directions of a Contrast of several points, and those of another space, are
    ablated at their own points.
    """
    own = home_points(source)
    is_of_other_space = len(own) == 1 and not is_residual(own[0])
    if len(own) > 1 or is_of_other_space:
        return list(own)
    return STREAM_POINTS


def _widths_by_position(lens: LoraLens, points: Any) -> dict[str, int]:
    """The width of the activations at each point that fires and holds activations by position.

    Points that a glob matches but that hold no such activations are left out.

    Cost: one forward pass of one token.

    Raises:
        ModelStateError: a point that is named in full holds no such activations, or none does.
    """
    widths: dict[str, int] = {}
    others: list[str] = []

    def measure(name: str, tensor: Any, hook: Any) -> None:
        del hook
        if _is_by_position(tensor):
            widths[name] = tensor.shape[2:].numel()
        else:
            others.append(name)

    hooks = [(name, functools.partial(measure, name)) for name in points.wanted]
    token = lens.prompts(torch.zeros(1, 1, dtype=torch.long, device=lens.device))
    with torch.no_grad(), lens.hooked(hooks):
        lens.run(token)
    for name in others:
        if name in points.in_full:
            raise ModelStateError(f"{name} holds no activations by position; leave this point out.")
    if others and not widths:
        raise ModelStateError(
            f"{first_few(others)}: no activations by position",
            remedy=f"name points such as {STREAM_POINTS!r}.",
        )
    return {name: width for name, width in widths.items() if name not in others}


def _is_by_position(value: Any) -> bool:
    """Whether a hook point's value, in a pass of one token, is an activation at that token."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    # One prompt and one position come first, and then the axes of the activation itself.
    return value.ndim > 2 and value.shape[:2] == (1, 1)


def _ablating_hook(
    lens: LoraLens, directions: Directions, name: str, where: Where, state: HookState
) -> HookFn:
    """The hook that ablates these directions at one point."""
    _require_own_space(lens, directions, name)
    V = directions.basis(centred=is_residual(name) and lens.host.centres_stream)
    # A partial and not a closure, because a sweep's fingerprint hashes the contents of a partial.
    return functools.partial(_projected, V, where, name, state)


def _require_own_space(lens: LoraLens, directions: Directions, name: str) -> None:
    """Refuse what may be a direction of the residual stream at a point of another space.

    Both have the same width, so the width alone does not show the mistake.
    """
    is_of_known_space = directions.hook_name is not None
    is_of_stream_width = directions.rows.shape[1] == lens.model.cfg.d_model
    if is_of_known_space or not is_of_stream_width or is_residual(name):
        return
    raise ArgumentError(
        f"{name} is as wide as the residual stream and holds another space (heads, a norm's "
        "output, or what comes before one), so a direction of the stream means nothing there. "
        "Name points such as 'blocks.*.hook_resid_pre' or 'blocks.*.hook_attn_out', or pass a "
        "Contrast of this point."
    )


def _projected(
    V: Tensor, where: Where, name: str, state: HookState, tensor: Tensor, hook: Any
) -> Tensor | None:
    """Return h − m V Vᵀh, computed in float32 or better."""
    del hook
    if not state.is_on:
        return None
    wide = torch.promote_types(tensor.dtype, torch.float32)
    basis = V.to(tensor.device, wide)
    h = tensor.flatten(2).to(wide)
    along = h @ basis
    if not where.is_everywhere:
        mask = _mask_of(where, name, state.module, h)
        along = along * mask[..., None].to(along)
    return (h - along @ basis.T).to(tensor.dtype).reshape(tensor.shape)


def _mask_of(where: Where, name: str, module: nn.Module, h: Tensor) -> Bool[Tensor, "#row pos"]:
    """Whether directions are ablated at each token of each row of an activation."""
    run = ForwardPass.under_way()
    if run is None or run.module is not module:
        raise ModelStateError(
            f"{name}: this part of the model runs outside of a pass of the whole model, so its "
            f"tokens are not known, and directions are removed at {where}",
            remedy="Call the model itself, or begin the block with sinks=True and no positions.",
        )
    rows, width = h.shape[:2]
    mask = where.mask(run, width)
    if len(mask) in (1, rows):
        return mask
    # Some points, such as positional embeddings, hold one row for several prompts.
    if bool((mask == mask[:1]).all()):
        return mask[:1]
    raise ModelStateError(
        f"{name} holds {rows} rows for {len(mask)} prompts whose tokens differ; leave this point "
        "out of the block."
    )
