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

from lens_lora.calculus.contract import parts
from lens_lora.calculus.forward import dual_forward
from lens_lora.calculus.function import Bound
from lens_lora.calculus.reverse import site_gradients
from lens_lora.hooked.plan import Injection
from lens_lora.lens import LoraLens
from lens_lora.prompts import Prompts

__all__ = ["hessian_product"]


def hessian_product(
    lens: LoraLens,
    prompts: Prompts,
    readout: Bound,
    at: Float[Tensor, "site"],
    direction: Float[Tensor, "site"],
) -> Float[Tensor, "batch site"]:
    """H v per prompt and site, in the readout's units. One dual forward and one dual backward.

    Raises:
        ModelStateError: the model has an operation without a forward-mode derivative.
    """
    product = torch.zeros(prompts.batch, len(lens.sites), dtype=lens.gate_dtype, device=lens.device)

    def visit(injection: Injection, weight: Tensor, gradient: Tensor, z: Tensor) -> None:
        kind = lens.sites[injection.site].kind
        found = weight * parts(injection.map, kind, lens.heads.of(kind), gradient, z, ())
        tangent = fwad.unpack_dual(found).tangent
        if tangent is not None:
            product[:, injection.site] += tangent.detach()

    with dual_forward():
        gates = fwad.make_dual(at.clone(), direction.clone())
        site_gradients(lens, prompts, readout, gates, visit)
    return product
