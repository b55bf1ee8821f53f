"""⟨G, δz⟩ of one site and its parts (note, Prop. 1), without building δz.

    a = Σ_pos Σ_rank (G·sB)_rank · u_rank,     G = Jᵀu_y at the site's output,  u = A z + a₀

1. `parts` splits the sum by position, head, expert and rank, as asked. Heads are those of the
   output for q, k and v (rows of B), and those of the input for o (columns of A).
2. `part_deltas` is δz with everything but one part set to zero. Forward mode needs it, as each part
   has a tangent of its own.
3. The axis of heads has one slot more than the model has heads. The last one is for what belongs to
   no head, such as a change of bias.
"""

from __future__ import annotations

import dataclasses

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lens_lora.core.model import LoraLens
from lens_lora.core.model.basis import SiteMap
from lens_lora.core.model.sites import require_heads
from lens_lora.core.readout import Prompts


@dataclasses.dataclass(frozen=True)
class HeadedMap:
    """A site's map z → δz, and the heads of attention that its input or its output has.

    Attributes:
        map: the map.
        heads: how many heads there are; 0 outside attention.
        reads_by_head: whether the heads are those of the input, as for o; otherwise they are those
            of the output, as for q, k and v.
    """

    map: SiteMap
    heads: int
    reads_by_head: bool

    @classmethod
    def of(cls, lens: LoraLens, kind: str, site_map: SiteMap) -> HeadedMap:
        """The map of a site of this kind, such as 'q' or 'o'."""
        return cls(site_map, lens.heads.of(kind), reads_by_head=kind == "o")


# --- ⟨G, δz⟩, split


def axis_sizes(lens: LoraLens, prompts: Prompts, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The size of each axis of parts.

    Positions are those of the longest row, ranks those of the largest site; heads and experts have
    a last slot for sites that have none.

    Raises:
        ModelStateError: an axis of heads, for attention whose heads are not laid out as declared.
    """
    if "head" in axes:
        require_heads(lens.sites)
    sizes = {
        "position": prompts.tokens.shape[1],
        "head": lens.heads.n_heads + 1,
        "expert": max(site.experts for site in lens.sites) + 1,
        "rank": max(site.rank for site in lens.sites),
    }
    return tuple(sizes[axis] for axis in axes)


def parts(
    site: HeadedMap,
    gradient: Float[Tensor, "batch pos out"],
    z: Float[Tensor, "batch pos *head in"] | Int[Tensor, "batch pos"],
    by: tuple[str, ...],
) -> Float[Tensor, " batch *by"]:
    """⟨G, δz⟩ of one site, split along the axes of `by`.

    Args:
        site: the site's map z → δz, with its heads.
        gradient: G, at the site's output.
        z: what the site reads; it has an axis of heads if each head has an input of its own.
        by: any of 'position', 'head', 'expert' and 'rank', in this order.
    """
    gradient = gradient.to(site.map.dtype)
    is_split_by_head = "head" in by and site.heads > 0
    if z.ndim == 4 or is_split_by_head:
        by_rank = _products_by_head(site, gradient, z)
    else:
        products = site.map.back(gradient) * site.map.coordinates(z)
        if not by:
            return products.sum((1, 2))
        by_rank = products[:, :, None]
    # Axes: row, position, head, rank.
    last_axis = "rank"
    if "expert" in by:
        by_expert = by_rank.unflatten(3, (max(site.map.experts, 1), -1))
        by_rank = by_expert.sum(4)
        last_axis = "expert"
    names = {1: "position", 2: "head", 3: last_axis}
    summed = [axis for axis, name in names.items() if name not in by]
    return by_rank.sum(summed) if summed else by_rank


def _products_by_head(
    site: HeadedMap, gradient: Tensor, z: Tensor
) -> Float[Tensor, "batch pos head rank"]:
    """The products (G·sB)_rank · u_rank, split by head."""
    site_map = site.map
    own = site_map.own_by_head(gradient, z, site.heads)
    if own is not None:
        return own
    if site.reads_by_head:
        back = gradient @ site_map.sB
        return back[:, :, None] * input_by_head(site, z)
    if site_map.sB_by_head is not None:
        back = einsum(gradient, site_map.sB_by_head, "b p d, h d r -> b p h r")
    else:
        gradient_by_head = gradient.unflatten(-1, (site.heads, -1))
        sB_by_head = site_map.sB.unflatten(0, (site.heads, -1))
        back = einsum(gradient_by_head, sB_by_head, "b p h d, h d r -> b p h r")
    u = site_map.coordinates(z)
    if z.ndim != 4:
        u = u[:, :, None]
    return back * u


def input_by_head(
    site: HeadedMap, z: Float[Tensor, "row pos in"]
) -> Float[Tensor, "row pos head rank"]:
    """Split u by the heads of the site's input (o); a last slot is for what belongs to no head."""
    A = site.map.A
    z_by_head = z.to(A.dtype).unflatten(-1, (site.heads, -1))
    A_by_head = A.unflatten(-1, (site.heads, -1))
    u = einsum(z_by_head, A_by_head, "b p h d, r h d -> b p h r")
    a0_by_head = site.map.a0_by_head
    if a0_by_head is None:
        return u
    missing_heads = len(a0_by_head) - site.heads
    return functional.pad(u, (0, 0, 0, missing_heads)) + a0_by_head


# --- δz of one part alone


@dataclasses.dataclass(frozen=True)
class Slots:
    """The part that each row keeps: for each axis one slot per row, with −1 for all slots.

    None for an axis says that every row keeps all of its slots.
    """

    position: Int[Tensor, " row"] | None = None
    head: Int[Tensor, " row"] | None = None
    expert: Int[Tensor, " row"] | None = None
    rank: Int[Tensor, " row"] | None = None


def part_deltas(
    site: HeadedMap,
    z: Float[Tensor, "_row pos *head in"] | Int[Tensor, "_row pos"],
    slots: Slots,
) -> Float[Tensor, "row pos out"]:
    """Compute δz of one site in each row, with everything but the row's part set to zero.

    If z has a single row, it is shared by all rows.
    """
    u = _coordinates_of_parts(site, z, slots)
    sB_by_head = site.map.sB_by_head
    if slots.head is not None and sB_by_head is not None:
        heads_kept = kept(slots.head, len(sB_by_head), u)
        sB = einsum(heads_kept, sB_by_head, "b h, h d r -> b d r")
        delta = u @ sB.transpose(1, 2)
    elif slots.head is not None and not site.reads_by_head:
        delta = site.map.write(u)
        d_head = delta.shape[-1] // site.heads
        heads_kept = kept(slots.head, site.heads, delta)
        features_kept = heads_kept.repeat_interleave(d_head, 1)
        delta = delta * features_kept[:, None]
    else:
        delta = site.map.write(u)
    if slots.position is not None:
        positions_kept = kept(slots.position, delta.shape[1], delta)
        delta = delta * positions_kept[:, :, None]
    return delta


def _coordinates_of_parts(
    site: HeadedMap, z: Tensor, slots: Slots
) -> Float[Tensor, "row pos *head rank"]:
    """Compute u, with everything but the row's head (of o), expert and rank set to zero."""
    u = site.map.coordinates(z)
    if slots.head is not None and site.reads_by_head:
        by_head = input_by_head(site, z)
        heads_kept = kept(slots.head, by_head.shape[2], u)
        u = einsum(by_head, heads_kept, "b p h r, b h -> b p r")
    masks: list[Tensor] = []
    if slots.rank is not None:
        masks.append(kept(slots.rank, u.shape[-1], u))
    experts = site.map.experts
    if slots.expert is not None and experts:
        ranks_of_each = site.map.rank // experts
        experts_kept = kept(slots.expert, experts, u)
        masks.append(experts_kept.repeat_interleave(ranks_of_each, 1))
    for mask in masks:
        u = u * mask.view(len(mask), *[1] * (u.ndim - 2), -1)
    return u


def kept(slot: Int[Tensor, " row"], size: int, like: Tensor) -> Float[Tensor, "row size"]:
    """A mask that is 1 where a row keeps a slot, and 0 elsewhere."""
    slot = slot.to(like.device)[:, None]
    places = torch.arange(size, device=like.device)
    return ((slot == places) | (slot == -1)).to(like.dtype)
