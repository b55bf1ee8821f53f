"""Second order by forward-over-reverse: H v, the derivative of every site's first order along v.

    (H v)_l = d/dt ∂g/∂ε_l (at + t v) at t = 0,   H_lm = ∂²g/∂ε_l ∂ε_m      (note, §6, item 4)

1. The gates are dual numbers at + v·d; the forward pass carries tangents and builds a graph.
2. The backward pass through it carries tangents too: each site's contraction ⟨G, δ⟩ is dual, and
   its tangent is (H v)_l.
3. Several directions ride in rows of one batch, in chunks of a bounded number of tokens.

Reverse-over-forward is not used: `F.layer_norm` has a wrong derivative of its forward-mode rule.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.calculus.forward import dual_forward
from lens_lora.calculus.slopes import require_finite_sites, site_slopes
from lens_lora.lens import LoraLens
from lens_lora.reading import Reading

__all__ = ["hessian_product", "hessian_products"]

DUAL_TOKENS_AT_ONCE, DUAL_LOGITS_AT_ONCE = 256, 2**24


def hessian_product(
    lens: LoraLens,
    reading: Reading,
    at: Float[Tensor, "*row site"],
    direction: Float[Tensor, "*row site"],
) -> Float[Tensor, "batch site"]:
    """H v per prompt and site, in the readout's units; one direction, or one per row.

    Cost: one dual forward and one dual backward.

    Raises:
        ModelStateError: the model has an operation without a forward-mode derivative.
    """
    with dual_forward():
        gates = fwad.make_dual(at.clone(), direction.clone())
        return site_slopes(lens, reading, gates, keep=_tangent)


def hessian_products(
    lens: LoraLens,
    reading: Reading,
    at: Float[Tensor, "site"],
    directions: Float[Tensor, "direction site"],
    *,
    progress: bool = True,
    what: str = "Hessian products",
) -> Iterator[Float[Tensor, "batch chunk site"]]:
    """H v of many directions, a chunk of them at a time, in their order.

    Cost: one dual forward and one dual backward a direction, batched.

    Raises:
        NumericsError: a product that is not finite, naming the site.
    """
    directions = directions.to(at)
    step = _directions_at_once(lens, reading)
    bar = tqdm(
        total=len(directions),
        desc=what,
        leave=False,
        disable=not progress or len(directions) <= step,
    )
    with bar:
        for some in directions.split(step):
            many = reading.repeat(len(some))
            by_row = some.repeat(len(reading.owner), 1)
            products = hessian_product(lens, many, at.expand_as(by_row), by_row)
            require_finite_sites(lens, products)
            yield products.unflatten(0, (reading.batch, len(some)))
            bar.update(len(some))


def _directions_at_once(lens: LoraLens, reading: Reading) -> int:
    """Bounded in tokens, and in logits, of a dual pass over every row of the reading."""
    logits = len(reading.owner) * int(lens.model.cfg.d_vocab_out)
    tokens = reading.prompts.tokens.numel()
    return max(1, min(DUAL_TOKENS_AT_ONCE // tokens, DUAL_LOGITS_AT_ONCE // logits))


def _tangent(dual: Tensor) -> Tensor:
    primal, tangent = fwad.unpack_dual(dual)
    return torch.zeros_like(primal) if tangent is None else tangent.detach()
