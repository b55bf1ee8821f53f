"""What a change of the residual stream reads as through the model's own final norm and unembedding.

    N(h) = γ ⊙ c(h)/σ(h) + β,     reading of Δh = W_U γ ⊙ c(Δh)/σ(h)

1. The norm's denominator σ is the base's, token by token, and held: so the reading is linear in Δh,
   that of a mean is the mean of readings, and β and b_U drop out. c centres where the norm does.
2. γ and W_U are the model's own, through its own modules: N(m) − N(0) = γ ⊙ c(m)/σ(m).
3. The layers in between are left out, and a soft-cap after the unembedding is.

Cost: the unembedding of two vectors.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.lens import LoraLens

__all__ = ["over_scale", "read_through"]


def over_scale(
    lens: LoraLens, shift: Float[Tensor, "*token d"], base: Float[Tensor, "*token d"]
) -> Float[Tensor, "*token d"]:
    """c(Δh)/σ(h), token by token.

    Args:
        lens: the adapter over the model.
        shift: Δh in the residual stream.
        base: h of the base model.
    """
    return _centred(lens, shift) / _scale(lens, base)


def read_through(lens: LoraLens, mean: Float[Tensor, "d"]) -> Float[Tensor, "vocab"]:
    """W_U γ ⊙ m of a mean m of `over_scale`, in logits.

    Args:
        lens: the adapter over the model.
        mean: of c(Δh)/σ(h) over tokens.
    """
    both = torch.stack([mean, torch.zeros_like(mean)])[None].to(lens.device, lens.dtype)
    with torch.no_grad():
        at, zero = lens.model.ln_final(both)[0]
        final = (at - zero) * _scale(lens, mean).to(at)
        read, bias = lens.model.unembed(torch.stack([final, torch.zeros_like(final)])[None])[0]
    return (read - bias).to(lens.gate_dtype)


def _centred(lens: LoraLens, values: Tensor) -> Tensor:
    centres = lens.plan.host.family.norm == "LN"
    return values - values.mean(-1, keepdim=True) if centres else values


def _scale(lens: LoraLens, values: Tensor) -> Float[Tensor, "*token 1"]:
    """σ(h), as the model's final norm computes it."""
    own = _centred(lens, values)
    return (own.square().mean(-1, keepdim=True) + float(lens.model.cfg.eps)).sqrt()
