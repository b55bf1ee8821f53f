"""The question of a public call: a lens, prompts and a readout, tokenised once and passed on.

1. `ask` tokenises the prompts and looks up the readout's tokens; `ask_prompts` is for what has no
   readout: the logits of all tokens, and activations.
2. What several analyses need is computed once, on first use: the exact ends g(0) and g(1), the
   noise floor, the prompts' tokens as strings.
3. A public function is `return verb_of(ask(lens, prompts, readout), …)`; an analysis that needs
   another one calls its `verb_of` with the same `Asked`.

An `Asked` is used within one public call only, as users' hooks may change between calls.
Cost: nothing by itself; two forward passes for the ends, or ten for the ends and the noise floor;
one for the base distribution that a divergence holds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine import noise
from lens_lora.engine.function import gated_readout, pays, require_finite
from lens_lora.engine.memory import pass_groups, rides_along, shares_pass
from lens_lora.engine.read import ends_plainly, logits_of_final, read_final, read_logits
from lens_lora.engine.reverse import slopes_of_first
from lens_lora.errors import ArgumentError
from lens_lora.model.gates import ScaleInject
from lens_lora.model.lens import LoraLens
from lens_lora.readouts.answers import KL, held
from lens_lora.readouts.prompts import Prompts, PromptsLike, PromptTokens
from lens_lora.readouts.reading import Divergence, Reading
from lens_lora.readouts.readout import Readout, bound

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
        """The same prompts, with a readout. One forward pass of a KL, for the base distribution.

        Raises:
            ArgumentError: something that is no readout.
            TokenError: a readout that does not fit the model.
        """
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
        asked.know_base(asked.lens.gates(0.0).new_zeros(reading.batch))
        return asked

    def require_slope_at_base(self) -> Asked:
        """The question itself, unless its readout has no derivative at ε = 0.

        Raises:
            ArgumentError: a KL, whose derivative there is zero.
        """
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

    def along(
        self, strengths: Sequence[float], progress: bool = True
    ) -> Float[Tensor, "batch scale"]:
        """g(ε·1) at several strengths. A forward pass for each that is not known yet, batched."""
        if missing := self._unknown(strengths):
            gates, what = self._gates(missing), "along the path"
            values = gated_readout(self.lens, self.reading, gates, progress=progress, what=what)
            self._know(missing, values)
        values = [self._known[strength] for strength in strengths]
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
        values = self._with_ends(gates[inner], progress, what)
        at_points = values.new_empty(len(values), len(gates))
        at_points[:, inner] = values
        for end, points in zip(self.ends, is_end, strict=True):
            at_points[:, points] = end[:, None].to(at_points)
        return at_points

    def _with_ends(
        self, gates: Float[Tensor, "inner site"], progress: bool, what: str
    ) -> Float[Tensor, "batch inner"]:
        missing = self._unknown(_ENDS)
        every = [*map(self.lens.gates, missing), *gates]
        if not every:
            return self.ends.T[:, :0]
        both = torch.stack([point.to(self.lens.gates(0.0)) for point in every])
        values = gated_readout(self.lens, self.reading, both, progress=progress, what=what)
        self._know(missing, values[:, : len(missing)])
        return values[:, len(missing) :]

    def slopes(
        self, at: float, axes: tuple[str, ...] = (), lens: LoraLens | None = None
    ) -> Float[Tensor, "batch site *by"]:
        """∂g/∂ε_l at one strength, split. One forward and one backward pass, which shows g, too.

        The unknown ends ride in it where prompts are so short that this is cheaper. A `lens` is the
        same f(ε) with its rank spaces in other coordinates.
        """
        riding = [strength for strength in self._unknown(_ENDS) if strength != at]
        if not rides_along(self.lens, self.reading, 1 + len(riding)):
            riding = []
        strengths = [at, *riding]
        gates = self._gates(strengths)
        slopes, values = slopes_of_first(lens or self.lens, self.reading, gates, axes)
        self._know(strengths, values)
        return slopes

    def know_base(self, base: Float[Tensor, " batch"]) -> None:
        """Take g(0) from a pass that was run anyway."""
        self._know([0.0], base[:, None])

    def know_ends(self, ends: Float[Tensor, "end batch"]) -> None:
        """Take g(0) and g(1) from passes that were run anyway."""
        self._know(_ENDS, ends.T)

    def _know(self, strengths: Sequence[float], values: Float[Tensor, "batch strength"]) -> None:
        require_finite(values, "the readout")
        self._known.update(zip(strengths, values.T, strict=True))

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
        return noise.noise_of_draws(self._drawn_at(0)[0])

    @property
    def adapted_noise(self) -> Float[Tensor, " batch"]:
        """σ of g(1) from rounding alone. Five forward passes at first, or four if it is known."""
        return noise.noise_of_draws(self._drawn_at(1)[0])

    @property
    def noise_floor(self) -> Float[Tensor, " batch"]:
        """σ of g(1) − g(0) from rounding alone. Ten forward passes at first, ends included."""
        base, adapted = map(noise.noise_of_draws, self._drawn_at(0, 1))
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
            shares = shares_pass(self.lens, self.reading, len(exact) + 2 * noise.DRAWS)
            if exact and (pays(self.lens, self._gates(exact)) or not shares):
                self.along(exact, progress)
                exact = []
            values, draws = noise.draws_at(
                self.lens, self.reading, new, exact=exact, progress=progress
            )
            self._know(exact, values)
            for end, drawn in zip(new, draws, strict=True):
                self._drawn[end] = torch.cat([self._known[end].to(drawn)[None], drawn])
        return [self._drawn[end] for end in ends]

    def _draws_of_held(self, read: Divergence) -> Float[Tensor, "draw batch"]:
        """D(1), and then draws of it in which p₀ is the one that moves."""

        def hold(logits: Tensor) -> Reading:
            return dataclasses.replace(self.reading, read=read.turned(logits))

        turned = hold(held_logits(self.lens, self.reading, hold, 1.0))
        _, (drawn,) = noise.draws_at(self.lens, turned, [0.0])
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
    def slope_draws(self) -> noise.Draws:
        """Draws of first order at the base. Four forward and backward passes."""
        return noise.base_draws(self.lens, self.reading)

    def slopes_with_floors(
        self, axes: tuple[str, ...], along: Sequence[float], progress: bool
    ) -> Float[Tensor, "batch site *by"]:
        """∂g/∂ε_l at the base, split, with `slope_draws`; g along the path beside its floors."""
        slopes, base, draws = noise.slopes_and_draws(self.lens, self.reading, axes)
        vars(self)["slope_draws"] = draws
        self.know_base(base)
        self._drawn_at(0, 1, beside=along, progress=progress)
        return slopes

    def effect_noise(self, scale: float) -> Float[Tensor, " batch"]:
        """σ of what an intervention does, from rounding alone: a difference of two g at one end.

        Of a KL at the base it is that of the whole D(1), which is more than a weak module needs.
        """
        return 2**0.5 * (self.adapted_noise if scale else self.base_noise)

    @functools.cached_property
    def str_tokens(self) -> tuple[tuple[str, ...], ...]:
        """Each prompt's tokens; 'a|b' where the rows of an answer continue differently."""
        if self._bound is None:
            return self.lens.str_tokens(self.prompts)
        merged = self.reading.tokens_of(self.lens.str_tokens(self.reading.prompts))
        return tuple(map(PromptTokens, merged, (source.said for source in self.prompts.sources)))


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
    bounded = lens if max_memory is None else lens.within(max_memory)
    return Asked(bounded, lens.prompts(prompts))


def held_logits(
    lens: LoraLens, reading: Reading, hold: Callable[[Tensor], Reading], strength: float
) -> Float[Tensor, "row *slot vocab"]:
    """f at this strength, in `lens.gate_dtype`: the distribution that a divergence is to hold.

    As many rows are run at a time as there is memory for beside what is held, and are unembedded
    some tokens at a time, straight to where they stay. One forward pass.

    Raises:
        ArgumentError: they are beyond the bound of the lens.
    """
    prompts = reading.prompts
    slots = [] if prompts.reads is None else [prompts.slots]
    shape = len(prompts.tokens), *slots, int(lens.model.cfg.d_vocab_out)
    logits = torch.empty(shape, dtype=lens.gate_dtype, device=lens.device)
    first = 0
    scaled = ScaleInject(lens.plan, lens.gates(strength))
    with torch.no_grad(), lens.injected(scaled):
        for group in pass_groups(lens, hold(logits)):
            rows = logits[first : (first := first + len(group.owner))]
            # What is beyond a group's slots is read by nothing, and stays as it is.
            rows = rows[:, : group.prompts.slots] if slots else rows
            if ends_plainly(lens):
                logits_of_final(lens, read_final(lens, group.prompts), rows)
            else:
                rows.copy_(read_logits(lens, group.prompts))
    return logits
