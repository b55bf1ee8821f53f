"""The shifts of all logits that two adapters make, as vectors of one metric.

With p₀ the base's distribution of the next token, and v and v′ the shifts of its logits,

    cos_F = vᵀFv′ / √(vᵀFv · v′ᵀFv′),    F_t = diag p₀,t − p₀,t p₀,tᵀ

so that vᵀFv′ is the covariance of the two shifts under p₀.

1. v is the joint first-order shift Σ_l J δz_l, from one pass of dual numbers, and beside it the
   exact shift f(1) − f(0), which at full strength may be something else.
2. Every token but a prompt's first is read. Where prompts begin alike, a token with the same tokens
   before it counts once.
3. Products are summed over tokens. A cosine sums them over prompts as well, inside each root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.core import Function, LoraLens, first_of_each
from lens_lora.errors import require_finite

# How many tokens are read at once: each holds its logits and four shifts.
_TOKENS = 512


def groups_of(f: Function) -> list[Int[Tensor, " some"]]:
    """The rows of f, by index, in groups that are read at once."""
    rows = torch.arange(f.rows.batch, device="cpu")
    return list(rows.split(f.passes.rows_at_once("dual", tokens=_TOKENS)))


def shift_products(
    f: Function, others: Callable[[], Iterable[LoraLens]]
) -> Float[Tensor, "kind other pair batch"]:
    """The products vᵀFv′, vᵀFv and v′ᵀFv′ of each prompt, in nats.

    The first kind is of first-order shifts, the second of exact ones.

    Cost: a forward pass of the base; for each adapter a forward pass and one of dual numbers.

    Args:
        f: the logits under the first adapter, at the tokens that are read.
        others: makes the other adapters, over the same model; called for each group of prompts.

    Raises:
        NumericsError: a shift that is not finite.
    """
    rows = f.rows
    marks = rows.marks().gather(1, rows.read_positions.cpu())
    is_first = first_of_each(marks.numpy(), rows.read_mask.cpu().numpy())
    counted = torch.from_numpy(is_first)
    groups: list[Tensor] = []
    for indices in groups_of(f):
        of_group = f.of_rows(rows.chosen(indices.tolist()))
        groups.append(_products_of(of_group, others(), counted[indices]))
    products = torch.cat(groups, -1)
    require_finite(products, "the shift of the logits")
    return products


@torch.no_grad()
def _products_of(
    f: Function, others: Iterable[LoraLens], counted: Bool[Tensor, "batch some_slot"]
) -> Float[Tensor, "kind other pair batch"]:
    """The products of one group of prompts."""
    base = f.passes.logits()
    p = base.softmax(-1)
    mask = counted[:, : f.rows.slots].to(base)[..., None]

    def weighted(shift: Float[Tensor, "batch slot vocab"]) -> Float[Tensor, "batch slot_and_vocab"]:
        """√p₀ ∘ (v − p₀ᵀv), whose products are those of F."""
        centred = shift - (p * shift).sum(-1, keepdim=True)
        return (p.sqrt() * centred * mask).flatten(1)

    def shifts_of(adapter: LoraLens) -> tuple[Tensor, Tensor]:
        """The first-order shift, and the exact one."""
        g = f.over(adapter)
        first = g.tangent(1.0)
        exact = g.passes.logits(under=adapter.adapted(1.0)) - base
        return weighted(first), weighted(exact)

    first, exact = shifts_of(f.lens)
    products: list[Tensor] = []
    for other in others:
        other_first, other_exact = shifts_of(other)
        kinds = [_inner_products(first, other_first), _inner_products(exact, other_exact)]
        products.append(torch.stack(kinds))
    return torch.stack(products, 1).cpu()


def _inner_products(
    v: Float[Tensor, "batch entry"], w: Float[Tensor, "batch entry"]
) -> Float[Tensor, "pair batch"]:
    """⟨v, w⟩, ⟨v, v⟩ and ⟨w, w⟩ of each prompt."""
    v_w = (v * w).sum(1)
    v_v = (v * v).sum(1)
    w_w = (w * w).sum(1)
    return torch.stack([v_w, v_v, w_w])


def cosine_of(
    products: Float[Tensor, "*kind pair batch"], prompt: int | None = None
) -> Float[Tensor, "*kind"]:
    """The cosine under F: vᵀFv′ / √(vᵀFv · v′ᵀFv′); NaN where a shift is zero.

    Args:
        products: from `shift_products`.
        prompt: the index of one prompt; all of them by default.
    """
    if prompt is not None:
        products = products[..., prompt : prompt + 1]
    v_w, v_v, w_w = products.double().sum(-1).unbind(-1)
    return v_w / (v_v * w_w).sqrt()
