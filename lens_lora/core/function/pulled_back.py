"""wᵀ J δz_l at ε = 0, with w made of the logits f and of their joint tangent v = Σ_l J δz_l.

One forward pass of dual numbers gives f and v, and keeps the graph of the values but none of the
tangents. w goes back through that graph, whose sites are tapped (`function/reverse.py`). Where the
graph is beyond the bound of the lens, the dual pass keeps none, and w goes back through a second
pass whose blocks run again.

Cost: one dual forward and one backward pass, and two forward passes more where blocks run again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function import forward as function
from lens_lora.core.function import memory, reverse
from lens_lora.core.function.duals import dual_forward, tangent_of
from lens_lora.core.model import LoraLens
from lens_lora.core.model.injections import Inject
from lens_lora.core.model.plan import Plan
from lens_lora.core.readout import Prompts, Reading

_RowLogits = Float[Tensor, "row *slot vocab"]
# w, from f(0), v and the rows of both.
Covector = Callable[[_RowLogits, _RowLogits, Prompts], _RowLogits]


def pulled_back(
    lens: LoraLens, reading: Reading, axes: tuple[str, ...], covector: Covector
) -> tuple[Float[Tensor, "batch site *by"], _RowLogits]:
    """wᵀ J δz_l of every site and its parts, and f(0). One dual forward and one backward pass.

    Raises:
        ModelStateError: a gradient did not reach some site, a split does not exist, or the model
            has an operation without a forward-mode derivative.
    """
    prompts, base_gates = reading.prompts, lens.gates(0.0)
    slopes = reverse.Slopes(lens, prompts, axes)
    if memory.must_rerun(lens, reading, duals=True):
        with torch.no_grad(), dual_forward(), lens.injected(_push(lens.plan)):
            base, v = _read(lens, prompts)
        with reverse.tapped(lens, reading, base_gates) as (taps, leaves):
            taps.visit = slopes.visit
            torch.autograd.grad(
                function.read_logits(lens, prompts), leaves, covector(base, v, prompts)
            )
    else:
        lens.check_backward(once=False)  # the tangents end where a block is run again
        push = _push(lens.plan)
        with dual_forward(), reverse.tapped(lens, reading, base_gates, push) as (taps, leaves):
            base, v = _read(lens, prompts)
        taps.visit = slopes.visit
        torch.autograd.grad(base, leaves, covector(base.detach(), v, prompts))
    taps.require_all_seen()
    return slopes.by_prompt(reading), base.detach()


def _read(lens: LoraLens, prompts: Prompts) -> tuple[_RowLogits, _RowLogits]:
    logits = function.read_logits(lens, prompts)
    return fwad.unpack_dual(logits).primal, tangent_of(logits).detach()


def _push(plan: Plan) -> Inject:
    """Every gate is the dual number 0 + d, so δ_l is added to the tangent alone."""

    def inject(index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = plan.injections[index]
        if injection.partner is not None:
            return None  # ½ ε_l ε_m has no derivative at zero
        z = fwad.unpack_dual(z).primal.detach()
        delta = injection.map.write(injection.map.coordinates(z))
        primal, tangent = fwad.unpack_dual(out)
        delta = delta.to(out.dtype).view(out.shape)
        return fwad.make_dual(primal, delta if tangent is None else tangent.detach() + delta)

    return inject
