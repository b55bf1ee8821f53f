"""Directions taken out of activations for a span of time: h − m V Vᵀh at hook points.

1. V is an orthonormal basis of the directions in the space of each point, m is 1 at the tokens
   where they are removed and 0 elsewhere, whose h stays as it is to the last bit.
2. By default m is 0 at each row's first token alone. It is a sink: its ‖h‖ is hundreds of times the
   others', every later token attends to it, and means that make a direction leave it out. A
   direction removed there changes the model everywhere, whatever the direction says of the tokens
   that one asks about.
3. A hook sees a tensor, and not which of its tokens are which. So the model's own forward pass is
   watched (`_Watched`): what stands in a cache already, and the attention mask that tells padding
   on the left. The lens tells which tokens of its rows are the prompt's (`told`); a pass of the
   caller's does not, and where it matters is refused.
4. A block that runs again on the way back is in no pass; what it was in is kept (`going_on`).
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

from lens_lora.compat import (
    Temporary,
    computing_attribute,
    open_spans,
)
from lens_lora.core import HookFn, Names, attached
from lens_lora.core.model.hooks import hold, lock_of
from lens_lora.core.model.passes import Watched, pass_under_way, watched_module
from lens_lora.core.model.sites import few, firing, resolved
from lens_lora.directions.where import Where
from lens_lora.errors import ArgumentError, ModelStateError
from lens_lora.formats.directions import Directions, directions_of, home_points, is_residual

STREAM_POINTS = "blocks.*.hook_resid_*"


class Switch:
    """Whether the hooks of a block remove anything at the moment."""

    is_on = True


@dataclasses.dataclass(frozen=True, eq=False)
class Removed:
    """What an open block of `lens.without` takes from a model.

    Attributes:
        model: the hooked model.
        says: what is removed where, for people.
        where: the tokens.
        switch: of the block's hooks.
    """

    model: nn.Module
    says: str
    where: Where
    switch: Switch


def removed_from(model: nn.Module) -> list[Removed]:
    """What the open blocks of this thread take from a model, the innermost last."""
    spans = [span.about for span in open_spans()]
    return [about for about in spans if isinstance(about, Removed) and about.model is model]


@contextlib.contextmanager
def put_back(model: nn.Module) -> Generator[None]:
    """Within the block, nothing is removed from the model."""
    switches = [removed.switch for removed in removed_from(model) if removed.switch.is_on]
    try:
        for switch in switches:
            switch.is_on = False
        yield
    finally:
        for switch in switches:
            switch.is_on = True


def take_away(
    span: Temporary, lens: Any, source: Any, names: Names | None, positions: object, sinks: object
) -> Any:
    """h − m V Vᵀh at hook points, until the span ends. One forward pass of one token.

    The hooks are a user's own for every call: they see the adapted model's h, and what reads h
    sees what they leave of it.
    """
    where = Where.of(positions, sinks)
    hold(span, lock_of(lens.model))
    points, widths = _points(lens, _names(source) if names is None else names)
    switch = Switch()
    by_point = {name: directions_of(source, name).at(name, widths[name]) for name in points}
    taken = [
        (name, _take(lens, directions, name, where, switch))
        for name, directions in by_point.items()
    ]
    if not where.is_everywhere:
        module = watched_module(lens.model)
        Watched.until(span, module, object(), computing_attribute(module))
    span.enter_context(attached(lens.model, taken))
    count, kind = len(by_point[points[0]].rows), type(source).__name__
    says = f"{count} of {kind} at {few(points)}, {where}"
    span.about = Removed(lens.model, says, where, switch)
    return lens.model


def _names(source: Any) -> Names:
    """Where directions are removed if no points are named.

    A single direction of the residual stream at all of it; several points of a Contrast, and
    directions of another space, at their own.
    """
    own = home_points(source)
    if len(own) > 1 or (own and not is_residual(own[0])):
        return list(own)
    return STREAM_POINTS


def _points(lens: Any, names: Names) -> tuple[tuple[str, ...], dict[str, int]]:
    """The named points that fire and hold activations by position, and how wide they are.

    Globs leave out what holds none.
    """
    in_full, wanted = resolved(lens, names)
    widths: dict[str, int] = {}
    others: list[str] = []

    def measure(name: str, tensor: Any, hook: Any) -> None:
        del hook
        is_activation = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if is_activation and tensor.ndim > 2 and tensor.shape[:2] == (1, 1):
            widths[name] = tensor.shape[2:].numel()
            return
        if name in in_full:
            raise ModelStateError(f"{name} holds no activations by position; leave this point out.")
        others.append(name)

    hooks = [(name, functools.partial(measure, name)) for name in wanted]
    with torch.no_grad(), attached(lens.model, hooks):
        lens.run(lens.prompts(torch.zeros(1, 1, dtype=torch.long, device=lens.device)))
    if others and not widths:
        raise ModelStateError(
            f"{few(others)}: no activations by position; name points such as {STREAM_POINTS!r}."
        )
    return firing(lens, widths, in_full, [name for name in wanted if name not in others]), widths


def _take(lens: Any, directions: Directions, name: str, where: Where, switch: Switch) -> HookFn:
    is_own = directions.hook_name is None and directions.rows.shape[1] == lens.model.cfg.d_model
    if is_own and not is_residual(name):
        raise ArgumentError(
            f"{name} is as wide as the residual stream and holds another space (heads, a norm's "
            "output, or what comes before one), so a direction of the stream means nothing there. "
            "Name points such as 'blocks.*.hook_resid_pre' or 'blocks.*.hook_attn_out', or pass a "
            "Contrast of this point."
        )
    V = directions.basis(centred=is_residual(name) and lens.plan.host.centres_stream)
    module = watched_module(lens.model)
    # A sweep's fingerprint hashes what a partial holds.
    return functools.partial(_projected, V, where, name, _Place(module, switch))


class _Place:
    """What belongs to the block of a hook, and decides none of its numbers."""

    def __init__(self, module: nn.Module, switch: Switch) -> None:
        self.module = module
        self.switch = switch


def _projected(
    V: Tensor, where: Where, name: str, place: _Place, tensor: Tensor, hook: Any
) -> Tensor | None:
    del hook
    if not place.switch.is_on:
        return None
    wide = torch.promote_types(tensor.dtype, torch.float32)
    basis, h = V.to(tensor.device, wide), tensor.flatten(2).to(wide)
    along = h @ basis
    if not where.is_everywhere:
        along = along * _mask_of(where, name, place.module, h)[..., None].to(along)
    return (h - along @ basis.T).to(tensor.dtype).reshape(tensor.shape)


def _mask_of(where: Where, name: str, module: nn.Module, h: Tensor) -> Bool[Tensor, "#row pos"]:
    """The tokens at which directions are removed, of each row of an activation."""
    run = pass_under_way()
    if run is None or run.module is not module:
        raise ModelStateError(
            f"{name}: this part of the model runs outside of a pass of the whole model, so it is "
            f"not known which token is which, and directions are removed at {where}",
            remedy="Call the model itself, or begin the block with sinks=True and no positions.",
        )
    rows, width = h.shape[:2]
    mask = where.mask(run, width)
    if len(mask) in (1, rows):
        return mask
    if bool((mask == mask[:1]).all()):
        return mask[:1]
    raise ModelStateError(
        f"{name} holds {rows} rows for {len(mask)} prompts whose tokens differ; leave this point "
        "out of the block."
    )
