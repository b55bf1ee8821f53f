"""Products wᵀ J δz_l at ε = 0; w is computed from the logits f and their tangent v = Σ_l J δz_l.

One forward pass of dual numbers gives f and v. It keeps a graph of the values, but none of the
tangents. w goes back through that graph, past taps at the sites (`reverse.py`). If the graph
exceeds the lens's bound on memory, the dual pass keeps no graph, and w goes back through a second
pass, whose blocks run again.

Cost: one dual forward and one backward pass; two more forward passes if blocks run again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lens_lora.core.function import forward, memory, reverse
from lens_lora.core.function.duals import dual_forward, tangent_of
from lens_lora.core.model import LoraLens
from lens_lora.core.model.injections import Inject
from lens_lora.core.model.plan import Plan
from lens_lora.core.readout import Prompts, Reading

_RowLogits = Float[Tensor, "row *slot vocab"]
# Computes w from f(0), v and the rows of both.
Covector = Callable[[_RowLogits, _RowLogits, Prompts], _RowLogits]


def pulled_back_in_groups(
    lens: LoraLens, reading: Reading, axes: tuple[str, ...], covector: Covector
) -> tuple[Float[Tensor, "batch site *by"], _RowLogits]:
    """Compute wᵀ J δz_l and f(0), in groups of prompts that fit within the lens's bound."""
    values: list[Tensor] = []
    base_logits: list[Tensor] = []
    for group in memory.dual_graph_groups(lens, reading):
        of_group, base = pulled_back(lens, group, axes, covector)
        values.append(of_group)
        if base.ndim == 3:
            # Zeros for slots that no row of the group has.
            missing_slots = reading.rows.slots - group.rows.slots
            base = functional.pad(base, (0, 0, 0, missing_slots))
        base_logits.append(base)
    return reverse.join_groups(values), torch.cat(base_logits)


def pulled_back(
    lens: LoraLens, reading: Reading, axes: tuple[str, ...], covector: Covector
) -> tuple[Float[Tensor, "batch site *by"], _RowLogits]:
    """Compute wᵀ J δz_l of every site and part, and f(0). One dual forward and one backward pass.

    Raises:
        ModelStateError: a gradient did not reach some site, a split does not exist, or the model
            has an operation without a forward-mode derivative.
    """
    slopes = reverse.SlopeSums(lens, reading.rows, axes)
    if memory.must_rerun(lens, reading, duals=True):
        base, taps = _in_two_passes(lens, reading, slopes, covector)
    else:
        base, taps = _in_one_pass(lens, reading, slopes, covector)
    taps.require_all_seen()
    return slopes.by_prompt(reading), base.detach()


def _in_one_pass(
    lens: LoraLens, reading: Reading, slopes: reverse.SlopeSums, covector: Covector
) -> tuple[_RowLogits, reverse.Taps]:
    """Go back through the graph of the dual pass itself."""
    rows = reading.rows
    # If a block ran again in the backward pass, the tangents would be lost.
    lens.check_backward(once=False)
    add_to_tangent = _adding_to_tangents(lens.plan)
    tapped = reverse.tapped(lens, reading, lens.gates(0.0), add_to_tangent)
    with dual_forward(), tapped as (taps, leaves):
        base, v = _read(lens, rows)
    taps.visit = slopes.visit
    w = covector(base.detach(), v, rows)
    torch.autograd.grad(base, leaves, w)
    return base, taps


def _in_two_passes(
    lens: LoraLens, reading: Reading, slopes: reverse.SlopeSums, covector: Covector
) -> tuple[_RowLogits, reverse.Taps]:
    """Take f and v from a dual pass without a graph, and go back through another pass."""
    rows = reading.rows
    with torch.no_grad(), dual_forward(), lens.injected(_adding_to_tangents(lens.plan)):
        base, v = _read(lens, rows)
    with reverse.tapped(lens, reading, lens.gates(0.0)) as (taps, leaves):
        taps.visit = slopes.visit
        logits = forward.read_logits(lens, rows)
        torch.autograd.grad(logits, leaves, covector(base, v, rows))
    return base, taps


def _read(lens: LoraLens, rows: Prompts) -> tuple[_RowLogits, _RowLogits]:
    """Run a pass of dual numbers, for f(0) and v."""
    logits = forward.read_logits(lens, rows)
    return fwad.unpack_dual(logits).primal, tangent_of(logits).detach()


def _adding_to_tangents(plan: Plan) -> Inject:
    """An inject in which every gate is the dual number 0 + d, so δ_l is added to the tangent."""

    def inject(index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = plan.injections[index]
        if injection.partner is not None:
            return None  # ½ ε_l ε_m has no derivative at zero.
        z_alone = fwad.unpack_dual(z).primal.detach()
        delta = injection.map.write(injection.map.coordinates(z_alone))
        delta = delta.to(out.dtype).view(out.shape)
        primal, tangent = fwad.unpack_dual(out)
        if tangent is not None:
            delta = tangent.detach() + delta
        return fwad.make_dual(primal, delta)

    return inject
