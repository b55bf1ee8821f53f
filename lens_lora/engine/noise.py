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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.batching import (
    copies_of_pass,
    directions_at_once,
    pass_groups,
    slopes_at_once,
)
from lens_lora.engine.gate_graph import hessian_products, in_groups
from lens_lora.engine.parts import parts
from lens_lora.engine.read import logits_dtype, read_logits
from lens_lora.engine.taps import site_gradients
from lens_lora.float64 import in_float64
from lens_lora.hooked.attaching import HookFn, attached
from lens_lora.hooked.gates import ScaleInject
from lens_lora.hooked.plan import Injection
from lens_lora.lens import LoraLens
from lens_lora.readouts.rows import Reading

__all__ = ["curvature_noise", "first_order_noise", "noise_at", "roundings"]

_DRAWS, _DRAWS_OF_END = 8, 4
_TWO_RUNS = 2**0.5  # A draw and the run that it is compared with are both rounded.


def noise_at(lens: LoraLens, reading: Reading, scale: float) -> Float[Tensor, "batch"]:
    """σ of g at one strength, in the readout's units. Five forward passes, batched.

    The ends may differ: log p of a token that is as good as certain has no room to move.

    The unit of rounding is 2⁻²⁴ for float32, 2⁻⁵³ for float64, 2⁻⁹ for bfloat16, and 1/254 where a
    kernel rounds activations to 8 bit (`hooked/quantised.py`).

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        scale: ε of all sites.
    """
    return torch.cat([_noise_of(lens, some, scale) for some in pass_groups(lens, reading)])


def _noise_of(lens: LoraLens, reading: Reading, scale: float) -> Float[Tensor, "some"]:
    prompts, runs = reading.prompts, torch.arange(1 + _DRAWS_OF_END)
    scaled = ScaleInject(lens.plan, lens.gates(scale))
    found: list[Tensor] = []
    for draws in runs.split(min(len(runs), copies_of_pass(lens, prompts))):
        perturb = roundings(lens, draws.tolist())
        with torch.no_grad(), lens.injected(scaled, before=[(lens.embedding_output, perturb)]):
            found += read_logits(lens, prompts.tiled(len(draws))).unflatten(0, (len(draws), -1))
            dtype = logits_dtype(lens)  # a site's own hook may be on the unembedding
    value, last = reading.read(found[0]), _rounding_of_logits(dtype)
    moved = torch.stack([reading.read(last(drawn)) for drawn in found[1:]]) - value
    return moved.square().mean(0).sqrt() / _TWO_RUNS


def _rounding_of_logits(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Moves logits by about their last rounding, which runs may share: they then hide it.

    One draw for the vocabulary, with a sign of its own for each row and slot.
    """
    unit = torch.finfo(dtype).eps / 2
    generator = torch.Generator(device="cpu").manual_seed(1)

    def move(logits: Tensor) -> Tensor:
        noise = torch.randn(logits.shape[-1], generator=generator, dtype=torch.float64)
        heads = torch.randint(2, logits.shape[:-1], generator=generator)
        return logits * (1 + unit * noise.to(logits) * (2 * heads - 1)[..., None].to(logits))

    return move


def first_order_noise(
    lens: LoraLens,
    reading: Reading,
    base: Float[Tensor, "batch"],
    slopes: Float[Tensor, "batch site"],
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """σ of g(ε) − g(0) near the base, and σ_a. Eight forward and backward passes, batched.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        base: g(0).
        slopes: a of every site, as computed.
    """
    values: list[Tensor] = []
    sums: list[Tensor] = []
    with attached(lens.model, [(lens.embedding_output, roundings(lens))]):
        for draws in torch.arange(_DRAWS).split(slopes_at_once(lens, reading.prompts)):
            drawn = _base_and_slopes(lens, reading.repeat(len(draws)))
            values.append(drawn[0].unflatten(0, (reading.batch, len(draws))))
            sums.append(drawn[1].sum(1).unflatten(0, (reading.batch, len(draws))))
    of_base = _moved(torch.cat(values, 1), base, _unit(lens) * base.abs())
    return 2**0.5 * of_base, _of_sum(lens, torch.cat(sums, 1), slopes)


def _base_and_slopes(
    lens: LoraLens, reading: Reading
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch site"]]:
    """g(0), and a of every site, in one forward and one backward pass."""
    shape = (len(reading.owner), len(lens.sites))
    slopes = torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)

    def visit(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        if weight is None:  # what waits for a partner's gate is nothing at the base model
            kind = lens.sites[injection.site].kind
            found = parts(injection.map, kind, lens.heads.of(kind), gradient, z, ())
            slopes[:, injection.site] += found.to(slopes.device)

    values = site_gradients(lens, reading, lens.gates(0.0), visit)
    return values, reading.by_prompt(slopes)


def curvature_noise(
    lens: LoraLens, reading: Reading, half_row_sums: Float[Tensor, "batch site"]
) -> Float[Tensor, "batch"]:
    """σ_H of ½ 1ᵀH1 at the base. Eight forward and sixteen backward passes.

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

    with attached(lens.model, [(lens.embedding_output, roundings(lens))]):
        return _of_sum(lens, in_groups(reading, of_some), half_row_sums) / _TWO_RUNS


def _of_sum(
    lens: LoraLens, drawn: Float[Tensor, "batch draw"], summands: Float[Tensor, "batch site"]
) -> Float[Tensor, "batch"]:
    """σ of a sum over sites; never less than one rounding of its summands."""
    return _moved(drawn, summands.sum(1), _unit(lens) * summands.norm(dim=1))


def _moved(
    drawn: Float[Tensor, "batch draw"],
    computed: Float[Tensor, "batch"],
    rounding: Float[Tensor, "batch"],
) -> Float[Tensor, "batch"]:
    """How far the draws lie from what was computed, at least one rounding.

    Their mean is nearer to the truth than one run is, so a run that lies far from them has a large
    error of its own. Both are rounded, so this is on the large side, as verdicts need it.
    """
    away = (drawn - computed.to(drawn)[:, None]).square().mean(1).sqrt()
    return torch.maximum(away, rounding.to(away))


def roundings(lens: LoraLens, draws: Sequence[int] | None = None) -> HookFn:
    """A hook that moves the embedding by about one rounding of the model's dtype.

    Args:
        lens: the adapter over the model.
        draws: of as many copies of the prompts, one after the other; that of draw 0 is left as it
            is, and each other draw is the same in every pass. Without it each pass draws anew.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)

    def perturb(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        if draws is None:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        else:
            shape = (len(tensor) // len(draws), *tensor.shape[1:])
            noise = torch.cat([_draw(draw, shape) for draw in draws])
        wide = in_float64(tensor)
        moved = wide * (1 + _unit(lens) * noise.to(wide.device))
        return moved.to(tensor.dtype).to(tensor.device)

    return perturb


def _draw(draw: int, shape: tuple[int, ...]) -> Float[Tensor, "*shape"]:
    if draw == 0:
        return torch.zeros(shape, dtype=torch.float64)
    generator = torch.Generator(device="cpu").manual_seed(draw)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _unit(lens: LoraLens) -> float:
    """Of rounding, relative: the dtype's, or that of activations which a kernel rounds to 8 bit."""
    return max(torch.finfo(lens.dtype).eps / 2, lens.plan.activation_rounding)
