"""The question of a public call: a lens, prompts and a readout, tokenised once; its noise floors.

1. `ask` tokenises the prompts and looks up the readout's tokens; `ask_prompts` is for what has no
   readout: the logits of all tokens, and activations.
2. What several analyses need is computed once, on first use: the exact ends g(0) and g(1), the
   noise floor, the prompts' tokens as strings.
3. A public function is `return verb_of(ask(lens, prompts, readout), …)`; an analysis that needs
   another one calls its `verb_of` with the same `Asked`.

An `Asked` is used within one public call only, as users' hooks may change between calls.

**Noise floors**: how far a readout's shift, and what first order leaves of it, move by rounding. A
small difference of float32 numbers may be rounding only. What rounding does is measured: relative
noise of the size of the model's rounding is added a few times to the token embedding and to what
each later block reads, and of the logits' own to them; σ is how far the number moves, at each end.
Of a sum over sites it is never less than one rounding of its summands.

    shift                 g(1) − g(0)                            σ = √(σ₀² + σ₁²)
    after first order     g(ε) − g(0) − ε Σ a                    √(σ² + ε²σ_a²)
    after second order    g(ε) − g(0) − ε Σ a − ½ε² 1ᵀH1         √(σ² + ε²σ_a² + ε⁴σ_H²)

Of a KL, D(0) = 0 hardly moves, but D(1) does with p₀: its σ₀ is how far draws of p₀ move D(1).

On a small adapter σ is nearly all of it. On a violent one g saturates, and a and H do not: their
own rounding, σ_a of Σ a and σ_H of ½ 1ᵀH1, is then thousands of times σ.

Against 200 draws, four give σ to 30 % and less than a third of it in 2 of 100 cases; two draws in 9
of 100, eight in none. The base has eight, because its error is in the shift at every strength.

Cost: nothing by itself; two forward passes for the ends, or ten for the ends and the noise floor;
one for the base distribution that a divergence holds; four forward and backward passes for σ_a,
four forward and eight backward for σ_H, all batched.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core.function import forward as function
from lens_lora.core.function import memory
from lens_lora.core.function.derivatives import hessian_products, in_groups
from lens_lora.core.function.reverse import Slopes, Visit, site_gradients, slopes_of_first
from lens_lora.core.model import HookFn, Injection, LoraLens, ScaleInject, attached
from lens_lora.core.readout import Prompts, PromptsLike, PromptTokens, Readout, bound
from lens_lora.core.readout.reading import Columns, Divergence, Picks, Reading
from lens_lora.errors import ArgumentError
from lens_lora.responses.answers import KL, held

_ENDS = 0.0, 1.0  # the base model and the adapted one


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """One question, bound to a lens.

    Attributes:
        lens: the adapter over the model.
        prompts: those asked about, as tokens; a readout of several tokens runs more rows.
    """

    lens: LoraLens
    prompts: Prompts
    _bound: tuple[Readout, Reading] | None = None
    # g by strength, and with its draws at each end.
    _known: dict[float, Tensor] = dataclasses.field(default_factory=dict, init=False)
    _drawn: dict[int, Tensor] = dataclasses.field(default_factory=dict, init=False)

    def about(self, readout: Readout) -> Asked:
        """The same prompts, with a readout. One forward pass of a KL, for the base distribution."""
        if isinstance(readout, KL):
            readout = readout.on(self.prompts)
        reading = bound(readout, self.lens.model, self.prompts)
        if isinstance(readout, KL):
            base = held_logits(self.lens, reading, functools.partial(held, readout, reading), 0.0)
            return self.compared_with(readout, reading, base)
        return Asked(self.lens, self.prompts, (readout, reading))

    def compared_with(
        self, readout: KL, reading: Reading, base: Float[Tensor, "row *slot vocab"]
    ) -> Asked:
        """The same prompts, with a KL whose base distribution is known."""
        asked = Asked(self.lens, self.prompts, (readout, held(readout, reading, base)))
        asked.know({0.0: asked.lens.gates(0.0).new_zeros(reading.batch)})
        return asked

    def require_slope_at_base(self) -> Asked:
        """The question itself, unless its readout has no derivative at ε = 0."""
        if isinstance(self.readout, KL):
            raise ArgumentError(
                f"{self.readout.label} is least at ε = 0, so its derivative there is zero and says "
                "nothing; use ll.kl_shares for its quadratic part, ll.path_attribution for all of "
                "it, or ll.first_order(…, at=1.0) for what leaving a module out does."
            )
        return self

    @property
    def readout(self) -> Readout:
        """What is read."""
        return self._with_readout[0]

    @property
    def reading(self) -> Reading:
        """The rows that are run, and g of each prompt from their logits."""
        return self._with_readout[1]

    @property
    def _with_readout(self) -> tuple[Readout, Reading]:
        if self._bound is None:
            raise RuntimeError("asked without a readout, and g is needed")
        return self._bound

    @property
    def ends(self) -> Float[Tensor, "end batch"]:
        """g(0) and g(1), exact. A forward pass for each that no pass has shown yet."""
        return self.along(_ENDS).T

    def along(self, scales: Sequence[float], progress: bool = True) -> Float[Tensor, "batch scale"]:
        """g(ε·1) at several strengths. A forward pass for each that is not known yet, batched."""
        if missing := self._unknown(scales):
            self._run(missing, (), progress, "along the path")
        values = [self._known[scale] for scale in scales]
        return torch.stack([value.to(values[-1]) for value in values], 1)

    def at_gates(
        self, gates: Float[Tensor, "point site"], *, progress: bool = True, what: str
    ) -> Float[Tensor, "batch point"]:
        """g at several gate vectors, in the same passes as the ends where those are not known yet.

        At most as many forward passes as points, and two for the ends; a point that is one of the
        ends is not run again.
        """
        is_end = torch.stack([(gates == strength).all(1) for strength in _ENDS])
        inner = ~is_end.any(0)
        values = self._run(self._unknown(_ENDS), gates[inner], progress, what)
        at_points = values.new_empty(len(values), len(gates))
        at_points[:, inner] = values
        for end, points in zip(self.ends, is_end, strict=True):
            at_points[:, points] = end[:, None].to(at_points)
        return at_points

    def _run(
        self, missing: Sequence[float], others: Iterable[Tensor], progress: bool, what: str
    ) -> Float[Tensor, "batch other"]:
        """g at other gates, in the same passes as at strengths where it is not known yet."""
        every = [*map(self.lens.gates, missing), *others]
        if not every:
            return self.ends.T[:, :0]
        gates = torch.stack([point.to(every[0]) for point in every])
        values = function.gated_readout(
            self.lens, self.reading, gates, progress=progress, what=what
        )
        self.know(dict(zip(missing, values.T, strict=False)))
        return values[:, len(missing) :]

    def slopes(
        self, at: float, axes: tuple[str, ...] = (), lens: LoraLens | None = None
    ) -> Float[Tensor, "batch site *by"]:
        """∂g/∂ε_l at one strength, split. One forward and one backward pass, which shows g, too.

        The unknown ends ride in it where prompts are so short that this is cheaper. A `lens` is the
        same f(ε) with its rank spaces in other coordinates.
        """
        riding = [strength for strength in self._unknown(_ENDS) if strength != at]
        if not memory.rides_along(self.lens, self.reading, 1 + len(riding)):
            riding = []
        strengths = [at, *riding]
        gates = self._gates(strengths)
        slopes, values = slopes_of_first(lens or self.lens, self.reading, gates, axes)
        self.know(dict(zip(strengths, values.T, strict=True)))
        return slopes

    def know(self, values: Mapping[float, Float[Tensor, " batch"]]) -> None:
        """Take g(ε·1) at some strengths from passes that were run anyway."""
        for value in values.values():
            function.require_finite(value, "the readout")
        self._known.update(values)

    def _unknown(self, strengths: Iterable[float]) -> list[float]:
        """Those at which g is not known yet."""
        return [strength for strength in strengths if strength not in self._known]

    def _gates(self, strengths: Sequence[float]) -> Float[Tensor, "point site"]:
        return torch.stack([self.lens.gates(strength) for strength in strengths])

    @property
    def base_noise(self) -> Float[Tensor, " batch"]:
        """σ of g(0) from rounding alone; of a KL, σ of D(1) from the rounding of p₀.

        Five forward passes at first, or four if the end is known.
        """
        return noise_of_draws(self._drawn_at(0)[0])

    @property
    def adapted_noise(self) -> Float[Tensor, " batch"]:
        """σ of g(1) from rounding alone. Five forward passes at first, or four if it is known."""
        return noise_of_draws(self._drawn_at(1)[0])

    @property
    def noise_floor(self) -> Float[Tensor, " batch"]:
        """σ of g(1) − g(0) from rounding alone. Ten forward passes at first, ends included."""
        base, adapted = map(noise_of_draws, self._drawn_at(0, 1))
        return (base.square() + adapted.square()).sqrt()

    def _drawn_at(
        self, *ends: int, beside: Sequence[float] = (), progress: bool = False
    ) -> list[Float[Tensor, "draw batch"]]:
        """g and its draws at these ends. What was not run yet is one batch, with g beside them."""
        read = self.reading.read
        if isinstance(read, Divergence) and 0 in ends and 0 not in self._drawn:
            self._drawn[0] = self._draws_of_held(read)
        if new := [end for end in ends if end not in self._drawn]:
            exact = self._unknown(dict.fromkeys([*map(float, new), *beside]))
            # Beside the draws only where they are no tree of their own, and the batch stays small.
            shares = memory.shares_pass(self.lens, self.reading, len(exact) + 2 * DRAWS)
            if exact and (function.pays(self.lens, self._gates(exact)) or not shares):
                self.along(exact, progress)
                exact = []
            values, draws = draws_at(self.lens, self.reading, new, exact=exact, progress=progress)
            self.know(dict(zip(exact, values.T, strict=True)))
            for end, drawn in zip(new, draws, strict=True):
                self._drawn[end] = torch.cat([self._known[end].to(drawn)[None], drawn])
        return [self._drawn[end] for end in ends]

    def _draws_of_held(self, read: Divergence) -> Float[Tensor, "draw batch"]:
        """D(1), and then draws of it in which p₀ is the one that moves."""

        def hold(logits: Tensor) -> Reading:
            return dataclasses.replace(self.reading, read=read.turned(logits))

        turned = hold(held_logits(self.lens, self.reading, hold, 1.0))
        _, (drawn,) = draws_at(self.lens, turned, [0.0])
        return torch.cat([self.ends[1].to(drawn)[None], drawn])

    @property
    def base_draws(self) -> Float[Tensor, "draw batch"]:
        """g(0), and then draws of it with noise at the embedding. As `base_noise`.

        Of a KL without them: where ε is small, what counts is how far D(0) itself moves, which the
        draws of the slopes show.
        """
        if isinstance(self.reading.read, Divergence):
            return self.ends[:1]
        return self._drawn_at(0)[0]

    @functools.cached_property
    def slope_draws(self) -> Draws:
        """Draws of first order at the base. Four forward and backward passes."""
        return base_draws(self.lens, self.reading)

    def slopes_with_floors(
        self, axes: tuple[str, ...], along: Sequence[float], progress: bool
    ) -> Float[Tensor, "batch site *by"]:
        """∂g/∂ε_l at the base, split, with `slope_draws`; g along the path beside its floors."""
        slopes, base, draws = slopes_and_draws(self.lens, self.reading, axes)
        vars(self)["slope_draws"] = draws
        self.know({0.0: base})
        self._drawn_at(0, 1, beside=along, progress=progress)
        return slopes

    def effect_noise(self, scale: float) -> Float[Tensor, " batch"]:
        """σ of what an intervention does, from rounding alone: a difference of two g at one end.

        Of a KL at the base it is that of the whole D(1), which is more than a weak module needs.
        """
        return 2**0.5 * (self.adapted_noise if scale else self.base_noise)

    def describe(self) -> dict[str, str]:
        """The names of model and adapter, versions, and how the prompts were read."""
        return self.lens.describe(self.prompts)

    @functools.cached_property
    def str_tokens(self) -> tuple[tuple[str, ...], ...]:
        """Each row's tokens, prompt and answer; 'a|b' where the rows continue differently.

        They know how many of them were asked, which is what titles and stories quote.
        """
        if self._bound is None or self.reading.prompts is self.prompts:
            return self.lens.str_tokens(self.prompts)
        merged = self.reading.tokens_of(self.lens.str_tokens(self.reading.prompts))
        said = [source.said for source in self.prompts.sources]
        return tuple(map(PromptTokens, merged, said, self.prompts.asked_lengths))


def ask(
    lens: LoraLens, prompts: PromptsLike, readout: Readout, max_memory: float | None = None
) -> Asked:
    """Tokenise the prompts and look up the readout's tokens, once.

    Raises:
        ArgumentError: something that is no readout.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        ModelStateError: the model is not as it was when the lens was made.
    """
    return ask_prompts(lens, prompts, max_memory).about(readout)


def ask_prompts(lens: LoraLens, prompts: PromptsLike, max_memory: float | None = None) -> Asked:
    """Tokenise the prompts of a question without a readout.

    Raises:
        ArgumentError: something that is no lens.
        PromptError: a prompt that does not fit the model.
        ModelStateError: the model is not as it was when the lens was made.
    """
    if not isinstance(lens, LoraLens):
        raise ArgumentError(
            f"the lens is a {type(lens).__name__}; make one: ll.LoraLens(model, adapter)."
        )
    lens.plan.check_state()
    return Asked(lens if max_memory is None else lens.within(max_memory), lens.prompts(prompts))


def held_logits(
    lens: LoraLens, reading: Reading, hold: Callable[[Tensor], Reading], strength: float
) -> Float[Tensor, "row *slot vocab"]:
    """f at this strength, in `lens.gate_dtype`: the distribution that a divergence is to hold.

    As many rows are run at a time as there is memory for beside what is held, and are unembedded
    some tokens at a time, straight to where they stay. One forward pass.
    """
    prompts = reading.prompts
    slots = [] if prompts.reads is None else [prompts.slots]
    shape = len(prompts.tokens), *slots, int(lens.model.cfg.d_vocab_out)
    logits = torch.empty(shape, dtype=lens.gate_dtype, device=lens.device)
    first = 0
    scaled = ScaleInject(lens.plan, lens.gates(strength))
    with torch.no_grad(), lens.injected(scaled):
        for group in memory.pass_groups(lens, hold(logits)):
            rows = logits[first : (first := first + len(group.owner))]
            # What is beyond a group's slots is read by nothing, and stays as it is.
            rows = rows[:, : group.prompts.slots] if slots else rows
            if function.ends_plainly(lens):
                function.logits_of_final(lens, function.read_final(lens, group.prompts), rows)
            else:
                rows.copy_(function.read_logits(lens, group.prompts))
    return logits


# --- The rounding of a model, as noise


def unit(lens: LoraLens) -> float:
    """Of rounding, relative: the dtype's, or that of activations which a kernel rounds to 8 bit."""
    return max(lens.eps / 2, lens.plan.activation_rounding)


def of_stream(
    lens: LoraLens,
    rows: Bool[Tensor, " row"] | None = None,
    generator: torch.Generator | None = None,
) -> list[tuple[str, HookFn]]:
    """Hooks that move the embedding, and what each later block reads, by about one rounding.

    With noise at the embedding alone, a large entry of the stream is rounded the same way in every
    draw, and its error is in none of their differences. Blocks take the draw of the embedding, one
    coordinate further each: the same one where a block is run again. Where the embedding is
    narrower than the stream (OPT-350m), it takes the first coordinates of the draw.
    """
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
            noise[:] = [(unit(lens) * drawn).to(values)]
        of_layer = noise[0].to(values).roll(layer, -1)
        shift = values * of_layer[..., : values.shape[-1]]
        return tensor.index_add(0, moved, shift.to(tensor))

    host = lens.plan.host
    blocks = {layer: host.block_input(layer) for layer in range(1, host.n_layers)}
    hooks = [(name, functools.partial(perturb, layer=layer)) for layer, name in blocks.items()]
    return [(lens.embedding_output, perturb), *hooks]


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
    kernel rounds activations to 8 bit (`model/kernels.py`).
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
        perturb = of_stream(lens, torch.tensor(is_drawn).repeat_interleave(rows), generator)
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


def base_draws(lens: LoraLens, reading: Reading) -> Draws:
    """g(0) and Σ a of each draw. Four forward and backward passes, batched."""
    groups = []
    for group in memory.graph_groups(lens, reading):
        chunks = torch.arange(DRAWS).split(memory.slopes_at_once(lens, group))
        with attached(lens.model, of_stream(lens, generator=_others())):
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

    with attached(lens.model, of_stream(lens, is_drawn, _others())):
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

    with attached(lens.model, of_stream(lens)):
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
