"""The complete attribution: each site's slope, integrated along the path from base to adapted.

    c_l = ∫₀¹ ∂g/∂ε_l(ε·1) dε,      Σ_l c_l = g(1) − g(0), for dg(ε·1)/dε = Σ_l ∂g/∂ε_l

Nested Clenshaw–Curtis rules take each integral, c_l ≈ Σ_k w_k ∂g/∂ε_l(ε_k·1), with as many nodes
as the tolerance needs (`integrals/path_integral.py`). The nodes ride in rows of the batch, and
their weighted slopes are summed as they come. The passes at both ends give the exact shift as well.
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
    """The integral c_l of every site, split as asked; over all sites it sums to the shift.

    Where the tolerance cannot be met (rounding, kinks of ReLU models, experts that switch) the
    values are those of the last rule, and `quadrature` says what was reached and probably why.

    Cost: one forward and one backward pass per node of the last rule, both ends among them, whose
    passes give the exact shift; eight forward passes for its noise floor. At most six results are
    held, however many nodes there are.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        tol: the completeness error allowed to every prompt, as a share of its shift.
        by: any of 'position', 'head', 'expert', 'rank'.
        max_nodes: most nodes of a rule, at least 5; the last rule has 5, 9, 17, 33 or 65 of them,
            and so on.
        progress: show a bar.

    Returns:
        Attribution with values [batch, site, *by] in the readout's units, method 'path', `at` NaN
        (a path has no single gate value), and its `quadrature`.

    Raises:
        ArgumentError: tol or max_nodes out of range, or an unknown axis.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    axes = by_axes(by)
    adapted = g.lens.gates(1.0)

    def added(
        strengths: Float[Tensor, " node"], weights: Float[Tensor, "sum node"]
    ) -> Float[Tensor, "sum batch site *by"]:
        return g.slopes(strengths[:, None] * adapted, axes, weights=weights)

    values, quadrature = path_integral(g, added, tol=tol, max_nodes=max_nodes)
    return Attribution.of(g, values, axes, method="path", at=math.nan, quadrature=quadrature)
