"""∂g/∂ε_l of every site, and of its positions, heads and ranks, in reverse mode: as tensors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.calculus.contract import parts
from lens_lora.calculus.function import require_finite
from lens_lora.calculus.reverse import site_gradients
from lens_lora.errors import NumericsError
from lens_lora.hooked.plan import Injection
from lens_lora.lens import LoraLens
from lens_lora.prompts import Prompts
from lens_lora.reading import Reading

__all__ = ["part_slots", "require_finite_sites", "site_slopes"]


def site_slopes(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "*row site"],
    axes: tuple[str, ...] = (),
) -> Float[Tensor, "batch site *by"]:
    """∂g/∂ε_l at these gates, one for all rows or each row's own. One forward, one backward."""
    prompts = reading.prompts
    shape = (prompts.batch, len(lens.sites), *part_slots(lens, prompts, axes))
    values = torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)

    heads_of = lens.heads

    def visit(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        kind = lens.sites[injection.site].kind
        heads = heads_of.of(kind)
        found = parts(injection.map, kind, heads, gradient, z, axes)
        if weight is not None:
            found = weight.to(found.device).view(-1, *[1] * (found.ndim - 1)) * found
        found = found.to(values.device)
        if not axes:
            values[:, injection.site].add_(found)
            return
        if kind == "unembed" and "position" in axes:
            found = _at_read_position(prompts, found)
        slots: list[int | slice] = [slice(None), injection.site]
        for axis in axes:
            size = found.shape[1 + axes.index(axis)]
            whole = axis == "head" and not heads
            slots.append(slice(-1, None) if whole else slice(0, size))
        values[tuple(slots)] += found

    site_gradients(lens, reading, gates, visit)
    return reading.by_prompt(values)


def part_slots(lens: LoraLens, prompts: Prompts, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The size of each axis: positions of the longest row, heads and 'none', the largest rank."""
    sizes = {
        "position": prompts.tokens.shape[1],
        "head": lens.heads.n_heads + 1,
        "rank": max(s.rank for s in lens.sites),
    }
    return tuple(sizes[axis] for axis in axes)


def _at_read_position(
    prompts: Prompts, found: Float[Tensor, "row one *by"]
) -> Float[Tensor, "row pos *by"]:
    """The unembedding is run, and has a gradient, at the read position alone."""
    spread = found.new_zeros(len(found), prompts.tokens.shape[1], *found.shape[2:])
    spread[torch.arange(len(found)), prompts.lengths - 1] = found[:, 0]
    return spread


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
