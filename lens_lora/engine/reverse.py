"""Reverse mode: ∂g/∂ε_l of every site, position, head and rank, in one forward and one backward.

1. Taps (`engine/taps.py`) hand G = ∂g/∂(output) and z of each site to a visitor, on the way back.
2. The visitor of `site_slopes` contracts G with u = Az + a₀ at once (`engine/parts.py`). Over
   positions v's constant part is split at v, though it is added at o (`hooked/value_bias.py`).

Cost: one forward and one backward pass, whatever the sites and parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lens_lora.engine import batching
from lens_lora.engine.function import require_finite
from lens_lora.engine.parts import parts
from lens_lora.engine.read import differentiable_tokens
from lens_lora.engine.taps import Visit, gradients_of_each, site_gradients
from lens_lora.errors import ModelStateError, NumericsError
from lens_lora.hooked.basis import SiteMap
from lens_lora.hooked.plan import Injection
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.rows import Reading

__all__ = [
    "Slopes",
    "joined",
    "part_slots",
    "require_finite_sites",
    "require_split",
    "site_slopes",
    "token_slopes",
    "value_slopes",
]


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
    found: list[Tensor] = []
    for some in batching.graph_groups(lens, reading) if gates.ndim == 1 else [reading]:
        slopes = Slopes(lens, some, axes)
        site_gradients(lens, some, gates, slopes.visit)
        found.append(slopes.by_prompt())
    return joined(found)


def joined(groups: Sequence[Float[Tensor, "_some site ..."]]) -> Float[Tensor, "batch site ..."]:
    """Groups of prompts as one, with zeros where one is shorter than the longest.

    Args:
        groups: at least one.
    """
    sizes = [max(each) for each in zip(*(one.shape[2:] for one in groups), strict=True)]

    def padded(values: Tensor) -> Tensor:
        more = [size - own for size, own in zip(sizes, values.shape[2:], strict=True)]
        return functional.pad(values, [edge for extra in reversed(more) for edge in (0, extra)])

    return torch.cat([padded(one) for one in groups])


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

    gradients_of_each(lens, reading, gates, lambda: differentiable_tokens(lens, reading), visit_of)
    return torch.stack([slopes.by_prompt() for slopes in each], -1)


def value_slopes(
    lens: LoraLens,
    prompts: Prompts,
    gates: Float[Tensor, "site"],
    read: Callable[[], Float[Tensor, "row value"]],
) -> Float[Tensor, "value row site"]:
    """∂/∂ε_l of each value that is read of a row. One forward and a backward pass a value.

    Args:
        lens: the adapter over the model.
        prompts: what `read` runs.
        gates: at which the derivative is taken.
        read: runs the prompts under the hooks that are then on the model, and reads.

    Raises:
        ModelStateError: a gradient did not reach some site.
    """
    each: list[Tensor] = []

    def visit_of(value: int) -> Visit:
        del value
        shape = (len(prompts.tokens), len(lens.sites))
        each.append(torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device))
        return functools.partial(_add_slope, lens, each[-1])

    gradients_of_each(lens, prompts, gates, read, visit_of)
    return torch.stack(each)


def _add_slope(
    lens: LoraLens,
    slopes: Float[Tensor, "row site"],
    injection: Injection,
    weight: Tensor | None,
    gradient: Tensor,
    z: Tensor,
) -> None:
    kind = lens.sites[injection.site].kind
    found = parts(injection.map, kind, lens.heads.of(kind), gradient, z, ())
    found = found if weight is None else weight.to(found.device) * found
    slopes[:, injection.site] += found.to(slopes.device)


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
