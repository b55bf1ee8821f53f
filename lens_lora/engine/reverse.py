"""Reverse mode: ∂g/∂ε_l of every site, position, head and rank, in one forward and one backward.

1. A forward pass keeps its graph, and each site's output is tapped (`engine/taps.py`). During the
   backward pass a tap hands G = ∂g/∂(output) and z to a visitor, and keeps nothing else
   (`site_gradients`).
2. The visitor of `site_slopes` contracts G with u = Az + a₀ at once (`engine/parts.py`). Over
   positions v's constant part is split at v, though it is added at o (`hooked/value_bias.py`).
3. The gradient that reaches the leaf is discarded; parameters never receive one.

Cost: one forward and one backward pass, whatever the sites and parts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.function import require_finite
from lens_lora.engine.parts import parts
from lens_lora.engine.read import differentiable_tokens, read_for_slopes
from lens_lora.engine.taps import Visit, tapped
from lens_lora.errors import ModelStateError, NumericsError
from lens_lora.hooked.basis import SiteMap
from lens_lora.hooked.gates import ScaleInject
from lens_lora.hooked.plan import Injection
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.rows import Reading

__all__ = [
    "Slopes",
    "part_slots",
    "require_finite_sites",
    "require_split",
    "site_gradients",
    "site_slopes",
    "token_slopes",
]


def site_gradients(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "*row site"],
    visit: Visit,
) -> Float[Tensor, "batch"]:
    """Visit every injection at these gates; returns g there. One forward and one backward.

    The visitor gets (injection, its partner's gate or None, G = Jᵀu_y [row, pos, out], z): the
    site's derivative is the sum of weight · ⟨G, δ(z)⟩ over its injections. The weight is a scalar,
    or one per row as the gates are.

    Raises:
        ModelStateError: a gradient did not reach some site.
    """
    inject = ScaleInject(lens.plan, gates)
    values, leaves, tap = tapped(lens, gates, inject, lambda: read_for_slopes(lens, reading))
    tap.visit = visit
    torch.autograd.grad(values, leaves, torch.ones_like(values))
    tap.require_all_seen()
    return values.detach()


def gradients_of_each(
    lens: LoraLens,
    gates: Float[Tensor, "*row site"],
    read: Callable[[], Float[Tensor, "batch token"]],
    visit_of: Callable[[int], Visit],
) -> None:
    """As `site_gradients`, for each token of a response in turn.

    One forward pass, and a backward pass for each token.

    Args:
        lens: the adapter over the model.
        gates: one for all rows, or each row's own.
        read: runs the rows under the hooks that are then on the model, and reads each token.
        visit_of: the visitor of a token, by its index.

    Raises:
        ModelStateError: a gradient did not reach some site.
    """
    values, leaves, tap = tapped(lens, gates, ScaleInject(lens.plan, gates), read)
    for token in range(values.shape[1]):
        tap.visit = visit_of(token)
        only = torch.zeros_like(values)
        only[:, token] = 1
        torch.autograd.grad(values, leaves, only, retain_graph=token + 1 < values.shape[1])
    tap.require_all_seen()


def site_slopes(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "*row site"],
    axes: tuple[str, ...] = (),
) -> Float[Tensor, "batch site *by"]:
    """∂g/∂ε_l at these gates, one for all rows or each row's own. One forward, one backward.

    Raises:
        ModelStateError: a gradient did not reach some site, or a split does not exist.
    """
    slopes = Slopes(lens, reading, axes)
    site_gradients(lens, reading, gates, slopes.visit)
    return slopes.by_prompt()


def token_slopes(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "site"],
    axes: tuple[str, ...],
) -> Float[Tensor, "batch site *by_and_token"]:
    """∂ℓ_t/∂ε_l of each token t of a response, split. One forward and a backward pass a token.

    Raises:
        ModelStateError: a gradient did not reach some site, or a split does not exist.
    """
    each: list[Slopes] = []

    def visit_of(token: int) -> Visit:
        del token
        each.append(Slopes(lens, reading, axes))
        return each[-1].visit

    gradients_of_each(lens, gates, lambda: differentiable_tokens(lens, reading), visit_of)
    return torch.stack([slopes.by_prompt() for slopes in each], -1)


class Slopes:
    """Sums up ∂g/∂ε_l and its parts while the gradients come by."""

    def __init__(self, lens: LoraLens, reading: Reading, axes: tuple[str, ...]) -> None:
        self._lens, self._reading, self._axes = lens, reading, axes
        self._heads = lens.heads
        shape = (len(reading.owner), len(lens.sites), *part_slots(lens, reading.prompts, axes))
        self._values = torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)
        self._totals = self._values.new_zeros(shape[:2])

    def by_prompt(self) -> Float[Tensor, "batch site *by"]:
        """What was summed up.

        Raises:
            ModelStateError: parts by position that do not add up to their site.
        """
        values, plan = self._reading.by_prompt(self._values), self._lens.plan
        if "position" in self._axes:
            totals = self._reading.by_prompt(self._totals)
            require_split(self._lens, values, totals[:, plan.with_constants])
        return values

    def visit(
        self, injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor
    ) -> None:
        """Add what one injection contributes."""
        kind, axes = self._lens.sites[injection.site].kind, self._axes
        heads = self._heads.of(kind)

        def of(site_map: SiteMap, by: tuple[str, ...]) -> Tensor:
            found = parts(site_map, kind, heads, gradient, z, by)
            if weight is not None:
                found = weight.to(found.device).view(-1, *[1] * (found.ndim - 1)) * found
            return found.to(self._values.device)

        if not axes:
            self._values[:, injection.site].add_(of(injection.map, axes))
            return
        split = injection.map_by_position if "position" in axes else injection.map
        if split is not injection.map:
            self._totals[:, injection.site] += of(injection.map, ())
        if split is None:
            return
        found = of(split, axes)
        if kind == "unembed" and "position" in axes:
            found = _at_read_positions(self._reading.prompts, found)
        slots: list[int | slice] = [slice(None), injection.site]
        for axis in axes:
            size = found.shape[1 + axes.index(axis)]
            whole = axis == "head" and not heads
            slots.append(slice(-1, None) if whole else slice(0, size))
        self._values[tuple(slots)] += found


def part_slots(lens: LoraLens, prompts: Prompts, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The size of each axis: positions of the longest row, heads and 'none', the largest rank."""
    sizes = {
        "position": prompts.tokens.shape[1],
        "head": lens.heads.n_heads + 1,
        "rank": max(s.rank for s in lens.sites),
    }
    return tuple(sizes[axis] for axis in axes)


def require_split(
    lens: LoraLens, values: Float[Tensor, "batch site *by"], whole: Float[Tensor, "batch some"]
) -> None:
    """Check that v's parts by position, its constant included, add up to what v adds at o.

    Args:
        lens: the adapter over the model.
        values: split by position.
        whole: of the sites `plan.with_constants`, not split.

    Raises:
        ModelStateError: a hook changes what attention passes on, so v's constant has no positions.
    """
    some = lens.plan.with_constants
    parts_of_v = values[:, some].flatten(2)
    gap = (parts_of_v.sum(2) - whole).abs()
    size = parts_of_v.abs().sum(2) + whole.abs()
    eps = max(torch.finfo(dtype).eps for dtype in (lens.dtype, torch.float32))
    apart = (gap > eps**0.5 * size).any(0).nonzero()
    if len(apart):
        site = lens.sites[some[int(apart[0])]]
        raise ModelStateError(
            f"{site.name}: this model's value biases are folded into b_O, and a hook changes what "
            "its attention passes on (the pattern, v or z), so the part of the update that belongs "
            "to the bias comes from no position. Take the hook off, leave 'position' out of by, or "
            "load the model unprocessed."
        )


def _at_read_positions(
    prompts: Prompts, found: Float[Tensor, "row slot *by"]
) -> Float[Tensor, "row pos *by"]:
    """The unembedding is run, and has a gradient, at the positions that are read only."""
    spread = found.new_zeros(len(found), prompts.tokens.shape[1], *found.shape[2:])
    rows = torch.arange(len(found), device=found.device)[:, None]
    at = prompts.read_positions.to(found.device)
    # A prompt with fewer slots repeats its last one, from which no further gradient comes.
    return spread.index_put((rows.expand_as(at), at), found, accumulate=True)


def require_finite_sites(lens: LoraLens, values: Float[Tensor, "batch site *by"]) -> None:
    """Refuse NaN and infinity, naming the first such site.

    Raises:
        NumericsError: some derivative is not finite.
    """
    finite = torch.isfinite(values.flatten(2) if values.ndim > 2 else values[..., None])
    broken = (~finite.all(-1).all(0)).nonzero()
    if len(broken):
        site = lens.sites[int(broken[0])]
        raise NumericsError(
            f"the derivative at {site.name} ({site.write}) is not finite; lens.logits(prompts) "
            "names the first hook point with non-finite activations, if the model has one."
        )
    require_finite(values, "the first-order shift")
