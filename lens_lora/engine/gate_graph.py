"""g with ε in the graph: for second derivatives, and for first ones of many readouts.

    ∂f_y/∂ε_l    of k tokens y
    (H v)_l    = d/dt ∂g/∂ε_l (at + t v) at t = 0,   H_lm = ∂²g/∂ε_l ∂ε_m      (note, §6, item 4)

1. One forward pass with ε as a leaf; each row of the batch has its own gates, so each prompt has
   its own derivatives. Unlike in `engine/reverse.py`, the whole graph is kept until it is released.
2. Many readouts: a covector for each goes back through the graph, as one batch.
3. Second order: one backward pass that is itself in the graph gives the slopes ∂g/∂ε_l. For each
   direction v a backward pass through both gives the derivative of Σ_l v_l ∂g/∂ε_l by every ε: H v,
   for H is symmetric. Many directions go back as one batch.
4. Prompts are independent, so they are run in groups, each with a bounded number of tokens.

Cost: one forward and k backward passes for k readouts; one forward, one backward and two backward
passes a direction for H v.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.engine import batching
from lens_lora.engine.batching import covectors_at_once, directions_at_once
from lens_lora.engine.dual_pass import attention_from_formula
from lens_lora.engine.memory import (
    Run,
    must_rerun,
    prompts_of,
    require_rows_of_graph,
    require_second_order,
)
from lens_lora.engine.read import read_value
from lens_lora.engine.reverse import require_finite_sites, value_slopes
from lens_lora.hooked.gates import ScaleInject
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.rows import Reading
from lens_lora.temporary import Temporary, without_warnings

__all__ = [
    "GateGraph",
    "gate_graph",
    "hessian_product",
    "hessian_products",
    "in_groups",
    "slopes_of_each",
]


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
            (found,) = torch.autograd.grad(
                self.out.sum(), self.gates, create_graph=True, materialize_grads=True
            )
        return found

    def pulled_back(
        self, values: Float[Tensor, "*n"], covectors: Float[Tensor, "covector *n"]
    ) -> Float[Tensor, "covector row site"]:
        """The derivative of Σ covector · values for each covector. A batch of backward passes."""
        nothing = self.gates.new_zeros(len(covectors), *self.gates.shape)
        if not values.requires_grad:
            return nothing
        with Temporary(functools.partial(without_warnings, message=".*batching rule")):
            grads = torch.autograd.grad(
                values,
                self.gates,
                covectors.to(values),
                is_grads_batched=True,
                retain_graph=True,
                allow_unused=True,
            )
        found = cast("Tensor | None", grads[0])
        return nothing if found is None else found

    def slopes_of_each(
        self, at_once: int, *, progress: bool = True
    ) -> Float[Tensor, "value row site"]:
        """The derivative of each value of out, [value, row]; `at_once` backward passes as one."""
        values = self.out
        found: list[Tensor] = []
        with tqdm(total=len(values), desc="slopes", leave=False, disable=not progress) as bar:
            for some in torch.arange(len(values), device=values.device).split(at_once):
                covectors = torch.zeros(len(some), *values.shape, device=values.device)
                covectors[torch.arange(len(some), device=values.device), some] = 1
                found.append(self.pulled_back(values, covectors))
                bar.update(len(some))
        return torch.cat(found)


def gate_graph(
    lens: LoraLens,
    prompts: Prompts,
    at: Float[Tensor, "*row site"],
    read: Callable[[], Float[Tensor, "*out"]],
) -> GateGraph:
    """The graph of one forward pass at these gates, up to what `read` returns.

    Attention is computed from its formula, as fused kernels have no second derivative.

    Args:
        lens: the adapter over the model.
        prompts: what `read` runs.
        at: the gates, one for all rows or each row's own.
        read: runs the prompts under the hooks that are then on the model, and reads.
    """
    gates = at.detach().expand(len(prompts.tokens), -1).clone().requires_grad_()
    inject = ScaleInject(lens.plan, gates)
    with torch.enable_grad(), lens.injected(inject), Temporary(attention_from_formula):
        return GateGraph(gates, read())


def slopes_of_each(
    lens: LoraLens,
    run: Run,
    at: Float[Tensor, "site"],
    read: Callable[[], Float[Tensor, "value row"]],
    *,
    progress: bool = True,
) -> Float[Tensor, "value row site"]:
    """∂/∂ε_l of each of many values that one pass reads, as many at once as there is memory for.

    Cost: one forward pass, and a backward pass for each value; where blocks run twice, with one
    more forward pass for each.

    Args:
        lens: the adapter over the model.
        run: what `read` runs.
        at: the gates at which the derivative is taken.
        read: runs the prompts under the hooks that are then on the model, and reads.
        progress: show a bar.

    Raises:
        ArgumentError: the bound of the lens is less than one value takes.
    """
    prompts = prompts_of(run)
    if must_rerun(lens, run):
        require_rows_of_graph(lens, run)
        return value_slopes(lens, prompts, at, lambda: read().T)
    step = covectors_at_once(lens, prompts)
    return gate_graph(lens, prompts, at, read).slopes_of_each(step, progress=progress)


def hessian_product(
    lens: LoraLens,
    reading: Reading,
    at: Float[Tensor, "site"],
    direction: Float[Tensor, "site"],
) -> Float[Tensor, "batch site"]:
    """H v per prompt and site, in the readout's units.

    Cost: one forward and two backward passes, about 2 FB. Memory: the graph of a group of prompts.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        at: the gates at which the second derivative is taken.
        direction: v.

    Raises:
        NumericsError: a product that is not finite, naming the site.
    """

    def of_some(some: Reading) -> Float[Tensor, "batch site"]:
        one = hessian_products(lens, some, at, direction[None], progress=False)
        return next(iter(one))[:, 0]

    return in_groups(reading, of_some)


def in_groups(
    reading: Reading, work: Callable[[Reading], Float[Tensor, "some *out"]]
) -> Float[Tensor, "batch *out"]:
    """Run `work` on one group of prompts after another, and join the results.

    Args:
        reading: what is run, and read.
        work: takes a group and returns a tensor with its prompts on the first axis.
    """
    return torch.cat([work(some) for some in reading.groups(batching.GRAPH_TOKENS)])


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

    Cost: one forward and one backward, and a backward through both for each direction, batched.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        at: the gates at which the second derivative is taken.
        directions: v, one a row.
        progress: show a bar where there are several chunks.
        what: the bar's name.

    Raises:
        NumericsError: a product that is not finite, naming the site.
    """
    require_second_order(lens, reading)
    directions = directions.to(at)
    step = directions_at_once(reading.prompts)
    silent = not progress or len(directions) <= step
    graph = gate_graph(lens, reading.prompts, at, lambda: read_value(lens, reading))
    slopes = graph.slopes()
    with tqdm(total=len(directions), desc=what, leave=False, disable=silent) as bar:
        for some in directions.split(step):
            covectors = some[:, None].expand(-1, *graph.gates.shape)
            products = graph.pulled_back(slopes, covectors).transpose(0, 1)
            products = reading.by_prompt(products)
            require_finite_sites(lens, products.transpose(1, 2))
            yield products
            bar.update(len(some))
