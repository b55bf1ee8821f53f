"""The complete attribution: each site's slope, integrated along the path from base to adapted.

    c_l = ∫₀¹ ∂g/∂ε_l(ε·1) dε,      Σ_l c_l = g(1) − g(0), for dg(ε·1)/dε = Σ_l ∂g/∂ε_l

Nested Clenshaw–Curtis rules compute each integral, c_l ≈ Σ_k w_k ∂g/∂ε_l(ε_k·1), with as many nodes
as the tolerance needs (`integrals/path_integral.py`). The nodes are rows of the batch, and their
weighted slopes are summed as they are computed. The passes at both ends also give the exact shift.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from lens_lora.core import Attribution, Function, analysis, by_axes
from lens_lora.integrals.path_integral import path_integral


@analysis
def path_attribution(
    g: Function, *, tol: float = 1e-3, by: tuple[str, ...] | str = (), max_nodes: int = 65
) -> Attribution:
    """The integral c_l of every site, which sums over all sites to the shift.

    If the tolerance cannot be met (rounding, kinks of ReLU models, experts that switch), the values
    are those of the last rule, and `quadrature` says what was reached and probably why.

    Cost: one forward and one backward pass per node of the last rule, which include both ends and
    give the exact shift; eight forward passes for its noise floor. At most six results are held,
    however many nodes there are.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read from the logits.
        tol: the completeness error allowed for every prompt, as a share of its shift.
        by: axes along which the values are split: any of 'position', 'head', 'expert', 'rank'.
        max_nodes: the largest number of nodes of a rule, at least 5; the last rule has 5, 9, 17, 33
            or 65 of them, and so on.
        progress: show a bar.

    Returns:
        Attribution with values [batch, site, *by] in the readout's units, method 'path', `at` NaN
        (a path has no single gate value), and its `quadrature`.

    Raises:
        ArgumentError: tol or max_nodes out of range, or an unknown axis.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a derivative is not finite; the error names the site.
    """
    axes = by_axes(by)
    adapted = g.lens.gates(1.0)

    def added(
        strengths: Float[Tensor, " node"], weights: Float[Tensor, "sum node"]
    ) -> Float[Tensor, "sum batch site *by"]:
        return g.slopes(strengths[:, None] * adapted, axes, weights=weights)

    values, quadrature = path_integral(g, added, tol=tol, max_nodes=max_nodes)
    return Attribution.of(g, values, axes, method="path", at=math.nan, quadrature=quadrature)
