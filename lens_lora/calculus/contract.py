"""u_yᵀ J δz split into its parts, without ever building δz:

    a = Σ_pos Σ_rank (GB)_rank · u_rank,    G = Jᵀu_y at the site's output,  u = A z + a₀.

Heads: of the output for q, k, v (rows of B), of the input for o (columns of A).
"""

from __future__ import annotations

import dataclasses

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from lens_lora.attribution import AXES
from lens_lora.hooked.basis import SiteMap

__all__ = ["by_axes", "parts", "part_delta"]


def by_axes(by: tuple[str, ...] | str) -> tuple[str, ...]:
    """`by` in canonical order.

    Raises:
        ValueError: an axis that is none of position, head, rank.
    """
    wanted = (by,) if isinstance(by, str) else tuple(by)
    unknown = [axis for axis in wanted if axis not in AXES]
    if unknown:
        raise ValueError(f"by={unknown}: expected any of {AXES}.")
    return tuple(axis for axis in AXES if axis in wanted)


def parts(
    site: SiteMap,
    kind: str,
    heads: int,
    gradient: Float[Tensor, "batch pos out"],
    z: Float[Tensor, "batch pos *head in"],
    by: tuple[str, ...],
) -> Float[Tensor, "batch *by"]:
    """⟨G, δz⟩ of one site, kept apart along `by` ('head' last slot: outside attention)."""
    gradient = gradient.to(site.B.dtype)
    if z.ndim == 4 or ("head" in by and heads):
        split = _by_head(site, kind, heads, gradient, z)
    else:
        split = ((gradient @ site.B) * site.coordinates(z))[:, :, None]
    summed = [axis for axis, name in ((1, "position"), (2, "head"), (3, "rank")) if name not in by]
    return split.sum(summed) if summed else split


def _by_head(
    site: SiteMap, kind: str, heads: int, gradient: Tensor, z: Tensor
) -> Float[Tensor, "batch pos head rank"]:
    if kind == "o":
        u = einsum(
            z.to(site.A.dtype).unflatten(-1, (heads, -1)),
            site.A.unflatten(-1, (heads, -1)),
            "b p h d, r h d -> b p h r",
        )
        if site.a0_by_head is not None:
            spare = len(site.a0_by_head) - heads
            u = torch.nn.functional.pad(u, (0, 0, 0, spare)) + site.a0_by_head
        return (gradient @ site.B)[:, :, None] * u
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


def part_delta(
    site: SiteMap,
    kind: str,
    heads: int,
    z: Float[Tensor, "pos *head in"],
    *,
    position: int | None = None,
    head: int | None = None,
    rank: int | None = None,
) -> Float[Tensor, "pos out"]:
    """δz of one site on one prompt, with everything but the named part set to zero."""
    u = site.coordinates(z)
    if head is not None and kind == "o":
        width = z.shape[-1] // heads
        some = slice(head * width, (head + 1) * width)  # empty for the slot after the heads
        u = z[:, some].to(site.A.dtype) @ site.A[:, some].T
        if site.a0_by_head is not None:
            u = u + site.a0_by_head[head]
    if rank is not None:
        u = u * (torch.arange(u.shape[-1], device=u.device) == rank)
    if head is not None and site.B_by_head is not None:
        site, head = dataclasses.replace(site, B=site.B_by_head[head]), None
    delta = site.write(u[None])[0]
    if position is not None:
        delta = delta * (torch.arange(len(delta), device=delta.device) == position)[:, None]
    if head is not None and kind != "o":
        rows = torch.arange(delta.shape[-1], device=delta.device) // (delta.shape[-1] // heads)
        delta = delta * (rows == head).to(delta)
    return delta
