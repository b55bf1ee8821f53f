"""Forward mode: the slopes of `Function.slopes` by the other route, a tangent for each part.

    ∂g/∂ε_p = d/dt readout(f + t J δ_p)  at t = 0,    for each site, group of sites or part p

The tangent J δ_p of the logits comes from a pass of dual numbers (`derivatives.part_tangents`), and
goes through the readout. By output token it is c_t · ẋ_t of the final residual stream x, with the
covectors c_t = ∂ℓ_t/∂x_t: no tangent is unembedded, where the model ends plainly.

Cost: at most a dual forward pass for each site, group or part, batched; about half of that where
the batch can grow, as each begins at its own block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function import derivatives
from lens_lora.core.function.activations import in_gauge
from lens_lora.core.function.cache import Evaluations
from lens_lora.core.function.derivatives import TokenTangents
from lens_lora.core.function.function import Function
from lens_lora.core.function.reverse import require_finite_sites
from lens_lora.core.model import Gauge, Groups
from lens_lora.errors import ArgumentError

_Under = AbstractContextManager[object] | None


def slopes(
    g: Evaluations,
    at: float,
    axes: tuple[str, ...] = (),
    *,
    gauge: Gauge = "trained",
    under: _Under = None,
) -> Float[Tensor, "batch site *by"]:
    """∂g/∂ε_l of every site or part at a strength, by token on the last axis where asked for.

    Args:
        g: with a readout, of one response where values are by token.
        at: the strength ε at which the derivative is taken.
        axes: any of 'position', 'head', 'expert', 'rank' and 'token', in this order.
        gauge: of parts by rank, as in `Function.slopes`.
        under: a context that holds for these passes.

    Raises:
        ModelStateError: an operation without a forward-mode derivative.
        NumericsError: a derivative that is not finite, naming the site.
    """
    _require_logits(g)
    lens = in_gauge(g.lens, gauge)
    gates = lens.gates(at)
    by_token = "token" in axes
    tokens = TokenTangents(lens, g.reading) if by_token else None
    with under or contextlib.nullcontext():
        values = derivatives.tangent_slopes(
            lens,
            g.reading,
            gates,
            axes[:-1] if by_token else axes,
            tokens=tokens,
            progress=g.progress,
        )
    if tokens is not None:
        _know_base(g, at, tokens)
    require_finite_sites(lens, values)
    return values


def group_slopes(
    g: Evaluations, groups: Groups, at: float, *, by_token: bool = False, under: _Under = None
) -> Float[Tensor, "batch group *token"]:
    """Σ_{l in G} ∂g/∂ε_l of every group G: one tangent for each.

    Args:
        g: with a readout, of one response where values are by token.
        groups: indices of sites, by name.
        at: the strength ε at which the derivative is taken.
        by_token: of each token of the response.
        under: a context that holds for these passes.

    Raises:
        ModelStateError: an operation without a forward-mode derivative.
    """
    _require_logits(g)
    lens = g.lens
    parts = derivatives.group_parts(lens, groups)
    tokens = TokenTangents(lens, g.reading) if by_token else None
    with under or contextlib.nullcontext():
        values = derivatives.part_tangents(
            lens,
            g.rows,
            lens.gates(at),
            parts,
            derivatives.of_value(g.reading) if tokens is None else tokens,
            final=tokens is not None and tokens.final,
            progress=g.progress,
        )
    if tokens is not None:
        _know_base(g, at, tokens)
    return values


def first_blocks(g: Function, axes: tuple[str, ...], groups: Groups | None = None) -> Sequence[int]:
    """The block in which each tangent begins: of the parts along these axes, or of the groups."""
    if groups is None:
        of_sites = tuple(axis for axis in axes if axis != "token")
        parts = derivatives.all_parts(g.lens, g.rows, of_sites)
    else:
        parts = derivatives.group_parts(g.lens, groups)
    return [g.lens.sites[part.site].layer for part in parts]


def _require_logits(g: Function) -> None:
    """Refuse a readout inside the model, whose passes end before the logits.

    Raises:
        ArgumentError: naming the mode that takes it.
    """
    if not g.reading.reads_logits:
        raise ArgumentError(
            "mode='forward' reads tangents of the logits, and this readout is inside the model",
            remedy="leave mode= out, or use mode='reverse'.",
        )


def _know_base(g: Evaluations, at: float, tokens: TokenTangents) -> None:
    """At the base g itself was found on the way."""
    if at == 0 and tokens.value is not None:
        g.know(at, tokens.value)
