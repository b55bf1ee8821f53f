"""The noise σ by which rounding alone moves g, Σ a and ½ 1ᵀH1, and the floors made of it.

    shift                 g(1) − g(0)                            σ = √(σ₀² + σ₁²)
    after first order     g(ε) − g(0) − ε Σ a                    √(σ² + ε²σ_a²)
    after second order    g(ε) − g(0) − ε Σ a − ½ε² 1ᵀH1         √(σ² + ε²σ_a² + ε⁴σ_H²)

1. A small difference of float32 numbers may be rounding and nothing else, so the effect of rounding
   is measured. Relative noise of the size of the model's rounding is added, several times, to the
   token embedding and to what each later block reads, and noise of the size of the logits' rounding
   to the logits. σ is how far the number moves, at each end. For a sum over sites, σ is at least
   one rounding of the summands.
2. A readout that holds the base's logits, as a KL does, has D(0) = 0, which hardly moves. But D(1)
   moves with p₀, so its σ₀ is how far draws of p₀ move D(1).
3. For a small adapter, σ is nearly all of the noise. For a large one, g saturates while a and H do
   not, and their own rounding, σ_a of Σ a and σ_H of ½ 1ᵀH1, is thousands of times σ.
4. Compared with 200 draws, four give σ to 30 %, and less than a third of it in 2 of 100 cases (two
   draws: in 9 of 100; eight draws: in none). The base has eight, because its error is in the shift
   at every strength.

Cost: ten forward passes for the noise of both ends, including the ends; four forward and backward
passes for σ_a; four forward and eight backward passes for σ_H; all batched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core.function import forward, many_gates, memory, tree
from lens_lora.core.function.corners import strengths
from lens_lora.core.function.gate_graph import hessian_products, in_groups
from lens_lora.core.function.many_gates import Bar
from lens_lora.core.function.reverse import SlopeSums, Visit, site_gradients, slopes_of_first
from lens_lora.core.model import HookFn, Injection, LoraLens, ScaleInject, attached
from lens_lora.core.readout.reading import AtPoint, Columns, Picks, Reading

_ByPrompt = Float[Tensor, " batch"]
_BySite = Float[Tensor, "batch site"]

# So few draws tell the size of a floor, and each of them costs a pass.
DRAWS = 4

# A draw and the run with which it is compared are both rounded, so their distance is √2 σ.
_TWO_RUNS = 2**0.5

# Draws of g, of the logits' rounding, and of first order have seeds of their own. So the draws of g
# and those of first order are independent, and together twice as many.
_SEED_OF_VALUES = 0
_SEED_OF_LOGITS = 1
_SEED_OF_SLOPES = 2


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


# --- The rounding of a model, as noise


def rounding_hooks(
    lens: LoraLens,
    rows: Bool[Tensor, " row"] | None = None,
    generator: torch.Generator | None = None,
    relative: float | None = None,
) -> list[tuple[str, HookFn]]:
    """Hooks that move the embedding, and what each later block reads, by about one rounding.

    With noise at the embedding alone, a large entry of the stream would be rounded in the same way
    in every draw, and no difference between draws would show its error. Block L uses the draw of
    the embedding, shifted by L coordinates, so a block that runs again gets the same noise. If the
    embedding is narrower than the stream (OPT-350m), it takes the first coordinates of the draw.

    Args:
        lens: the adapter over the model.
        rows: the rows of the batch that are moved; None for all.
        generator: makes the draws.
        relative: the size of one rounding, relative to the value; None for the model's own.
    """
    size = lens.unit_roundoff if relative is None else relative
    draws = _generator(_SEED_OF_VALUES) if generator is None else generator
    noise_of_pass: list[Tensor] = []

    def perturb(tensor: Tensor, hook: Any, layer: int = 0) -> Tensor:
        del hook
        is_moved = torch.ones(len(tensor), dtype=torch.bool) if rows is None else rows
        row_indices = is_moved.nonzero()[:, 0].to(tensor.device)
        values = tensor.detach()[row_indices].to(lens.gate_dtype)
        if layer == 0:
            width = max(values.shape[-1], int(lens.model.cfg.d_model))
            shape = (*values.shape[:-1], width)
            noise = torch.randn(shape, generator=draws, dtype=torch.float64)
            noise_of_pass[:] = [(size * noise).to(values)]
        of_layer = noise_of_pass[0].to(values).roll(layer, -1)
        shift = values * of_layer[..., : values.shape[-1]]
        return tensor.index_add(0, row_indices, shift.to(tensor))

    hooks: list[tuple[str, HookFn]] = [(lens.embedding_output, perturb)]
    for layer in range(1, lens.host.n_layers):
        hooks.append((lens.host.block_input(layer), functools.partial(perturb, layer=layer)))
    return hooks


def noise_of_logits(
    lens: LoraLens, shape: tuple[int, ...], generator: torch.Generator
) -> forward.Factor:
    """A factor that moves logits by about their last rounding, which different runs may share.

    There is one draw for the vocabulary, and each row and slot has a sign of its own.
    """
    # A device may round products of float32 more coarsely than the dtype says.
    is_float32 = lens.dtype == torch.float32
    eps = lens.eps if is_float32 else torch.finfo(forward.logits_dtype(lens)).eps
    vocabulary = int(lens.model.cfg.d_vocab_out)
    noise = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    signs = 2 * torch.randint(2, shape, generator=generator) - 1

    def factor(logits: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        sign = signs
        if places:
            sign = signs[tuple(index.to(signs.device) for index in places)]
        return 1 + eps / 2 * noise.to(logits) * sign[..., None].to(logits)

    return factor


# --- Draws of g


class _Copy(NamedTuple):
    """A copy of all rows in a batch.

    Attributes:
        gates: the gates of its rows.
        is_drawn: whether noise is added to it.
    """

    gates: Float[Tensor, " site"]
    is_drawn: bool


def draws_at(
    lens: LoraLens,
    reading: Reading,
    scales: Sequence[float],
    *,
    exact: Sequence[float] = (),
    progress: bool = False,
) -> tuple[Float[Tensor, "batch exact"], Float[Tensor, "scale draw batch"]]:
    """Evaluate g without noise at the strengths `exact`, and four draws of it at `scales`.

    It takes one pass for each of these, batched. One rounding is 2⁻²⁴ for float32, 2⁻⁵³ for
    float64, 2⁻⁸ for bfloat16, and 1/254 if a kernel rounds activations to 8 bit
    (`hosts/quantised.py`).
    """
    copies = [_Copy(lens.gates(scale), is_drawn=False) for scale in exact]
    for scale in scales:
        copies += DRAWS * [_Copy(lens.gates(scale), is_drawn=True)]
    values_of_groups: list[Tensor] = []
    for group in memory.pass_groups(lens, reading):
        values_of_groups.append(_values_of_copies(lens, group, copies, progress))
    values = torch.cat(values_of_groups)
    as_is = values[:, : len(exact)]
    draws = values[:, len(exact) :]
    return as_is, draws.T.unflatten(0, (len(scales), -1))


def exact_and_draws(
    lens: LoraLens,
    reading: Reading,
    exact: Sequence[float],
    drawn: Sequence[float],
    *,
    progress: bool,
) -> tuple[Float[Tensor, "exact batch"], Float[Tensor, "drawn draw batch"]]:
    """Evaluate g at the strengths `exact`, and draws of it at `drawn`; in one batch if cheaper."""
    copies = len(exact) + 2 * DRAWS
    share_one_pass = memory.shares_pass(lens, reading, copies)
    if not exact:
        values, draws = draws_at(lens, reading, drawn, progress=progress)
        return values.T, draws
    points = strengths(lens, exact)
    if share_one_pass and not tree.pays(lens, points):
        values, draws = draws_at(lens, reading, drawn, exact=exact, progress=progress)
        return values.T, draws
    values = many_gates.gated_readout(lens, reading, points, bar=Bar("along the path", progress))
    _, draws = draws_at(lens, reading, drawn, progress=progress)
    return values.T, draws


def _values_of_copies(
    lens: LoraLens, reading: Reading, copies: Sequence[_Copy], progress: bool
) -> Float[Tensor, "some copy"]:
    """Evaluate g of each copy of these rows, with as many copies in one pass as fit."""
    rows = reading.rows.batch
    step = memory.rows_at_once(lens, reading)
    draws = _generator(_SEED_OF_VALUES)
    draws_of_logits = _generator(_SEED_OF_LOGITS)

    def run(chunk: Sequence[_Copy]) -> Float[Tensor, "some chunk"]:
        is_drawn = [copy.is_drawn for copy in chunk]
        rows_drawn = torch.tensor(is_drawn).repeat_interleave(rows)
        perturb = rounding_hooks(lens, rows_drawn, draws)
        gates = torch.stack([copy.gates for copy in chunk])
        write = ScaleInject(lens.plan, gates.repeat_interleave(rows, 0))
        with torch.no_grad(), lens.injected(write, before=perturb):
            return torch.stack(_values_in_pass(lens, reading, is_drawn, draws_of_logits), 1)

    chunks = [copies[start : start + step] for start in range(0, len(copies), step)]
    with Bar("along the path", progress).over(len(copies)) as bar:
        return many_gates.in_chunks(chunks, run, bar)


def _values_in_pass(
    lens: LoraLens, reading: Reading, is_drawn: Sequence[bool], generator: torch.Generator
) -> list[Float[Tensor, " some"]]:
    """Evaluate g of each copy of the rows in one pass; drawn copies get noise at the logits too."""
    prompts = reading.rows
    read = reading.read
    rows = prompts.batch
    many = prompts.tiled(len(is_drawn))
    if isinstance(read, AtPoint):
        activations = forward.read_activation(lens, many, read.name)
        return [read(of_copy) for of_copy in activations.unflatten(0, (-1, rows))]
    shape = (rows,) if prompts.reads is None else (rows, prompts.slots)
    factors: list[forward.Factor | None] = []
    for drawn in is_drawn:
        factor: forward.Factor | None = None
        if drawn:
            factor = noise_of_logits(lens, shape, generator)
        factors.append(factor)
    values: list[Tensor] = []
    if isinstance(read, Picks | Columns) and forward.ends_plainly(lens):
        finals = forward.read_final(lens, many).unflatten(0, (-1, rows))
        for final, factor in zip(finals, factors, strict=True):
            values.append(forward.value_of_final(lens, read, final, factor))
        return values
    logits_of_copies = forward.read_logits(lens, many).unflatten(0, (-1, rows))
    for logits, factor in zip(logits_of_copies, factors, strict=True):
        rounded = logits if factor is None else logits * factor(logits, ())
        values.append(read(rounded))
    return values


# --- Draws of Σ a


class Draws(NamedTuple):
    """Draws of first order at the base, with noise at the embedding.

    Attributes:
        values: g(0) in each draw.
        sums: Σ_l a_l in each draw.
    """

    values: Float[Tensor, "batch draw"]
    sums: Float[Tensor, "batch draw"]


def base_draws(lens: LoraLens, reading: Reading) -> Draws:
    """Evaluate g(0) and Σ a of each draw. Four forward and backward passes, batched."""
    groups: list[Draws] = []
    for group in memory.graph_groups(lens, reading):
        draws: list[Draws] = []
        hooks = rounding_hooks(lens, generator=_generator(_SEED_OF_SLOPES))
        with attached(lens.model, hooks):
            draws_at_once = memory.slopes_at_once(lens, group)
            for chunk in torch.arange(DRAWS).split(draws_at_once):
                copies = group.repeat(len(chunk))
                draws.append(_draws_in_pass(lens, copies, group.batch))
        groups.append(_joined(draws, 1))
    return _joined(groups, 0)


def _joined(draws: Sequence[Draws], dim: int) -> Draws:
    values = torch.cat([some.values for some in draws], dim)
    sums = torch.cat([some.sums for some in draws], dim)
    return Draws(values, sums)


def slopes_and_draws(
    lens: LoraLens, reading: Reading, axes: tuple[str, ...]
) -> tuple[Float[Tensor, "batch site *by"], _ByPrompt, Draws]:
    """∂g/∂ε_l and g at the base, and `base_draws`; in one pass if all rows fit."""
    copies = 1 + DRAWS
    if lens.plan.activation_rounding or copies > memory.slopes_at_once(lens, reading):
        at_base = lens.gates(0.0)[None]
        slopes, values = slopes_of_first(lens, reading, at_base, axes)
        return slopes, values[:, 0], base_draws(lens, reading)
    # The first copy of each row is exact, and the others are draws.
    exact = SlopeSums(lens, reading.rows, axes)
    many = reading.repeat(copies)
    is_drawn = torch.arange(len(many.owner), device="cpu") % copies > 0

    def visit(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        exact.visit(injection, weight, gradient[::copies], z[::copies])

    hooks = rounding_hooks(lens, is_drawn, _generator(_SEED_OF_SLOPES))
    with attached(lens.model, hooks):
        of_copies = _draws_in_pass(lens, many, reading.batch, visit)
    draws = Draws(of_copies.values[:, 1:], of_copies.sums[:, 1:])
    return exact.by_prompt(reading), of_copies.values[:, 0], draws


def _draws_in_pass(lens: LoraLens, many: Reading, batch: int, also: Visit | None = None) -> Draws:
    """Evaluate g(0) and Σ a of several copies of each prompt. One forward and one backward pass.

    Args:
        lens: the adapter over the model.
        many: the copies, where those of a prompt follow one another.
        batch: the number of prompts.
        also: a second visitor of the same backward pass.
    """
    slopes = SlopeSums(lens, many.rows)

    def visit(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        if also is not None:
            also(injection, weight, gradient, z)
        # δ with a partner is multiplied by the partner's gate, which is zero at the base.
        if weight is None:
            slopes.visit(injection, weight, gradient, z)

    values = site_gradients(lens, many, lens.gates(0.0), visit)
    sums = slopes.by_prompt(many).sum(1)
    return Draws(values.unflatten(0, (batch, -1)), sums.unflatten(0, (batch, -1)))


# --- σ


def noise_of_draws(values: Float[Tensor, "draw batch"]) -> _ByPrompt:
    """The noise σ of g at one strength, from g without noise and draws of it.

    It may differ between the ends: log p of a token that is nearly certain has no room to move.
    """
    distance = (values[1:] - values[0]).square().mean(0).sqrt()
    return _infinite_if_unknown(distance) / _TWO_RUNS


def noise_of_ends(
    base: Float[Tensor, "draw batch"], adapted: Float[Tensor, "draw batch"]
) -> _ByPrompt:
    """The noise σ of g(1) − g(0), from g at both ends and its draws there."""
    return (noise_of_draws(base).square() + noise_of_draws(adapted).square()).sqrt()


def first_order_noise(
    lens: LoraLens, draws: Draws, values: Float[Tensor, "draw batch"], slopes: _BySite
) -> tuple[_ByPrompt, _ByPrompt]:
    """The noise σ of g(ε) − g(0) near the base, and σ_a. No pass.

    Args:
        lens: the adapter over the model.
        draws: draws of first order.
        values: g at the base, and then draws of it.
        slopes: the a_l.
    """
    base = values[0]
    all_draws = torch.cat([draws.values, values[1:].T], 1)
    of_base = _distance_of_draws(all_draws, base, lens.unit_roundoff * base.abs())
    return _TWO_RUNS * of_base, _noise_of_sum(lens, draws.sums, slopes)


def curvature_noise(lens: LoraLens, reading: Reading, half_row_sums: _BySite) -> _ByPrompt:
    """The noise σ_H of ½ 1ᵀH1 at the base. Four forward and eight backward passes."""
    base = lens.gates(0.0)
    ones = torch.ones_like(base)[None]

    def half_sums(group: Reading) -> Float[Tensor, "some draw"]:
        sums: list[Tensor] = []
        draws_at_once = memory.second_orders_at_once(lens, group)
        for draws in torch.arange(DRAWS).split(draws_at_once):
            many = group.repeat(len(draws))
            (product,) = hessian_products(lens, many, base, ones, progress=False)
            of_copies = product[:, 0].sum(1)
            sums.append(of_copies.unflatten(0, (group.batch, len(draws))))
        return torch.cat(sums, 1) / 2

    with attached(lens.model, rounding_hooks(lens)):
        draws_of_sum = in_groups(lens, reading, half_sums)
    return _noise_of_sum(lens, draws_of_sum, half_row_sums) / _TWO_RUNS


def _noise_of_sum(
    lens: LoraLens, drawn: Float[Tensor, "batch draw"], summands: _BySite
) -> _ByPrompt:
    """The noise σ of a sum over sites; never less than one rounding of its summands."""
    one_rounding = lens.unit_roundoff * summands.norm(dim=1)
    return _distance_of_draws(drawn, summands.sum(1), one_rounding)


def _distance_of_draws(
    drawn: Float[Tensor, "batch draw"], computed: _ByPrompt, least: _ByPrompt
) -> _ByPrompt:
    """How far the draws lie from what was computed, at least one rounding.

    Their mean is nearer to the truth than one run is, so a run that lies far from them has a large
    error of its own. Both are rounded, so this is on the large side, as verdicts need it.
    """
    distance = (drawn - computed.to(drawn)[:, None]).square().mean(1).sqrt()
    return torch.maximum(_infinite_if_unknown(distance), least.to(distance))


def _infinite_if_unknown(noise: _ByPrompt) -> _ByPrompt:
    """The noise σ, and infinity where a draw is NaN: there rounding may do anything.

    A readout with a root or a norm of zero at the base has such derivatives.
    """
    return noise.nan_to_num(nan=torch.inf, posinf=torch.inf)
