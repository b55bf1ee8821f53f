"""How far rounding alone moves g, Σ a and ½ 1ᵀH1: the noise floors.

A small difference of float32 numbers may be rounding and nothing else. What rounding does is
measured: relative noise of the size of the model's rounding is added a few times to the token
embedding and to what each later block reads, and of the logits' own to them; σ is how far the
number moves, at each end. Of a sum over sites it is never less than one rounding of its summands.

    shift                 g(1) − g(0)                            σ = √(σ₀² + σ₁²)
    after first order     g(ε) − g(0) − ε Σ a                    √(σ² + ε²σ_a²)
    after second order    g(ε) − g(0) − ε Σ a − ½ε² 1ᵀH1         √(σ² + ε²σ_a² + ε⁴σ_H²)

A readout that holds the base's logits, as a KL does, has D(0) = 0, which hardly moves, but D(1)
does with p₀: its σ₀ is how far draws of p₀ move D(1).

On a small adapter σ is nearly all of it. On a violent one g saturates, and a and H do not: their
own rounding, σ_a of Σ a and σ_H of ½ 1ᵀH1, is then thousands of times σ.

Against 200 draws, four give σ to 30 % and less than a third of it in 2 of 100 cases; two draws in 9
of 100, eight in none. The base has eight, because its error is in the shift at every strength.

Cost: ten forward passes for the noise of both ends, which they include; four forward and backward
passes for σ_a, four forward and eight backward for σ_H, all batched.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core.function import forward as function
from lens_lora.core.function import memory
from lens_lora.core.function.gate_graph import hessian_products, in_groups
from lens_lora.core.function.reverse import Slopes, Visit, site_gradients, slopes_of_first
from lens_lora.core.model import HookFn, Injection, LoraLens, ScaleInject, attached
from lens_lora.core.readout.reading import AtPoint, Columns, Picks, Reading

# --- The rounding of a model, as noise


def unit(lens: LoraLens) -> float:
    """Of rounding, relative: the dtype's, or that of activations which a kernel rounds to 8 bit."""
    return lens.unit_roundoff


def rounding_hooks(
    lens: LoraLens,
    rows: Bool[Tensor, " row"] | None = None,
    generator: torch.Generator | None = None,
    relative: float | None = None,
) -> list[tuple[str, HookFn]]:
    """Hooks that move the embedding, and what each later block reads, by about one rounding.

    With noise at the embedding alone, a large entry of the stream is rounded the same way in every
    draw, and its error is in none of their differences. Blocks take the draw of the embedding, one
    coordinate further each: the same one where a block is run again. Where the embedding is
    narrower than the stream (OPT-350m), it takes the first coordinates of the draw.

    `relative` is the size of one rounding, relative to the value; None for the model's own.
    """
    size = unit(lens) if relative is None else relative
    draw = torch.Generator(device="cpu").manual_seed(0) if generator is None else generator
    noise: list[Tensor] = []  # of the pass that is going on

    def perturb(tensor: Tensor, hook: Any, layer: int = 0) -> Tensor:
        moved = torch.arange(len(tensor), device="cpu") if rows is None else rows.nonzero()[:, 0]
        moved = moved.to(tensor.device)
        values = tensor.detach()[moved].to(lens.gate_dtype)
        if not layer:
            width = max(values.shape[-1], int(lens.model.cfg.d_model))
            shape = *values.shape[:-1], width
            drawn = torch.randn(shape, generator=draw, dtype=torch.float64)
            noise[:] = [(size * drawn).to(values)]
        of_layer = noise[0].to(values).roll(layer, -1)
        shift = values * of_layer[..., : values.shape[-1]]
        return tensor.index_add(0, moved, shift.to(tensor))

    host = lens.host
    blocks = {layer: host.block_input(layer) for layer in range(1, host.n_layers)}
    hooks = [(name, functools.partial(perturb, layer=layer)) for layer, name in blocks.items()]
    return [(lens.embedding_output, perturb), *hooks]


@contextlib.contextmanager
def rounding_noise(lens: LoraLens, relative: float | None = None) -> Generator[None]:
    """Within the block, every forward pass has noise of about one rounding in its residual stream.

    Args:
        lens: the lens whose model is run.
        relative: the size of one rounding, relative to the value; None for the model's own dtype.
    """
    with attached(lens.model, rounding_hooks(lens, relative=relative)):
        yield


def of_logits(lens: LoraLens, shape: tuple[int, ...], rng: torch.Generator) -> function.Factor:
    """Moves logits by about their last rounding, which runs may share: they then hide it.

    One draw for the vocabulary, with a sign of its own for each row and slot.
    """
    is_float32 = lens.dtype == torch.float32  # whose products a device may round more coarsely
    eps = lens.eps if is_float32 else torch.finfo(function.logits_dtype(lens)).eps
    relative = eps / 2
    noise = torch.randn(int(lens.model.cfg.d_vocab_out), generator=rng, dtype=torch.float64)
    signs = 2 * torch.randint(2, shape, generator=rng) - 1

    def factor(logits: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        sign = signs[tuple(index.to(signs.device) for index in places)] if places else signs
        return 1 + relative * noise.to(logits) * sign[..., None].to(logits)

    return factor


# --- Draws of g, of Σ a and of ½ 1ᵀH1


_ByPrompt = Float[Tensor, " batch"]
_BySite = Float[Tensor, "batch site"]
DRAWS = 4  # As few as tell the size of a floor; each costs a pass.
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
    lens: LoraLens,
    reading: Reading,
    scales: Sequence[float],
    *,
    exact: Sequence[float] = (),
    progress: bool = False,
) -> tuple[Float[Tensor, "batch exact"], Float[Tensor, "scale draw batch"]]:
    """g at some strengths as it is, and at some in four draws. A pass for each, batched.

    The unit of rounding is 2⁻²⁴ for float32, 2⁻⁵³ for float64, 2⁻⁸ for bfloat16, and 1/254 where a
    kernel rounds activations to 8 bit (`hosts/quantised.py`).
    """
    copies = [(lens.gates(strength), False) for strength in exact]
    copies += [(lens.gates(strength), True) for strength in scales for _ in range(DRAWS)]
    groups = memory.pass_groups(lens, reading)
    values = torch.cat([_draws_of(lens, group, copies, progress) for group in groups])
    as_is, draws = values.split([len(exact), len(copies) - len(exact)], 1)
    return as_is, draws.T.unflatten(0, (len(scales), -1))


_Copy = tuple[Float[Tensor, " site"], bool]  # gates, and whether there is noise


def _draws_of(
    lens: LoraLens, reading: Reading, copies: Sequence[_Copy], progress: bool
) -> Float[Tensor, "some copy"]:
    rows, generator = reading.prompts.batch, torch.Generator(device="cpu").manual_seed(0)
    step, of_logits = memory.rows_at_once(lens, reading), torch.Generator().manual_seed(1)

    def run(chunk: Sequence[_Copy]) -> Float[Tensor, "some chunk"]:
        gates, is_drawn = zip(*chunk, strict=True)
        perturb = rounding_hooks(lens, torch.tensor(is_drawn).repeat_interleave(rows), generator)
        scaled = ScaleInject(lens.plan, torch.stack(gates).repeat_interleave(rows, 0))
        with torch.no_grad(), lens.injected(scaled, before=perturb):
            return torch.stack(_values_of(lens, reading, is_drawn, of_logits), 1)

    chunks = [copies[start : start + step] for start in range(0, len(copies), step)]
    with function.bar_of(len(copies), progress, "along the path") as bar:
        return function.in_chunks(chunks, run, bar)


def _values_of(
    lens: LoraLens, reading: Reading, is_drawn: Sequence[bool], generator: torch.Generator
) -> list[Float[Tensor, " some"]]:
    """g of each copy of the rows in one pass; of those that are drawn the logits move, too."""
    prompts, reads = reading.prompts, reading.read
    rows, many = prompts.batch, prompts.tiled(len(is_drawn))
    if isinstance(reads, AtPoint):
        activations = function.read_activation(lens, many, reads.name).unflatten(0, (-1, rows))
        return [reads(activation) for activation in activations]
    shape = (rows,) if prompts.reads is None else (rows, prompts.slots)
    factors = [of_logits(lens, shape, generator) if drawn else None for drawn in is_drawn]
    if isinstance(reads, Picks | Columns) and function.ends_plainly(lens):
        ends = function.read_final(lens, many).unflatten(0, (-1, rows))
        pairs = zip(ends, factors, strict=True)
        return [function.value_of_final(lens, reads, end, factor) for end, factor in pairs]
    pairs = zip(function.read_logits(lens, many).unflatten(0, (-1, rows)), factors, strict=True)
    return [reads(logits if by is None else logits * by(logits, ())) for logits, by in pairs]


def noise_of_draws(values: Float[Tensor, "draw batch"]) -> _ByPrompt:
    """σ of g at one strength, in the readout's units, from g without noise and then its draws.

    The ends may differ: log p of a token that is as good as certain has no room to move.
    """
    return (values[1:] - values[0]).square().mean(0).sqrt() / _TWO_RUNS


def noise_of_ends(
    base: Float[Tensor, "draw batch"], adapted: Float[Tensor, "draw batch"]
) -> _ByPrompt:
    """σ of g(1) − g(0), from g at both ends and its draws there."""
    return (noise_of_draws(base).square() + noise_of_draws(adapted).square()).sqrt()


def base_draws(lens: LoraLens, reading: Reading) -> Draws:
    """g(0) and Σ a of each draw. Four forward and backward passes, batched."""
    groups = []
    for group in memory.graph_groups(lens, reading):
        chunks = torch.arange(DRAWS).split(memory.slopes_at_once(lens, group))
        with attached(lens.model, rounding_hooks(lens, generator=_others())):
            draws = [_drawn(lens, group.repeat(len(c)), group.batch) for c in chunks]
        groups.append(_joined(draws, 1))
    return _joined(groups, 0)


def _joined(draws: Sequence[Draws], dim: int) -> Draws:
    return Draws(*(torch.cat(parts, dim) for parts in zip(*draws, strict=True)))


def slopes_and_draws(
    lens: LoraLens, reading: Reading, axes: tuple[str, ...]
) -> tuple[Float[Tensor, "batch site *by"], _ByPrompt, Draws]:
    """∂g/∂ε_l at the base, split, g there, and `base_draws`; in one pass where they are few."""
    copies = 1 + DRAWS
    if lens.plan.activation_rounding or copies > memory.slopes_at_once(lens, reading):
        slopes, values = slopes_of_first(lens, reading, lens.gates(0.0)[None], axes)
        return slopes, values[:, 0], base_draws(lens, reading)
    exact, many = Slopes(lens, reading.prompts, axes), reading.repeat(copies)
    is_drawn = torch.arange(len(many.owner), device="cpu") % copies > 0

    def visit(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        exact.visit(injection, weight, gradient[::copies], z[::copies])

    with attached(lens.model, rounding_hooks(lens, is_drawn, _others())):
        drawn = _drawn(lens, many, reading.batch, visit)
    draws = Draws(drawn.values[:, 1:], drawn.sums[:, 1:])
    return exact.by_prompt(reading), drawn.values[:, 0], draws


def _others() -> torch.Generator:
    """Of draws that are none of `draws_at`, so that both together are twice as many."""
    return torch.Generator(device="cpu").manual_seed(2)


def _drawn(lens: LoraLens, many: Reading, batch: int, also: Visit | None = None) -> Draws:
    """g(0), and Σ a over sites, of so many copies of each prompt. One forward, one backward."""
    slopes = Slopes(lens, many.prompts)

    def visit(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        if also is not None:
            also(injection, weight, gradient, z)
        if weight is None:  # what waits for a partner's gate is nothing at the base model
            slopes.visit(injection, weight, gradient, z)

    values = site_gradients(lens, many, lens.gates(0.0), visit)
    sums = slopes.by_prompt(many).sum(1)
    return Draws(values.unflatten(0, (batch, -1)), sums.unflatten(0, (batch, -1)))


def first_order_noise(
    lens: LoraLens, draws: Draws, values: Float[Tensor, "draw batch"], slopes: _BySite
) -> tuple[_ByPrompt, _ByPrompt]:
    """σ of g(ε) − g(0) near the base, and σ_a. No pass."""
    base, drawn = values[0], torch.cat([draws.values, values[1:].T], 1)
    of_base = _moved(drawn, base, unit(lens) * base.abs())
    return _TWO_RUNS * of_base, _of_sum(lens, draws.sums, slopes)


def curvature_noise(lens: LoraLens, reading: Reading, half_row_sums: _BySite) -> _ByPrompt:
    """σ_H of ½ 1ᵀH1 at the base. Four forward and eight backward passes."""
    base = lens.gates(0.0)

    def half_sums(group: Reading) -> Float[Tensor, "some draw"]:
        sums: list[Tensor] = []
        for draws in torch.arange(DRAWS).split(memory.second_orders_at_once(lens, group)):
            many, ones = group.repeat(len(draws)), torch.ones_like(base)[None]
            (product,) = hessian_products(lens, many, base, ones, progress=False)
            sums.append(product[:, 0].sum(1).unflatten(0, (group.batch, len(draws))))
        return torch.cat(sums, 1) / 2

    with attached(lens.model, rounding_hooks(lens)):
        return _of_sum(lens, in_groups(lens, reading, half_sums), half_row_sums) / _TWO_RUNS


def _of_sum(lens: LoraLens, drawn: Float[Tensor, "batch draw"], summands: _BySite) -> _ByPrompt:
    """σ of a sum over sites; never less than one rounding of its summands."""
    return _moved(drawn, summands.sum(1), unit(lens) * summands.norm(dim=1))


def _moved(drawn: Float[Tensor, "batch draw"], computed: _ByPrompt, least: _ByPrompt) -> _ByPrompt:
    """How far the draws lie from what was computed, at least one rounding.

    Their mean is nearer to the truth than one run is, so a run that lies far from them has a large
    error of its own. Both are rounded, so this is on the large side, as verdicts need it.
    """
    away = (drawn - computed.to(drawn)[:, None]).square().mean(1).sqrt()
    return torch.maximum(away, least.to(away))
