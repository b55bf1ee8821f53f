"""u_yᵀ J δz split into its parts, without ever building δz:

    a = Σ_pos Σ_rank (GB)_rank · u_rank,    G = Jᵀu_y at the site's output,  u = A z + a₀.

Heads: of the output for q, k, v (rows of B), of the input for o (columns of A).
"""

from __future__ import annotations

import dataclasses

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.hooked.basis import SiteMap
from lens_lora.hooked.norm_map import NormMap

__all__ = ["Slots", "part_deltas", "parts"]


def parts(
    site: SiteMap,
    kind: str,
    heads: int,
    gradient: Float[Tensor, "batch pos out"],
    z: Float[Tensor, "batch pos *head in"] | Int[Tensor, "batch pos"],
    by: tuple[str, ...],
) -> Float[Tensor, "batch *by"]:
    """⟨G, δz⟩ of one site, kept apart along `by` ('head' last slot: outside attention)."""
    gradient = gradient.to(site.dtype)
    if z.ndim == 4 or ("head" in by and heads):
        split = _by_head(site, kind, heads, gradient, z)
    elif not by:
        return (site.back(gradient) * site.coordinates(z)).sum((1, 2))
    else:
        split = (site.back(gradient) * site.coordinates(z))[:, :, None]
    summed = [axis for axis, name in ((1, "position"), (2, "head"), (3, "rank")) if name not in by]
    return split.sum(summed) if summed else split


def _by_head(
    site: SiteMap, kind: str, heads: int, gradient: Tensor, z: Tensor
) -> Float[Tensor, "batch pos head rank"]:
    if isinstance(site, NormMap):
        return site.by_head(gradient, z, heads)
    if kind == "o":
        return (gradient @ site.B)[:, :, None] * input_by_head(site, heads, z)
    if site.B_by_head is not None:
        back = einsum(gradient, site.B_by_head, "b p d, h d r -> b p h r")
    else:
        back = einsum(
            gradient.unflatten(-1, (heads, -1)),
            site.B.unflatten(0, (heads, -1)),
            "b p h d, h d r -> b p h r",
        )
    u = site.coordinates(z)
    return back * (u if z.ndim == 4 else u[:, :, None])


@dataclasses.dataclass(frozen=True)
class Slots:
    """Which slot of each axis each row keeps; −1 keeps all slots, None all slots in every row."""

    position: Int[Tensor, "row"] | None = None
    head: Int[Tensor, "row"] | None = None
    rank: Int[Tensor, "row"] | None = None


def part_deltas(
    site: SiteMap,
    kind: str,
    heads: int,
    z: Float[Tensor, "_row pos *head in"] | Int[Tensor, "_row pos"],
    slots: Slots,
) -> Float[Tensor, "row pos out"]:
    """δz of one site in each row, with everything but the row's own part set to zero.

    z may have one row, which is then every row's.
    """
    u = site.coordinates(z)
    if slots.head is not None and kind == "o":
        by_head = input_by_head(site, heads, z)
        u = einsum(by_head, kept(slots.head, by_head.shape[2], u), "b p h r, b h -> b p r")
    if slots.rank is not None:
        mask = kept(slots.rank, u.shape[-1], u)
        u = u * mask.view(len(mask), *[1] * (u.ndim - 2), -1)
    if slots.head is not None and site.B_by_head is not None:
        B = einsum(kept(slots.head, len(site.B_by_head), u), site.B_by_head, "b h, h d r -> b d r")
        delta = u @ B.transpose(1, 2)
    else:
        delta = site.write(u)
        if slots.head is not None and kind != "o":
            mask = kept(slots.head, heads, delta)
            delta = delta * mask.repeat_interleave(delta.shape[-1] // heads, 1)[:, None]
    if slots.position is not None:
        delta = delta * kept(slots.position, delta.shape[1], delta)[:, :, None]
    return delta


def kept(slot: Int[Tensor, "row"], size: int, like: Tensor) -> Float[Tensor, "row size"]:
    """1 where the row keeps the slot, else 0."""
    slot = slot.to(like.device)[:, None]
    places = torch.arange(size, device=like.device)
    return ((slot == places) | (slot == -1)).to(like.dtype)


def input_by_head(
    site: SiteMap, heads: int, z: Float[Tensor, "row pos in"]
) -> Float[Tensor, "row pos head rank"]:
    """u of a site whose input has heads (o), kept apart by head, and what belongs to none last."""
    u = einsum(
        z.to(site.A.dtype).unflatten(-1, (heads, -1)),
        site.A.unflatten(-1, (heads, -1)),
        "b p h d, r h d -> b p h r",
    )
    if site.a0_by_head is None:
        return u
    spare = len(site.a0_by_head) - heads
    return torch.nn.functional.pad(u, (0, 0, 0, spare)) + site.a0_by_head
