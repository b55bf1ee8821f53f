"""Edges along the path from the base to the adapted model, which sum to the exact shift.

    E_lm = ∫₀¹ ⟨δ_l, G_m⟩(ε·1) dε,      Σ_m E_lm = c_l,      Σ_l Σ_m E_lm = g(1) − g(0)

At each ε edges sum over readers to the slope of their site (`by_reader.py`). So their integral
sums over readers to the path attribution c_l, and over everything to the shift. It is taken by the
nested rules of `path_attribution`, whose ends are the passes that give the exact shift.

EAP-IG averages gradients over steps of the input or of the activations, and its scores have no such
sum.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import Evaluations, Quadrature
from lens_lora.edge_attribution.by_reader import EdgeValues, edge_values
from lens_lora.errors import require_finite
from lens_lora.integrals.path_integral import path_integral


def edges_along_path(
    g: Evaluations, *, by_head: bool, by_position: bool, tol: float, max_nodes: int
) -> tuple[EdgeValues, Quadrature]:
    """The integral of every edge, and how it was taken. The passes of `edge_values` at each node.

    Args:
        g: the function, with a readout.
        by_head: whether attention is split into what each head's q, k and v reads.
        by_position: whether each edge is split over the tokens at which it is read.
        tol: the completeness error allowed to every prompt, as a share of its shift.
        max_nodes: most nodes of a rule, at least 5.

    Raises:
        ArgumentError: tol or max_nodes out of range.
        ModelStateError: edges that do not sum to first order, or heads that are not known.
        NumericsError: an edge that is not finite.
    """
    at_nodes: list[EdgeValues] = []

    def added(
        strengths: Float[Tensor, " node"], weights: Float[Tensor, "sum node"]
    ) -> Float[Tensor, "sum batch site reader *position"]:
        sums: Tensor = weights.new_zeros(())
        for strength, of_node in zip(strengths.tolist(), weights.T, strict=True):
            split = edge_values(
                g.with_progress(False), strength, by_head=by_head, by_position=by_position
            )
            require_finite(split.values, "an edge")
            g.know(strength, split.value)
            sums = sums + torch.einsum("r,bs...->rbs...", of_node.to(split.values), split.values)
            at_nodes[:] = [split]
        return sums

    values, quadrature = path_integral(g, added, tol=tol, max_nodes=max_nodes)
    last = at_nodes[0]
    return EdgeValues(last.readers, values, last.exists, last.value), quadrature
