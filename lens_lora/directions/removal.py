"""`lens.ablate_directions` removes directions from activations: h becomes h − m V Vᵀh.

1. V is an orthonormal basis of the directions in the space of each hook point. The mask m is 1 at
   the tokens where they are removed, and 0 elsewhere, where no bit of h changes
   (`directions/where.py`).
2. A hook sees a tensor, and does not know which of the prompt's tokens it holds. So it asks the
   running pass (`directions/passes.py`), unless directions are removed at every token.
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
from lens_lora.core import ForwardPass, HookFn, LoraLens, Names, OpenBlock
from lens_lora.core.model import extensions
from lens_lora.directions.passes import Watched
from lens_lora.directions.where import Where
from lens_lora.errors import ArgumentError, ModelStateError, first_few
from lens_lora.formats.directions import Directions, directions_of, home_points, is_residual
from lens_lora.spans import Temporary

# Every point of the residual stream.
STREAM_POINTS = "blocks.*.hook_resid_*"


class Switch:
    """Whether the hooks of a block remove anything at the moment."""

    is_on = True


@dataclasses.dataclass(frozen=True, eq=False)
class Removed(OpenBlock):
    """An open block of `lens.ablate_directions`.

    Attributes:
        where: the tokens at which directions are removed.
        switch: whether the block's hooks remove anything at the moment.
    """

    where: Where
    switch: Switch


def removed_from(model: nn.Module) -> list[Removed]:
    """The blocks of this thread that are open on a model, the innermost last.

    Args:
        model: the hooked model.
    """
    return [block for block in OpenBlock.open_on(model) if isinstance(block, Removed)]


@contextlib.contextmanager
def put_back(model: nn.Module) -> Generator[None]:
    """Within the block, nothing is removed from the model.

    Args:
        model: the hooked model.
    """
    switches = [removed.switch for removed in removed_from(model) if removed.switch.is_on]
    try:
        for switch in switches:
            switch.is_on = False
        yield
    finally:
        for switch in switches:
            switch.is_on = True


@extensions.take_away.provide
def take_away(
    span: Temporary,
    lens: LoraLens,
    source: Any,
    names: Names | None,
    positions: object,
    sinks: object,
) -> Any:
    """Remove directions at hook points until the span ends. One forward pass of one token.

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
    points, widths = _points(lens, names)
    switch = Switch()
    hooks: list[tuple[str, HookFn]] = []
    counts: list[int] = []
    for name in points:
        directions = directions_of(source, name).at(name, widths[name])
        counts.append(len(directions.rows))
        hooks.append((name, _removing(lens, directions, name, where, switch)))
    if not where.is_everywhere:
        module = ForwardPass.module_of(lens.model)
        Watched.until(span, module, object(), computing_attribute(module))
    span.enter_context(lens.hooked(hooks))
    says = f"{counts[0]} of {type(source).__name__} at {first_few(points)}, {where}"
    span.about = Removed(lens.model, says, where, switch)
    return lens.model


def _home_points(source: Any) -> Names:
    """The hook points at which directions are removed if the caller names none.

    A direction of the residual stream is removed at all of its points. The directions of a Contrast
    of several points, and those of another space, are removed at their own points.
    """
    own = home_points(source)
    is_of_other_space = len(own) == 1 and not is_residual(own[0])
    if len(own) > 1 or is_of_other_space:
        return list(own)
    return STREAM_POINTS


def _points(lens: Any, names: Names) -> tuple[tuple[str, ...], dict[str, int]]:
    """The named points that fire and hold activations by position, and the width of each.

    Points that match a glob but hold no such activations are left out.

    Cost: one forward pass of one token.
    """
    points = lens.points(names)
    widths: dict[str, int] = {}
    others: list[str] = []

    def measure(name: str, tensor: Any, hook: Any) -> None:
        del hook
        is_activation = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if is_activation and tensor.ndim > 2 and tensor.shape[:2] == (1, 1):
            widths[name] = tensor.shape[2:].numel()
        elif name in points.in_full:
            raise ModelStateError(f"{name} holds no activations by position; leave this point out.")
        else:
            others.append(name)

    hooks = [(name, functools.partial(measure, name)) for name in points.wanted]
    token = lens.prompts(torch.zeros(1, 1, dtype=torch.long, device=lens.device))
    with torch.no_grad(), lens.hooked(hooks):
        lens.run(token)
    if others and not widths:
        raise ModelStateError(
            f"{first_few(others)}: no activations by position",
            remedy=f"name points such as {STREAM_POINTS!r}.",
        )
    positioned = [name for name in widths if name not in others]
    return points.fired(positioned, updated=True), widths


def _removing(lens: Any, directions: Directions, name: str, where: Where, switch: Switch) -> HookFn:
    """The hook that removes these directions at one point."""
    is_as_wide = directions.hook_name is None and directions.rows.shape[1] == lens.model.cfg.d_model
    if is_as_wide and not is_residual(name):
        raise ArgumentError(
            f"{name} is as wide as the residual stream and holds another space (heads, a norm's "
            "output, or what comes before one), so a direction of the stream means nothing there. "
            "Name points such as 'blocks.*.hook_resid_pre' or 'blocks.*.hook_attn_out', or pass a "
            "Contrast of this point."
        )
    V = directions.basis(centred=is_residual(name) and lens.host.centres_stream)
    place = _Place(ForwardPass.module_of(lens.model), switch)
    # A partial and not a closure, because a sweep's fingerprint hashes the contents of a partial.
    return functools.partial(_projected, V, where, name, place)


class _Place:
    """The parts of a block that its hooks need, and that do not change their numbers.

    They have a class of their own so that they are not part of a sweep's fingerprint.
    """

    def __init__(self, module: nn.Module, switch: Switch) -> None:
        self.module = module
        self.switch = switch


def _projected(
    V: Tensor, where: Where, name: str, place: _Place, tensor: Tensor, hook: Any
) -> Tensor | None:
    """Return h − m V Vᵀh, computed in float32 or better."""
    del hook
    if not place.switch.is_on:
        return None
    wide = torch.promote_types(tensor.dtype, torch.float32)
    basis = V.to(tensor.device, wide)
    h = tensor.flatten(2).to(wide)
    along = h @ basis
    if not where.is_everywhere:
        mask = _mask_of(where, name, place.module, h)
        along = along * mask[..., None].to(along)
    return (h - along @ basis.T).to(tensor.dtype).reshape(tensor.shape)


def _mask_of(where: Where, name: str, module: nn.Module, h: Tensor) -> Bool[Tensor, "#row pos"]:
    """Whether directions are removed at each token of each row of an activation."""
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
