"""The constant part of an update of v, which is added at o where value biases were folded.

The model. Attention's pattern A_qk mixes the values, and o writes the result. Rep repeats each head
of keys and values for its group of query heads; it is linear. With the adapter at gates ε_v, ε_o,

    v_k   = (W_V + ε_v ΔW_V) n_k + b_V + ε_v Δb_V,        n_k = γ ⊙ x_k + β
    z_q   = Σ_k A_qk Rep(v_k)
    out_q = (W_O + ε_o ΔW_O) z_q + b_O

Step 1. Split v_k into what reads x_k and what does not:

    v_k = v'_k + b̂_V + ε_v c_v
    v'_k = (W_V + ε_v ΔW_V)(γ ⊙ x_k)
    b̂_V = W_V β + b_V                                     the base's value bias
    c_v  = ΔW_V β + Δb_V                                  the update's constant part

Step 2. The rows of A sum to one, Σ_k A_qk = 1, so what is equal at every k comes through as it is:

    z_q = z'_q + Rep(b̂_V) + ε_v Rep(c_v),                 z'_q = Σ_k A_qk Rep(v'_k)

Step 3. Put z_q into out_q, and sort by what a folded model holds:

    out_q = W_O z'_q + [b_O + W_O Rep(b̂_V)]               the folded model and its bias
          + ε_o ΔW_O (z'_q + Rep(b̂_V))                    the update of o; its a₀ has Rep(b̂_V)
          + ε_v W_O Rep(c_v)                              `through_o`
          + ε_o ε_v ΔW_O Rep(c_v)                         `through_update_of_o`

So v's own output gets v'_k alone (`without_constant`), and the last two lines are added at o,
at every position. Then every named activation, z' and v' included, is that of a model made
from the merged weights, as folding those would move ε_v c_v to b_O, too.

In rank space. v's map is δ = sB u_k with u_k = A(γ ⊙ x_k) + a₀ and a₀ = Aβ, with a last coordinate
1 for Δb_V. Hence c_v = sB u with u = a₀ (`constant_of_v`). Where only the bias was folded and not
the norm, the hook shows n_k itself: Aβ is no constant then, and u is the coordinate of Δb_V alone.

The term ε_o ε_v belongs to both gates. It is written as two maps of the same output, one in v's
rank space and one in o's, each of which adds half of it. The slope by ε_v is read from the first,
with the weight ε_o, and the slope by ε_o from the second, with the weight ε_v.

Over positions the constant is split at v, not at o. What it adds at position q comes from all
positions k of v by A_qk, and the part of k is, with G = Jᵀu_y at each output,

    Σ_q A_qk ⟨G_q at o, (W_O + ε_o ΔW_O) Rep(c_v)⟩  =  ⟨G_k at v, c_v⟩

as ∂out_q/∂v_k = A_qk (W_O + ε_o ΔW_O) Rep. Under a hook that edits the pattern or z there is no
such split.
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
    """The constant c_v = sB u of an update of v, in v's rank space.

    Attributes:
        u: its coordinates.
        spread: Rep sB, split by the head of keys and values that it comes from. The sum over kv is
            Rep sB, with n_heads · d_head outputs.
    """

    u: Float[Tensor, " rank"]
    spread: Float[Tensor, "kv out rank"]


def constant_of_v(
    site: SiteMap, heads: Heads, *, norm_folded: bool, has_bias: bool
) -> Constant | None:
    """The part of an update of v that folds as a bias; None where there is none.

    Args:
        site: the map of v, whose a₀ is Aβ, with a last coordinate 1 for Δb_V.
        heads: how many heads there are of queries, and of keys and values.
        norm_folded: whether the norm was folded. If not, β reaches v through the norm, and only a
            change of bias folds.
        has_bias: whether the update changes the bias.
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
    """The map that adds W_O Rep(c_v) = (W_O Rep sB) u, in v's rank space."""
    return _constant_map(W_O.to(constant.spread) @ constant.spread, constant.u, heads)


def through_update_of_o(constant: Constant, o: SiteMap, heads: Heads) -> tuple[SiteMap, SiteMap]:
    """The map that adds ΔW_O Rep(c_v), with ΔW_O = s_o B_o A_o, in v's rank space and in o's.

    In v's it is (s_o B_o A_o Rep sB) u. In o's it is s_o B_o u_o with u_o = A_o Rep(c_v), which
    splits by the query heads that A_o reads.
    """
    of_v = _constant_map(o.sB @ (o.A @ constant.spread), constant.u, heads)
    repeated = constant.spread.sum(0) @ constant.u  # Rep(c_v)
    products = (o.A * repeated).unflatten(-1, (heads.n_heads, -1))
    u_by_head = products.sum(-1).T  # [head, rank]
    if o.a0_by_head is not None:
        slots_behind_heads = len(o.a0_by_head) - len(u_by_head)
        u_by_head = torch.nn.functional.pad(u_by_head, (0, 0, 0, slots_behind_heads))
    reads_nothing = o.A.new_zeros(o.A.shape[0], heads.n_heads)
    of_o = SiteMap(reads_nothing, o.sB, a0=o.A @ repeated, a0_by_head=u_by_head.contiguous())
    return of_v, of_o


def _constant_map(
    by_kv: Float[Tensor, "kv d_model rank"], u: Float[Tensor, " rank"], heads: Heads
) -> SiteMap:
    """The map that adds Σ_kv B_kv u, whatever it reads."""
    reads_nothing = u.new_zeros(len(u), heads.n_heads)
    return SiteMap(reads_nothing, by_kv.sum(0), a0=u, sB_by_head=by_kv)
