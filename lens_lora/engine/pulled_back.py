"""The joint tangent and the slopes of what is made of it, in one pass there and one back.

    v = Σ_l J δz_l,    w = w(f, v),    ∂(wᵀf)/∂ε_l = wᵀ J δz_l     all at ε = 0

1. One forward pass of dual numbers gives f and v (`engine/dual_pass.py`). It keeps the graph of the
   values, and none of the tangents, so memory is that of a bare forward and backward pass while
   tangents of it are held.
2. w goes back through that graph, whose sites are tapped (`engine/taps.py`).

Cost: one dual forward and one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.dual_pass import dual_forward, tangent_of
from lens_lora.engine.read import read_logits
from lens_lora.engine.reverse import Slopes
from lens_lora.engine.taps import tapped
from lens_lora.hooked.plan import Plan
from lens_lora.lens import LoraLens
from lens_lora.readouts.rows import Reading

__all__ = ["pulled_back"]

_Logits = Float[Tensor, "row *slot vocab"]


def pulled_back(
    lens: LoraLens,
    reading: Reading,
    axes: tuple[str, ...],
    covector: Callable[[_Logits, _Logits], _Logits],
) -> tuple[Float[Tensor, "batch site *by"], _Logits]:
    """wᵀ J δz_l of every site and its parts, and f(0). One dual forward and one backward pass.

    Args:
        lens: the adapter over the model.
        reading: what is run.
        axes: position, head and rank, as far as they are asked for.
        covector: w of f(0) and v.

    Raises:
        ModelStateError: a gradient did not reach some site, a split does not exist, or the model
            has an operation without a forward-mode derivative.
    """
    slopes, none = Slopes(lens, reading, axes), lens.gates(0.0)

    def read() -> tuple[Tensor, Tensor]:
        logits = read_logits(lens, reading.prompts)
        return fwad.unpack_dual(logits).primal, tangent_of(logits).detach()

    with dual_forward():
        (base, v), leaves, taps = tapped(lens, none, _Push(lens.plan), read)
    taps.visit = slopes.visit
    torch.autograd.grad(base, leaves, covector(base.detach(), v))
    taps.require_all_seen()
    return slopes.by_prompt(), base.detach()


class _Push:
    """Every gate is the dual number 0 + d, so δ_l is added to the tangent alone."""

    def __init__(self, plan: Plan) -> None:
        self._injections = plan.injections

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = self._injections[index]
        if injection.partner is not None:
            return None  # ½ ε_l ε_m has no derivative at zero
        z = fwad.unpack_dual(z).primal.detach()
        delta = injection.map.write(injection.map.coordinates(z))
        primal, tangent = fwad.unpack_dual(out)
        delta = delta.to(out.dtype).view(out.shape)
        return fwad.make_dual(primal, delta if tangent is None else tangent.detach() + delta)
