"""The joint tangent and the slopes of what is made of it, in one pass there and one back.

    v = Σ_l J δz_l,    w = w(f, v),    ∂(wᵀf)/∂ε_l = wᵀ J δz_l     all at ε = 0

1. One forward pass of dual numbers gives f and v (`engine/dual_pass.py`). It keeps the graph of the
   values, and none of the tangents, so memory is that of a bare forward and backward pass while
   tangents of it are held.
2. w goes back through that graph, whose sites are tapped (`engine/taps.py`).
3. Where that graph is beyond the bound of the lens, the dual pass keeps none, and w goes back
   through a second pass whose blocks run again.

Cost: one dual forward and one backward pass; two forward passes more in the third case.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.dual_pass import dual_forward, tangent_of
from lens_lora.engine.memory import must_rerun
from lens_lora.engine.read import read_logits
from lens_lora.engine.reverse import Slopes
from lens_lora.engine.taps import tapped
from lens_lora.hooked.plan import Plan
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
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
    slopes, none, prompts = Slopes(lens, reading, axes), lens.gates(0.0), reading.prompts
    if must_rerun(lens, reading, duals=True):
        with torch.no_grad(), dual_forward(), lens.injected(_Push(lens.plan)):
            base, v = _read(lens, prompts)
        with tapped(lens, reading, none) as (taps, leaves):
            taps.visit = slopes.visit
            torch.autograd.grad(read_logits(lens, prompts), leaves, covector(base, v))
    else:
        with dual_forward(), tapped(lens, reading, none, _Push(lens.plan)) as (taps, leaves):
            base, v = _read(lens, prompts)
        taps.visit = slopes.visit
        torch.autograd.grad(base, leaves, covector(base.detach(), v))
    taps.require_all_seen()
    return slopes.by_prompt(), base.detach()


def _read(lens: LoraLens, prompts: Prompts) -> tuple[_Logits, _Logits]:
    logits = read_logits(lens, prompts)
    return fwad.unpack_dual(logits).primal, tangent_of(logits).detach()


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
