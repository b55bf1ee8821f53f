"""g with ε in the graph: second derivatives, and first ones of what is made of the joint tangent.

    ∂f_y/∂ε_l    of k tokens y
    (H v)_l    = d/dt ∂g/∂ε_l (at + t v) at t = 0,   H_lm = ∂²g/∂ε_l ∂ε_m      (note, §6, item 4)

1. One forward pass with ε as a leaf; each row of the batch has its own gates, so each prompt has
   its own derivatives. Unlike in `engine/reverse.py`, the whole graph is kept until it is released.
2. Many readouts: a covector for each goes back through the graph, as one batch.
3. Second order: one backward pass that is itself in the graph gives the slopes ∂g/∂ε_l. For each
   direction v a backward pass through both gives the derivative of Σ_l v_l ∂g/∂ε_l by every ε: H v,
   for H is symmetric. Many directions go back as one batch.
4. Prompts are independent, so they are run in groups, each with a bounded number of tokens.
5. `pulled_back`: wᵀ J δz_l at ε = 0, with w made of f and of the joint tangent v = Σ_l J δz_l. One
   forward pass of dual numbers gives f and v, and keeps the graph of the values but none of the
   tangents. w goes back through that graph, whose sites are tapped (`engine/reverse.py`). Where the
   graph is beyond the bound of the lens, the dual pass keeps none, and w goes back through a second
   pass whose blocks run again.

Cost: one forward and k backward passes for k readouts; one forward, one backward and two backward
passes a direction for H v; one dual forward and one backward pass for `pulled_back`, and two
forward passes more where blocks run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.compat import Temporary, without_warnings
from lens_lora.engine import memory
from lens_lora.engine.duals import attention_from_formula, dual_forward, tangent_of
from lens_lora.engine.memory import Run, prompts_of
from lens_lora.engine.read import read_logits, read_value
from lens_lora.engine.reverse import Slopes, require_finite_sites, slopes_by_value, tapped
from lens_lora.model.gates import Inject, Plan, ScaleInject
from lens_lora.model.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.reading import Reading


@dataclasses.dataclass(frozen=True)
class GateGraph:
    """Gates and what was read of a forward pass, with the graph between them.

    Attributes:
        gates: [row, site], the leaf.
        out: g of each prompt, or many such numbers.
    """

    gates: Float[Tensor, "row site"]
    out: Float[Tensor, "*out"]

    def slopes(self) -> Float[Tensor, "row site"]:
        """The derivative of Σ out, itself in the graph."""
        with torch.enable_grad():
            (slopes,) = torch.autograd.grad(
                self.out.sum(), self.gates, create_graph=True, materialize_grads=True
            )
        return slopes

    def pulled_back(
        self, values: Float[Tensor, "*n"], covectors: Float[Tensor, " covector *n"]
    ) -> Float[Tensor, "covector row site"]:
        """The derivative of Σ covector · values for each covector. A batch of backward passes."""
        zeros = self.gates.new_zeros(len(covectors), *self.gates.shape)
        if not values.requires_grad:
            return zeros
        with without_warnings(".*batching rule"):
            (slopes,) = torch.autograd.grad(
                values,
                self.gates,
                covectors.to(values),
                is_grads_batched=True,
                retain_graph=True,
                allow_unused=True,
            )
        return zeros if cast("Tensor | None", slopes) is None else slopes


def gate_graph(
    lens: LoraLens,
    prompts: Prompts,
    at: Float[Tensor, "*row site"],
    read: Callable[[], Float[Tensor, "*out"]],
) -> GateGraph:
    """The graph of one forward pass at these gates, up to what `read` returns.

    Attention is computed from its formula, as fused kernels have no second derivative.
    """
    gates = at.detach().expand(len(prompts.tokens), -1).clone().requires_grad_()
    inject = ScaleInject(lens.plan, gates)
    with torch.enable_grad(), lens.injected(inject), Temporary(attention_from_formula):
        return GateGraph(gates, read())


def slopes_of_each(
    lens: LoraLens,
    run: Run,
    at: Float[Tensor, " site"],
    read: Callable[[], Float[Tensor, "value row"]],
    *,
    progress: bool = True,
) -> Float[Tensor, "value row site"]:
    """∂/∂ε_l of each of many values that one pass reads, as many at once as there is memory for.

    Cost: one forward pass, and a backward pass for each value; where blocks run twice, with one
    more forward pass for each.
    """
    prompts = prompts_of(run)
    if memory.must_rerun(lens, run):
        memory.require_rows_of_graph(lens, run)
        values = slopes_by_value(lens, prompts, at, lambda: read().T)
        return torch.stack([slopes.by_row for slopes in values])
    step = memory.covectors_at_once(lens, prompts)
    graph = gate_graph(lens, prompts, at, read)
    values, slopes = graph.out, []
    with tqdm(total=len(values), desc="slopes", leave=False, disable=not progress) as bar:
        for chunk in torch.arange(len(values), device=values.device).split(step):
            covectors = torch.zeros(len(chunk), *values.shape, device=values.device)
            covectors[torch.arange(len(chunk), device=values.device), chunk] = 1
            slopes.append(graph.pulled_back(values, covectors))
            bar.update(len(chunk))
    return torch.cat(slopes)


def hessian_product(
    lens: LoraLens, reading: Reading, at: Float[Tensor, " site"], direction: Float[Tensor, " site"]
) -> Float[Tensor, "batch site"]:
    """H v per prompt and site, in the readout's units.

    Cost: one forward and two backward passes, about 2 FB. Memory: the graph of a group of prompts.
    """

    def product(group: Reading) -> Float[Tensor, "batch site"]:
        return next(hessian_products(lens, group, at, direction[None], progress=False))[:, 0]

    return in_groups(reading, product)


def in_groups(
    reading: Reading, work: Callable[[Reading], Float[Tensor, " some *out"]]
) -> Float[Tensor, " batch *out"]:
    """Run `work` on one group of prompts after another, and join the results."""
    return torch.cat([work(group) for group in reading.groups(memory.GRAPH_TOKENS)])


def hessian_products(
    lens: LoraLens,
    reading: Reading,
    at: Float[Tensor, " site"],
    directions: Float[Tensor, "direction site"],
    *,
    progress: bool = True,
    what: str = "Hessian products",
) -> Iterator[Float[Tensor, "batch chunk site"]]:
    """H v of many directions, a chunk of them at a time, in their order.

    Cost: one forward and one backward, and a backward through both for each direction, batched.

    Raises:
        NumericsError: a product that is not finite, naming the site.
    """
    memory.require_second_order(lens, reading)
    directions = directions.to(at)
    step = memory.directions_at_once(reading.prompts)
    silent = not progress or len(directions) <= step
    graph = gate_graph(lens, reading.prompts, at, lambda: read_value(lens, reading))
    slopes = graph.slopes()
    with tqdm(total=len(directions), desc=what, leave=False, disable=silent) as bar:
        for chunk in directions.split(step):
            covectors = chunk[:, None].expand(-1, *graph.gates.shape)
            products = graph.pulled_back(slopes, covectors).transpose(0, 1)
            products = reading.by_prompt(products)
            require_finite_sites(lens, products.transpose(1, 2))
            yield products
            bar.update(len(chunk))


# --- The joint tangent, and slopes of what is made of it


_Logits = Float[Tensor, "row *slot vocab"]
_Covector = Callable[[_Logits, _Logits], _Logits]  # from f(0) and v


def pulled_back(
    lens: LoraLens, reading: Reading, axes: tuple[str, ...], covector: _Covector
) -> tuple[Float[Tensor, "batch site *by"], _Logits]:
    """wᵀ J δz_l of every site and its parts, and f(0). One dual forward and one backward pass.

    Raises:
        ModelStateError: a gradient did not reach some site, a split does not exist, or the model
            has an operation without a forward-mode derivative.
    """
    prompts, base_gates = reading.prompts, lens.gates(0.0)
    slopes = Slopes(lens, prompts, axes)
    if memory.must_rerun(lens, reading, duals=True):
        with torch.no_grad(), dual_forward(), lens.injected(_push(lens.plan)):
            base, v = _read(lens, prompts)
        with tapped(lens, reading, base_gates) as (taps, leaves):
            taps.visit = slopes.visit
            torch.autograd.grad(read_logits(lens, prompts), leaves, covector(base, v))
    else:
        with dual_forward(), tapped(lens, reading, base_gates, _push(lens.plan)) as (taps, leaves):
            base, v = _read(lens, prompts)
        taps.visit = slopes.visit
        torch.autograd.grad(base, leaves, covector(base.detach(), v))
    taps.require_all_seen()
    return slopes.by_prompt(reading), base.detach()


def _read(lens: LoraLens, prompts: Prompts) -> tuple[_Logits, _Logits]:
    logits = read_logits(lens, prompts)
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
