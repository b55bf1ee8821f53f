"""The constant part of an update of v, which is added at o where value biases were folded.

A folded model's v and z have no bias: b̂_V is in b_O. An update of v has a constant part as well,
c_v = B_v u with u = s A_v β (+ Δb), and folding merged weights would move it to b_O, too. So v's
own output gets B_v A_v' n only, and attention's output gets, at every position,

    ε_v W_O Rep(c_v)  +  ε_o ε_v s_o B_o A_o Rep(c_v)

(o's own update reads z + Rep(c_v)). Then every named activation, z and v included, equals that of
a model made from the merged weights. Rep repeats each KV head for its group of query heads.

Over positions the constant is split at v, not at o. Attention's rows sum to one, so what it adds at
position q comes from all positions k of v, and the part of k is, with G = Jᵀu_y at each output,

    Σ_q A_qk ⟨G_q at o, W_O Rep(c_v)⟩  =  ⟨G_k at v, c_v⟩

as in the unprocessed model. Under a hook that edits the pattern or z there is no such split.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.model.basis import SiteMap
from lens_lora.core.model.sites import Heads


@dataclasses.dataclass(frozen=True)
class Constant:
    """The constant c_v = B u of an update of v, in v's rank space.

    Attributes:
        u: its coordinates.
        spread: Rep B of each head of keys and values: [kv, n_heads · d_head, rank].
    """

    u: Float[Tensor, " rank"]
    spread: Float[Tensor, "kv out rank"]


def constant_of_v(
    site: SiteMap, heads: Heads, *, norm_folded: bool, has_bias: bool
) -> Constant | None:
    """The part of an update of v that folds as a bias; None where there is none.

    If the norm was folded, it is all of a₀ = A_v β (and Δb). If not, β reaches v through the norm,
    and only a change of bias (the last entry of a₀) folds.
    """
    if site.a0 is None:
        return None
    u = site.a0.clone()
    if not norm_folded:
        of_beta = len(u) - 1 if has_bias else len(u)
        u[:of_beta] = 0
    if not bool(u.any()):
        return None
    # Rep: [kv, head] is 1 where a query head reads a head of keys and values.
    queries_of_each = heads.n_heads // heads.n_kv
    reads = torch.eye(heads.n_kv).repeat_interleave(queries_of_each, 1)
    B_by_kv = site.sB.unflatten(0, (heads.n_kv, -1))
    spread = reads.to(B_by_kv)[:, :, None, None] * B_by_kv[:, None]
    return Constant(u, spread.flatten(1, 2))


def without_constant(site: SiteMap, constant: Constant) -> SiteMap:
    """Return δ of v without its constant part."""
    if site.a0 is None:
        return site
    return dataclasses.replace(site, a0=site.a0 - constant.u)


def through_o(constant: Constant, W_O: Float[Tensor, "d_model out"], heads: Heads) -> SiteMap:
    """The map that adds W_O Rep(c_v), in v's rank space."""
    return _constant_map(W_O.to(constant.spread) @ constant.spread, constant.u, heads)


def through_update_of_o(constant: Constant, o: SiteMap, heads: Heads) -> tuple[SiteMap, SiteMap]:
    """The map that adds s_o B_o A_o Rep(c_v), once in v's rank space and once in o's."""
    of_v = _constant_map(o.sB @ (o.A @ constant.spread), constant.u, heads)
    shift = constant.spread.sum(0) @ constant.u
    by_head = (o.A * shift).unflatten(-1, (heads.n_heads, -1)).sum(-1).T  # [head, rank]
    if o.a0_by_head is not None:
        slots_behind_heads = len(o.a0_by_head) - len(by_head)
        by_head = torch.nn.functional.pad(by_head, (0, 0, 0, slots_behind_heads))
    reads_nothing = o.A.new_zeros(o.A.shape[0], heads.n_heads)
    of_o = SiteMap(reads_nothing, o.sB, o.A @ shift, by_head.contiguous())
    return of_v, of_o


def _constant_map(
    by_kv: Float[Tensor, "kv d_model rank"], u: Float[Tensor, " rank"], heads: Heads
) -> SiteMap:
    """The map that adds B u whatever it reads, with B the sum over heads of keys and values."""
    reads_nothing = u.new_zeros(len(u), heads.n_heads)
    return SiteMap(reads_nothing, by_kv.sum(0), u, sB_by_head=by_kv)
