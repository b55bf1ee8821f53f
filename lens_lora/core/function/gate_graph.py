"""A graph with ε as its leaf: the derivatives of many readouts at once, and second order.

    ∂f_y/∂ε_l    of k tokens y
    (H v)_l    = d/dt ∂g/∂ε_l (at + t v) at t = 0,   H_lm = ∂²g/∂ε_l ∂ε_m      (note, §6, item 4)

1. There is one forward pass with ε as a leaf. Each row of the batch has its own gates, so each
   prompt has its own derivatives. Unlike in `reverse.py`, the whole graph is kept.
2. For many readouts, a covector for each of them goes back through the graph, in one batch.
3. For second order, one backward pass gives the slopes ∂g/∂ε_l, and is itself in the graph. For
   each direction v, a backward pass through both passes gives the derivative of Σ_l v_l ∂g/∂ε_l by
   every ε. That is H v, as H is symmetric. Many directions go back in one batch.
4. Prompts are independent, so they are run in groups, each with a bounded number of tokens.

Cost: for k readouts one forward and k backward passes; for H v one forward and one backward pass,
and two backward passes for each direction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.compat import without_warnings
from lens_lora.core.function import forward, memory, reverse
from lens_lora.core.function.duals import attention_from_formula
from lens_lora.core.function.footprint import Run, prompts_of
from lens_lora.core.model import LoraLens
from lens_lora.core.model.injections import ScaleInject
from lens_lora.core.readout import Prompts, Reading
from lens_lora.spans import Temporary


@dataclasses.dataclass(frozen=True)
class GateGraph:
    """The gates of a forward pass and what was read from it, with the graph between them.

    Attributes:
        gates: [row, site], the leaf of the graph.
        out: g of each prompt, or many such numbers.
        by_turns: whether derivatives of several numbers are taken one after another, because torch
            cannot batch what processes send to one another.
    """

    gates: Float[Tensor, "row site"]
    out: Float[Tensor, "*out"]
    by_turns: bool = False

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
        """The derivative of Σ covector · values for each covector, in one batched backward pass."""
        zeros = self.gates.new_zeros(len(covectors), *self.gates.shape)
        if not values.requires_grad:
            return zeros
        if self.by_turns:
            each = [self._pulled_back(values, covector) for covector in covectors.to(values)]
            return torch.stack(each)
        with without_warnings(".*batching rule"):
            (slopes,) = torch.autograd.grad(
                values,
                self.gates,
                covectors.to(values),
                is_grads_batched=True,
                retain_graph=True,
                allow_unused=True,
            )
        do_values_depend_on_gates = cast("Tensor | None", slopes) is not None
        return slopes if do_values_depend_on_gates else zeros

    def _pulled_back(
        self, values: Float[Tensor, "*n"], covector: Float[Tensor, "*n"]
    ) -> Float[Tensor, "row site"]:
        """The derivative of Σ covector · values."""
        (slopes,) = torch.autograd.grad(
            values, self.gates, covector, retain_graph=True, materialize_grads=True
        )
        return slopes


def gate_graph(
    lens: LoraLens,
    prompts: Prompts,
    at: Float[Tensor, "*row site"],
    read: Callable[[], Float[Tensor, "*out"]],
) -> GateGraph:
    """Run one forward pass at these gates, and keep its graph up to what `read` returns.

    Attention is computed from its formula, as fused kernels have no second derivative.
    """
    lens.check_backward(once=False)
    lens.plan.refuse_gathered()
    gates = at.detach().expand(len(prompts.tokens), -1).clone().requires_grad_()
    inject = ScaleInject(lens.plan, gates)
    with torch.enable_grad(), lens.injected(inject), Temporary(attention_from_formula):
        return GateGraph(gates, read(), by_turns=lens.plan.is_over_ranks)


def slopes_of_each(
    lens: LoraLens,
    run: Run,
    at: Float[Tensor, " site"],
    read: Callable[[], Float[Tensor, "value row"]],
    *,
    progress: bool = True,
) -> Float[Tensor, "value row site"]:
    """∂/∂ε_l of each of many values that are read from one pass, as many at a time as fit.

    Cost: one forward pass and one backward pass for each value; if blocks run twice, one more
    forward pass for each value.
    """
    prompts = prompts_of(run)
    if memory.must_rerun(lens, run):
        memory.require_rows_of_graph(lens, run)
        by_value = reverse.slopes_by_value(lens, prompts, at, lambda: read().T)
        return torch.stack([slopes.by_row for slopes in by_value])
    step = memory.derivatives_at_once(memory.COVECTOR_TOKENS, lens, prompts, prompts.batch)
    graph = gate_graph(lens, prompts, at, read)
    values = graph.out
    slopes: list[Tensor] = []
    with tqdm(total=len(values), desc="slopes", leave=False, disable=not progress) as bar:
        for chunk in torch.arange(len(values), device=values.device).split(step):
            # The covector of a value is 1 at that value, in every row.
            covectors = torch.zeros(len(chunk), *values.shape, device=values.device)
            covectors[torch.arange(len(chunk), device=values.device), chunk] = 1
            slopes.append(graph.pulled_back(values, covectors))
            bar.update(len(chunk))
    return torch.cat(slopes)


def token_slopes(
    lens: LoraLens,
    reading: Reading,
    at: Float[Tensor, " site"],
    axes: tuple[str, ...] = (),
    *,
    progress: bool = True,
) -> Float[Tensor, "batch site *by_and_token"]:
    """∂ℓ_t/∂ε_l of each token t of a response, with ℓ_t = log p(y_t | x, y_<t), by reverse mode.

    A covector for each token goes back through one graph, in batches. If sites are split as well,
    or if the graph and the covectors do not fit together, each token has its own backward pass.
    """
    has_own_passes = bool(axes) or memory.must_rerun(lens, reading)
    if has_own_passes or not memory.fits_with_covectors(lens, reading.rows):
        by_group: list[Tensor] = []
        for group in memory.graph_groups(lens, reading):
            by_group.append(reverse.token_slopes(lens, group, at, axes))
        return reverse.join_groups(by_group)

    def tokens() -> Float[Tensor, "token row"]:
        return forward.differentiable_tokens(lens, reading).T

    slopes = slopes_of_each(lens, reading, at, tokens, progress=progress)
    return slopes.permute(1, 2, 0)


def hessian_product(
    lens: LoraLens, reading: Reading, at: Float[Tensor, " site"], direction: Float[Tensor, " site"]
) -> Float[Tensor, "batch site"]:
    """H v of each prompt and site, in the readout's units.

    Cost: one forward and two backward passes. The graph of a group of prompts is held.

    Raises:
        ArgumentError: the lens's bound on memory has no room for one prompt.
    """

    def product(group: Reading) -> Float[Tensor, "batch site"]:
        (of_direction,) = hessian_products(lens, group, at, direction[None], progress=False)
        return of_direction[:, 0]

    return in_groups(lens, reading, product)


def in_groups(
    lens: LoraLens, reading: Reading, work: Callable[[Reading], Float[Tensor, " some *out"]]
) -> Float[Tensor, " batch *out"]:
    """Compute a second derivative of one group of prompts after another, and join the results."""
    return torch.cat([work(group) for group in memory.second_order_groups(lens, reading)])


def products_at_points(
    lens: LoraLens,
    reading: Reading,
    points: Float[Tensor, "point site"],
    directions: Float[Tensor, "direction site"],
    *,
    progress: bool,
) -> Float[Tensor, "batch point direction site"]:
    """H v of every direction at every point; a batch has each row once for each of some points."""
    points_at_once = memory.second_orders_at_once(lens, reading, memory.CURVATURE_TOKENS)
    chunks: list[Tensor] = []
    for some_points in points.split(points_at_once):
        many = reading
        gates = some_points[0]
        if len(some_points) > 1:
            many = reading.repeat(len(some_points))
            gates = some_points.repeat(len(reading.owner), 1)  # Those of each row.
        of_directions = list(hessian_products(lens, many, gates, directions, progress=progress))
        products = torch.cat(of_directions, 1)
        chunks.append(products.unflatten(0, (reading.batch, len(some_points))))
    return torch.cat(chunks, 1)


def hessian_products(
    lens: LoraLens,
    reading: Reading,
    at: Float[Tensor, "*row site"],
    directions: Float[Tensor, "direction site"],
    *,
    progress: bool = True,
) -> Iterator[Float[Tensor, "batch chunk site"]]:
    """Yield H v of many directions in their order, a chunk at a time.

    The gates are shared by all rows, or each row has its own.

    Cost: one forward and one backward pass, and for each direction a backward pass through both,
    batched.
    """
    directions = directions.to(at)
    step = memory.directions_at_once(reading.rows)
    is_silent = not progress or len(directions) <= step
    graph = gate_graph(lens, reading.rows, at, lambda: forward.read_value(lens, reading))
    slopes = graph.slopes()
    bar = tqdm(total=len(directions), desc="Hessian products", leave=False, disable=is_silent)
    with bar:
        for chunk in directions.split(step):
            covectors = chunk[:, None].expand(-1, *graph.gates.shape)
            by_row = graph.pulled_back(slopes, covectors).transpose(0, 1)
            products = reading.by_prompt(by_row)
            lens.sites.require_finite(products.transpose(1, 2))
            yield products
            bar.update(len(chunk))
