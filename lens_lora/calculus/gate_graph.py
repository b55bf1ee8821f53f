"""g with ε in the graph: what is differentiated more than once, or for many readouts.

    ∂f_y/∂ε_l for k tokens y    one forward pass, k backward passes as one batch
    H v, and H of any rows      one forward, one backward that is itself in the graph, and a
                                backward through both for each direction, as one batch

Each row of the batch has gates of its own, so that each prompt has derivatives of its own. What
`calculus/reverse.py` streams away is kept here until the graph is let go.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from lens_lora.hooked.gates import ScaleInject
from lens_lora.lens import LoraLens
from lens_lora.prompts import Prompts

__all__ = ["GateGraph", "gate_graph"]


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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*batching rule.*", category=UserWarning)
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
        """The derivative of each value of out, [value, row]; so many backward passes as one."""
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
    """The graph at these gates, of what `read` reads of one forward pass.

    Attention is computed from its formula, as fused kernels have no second derivative.
    """
    gates = at.detach().expand(len(prompts.tokens), -1).clone().requires_grad_()
    inject = ScaleInject(lens.plan, gates)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), lens.injected(inject):
        return GateGraph(gates, read())
