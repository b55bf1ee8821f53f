"""∂g/∂ε_p = d/dt readout(f + t J δ_p) at t = 0, for each site, group of sites or part p.

Forward mode gives the slopes of `Function.slopes` (note, Prop. 1) by another route, and so checks
reverse mode:

1. A pass of dual numbers (`tangents.py`) gives the tangent J δ_p of the logits, which then goes
   through the readout.
2. By output token, let c_t = ∂ℓ_t/∂x_t be the gradient of ℓ_t = log p(y_t | x, y_<t) in the final
   residual stream x. The derivative is c_t · ẋ_t, so no tangent is unembedded, provided that the
   model does nothing but unembed x.
3. If the constant part of v is added at o, the parts of v by position are checked against the whole
   site, which takes one more tangent for each such site.

Cost: at most one dual forward pass for each site, group or part, batched; about half of that if the
batch can grow, as each tangent then begins at its own block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function import forward, reverse
from lens_lora.core.function.cache import Evaluations
from lens_lora.core.function.contraction import axis_sizes
from lens_lora.core.function.duals import tangent_of
from lens_lora.core.function.function import Function
from lens_lora.core.function.tangents import (
    ExpansionPoint,
    Part,
    all_parts,
    group_parts,
    part_tangents,
)
from lens_lora.core.model import Gauge, Groups, LoraLens
from lens_lora.core.readout import LogProbs, Reading
from lens_lora.errors import ArgumentError

_Under = AbstractContextManager[object] | None
_Logits = Float[Tensor, "row part *slot vocab"]


def slopes(
    g: Evaluations,
    at: float,
    axes: tuple[str, ...] = (),
    *,
    gauge: Gauge = "trained",
    under: _Under = None,
) -> Float[Tensor, "batch site *by"]:
    """∂g/∂ε_l of every site or part at a strength ε; by token, if asked for, on the last axis.

    Args:
        g: a function with a readout; by token, of one response for each prompt.
        at: the strength ε at which the derivative is taken.
        axes: any of 'position', 'head', 'expert', 'rank' and 'token', in this order.
        gauge: what a rank is, as in `Function.slopes`.
        under: a context that is entered for these passes.

    Raises:
        ModelStateError: an operation without a forward-mode derivative, or parts by position that
            do not add up to their site.
        NumericsError: a derivative that is not finite, naming the site.
    """
    _require_logits(g)
    lens = g.lens.in_gauge(gauge)
    axes_of_sites = tuple(axis for axis in axes if axis != "token")
    tokens: TokenTangents | None = None
    if "token" in axes:
        tokens = TokenTangents(lens, g.reading)

    def tangents(parts: Sequence[Part]) -> Float[Tensor, "batch part *token"]:
        return _tangents(g, lens, at, parts, tokens)

    parts = all_parts(lens, g.rows, axes_of_sites)
    shape = [g.reading.batch, len(lens.sites), *axis_sizes(lens, g.rows, axes_of_sites)]
    if tokens is not None:
        shape.append(g.rows.slots)
    values = torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)
    # The place of each part: its site, and its slot on each axis. The last slot stands for none.
    places = [[part.site for part in parts]]
    for axis in axes_of_sites:
        slots: list[int] = []
        for part in parts:
            slot = getattr(part, axis)
            slots.append(-1 if slot is None else slot)
        places.append(slots)
    with under or contextlib.nullcontext():
        values[(slice(None), *places)] = tangents(parts)
        whole = [Part(index) for index in lens.plan.with_constants]
        if "position" in axes and whole:
            _require_split(lens, values, tangents(whole), by_token=tokens is not None)
    if tokens is not None:
        _know_base(g, at, tokens)
    lens.sites.require_finite(values)
    return values


def group_slopes(
    g: Evaluations, groups: Groups, at: float, *, by_token: bool = False, under: _Under = None
) -> Float[Tensor, "batch group *token"]:
    """Σ_{l in G} ∂g/∂ε_l of every group G, with one tangent for each.

    Args:
        g: a function with a readout; by token, of one response for each prompt.
        groups: indices of sites, by name.
        at: the strength ε at which the derivative is taken.
        by_token: whether to differentiate the log-probability of each token of the response.
        under: a context that is entered for these passes.

    Raises:
        ModelStateError: an operation without a forward-mode derivative.
    """
    _require_logits(g)
    tokens = TokenTangents(g.lens, g.reading) if by_token else None
    with under or contextlib.nullcontext():
        values = _tangents(g, g.lens, at, group_parts(g.lens, groups), tokens)
    if tokens is not None:
        _know_base(g, at, tokens)
    return values


def first_blocks(g: Function, axes: tuple[str, ...], groups: Groups | None = None) -> Sequence[int]:
    """The block in which each tangent begins: of the parts along these axes, or of the groups."""
    if groups is None:
        axes_of_sites = tuple(axis for axis in axes if axis != "token")
        parts = all_parts(g.lens, g.rows, axes_of_sites)
    else:
        parts = group_parts(g.lens, groups)
    return [g.lens.sites[part.site].layer for part in parts]


def _require_logits(g: Function) -> None:
    """Refuse a readout inside the model, whose passes end before the logits.

    Raises:
        ArgumentError: such a readout; the error names the mode to use.
    """
    if not g.reading.reads_logits:
        raise ArgumentError(
            "mode='forward' reads tangents of the logits, and this readout is inside the model",
            remedy="leave mode= out, or use mode='reverse'.",
        )


def _tangents(
    g: Function, lens: LoraLens, at: float, parts: Sequence[Part], tokens: TokenTangents | None
) -> Float[Tensor, "batch part *token"]:
    """The derivative of g, or of each token's term, along each part."""
    point = ExpansionPoint(lens, g.rows, lens.gates(at))
    if tokens is None:
        return part_tangents(point, parts, _of_value(g.reading), progress=g.progress)
    return part_tangents(point, parts, tokens, final=tokens.final, progress=g.progress)


def _require_split(lens: LoraLens, values: Tensor, whole: Tensor, by_token: bool) -> None:
    """Check that v's parts by position, its constant included, add up to what v adds at o."""
    if not by_token:
        reverse.require_split(lens, values, whole)
        return
    for token in range(values.shape[-1]):
        reverse.require_split(lens, values[..., token], whole[..., token])


def _know_base(g: Evaluations, at: float, tokens: TokenTangents) -> None:
    """Tell g its value at the base, if the passes have computed it."""
    if at == 0 and tokens.value is not None:
        g.know(at, tokens.value)


def _of_value(reading: Reading) -> Callable[[_Logits], Float[Tensor, "batch part"]]:
    """A function that computes the tangent of g for each part from the dual logits."""

    def read(rows: _Logits) -> Float[Tensor, "batch part"]:
        many = reading.repeat(rows.shape[1])
        return tangent_of(many.read(rows.flatten(0, 1))).view(reading.batch, -1)

    return read


class TokenTangents:
    """Computes the tangent of each token's term of g, for each part, from a dual pass.

    Attributes:
        final: whether the pass ends with the final residual stream x; otherwise with the logits.
        value: [batch], g at the gates of the pass, once it was computed; else None.
    """

    def __init__(self, lens: LoraLens, reading: Reading) -> None:
        self._lens = lens
        self._reading = reading
        self._read = cast(LogProbs, reading.read)
        self._covectors: Tensor | None = None
        self.final: bool = forward.ends_plainly(lens)
        self.value: Tensor | None = None

    def __call__(self, rows: Float[Tensor, "row part slot d"]) -> Float[Tensor, "row part token"]:
        """Compute the tangents from what a dual pass ends with."""
        return self._of_final(rows) if self.final else self._of_logits(rows)

    def _of_final(self, rows: Tensor) -> Tensor:
        """Compute c_t · ẋ_t; x, and so c_t, is the same for all parts and passes."""
        if self._covectors is None:
            x = fwad.unpack_dual(rows).primal[:, 0]
            self._covectors, log_probs = forward.token_covectors(self._lens, self._reading, x)
            self.value = self._read.weighted_sum(log_probs)
        return (self._covectors[:, None] * tangent_of(rows)).sum(-1)

    def _of_logits(self, rows: Tensor) -> Tensor:
        many = self._read.repeat(rows.shape[1])
        by_token = many.by_token(many.terms_in(rows.flatten(0, 1)))
        return tangent_of(by_token).unflatten(0, rows.shape[:2])
