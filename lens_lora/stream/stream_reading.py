"""A change Δh of the residual stream, read through the model's own final norm and unembedding.

    N(h) = γ ⊙ c(h)/σ(h) + β,     reading of Δh = W_U γ ⊙ c(Δh)/σ(h)

The denominator σ is the base's, token by token. So the reading is linear in Δh, the reading of a
mean is the mean of the readings, and β and b_U drop out. c centres if the norm does. γ and W_U are
applied by the model's own modules, by N(m) − N(0) = γ ⊙ c(m)/σ(m). The layers in between are left
out, and so is a soft-cap after the unembedding. The model's own Jacobian can take the place of
these layers (`audit/jacobian.py`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import LoraLens


def over_scale(
    lens: LoraLens, shift: Float[Tensor, "*token d"], base: Float[Tensor, "*token d"]
) -> Float[Tensor, "*token d"]:
    """The normed shift c(Δh)/σ(h), token by token; Δh itself if the model has no final norm.

    Args:
        lens: the adapter over the model.
        shift: Δh.
        base: h, whose σ is the denominator.
    """
    if lens.host.final_norm is None:
        return shift
    return _centred(lens, shift) / _scale(lens, base)


def read_through(lens: LoraLens, mean: Float[Tensor, "*token d"]) -> Float[Tensor, "*token vocab"]:
    """The logits W_U γ ⊙ m of normed shifts m, or of their mean.

    If a projection P, and no norm, is between the stream and the head (OPT-350m), it is W_U P m.

    Args:
        lens: the adapter over the model.
        mean: m, from `over_scale`.
    """
    host = lens.host
    rows = mean.reshape(-1, mean.shape[-1])
    m = rows.to(lens.device, lens.dtype)
    with torch.no_grad():
        if host.final_norm is None:
            final = m
        else:
            # N(m) − N(0) is γ ⊙ c(m)/σ(m): β drops out, and σ(m) is multiplied back.
            normed, beta = host.final_norm(torch.stack([m, torch.zeros_like(m)]))
            final = (normed - beta) * _scale(lens, rows).to(normed)
        for projection in host.after_the_stream:
            final = projection(final)
        read, bias = lens.model.unembed(torch.stack([final, torch.zeros_like(final)]))
    return (read - bias).to(lens.gate_dtype).view(*mean.shape[:-1], -1)


def _centred(lens: LoraLens, values: Tensor) -> Tensor:
    """Subtract the mean over d if the model has LayerNorm."""
    if lens.host.family.norm != "LN":
        return values
    return values - values.mean(-1, keepdim=True)


def _scale(lens: LoraLens, values: Tensor) -> Float[Tensor, "*token 1"]:
    """The denominator σ(h), as the model's final norm computes it."""
    square = _centred(lens, values).square().mean(-1, keepdim=True)
    return (square + float(lens.model.cfg.eps)).sqrt()
