"""Second order by forward-over-reverse: H v, the derivative of every site's first order along v.

    (H v)_l = d/dt ∂g/∂ε_l (at + t v) at t = 0,   H_lm = ∂²g/∂ε_l ∂ε_m      (note, §6, item 4)

1. The gates are dual numbers at + v·d; the forward pass carries tangents and builds a graph.
2. The backward pass through it carries tangents too: each site's contraction ⟨G, δ⟩ is dual, and
   its tangent is (H v)_l.

Reverse-over-forward is not used: `F.layer_norm` has a wrong derivative of its forward-mode rule.
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor

from lens_lora.calculus.forward import dual_forward
from lens_lora.calculus.slopes import site_slopes
from lens_lora.lens import LoraLens
from lens_lora.reading import Reading

__all__ = ["hessian_product"]


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


def _tangent(dual: Tensor) -> Tensor:
    primal, tangent = fwad.unpack_dual(dual)
    return torch.zeros_like(primal) if tangent is None else tangent.detach()
