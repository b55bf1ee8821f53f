"""`Evaluator` runs the passes that give g, its slopes and its draws at points of the gates.

`Function` checks what its caller gives, and shapes what it returns. Here everything is run anew
each time; `Remembering` (`remembering.py`) is an evaluator with a memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function import forward, many_gates, memory, rounding
from lens_lora.core.function.corners import Points, strengths
from lens_lora.core.function.duals import attention_from_formula
from lens_lora.core.function.logits import logits_at_points
from lens_lora.core.function.many_gates import Bar
from lens_lora.core.function.slopes_at_points import slopes_at_points, weighted_slopes
from lens_lora.core.model import LoraLens, ScaleInject
from lens_lora.core.readout import Reading
from lens_lora.spans import Temporary


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Evaluator:
    """Evaluates g(ε), its slopes and its draws at points; it keeps no number.

    Attributes:
        lens: the adapter over the model.
        reading: the rows that are run, and how g of each prompt is read from their logits.
        progress: whether long calls show a bar.
    """

    lens: LoraLens
    reading: Reading
    progress: bool

    # --- Values

    def values(self, points: Points, shown_as: str) -> Float[Tensor, "point batch"]:
        """Evaluate g at these gates; `shown_as` names them in a progress bar."""
        return self.run(points, shown_as)

    def along(self, scales: Sequence[float]) -> Float[Tensor, "point batch"]:
        """Evaluate g(ε·1) at these strengths."""
        return self.run(strengths(self.lens, scales), "along the path")

    def run(self, points: Points, shown_as: str) -> Float[Tensor, "point batch"]:
        """Evaluate g at these gates by forward passes, whatever is known already."""
        values = many_gates.gated_readout(
            self.lens, self.reading, points, bar=Bar(shown_as, self.progress)
        )
        return values.T

    def with_graph(self, points: Points) -> Float[Tensor, "point batch"]:
        """Evaluate g at these gates with its graph, all points in one pass.

        Attention is computed from its formula, which has derivatives of every order.
        """
        reading = self.reading
        copies = reading.repeat(len(points))
        memory.require_graph(self.lens, copies)
        self.lens.check_backward(once=False)
        gates_of_rows = points.repeat(len(reading.owner), 1)
        write = ScaleInject(self.lens.plan, gates_of_rows)
        formula = Temporary(attention_from_formula)
        with torch.enable_grad(), self.lens.injected(write), formula:
            values = forward.read_value(self.lens, copies)
        return values.unflatten(0, (reading.batch, len(points))).T

    # --- Slopes

    def slopes(
        self, points: Points, axes: tuple[str, ...], lens: LoraLens, *, remember: bool = True
    ) -> Float[Tensor, "point batch site *by"]:
        """∂g/∂ε_l at each point; `lens` has the gauge in which ranks are split."""
        del remember  # This class has no memory.
        return slopes_at_points(lens, self.reading, points, axes, progress=self.progress)

    def weighted_slopes(
        self,
        points: Points,
        weights: Float[Tensor, "*sum point"],
        axes: tuple[str, ...],
        lens: LoraLens,
    ) -> Float[Tensor, "*sum batch site *by"]:
        """Weighted sums of ∂g/∂ε_l over points; `lens` has the gauge in which ranks are split."""
        sums, _ = weighted_slopes(lens, self.reading, points, weights, axes, progress=self.progress)
        return sums

    # --- Draws: the same numbers, with noise of the size of the model's rounding

    def draws(self, scales: Sequence[float]) -> list[Float[Tensor, "draw batch"]]:
        """At each strength g, followed by draws of g with noise at the embedding.

        For a readout that holds the base's logits, those at 0 are g(1), followed by draws of g(1)
        in which only these logits move.
        """
        drawn: dict[float, Tensor] = {}
        if self.reading.holds_base and 0.0 in scales:
            drawn[0.0] = self.draws_of_held_base()
        others = [scale for scale in scales if scale not in drawn]
        if others:
            exact, draws = rounding.exact_and_draws(
                self.lens, self.reading, others, others, progress=False
            )
            for scale, value, of_scale in zip(others, exact, draws, strict=True):
                drawn[scale] = torch.cat([value.to(of_scale)[None], of_scale])
        return [drawn[scale] for scale in scales]

    def draws_of_ends(self) -> tuple[Float[Tensor, "draw batch"], Float[Tensor, "draw batch"]]:
        """The draws at 0 and those at 1."""
        (base,) = self.draws([0.0])
        (adapted,) = self.draws([1.0])
        return base, adapted

    def draws_of_held_base(self) -> Float[Tensor, "draw batch"]:
        """Evaluate g(1), followed by draws of it in which only the base's held logits move."""
        (adapted_logits,) = logits_at_points(
            self.lens, self.reading.rows, strengths(self.lens, [1.0]), self.reading.held_bytes
        )
        exchanged = self.reading.redrawn(adapted_logits)
        _, (draws,) = rounding.draws_at(self.lens, exchanged, [0.0])
        return torch.cat([self.along([1.0]).to(draws), draws])

    def slope_draws(self) -> rounding.Draws:
        """Draws of g(0) and Σ a. Four forward and backward passes."""
        return rounding.base_draws(self.lens, self.reading)
