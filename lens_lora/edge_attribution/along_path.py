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

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core import Evaluations, Quadrature
from lens_lora.edge_attribution.by_reader import edge_values
from lens_lora.errors import require_finite
from lens_lora.integrals.path_integral import path_integral


@dataclasses.dataclass(frozen=True, eq=False)
class EdgeIntegrals:
    """The edges of some prompts, integrated along the path.

    Attributes:
        readers: the names of the readers, in the order of a forward pass.
        values: ∫₀¹ ⟨δ_l, G_m⟩ dε, zero if the reader is not downstream.
        exists: whether the reader is downstream of the site.
        quadrature: how the integrals were computed.
    """

    readers: tuple[str, ...]
    values: Float[Tensor, "batch site reader *position"]
    exists: Bool[Tensor, "site reader"]
    quadrature: Quadrature


def edges_along_path(
    g: Evaluations, *, by_head: bool, by_position: bool, tol: float, max_nodes: int
) -> EdgeIntegrals:
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
    edges = _EdgesAtNodes(g, by_head=by_head, by_position=by_position)
    values, quadrature = path_integral(g, edges.weighted_sums, tol=tol, max_nodes=max_nodes)
    return EdgeIntegrals(edges.readers, values, edges.exists, quadrature)


class _EdgesAtNodes:
    """The edges at the nodes of a rule, each added to weighted sums as soon as it is computed.

    Attributes:
        readers: the names of the readers, once a node was evaluated; the same at every node.
        exists: whether a reader is downstream of a site, likewise.
    """

    readers: tuple[str, ...]
    exists: Bool[Tensor, "site reader"]

    def __init__(self, g: Evaluations, *, by_head: bool, by_position: bool) -> None:
        # The integral has a bar of its own.
        self._g = g.with_progress(False)
        self._by_head = by_head
        self._by_position = by_position

    def weighted_sums(
        self, strengths: Float[Tensor, " node"], weights: Float[Tensor, "sum node"]
    ) -> Float[Tensor, "sum batch site reader *position"]:
        """Σ_k w_k ⟨δ_l, G_m⟩(ε_k·1) for each row of weights.

        Args:
            strengths: the nodes ε_k.
            weights: the weight of each node in each sum.
        """
        sums: Tensor = weights.new_zeros(())
        for strength, node_weights in zip(strengths.tolist(), weights.T, strict=True):
            values = self._values_at(strength)
            sums = sums + torch.einsum("r,bs...->rbs...", node_weights.to(values), values)
        return sums

    def _values_at(self, strength: float) -> Float[Tensor, "batch site reader *position"]:
        """Compute the edges at one node, and remember g there."""
        edges = edge_values(self._g, strength, by_head=self._by_head, by_position=self._by_position)
        require_finite(edges.values, "an edge")
        self._g.know(strength, edges.value)
        self.readers = edges.readers
        self.exists = edges.exists
        return edges.values
