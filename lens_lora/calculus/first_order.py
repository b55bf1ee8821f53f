"""First-order shift of each site: a_l = u_yᵀ J_{l→L} δz_l = ∂g/∂ε_l (note, Prop. 1).

Reverse mode gives every site and part for one readout; forward mode gives the same numbers by the
other route, and is its check. At ε = 0 it predicts what adding one module to the base model does;
at ε = 1 what taking one away from the adapted model does.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.attribution import Attribution
from lens_lora.calculus.contract import by_axes, parts
from lens_lora.calculus.forward import Part, part_tangents
from lens_lora.calculus.function import Bound, gated_readout, require_finite
from lens_lora.calculus.reverse import site_gradients
from lens_lora.errors import NumericsError
from lens_lora.hooked.plan import Injection
from lens_lora.lens import LoraLens
from lens_lora.prompts import Prompts, PromptsLike
from lens_lora.readout import Readout

__all__ = ["first_order"]

Mode = Literal["auto", "reverse", "forward"]


def first_order(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    at: float = 0.0,
    mode: Mode = "auto",
    by: tuple[str, ...] | str = (),
    progress: bool = True,
) -> Attribution:
    """a_l = u_yᵀ J δz_l of every site, split by position, head and rank as asked.

    Cost: one forward and one backward in reverse mode (what 'auto' takes), and two forward passes
    for the exact shift beside it; forward mode takes one dual forward pass per site or part.

    Args:
        at: the gate value at which the derivative is taken: 0 base, 1 adapted.
        by: any of 'position', 'head', 'rank'.

    Returns:
        Attribution with values [batch, site, *by] in the readout's units.

    Raises:
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    if mode not in ("auto", "reverse", "forward"):
        raise ValueError(f"mode {mode!r}: expected 'auto', 'reverse' or 'forward'.")
    axes, ready = by_axes(by), lens.prompts(prompts)
    bound = readout.bind(lens.model, ready.batch)
    gates = lens.gates(float(at))
    compute = _forward if mode == "forward" else _reverse
    values = compute(lens, ready, bound, gates, axes, progress)
    _require_finite_sites(lens, values)
    ends = torch.stack([lens.gates(0.0), lens.gates(1.0)])
    base, adapted = gated_readout(lens, ready, bound, ends).T
    return Attribution(
        values=values,
        by=axes,
        sites=lens.sites,
        heads=tuple(lens.heads.of(s.kind) for s in lens.sites),
        base=base.contiguous(),
        adapted=adapted.contiguous(),
        str_tokens=tuple(tuple(row) for row in lens.str_tokens(ready)),
        readout=readout.label,
        units=readout.units,
        method="first_order",
        at=float(at),
        meta=lens.describe(),
    )


def _slots(lens: LoraLens, prompts: Prompts, axes: tuple[str, ...]) -> tuple[int, ...]:
    sizes = {
        "position": prompts.tokens.shape[1],
        "head": lens.heads.n_heads + 1,
        "rank": max(s.rank for s in lens.sites),
    }
    return tuple(sizes[axis] for axis in axes)


def _reverse(
    lens: LoraLens,
    prompts: Prompts,
    readout: Bound,
    gates: Float[Tensor, "site"],
    axes: tuple[str, ...],
    progress: bool,
) -> Float[Tensor, "batch site *by"]:
    del progress
    shape = (prompts.batch, len(lens.sites), *_slots(lens, prompts, axes))
    values = torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)

    def visit(injection: Injection, weight: Tensor, gradient: Tensor, z: Tensor) -> None:
        kind = lens.sites[injection.site].kind
        heads = lens.heads.of(kind)
        found = weight * parts(injection.map, kind, heads, gradient, z, axes)
        if kind == "unembed" and "position" in axes:
            found = _at_read_position(prompts, found)
        slots: list[int | slice] = [slice(None), injection.site]
        for axis in axes:
            size = found.shape[1 + axes.index(axis)]
            whole = axis == "head" and not heads
            slots.append(slice(-1, None) if whole else slice(0, size))
        values[tuple(slots)] += found

    site_gradients(lens, prompts, readout, gates, visit)
    return values


def _at_read_position(
    prompts: Prompts, found: Float[Tensor, "batch one *by"]
) -> Float[Tensor, "batch pos *by"]:
    """The unembedding is run, and has a gradient, at the read position alone."""
    spread = found.new_zeros(len(found), prompts.tokens.shape[1], *found.shape[2:])
    spread[torch.arange(len(found)), prompts.lengths - 1] = found[:, 0]
    return spread


def _forward(
    lens: LoraLens,
    prompts: Prompts,
    readout: Bound,
    gates: Float[Tensor, "site"],
    axes: tuple[str, ...],
    progress: bool,
) -> Float[Tensor, "batch site *by"]:
    shape = (prompts.batch, len(lens.sites), *_slots(lens, prompts, axes))
    values = torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)
    wanted = _all_parts(lens, prompts, axes)
    tangents = part_tangents(lens, prompts, gates, wanted, readout, progress=progress)
    for j, part in enumerate(wanted):
        where = {"position": part.position, "head": part.head, "rank": part.rank}
        slot = [-1 if where[axis] is None else where[axis] for axis in axes]
        values[(slice(None), part.site, *slot)] = tangents[:, j]
    return values


def _all_parts(lens: LoraLens, prompts: Prompts, axes: tuple[str, ...]) -> list[Part]:
    found = []
    for index, site in enumerate(lens.sites):
        heads = lens.heads.of(site.kind)
        ranges = {
            "position": range(prompts.tokens.shape[1]),
            "head": range(_head_slots(lens, index)) if heads else [None],
            "rank": range(site.rank),
        }
        options = [
            ranges[axis] if axis in axes else [None] for axis in ("position", "head", "rank")
        ]
        found += [Part(index, p, h, r) for p in options[0] for h in options[1] for r in options[2]]
    return found


def _head_slots(lens: LoraLens, index: int) -> int:
    """The site's heads, and one slot more where a bias belongs to none of them."""
    by_head = lens.maps[index].a0_by_head
    heads = lens.heads.of(lens.sites[index].kind)
    return heads if by_head is None else len(by_head)


def _require_finite_sites(lens: LoraLens, values: Float[Tensor, "batch site *by"]) -> None:
    finite = torch.isfinite(values.flatten(2) if values.ndim > 2 else values[..., None])
    broken = (~finite.all(-1).all(0)).nonzero()
    if len(broken):
        site = lens.sites[int(broken[0])]
        raise NumericsError(
            f"the derivative at {site.name} ({site.write}) is not finite; lens.logits(prompts) "
            "names the first hook point with non-finite activations, if the model has one."
        )
    require_finite(values, "the first-order shift")
