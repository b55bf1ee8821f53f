"""Noise floors: how far a readout's shift, and what first order leaves of it, move by rounding.

A small difference of float32 numbers may be rounding only. What rounding does is measured: relative
noise of the size of the model's rounding is added to the token embedding a few times, and of the
logits' own to them; σ is how far the number moves, at each end. Of a sum over sites it is never
less than one rounding of its summands.

    shift                 g(1) − g(0)                            σ = √(σ₀² + σ₁²)
    after first order     g(ε) − g(0) − ε Σ a                    √(σ² + ε²σ_a²)
    after second order    g(ε) − g(0) − ε Σ a − ½ε² 1ᵀH1         √(σ² + ε²σ_a² + ε⁴σ_H²)

On a small adapter σ is nearly all of it. On a violent one g saturates, and a and H do not: their
own rounding, σ_a of Σ a and σ_H of ½ 1ᵀH1, is then thousands of times σ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine import rounding
from lens_lora.engine.batching import (
    directions_at_once,
    graph_groups,
    pass_groups,
    rows_at_once,
    slopes_at_once,
)
from lens_lora.engine.gate_graph import hessian_products, in_groups
from lens_lora.engine.parts import parts
from lens_lora.engine.read import ends_plainly, read_final, read_logits, terms_of_final
from lens_lora.engine.reverse import Slopes, site_slopes
from lens_lora.engine.taps import Visit, site_gradients
from lens_lora.hooked.attaching import attached
from lens_lora.hooked.gates import ScaleInject
from lens_lora.hooked.plan import Injection
from lens_lora.lens import LoraLens
from lens_lora.readouts.picks import Picks
from lens_lora.readouts.rows import Reading

__all__ = [
    "Draws",
    "base_draws",
    "curvature_noise",
    "draws_at",
    "first_order_noise",
    "noise_of_draws",
    "slopes_and_draws",
]

_DRAWS = 4
_TWO_RUNS = 2**0.5  # A draw and the run that it is compared with are both rounded.


class Draws(NamedTuple):
    """What noise at the embedding makes of first order at the base.

    Attributes:
        values: g(0).
        sums: Σ_l a_l.
    """

    values: Float[Tensor, "batch draw"]
    sums: Float[Tensor, "batch draw"]


def draws_at(
    lens: LoraLens, reading: Reading, scales: Sequence[float], *, first: bool
) -> Float[Tensor, "scale draw batch"]:
    """g at some strengths in four draws, and first as it is. Four or five passes each, batched.

    The unit of rounding is 2⁻²⁴ for float32, 2⁻⁵³ for float64, 2⁻⁹ for bfloat16, and 1/254 where a
    kernel rounds activations to 8 bit (`hooked/quantised.py`).

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        scales: ε of all sites.
        first: also g without noise, as it may be known from other passes.
    """
    copies = [(lens.gates(e), draw) for e in scales for draw in range(not first, 1 + _DRAWS)]
    found = [_draws_of(lens, some, copies) for some in pass_groups(lens, reading)]
    return torch.cat(found, 1).unflatten(0, (len(scales), -1))


def _draws_of(
    lens: LoraLens, reading: Reading, copies: Sequence[tuple[Float[Tensor, "site"], int]]
) -> Float[Tensor, "copy some"]:
    rows, generator = reading.prompts.batch, torch.Generator(device="cpu").manual_seed(0)
    step, of_logits = rows_at_once(lens, reading), torch.Generator().manual_seed(1)
    found: list[Tensor] = []
    for start in range(0, len(copies), step):
        some = copies[start : start + step]
        gates = torch.stack([gates for gates, _ in some]).repeat_interleave(rows, 0)
        is_drawn = torch.tensor([draw > 0 for _, draw in some]).repeat_interleave(rows)
        perturb = (lens.embedding_output, rounding.of_embedding(lens, is_drawn, generator))
        scaled = ScaleInject(lens.plan, gates)
        with torch.no_grad(), lens.injected(scaled, before=[perturb]):
            found += _values_of(lens, reading, [draw > 0 for _, draw in some], of_logits)
    return torch.stack(found)


def _values_of(
    lens: LoraLens, reading: Reading, is_drawn: Sequence[bool], generator: torch.Generator
) -> list[Float[Tensor, "some"]]:
    """g of each copy of the rows in one pass; of those that are drawn the logits move, too."""
    prompts, read = reading.prompts, reading.read
    rows, many = prompts.batch, prompts.tiled(len(is_drawn))
    shape = (rows,) if prompts.reads is None else (rows, prompts.slots)
    moves = [rounding.of_logits(lens, shape, generator) if drawn else None for drawn in is_drawn]
    if isinstance(read, Picks) and ends_plainly(lens):
        ends = read_final(lens, many).unflatten(0, (-1, rows))
        pairs = zip(ends, moves, strict=True)
        return [read.of(terms_of_final(lens, read, end, move)) for end, move in pairs]
    each = zip(read_logits(lens, many).unflatten(0, (-1, rows)), moves, strict=True)
    return [reading.read(logits if move is None else move(logits, ())) for logits, move in each]


def noise_of_draws(values: Float[Tensor, "draw batch"]) -> Float[Tensor, "batch"]:
    """σ of g at one strength, in the readout's units.

    The ends may differ: log p of a token that is as good as certain has no room to move.

    Args:
        values: g as it is, and then its draws.
    """
    return (values[1:] - values[0]).square().mean(0).sqrt() / _TWO_RUNS


def base_draws(lens: LoraLens, reading: Reading) -> Draws:
    """g(0) and Σ a of each draw. Four forward and backward passes, batched.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
    """
    groups = [_base_draws_of(lens, some) for some in graph_groups(lens, reading)]
    return Draws(*(torch.cat(each) for each in zip(*groups, strict=True)))


def _base_draws_of(lens: LoraLens, reading: Reading) -> Draws:
    found: list[Draws] = []
    perturb = rounding.of_embedding(lens, generator=_others())
    with attached(lens.model, [(lens.embedding_output, perturb)]):
        for draws in torch.arange(_DRAWS).split(slopes_at_once(lens, reading)):
            found.append(_drawn(lens, reading.repeat(len(draws)), reading.batch))
    return Draws(*(torch.cat(each, 1) for each in zip(*found, strict=True)))


def slopes_and_draws(
    lens: LoraLens, reading: Reading, axes: tuple[str, ...]
) -> tuple[Float[Tensor, "batch site *by"], Draws]:
    """∂g/∂ε_l at the base, split, and `base_draws`, in one pass where so many rows make one.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        axes: of the parts.

    Raises:
        ModelStateError: a gradient did not reach some site, or a split does not exist.
    """
    copies = 1 + _DRAWS
    if copies > slopes_at_once(lens, reading):
        slopes = site_slopes(lens, reading, lens.gates(0.0), axes)
        return slopes, base_draws(lens, reading)
    exact, many = Slopes(lens, reading, axes), reading.repeat(copies)
    is_drawn = torch.arange(len(many.owner), device="cpu") % copies > 0

    def visit(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        exact.visit(injection, weight, gradient[::copies], z[::copies])

    perturb = rounding.of_embedding(lens, is_drawn, _others())
    with attached(lens.model, [(lens.embedding_output, perturb)]):
        drawn = _drawn(lens, many, reading.batch, visit)
    return exact.by_prompt(), Draws(*(each[:, 1:] for each in drawn))


def _others() -> torch.Generator:
    """Of draws that are none of `draws_at`, so that both together are twice as many."""
    return torch.Generator(device="cpu").manual_seed(2)


def _drawn(lens: LoraLens, many: Reading, batch: int, also: Visit | None = None) -> Draws:
    """g(0), and Σ a over sites, of so many copies of each prompt. One forward, one backward."""
    shape = (len(many.owner), len(lens.sites))
    slopes = torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)

    def visit(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        if also is not None:
            also(injection, weight, gradient, z)
        if weight is None:  # what waits for a partner's gate is nothing at the base model
            kind = lens.sites[injection.site].kind
            found = parts(injection.map, kind, lens.heads.of(kind), gradient, z, ())
            slopes[:, injection.site] += found.to(slopes.device)

    values = site_gradients(lens, many, lens.gates(0.0), visit)
    sums = many.by_prompt(slopes).sum(1)
    return Draws(values.unflatten(0, (batch, -1)), sums.unflatten(0, (batch, -1)))


def first_order_noise(
    lens: LoraLens,
    draws: Draws,
    values: Float[Tensor, "draw batch"],
    slopes: Float[Tensor, "batch site"],
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """σ of g(ε) − g(0) near the base, and σ_a. No pass.

    Args:
        lens: the adapter over the model.
        draws: of the same question.
        values: g(0), and then draws of it.
        slopes: a of every site, as computed.
    """
    base, every = values[0], torch.cat([draws.values, values[1:].T], 1)
    of_base = _moved(every, base, rounding.unit(lens) * base.abs())
    return 2**0.5 * of_base, _of_sum(lens, draws.sums, slopes)


def curvature_noise(
    lens: LoraLens, reading: Reading, half_row_sums: Float[Tensor, "batch site"]
) -> Float[Tensor, "batch"]:
    """σ_H of ½ 1ᵀH1 at the base. Four forward and eight backward passes.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        half_row_sums: ½(H1)_l of every site, as computed.
    """
    base = lens.gates(0.0)

    def of_some(some: Reading) -> Float[Tensor, "some draw"]:
        found: list[Tensor] = []
        for draws in torch.arange(_DRAWS).split(directions_at_once(some.prompts)):
            many, one = some.repeat(len(draws)), torch.ones_like(base)[None]
            (product,) = hessian_products(lens, many, base, one, progress=False)
            found.append(product[:, 0].sum(1).unflatten(0, (some.batch, len(draws))))
        return torch.cat(found, 1) / 2

    with attached(lens.model, [(lens.embedding_output, rounding.of_embedding(lens))]):
        return _of_sum(lens, in_groups(reading, of_some), half_row_sums) / _TWO_RUNS


def _of_sum(
    lens: LoraLens, drawn: Float[Tensor, "batch draw"], summands: Float[Tensor, "batch site"]
) -> Float[Tensor, "batch"]:
    """σ of a sum over sites; never less than one rounding of its summands."""
    return _moved(drawn, summands.sum(1), rounding.unit(lens) * summands.norm(dim=1))


def _moved(
    drawn: Float[Tensor, "batch draw"],
    computed: Float[Tensor, "batch"],
    least: Float[Tensor, "batch"],
) -> Float[Tensor, "batch"]:
    """How far the draws lie from what was computed, at least one rounding.

    Their mean is nearer to the truth than one run is, so a run that lies far from them has a large
    error of its own. Both are rounded, so this is on the large side, as verdicts need it.
    """
    away = (drawn - computed.to(drawn)[:, None]).square().mean(1).sqrt()
    return torch.maximum(away, least.to(away))
