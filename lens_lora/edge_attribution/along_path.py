"""Edges along the path from the base to the adapted model, which sum to the exact shift.

    E_lm = ∫₀¹ ⟨δ_l, G_m⟩(ε·1) dε,      Σ_m E_lm = c_l,      Σ_l Σ_m E_lm = g(1) − g(0)

At each ε, the edges of a site sum over readers to the site's slope (`by_reader.py`). So their
integrals sum over readers to the path attribution c_l, and over sites and readers to the shift.
They are computed by the nested rules of `path_attribution`, whose end nodes also give the exact
shift.

EAP-IG averages gradients over steps of the input or of the activations; its scores have no such
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
    """The integral of every edge, and how it was computed.

    Cost: the passes of `edge_values` at each node.

    Args:
        g: the function, with a readout.
        by_head: whether attention is split by head into what q, k and v read.
        by_position: whether each edge is split over the tokens at which it is read.
        tol: the completeness error allowed for every prompt, as a share of its shift.
        max_nodes: the largest number of nodes of a rule, at least 5.

    Raises:
        ArgumentError: tol or max_nodes out of range.
        ModelStateError: edges that do not sum to first order, or heads that are not known.
        NumericsError: an edge that is not finite.
    """
    quiet = g.with_progress(False)
    last: EdgeValues | None = None

    def weighted_sums(
        strengths: Float[Tensor, " node"], weights: Float[Tensor, "sum node"]
    ) -> Float[Tensor, "sum batch site reader *position"]:
        nonlocal last
        sums: Tensor = weights.new_zeros(())
        for strength, node_weights in zip(strengths.tolist(), weights.T, strict=True):
            at_node = edge_values(quiet, strength, by_head=by_head, by_position=by_position)
            require_finite(at_node.values, "an edge")
            g.know(strength, at_node.value)
            node_weights = node_weights.to(at_node.values)
            sums = sums + torch.einsum("r,bs...->rbs...", node_weights, at_node.values)
            last = at_node
        return sums

    values, quadrature = path_integral(g, weighted_sums, tol=tol, max_nodes=max_nodes)
    assert last is not None, "every rule has nodes"
    # Readers, and who is downstream of whom, are the same at every node.
    return EdgeValues(last.readers, values, last.exists, last.value), quadrature
