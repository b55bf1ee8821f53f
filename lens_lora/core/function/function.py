"""The function g(ε) = readout(f(ε)) as an object, with every quantity of the note as a method.

Each adapted module, a site, has a gate ε_l and writes W_l z_l + ε_l ΔW_l z_l. The methods stand in
this order, and each of them asks the file that computes it:

    quantity             what it is                            method              computed in
    g(ε)                 the readout at gates ε                g(gates), along     forward.py
    g(0), g(1)           the base and the adapted model        ends, shift         forward.py
    g(e_l), g(1 − e_l)   corners of the cube [0, 1]^S          corners             corners.py
    f(ε)                 the logits where they are read        logits              logits.py
    ∂g/∂ε_l              slopes (Prop. 1), also split by       slopes              reverse.py
                         position, head, rank or token
    Σ_l v_l ∂f/∂ε_l      a tangent of the logits               tangent             tangents.py
    (H v)_l              curvature along a direction           curvature           gate_graph.py
    σ                    what rounding alone makes of these    floor, noise        rounding.py

After these come passes under hooks of your own (`passes`), the same function of other prompts, of
another readout or adapter (`only`, `about`, `over`), what results say of it (`header`), and what is
refused.

1. `lens.function(prompts, readout)` tokenises the prompts and looks up the readout's tokens once
   (`binding.py`).
2. Gates are a number for every site, a tensor [site], or {site name or glob: number}. A tensor
   [*point, site] is many points at once. Results have the axes of the points first, then prompts.
3. Every call runs the model under the hooks that are on it at that moment, including a user's own.
   How many rows go into one pass, and which points share their first blocks, is decided below this
   file (`memory.py`) and changes the numbers by rounding only.
4. Four classes share this work:

       `Function`      here             checks arguments, shapes results, asks its evaluator
       `Evaluator`     evaluator.py     runs the passes; what is asked for twice is run twice
       `Evaluations`   cache.py         a `Function` with a memory, which public calls use
       `Remembering`   remembering.py   its evaluator: runs only what it does not know yet
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Real
from torch import Tensor

from lens_lora.arguments import numbers_of, whole
from lens_lora.core.adapter.adapter import Adapter
from lens_lora.core.function import (
    forward,
    gate_graph,
    many_gates,
    memory,
    modes,
    reverse,
    rounding,
    tangents,
)
from lens_lora.core.function.corners import (
    Corners,
    Gates,
    Points,
    SitesOfCorners,
    corner_gates,
    is_differentiated,
    one_point,
    points_of,
)
from lens_lora.core.function.evaluator import Evaluator
from lens_lora.core.function.exclusive import exclusive
from lens_lora.core.function.logits import logits_at_points
from lens_lora.core.function.many_gates import Bar
from lens_lora.core.function.noise import Noise, scale_of_each
from lens_lora.core.function.own_passes import OwnPasses
from lens_lora.core.function.pulled_back import Covector, pulled_back_in_groups
from lens_lora.core.model import Gauge, LoraLens, by_axes, extensions, run_alone
from lens_lora.core.model.sites import Site
from lens_lora.core.readout import LogProbs, Prompts, PromptTokens, Reading, Readout
from lens_lora.core.results.base import Header, Labels
from lens_lora.errors import ArgumentError, MissingPartError, require_finite

# A direction is given as gates are, or several of them: then their axes come first.
_Number = float | Real[Tensor, ""]
Direction = _Number | Real[Tensor, "*direction site"] | Mapping[str, _Number]


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Function:
    """A readout of the logits as a function of the gates, g(ε); from `lens.function`.

    Gates are a number for every site, a tensor [site], {site name or glob: number} with all other
    sites at 0, or a tensor [*point, site] of many points. Every result has the axes of the points
    first, then the prompts.

    It keeps no number: what is asked for twice is run twice. Every call runs the model under the
    hooks that are on it at that moment, including yours.

        >>> g = lens.function("The capital of France is", margin)  # doctest: +SKIP
        >>> base, adapted = g.ends  # doctest: +SKIP
        >>> g({"*.attn.*": 1.0}) - base  # what the attention modules do alone  # doctest: +SKIP

    Attributes:
        lens: the adapter over the model.
        prompts: the prompts that are asked about, as tokens.
        rows: the tokens that are run: the prompts, followed by their answers if those are read.
        readout: what is read from the logits; None for f alone.
        progress: whether long calls show a bar.
    """

    lens: LoraLens
    prompts: Prompts
    rows: Prompts
    readout: Readout | None = None
    _reading: Reading | None = None
    progress: bool = True

    def __repr__(self) -> str:
        read = "logits"
        if self.readout is not None:
            read = f"{self.readout.label}, in {self.readout.units}"
        return f"{type(self).__name__}({read}; {self.prompts!r}; {len(self.lens.sites)} gates)"

    @property
    def reading(self) -> Reading:
        """The rows that are run, and how g of each prompt is read from their logits.

        Raises:
            MissingPartError: a function without a readout.
        """
        if self._reading is None:
            raise MissingPartError(
                "this function has no readout, so it has logits and tangents alone",
                remedy="make it with lens.function(prompts, readout), or of the same prompts with "
                "f.about(readout).",
            )
        return self._reading

    def require_reading(self) -> Reading:
        """`reading` as a method, for the Protocol of `g.passes`.

        A runtime protocol reads every property as isinstance() checks it, and this one may raise.

        Raises:
            ArgumentError: a function without a readout.
        """
        return self.reading

    # --- Values

    @exclusive
    def __call__(self, gates: Gates) -> Float[Tensor, "*point batch"]:
        """Evaluate g at these gates, in the readout's units.

        Cost: at most one forward pass a point, batched. Points that agree in the first blocks share
        the work of those blocks, if the model's batch may grow on the way.

        Args:
            gates: a number, [site], {site name or glob: number}, or [*point, site]. If they need a
                gradient (or carry a tangent), so does the result, and the graph of all points is
                kept.

        Raises:
            SiteError, ArgumentError: as for `LoraLens.gates`; or a function without a readout.
            NumericsError: a readout that is not finite.
        """
        points, shape = points_of(self.lens, gates)
        if is_differentiated(points):
            return self._evaluator.with_graph(points).view(*shape, -1)
        return self._evaluator.values(points, "values of g").reshape(*shape, -1)

    @exclusive
    def along(
        self, scales: Sequence[float] | Float[Tensor, " point"]
    ) -> Float[Tensor, "point batch"]:
        """Evaluate g(ε·1), with the same strength ε at every site. A forward pass each, batched.

        Args:
            scales: the strengths; 0 is the base model, 1 the adapted one.

        Raises:
            ArgumentError: anything but a list of finite numbers.
        """
        strengths = numbers_of("scales", scales)
        if not strengths:
            raise ArgumentError(
                "scales=[] asks for nothing", remedy="give at least one strength ε."
            )
        return self._evaluator.along(strengths)

    @property
    def ends(self) -> Float[Tensor, "end=2 batch"]:
        """The two ends, g(0) of the base and g(1) of the adapted model. Two forward passes."""
        return self.along([0.0, 1.0])

    @property
    def shift(self) -> Float[Tensor, " batch"]:
        """The exact shift g(1) − g(0). Two forward passes."""
        base, adapted = self.ends
        return adapted - base

    @exclusive
    def corners(
        self,
        which: Corners | Gates | None = None,
        *,
        on: SitesOfCorners | None = None,
        off: SitesOfCorners | None = None,
    ) -> Float[Tensor, "corner batch"]:
        """Evaluate g at corners: some sites as in the adapted model, the others as in the base.

            g.corners("leave_one_out")                # g(1 − e_l): each site off in turn
            g.corners(off=[("blocks.3.attn.q", "blocks.3.attn.k"), "blocks.4.*"])
            g.corners(on=["*.attn.*", "*.mlp.*"])     # the attention alone, the MLPs alone

        Cost: one forward pass a corner; for every site in turn about half of that, if the model's
        batch may grow on the way.

        Args:
            which: 'add_one' for g(e_l), or 'leave_one_out' for g(1 − e_l), of each site in the
                order of `lens.sites`; or the gates of each corner, [corner, site].
            on: the sites that are on at each corner, as a name, a glob, or several; the others are
                off.
            off: the sites that are off at each corner; the others are on.

        Raises:
            ArgumentError: none, or more than one, of which, on and off.
            SiteError: a name or a glob that matches no site; the nearest names are given.
        """
        points = corner_gates(self.lens, which, on, off)
        name_on_bar = "corners"
        if isinstance(which, str):
            name_on_bar = which.replace("_", " ")
        return self._evaluator.values(points, name_on_bar)

    @exclusive
    def each_prompt(self, gates: Float[Tensor, "point batch site"]) -> Float[Tensor, "point batch"]:
        """Evaluate g where each prompt has its own gates. At most a forward pass a point, batched.

        Args:
            gates: the gates of each prompt at every point.

        Raises:
            ArgumentError: gates of another shape, NaN or infinite.
            SiteError: gates for another number of sites.
            NumericsError: a readout that is not finite.
        """
        finite = self.lens.gates(gates)
        if finite.ndim != 3 or finite.shape[1] != self.reading.batch:
            raise ArgumentError(
                f"gates of shape {tuple(gates.shape)} for {self.reading.batch} prompts and "
                f"{len(self.lens.sites)} sites",
                remedy="give [point, prompt, site]; gates of all prompts go to g(gates).",
            )
        by_prompt = finite.movedim(1, 0)
        values = many_gates.gated_readout(
            self.lens, self.reading, by_prompt, bar=Bar(shown=self.progress)
        )
        return values.T

    @exclusive
    def logits(self, gates: Gates) -> Float[Tensor, "*point row *slot vocab"]:
        """The logits f at these gates, where they are read: of the next token, or of a response.

        A row is a prompt; `AnswerMargin` has two rows for each. With a response there is one slot
        for each of its tokens, with the logits from which that token is drawn. A row with fewer
        tokens repeats its last slot, and `rows.read_mask` says which slots are real. The dtype is
        float32 or better. One forward pass a point.

        Args:
            gates: the gates, as for g itself.

        Raises:
            NumericsError: logits that are not finite.
        """
        points, shape = points_of(self.lens, gates)
        held_bytes = 0 if self._reading is None else self._reading.held_bytes
        values = logits_at_points(self.lens, self.rows, points, held_bytes)
        require_finite(values, "the model's output")
        return values.view(*shape, *values.shape[1:])

    @exclusive
    def token_values(self, gates: Gates) -> Float[Tensor, "*point batch token"]:
        """The log-probability ℓ_t = log p(y_t | x, y_<t) of each token t of a response.

        It is zero beyond the end of a prompt's own response. Cost: as for g itself.

        Args:
            gates: the gates, as for g itself.

        Raises:
            ArgumentError: the readout is not of one response for each prompt.
            NumericsError: a value that is not finite.
        """
        self.require_one_response()
        points, shape = points_of(self.lens, gates)
        by_prompt = many_gates.gated_readout(
            self.lens,
            self.reading,
            points,
            read=forward.read_tokens,
            bar=Bar("log-probabilities of tokens", self.progress),
        )
        values = by_prompt.movedim(1, 0)
        return values.reshape(*shape, *values.shape[1:])

    # --- Slopes

    @exclusive
    def slopes(
        self,
        at: Gates = 0.0,
        by: tuple[str, ...] | str = (),
        *,
        gauge: Gauge = "trained",
        weights: Float[Tensor, "*sum point"] | None = None,
        under: AbstractContextManager[object] | None = None,
    ) -> Float[Tensor, "*point_or_sum batch site *by"]:
        """∂g/∂ε_l of every site (note, Prop. 1), by reverse mode, in the readout's units.

        At 0 it predicts what adding a module to the base does; at 1, what taking it away from the
        adapted model does.

        Cost: one forward and one backward pass a point, whatever the number of sites and parts. By
        token, one backward pass for each token of the response, batched if nothing else is split.

        Args:
            at: the gates at which the derivative is taken, as for g itself.
            by: any of 'position', 'head', 'expert' and 'rank'. Each becomes an axis, in this order,
                whose parts sum to the site's slope. 'token', for `AnswerLogProb`, is the last axis:
                the tokens of the response.
            gauge: what a rank is: 'trained' for the factors' own ranks, or 'svd' for the singular
                directions of ΔW, which are unique.
            weights: one weight for each of several points. The result is then the weighted sum over
                the points, [batch, site, *by], as for an integral along a path. Weights [*sum,
                point] give several sums, [*sum, batch, site, *by]. No more than the slopes of one
                batch of points are held at a time.
            under: a context that is entered while these slopes are computed, such as rules that
                hold attention patterns constant. It may change derivatives, but no value.

        Raises:
            ArgumentError: another axis or gauge; a readout without a slope at 0, such as a `KL`,
                where `at` is 0; weights for other points, or by token.
            ModelStateError: a gradient did not reach some site.
            NumericsError: a derivative that is not finite, naming the site.
        """
        axes = by_axes(by, with_token=True)
        points, shape = points_of(self.lens, at)
        self._require_slope_at(points, is_single=not shape)
        lens = self.lens.in_gauge(gauge)
        with under or contextlib.nullcontext():
            if weights is not None:
                sums = self._evaluator.weighted_slopes(points, weights, axes, lens)
                lens.sites.require_finite(sums.reshape(-1, *sums.shape[weights.ndim :]))
                return sums
            if "token" in axes:
                self.require_one_response()
            values = self._evaluator.slopes(points, axes, lens, remember=under is None)
        lens.sites.require_finite(values.flatten(0, 1))
        return values.view(*shape, *values.shape[1:])

    @exclusive
    def slopes_of(
        self, read: Callable[[Tensor], Float[Tensor, "value row"]], at: Gates = 0.0
    ) -> Float[Tensor, "value row site"]:
        """∂/∂ε_l of each of many values that are read from the logits of one pass.

        Cost: one forward pass and a batched backward pass for each value. If the graph exceeds the
        lens's bound on memory, one more forward pass for each value.

        Args:
            read: maps what `logits` returns, [row, *slot, vocab], to the values of each row.
            at: the gates at which the derivative is taken, one point.

        Raises:
            NumericsError: a derivative that is not finite, naming the site.
        """

        def values() -> Float[Tensor, "value row"]:
            return read(forward.read_logits(self.lens, self.rows))

        return self._slopes_of_each(self.rows, values, at)

    @exclusive
    def slopes_of_tokens(
        self, tokens: Sequence[int], at: Gates = 0.0
    ) -> Float[Tensor, "token batch site"]:
        """∂ℓ_t/∂ε_l of some tokens t of a response, with ℓ_t = log p(y_t | x, y_<t).

        Cost: one forward pass, and a backward pass for each token, batched.

        Args:
            tokens: the indices of these tokens in the response.
            at: the gates at which the derivative is taken, one point.

        Raises:
            ArgumentError: the readout is not of one response for each prompt; or no token, or one
                beyond the longest response.
            NumericsError: a derivative that is not finite, naming the site.
        """
        response = self.require_one_response()
        # In a prompt with a shorter response, a token beyond its end has slope 0.
        longest = 1 if response.slots is None else int(response.slots.max()) + 1
        chosen = [whole("tokens", token, 0) for token in tokens]
        if not chosen or max(chosen) >= longest:
            raise ArgumentError(
                f"tokens={chosen}: expected indices from 0 to {longest - 1}, at least one."
            )

        def values() -> Float[Tensor, "token row"]:
            return forward.differentiable_tokens(self.lens, self.reading)[:, chosen].T

        return self._slopes_of_each(self.reading, values, at)

    def _slopes_of_each(
        self, run: memory.Run, values: Callable[[], Tensor], at: Gates
    ) -> Float[Tensor, "value row site"]:
        gates = one_point(self.lens, at)
        of_each = gate_graph.slopes_of_each(self.lens, run, gates, values, progress=self.progress)
        self.lens.sites.require_finite(of_each.flatten(0, 1))
        return of_each

    @exclusive
    def slopes_of_adapters(
        self,
        adapters: Callable[[], Iterable[Adapter]],
        sites: Sequence[Site],
        like: Sequence[Adapter],
    ) -> Float[Tensor, "adapter batch site"]:
        """∂g/∂ε_l at the base for many adapters, at some of their sites.

        At the base, what a site reads and the gradient at its output do not depend on the adapter,
        so the passes are run once for all adapters.

        Cost: one forward and one backward pass, and one more of each for every adapter of `like`
        that reads or writes where no earlier one does.

        Args:
            adapters: makes the adapters. It is called again for each group of prompts.
            sites: the sites that are returned, in this order; every adapter has them by name.
            like: adapters that together read and write wherever the others do.

        Raises:
            NumericsError: a derivative that is not finite, naming the site.
        """
        return extensions.slopes_of_adapters(self, adapters, sites, like)

    @exclusive
    def pulled_back(
        self, covector: Covector, by: tuple[str, ...] | str = (), *, gauge: Gauge = "trained"
    ) -> tuple[Float[Tensor, "batch site *by"], Float[Tensor, "row *slot vocab"]]:
        """Compute wᵀ J δz_l at the base, with w made of f(0) and its tangent v; and f(0).

        v = Σ_l J δz_l is the first-order shift of the logits. With w = F v, where F is the Fisher
        information of the base's distribution, the values are the shares of vᵀF v.

        Cost: one dual forward pass and one backward pass; two more forward passes if the graph
        exceeds the lens's bound on memory.

        Args:
            covector: computes w from f(0) and v of some rows, and these rows.
            by: any of 'position', 'head', 'expert' and 'rank', as for `slopes`.
            gauge: what a rank is, as for `slopes`.

        Raises:
            ModelStateError: the model has an operation without a forward-mode derivative.
            NumericsError: a derivative that is not finite, naming the site.
        """
        lens = self.lens.in_gauge(gauge)
        values, base_logits = pulled_back_in_groups(lens, self.reading, by_axes(by), covector)
        lens.sites.require_finite(values)
        return values, base_logits

    # --- Tangents, curvature, and g with its graph

    @exclusive
    def tangent(
        self,
        direction: Direction,
        at: Gates = 0.0,
        *,
        read: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "*direction row *slot_and_vocab"]:
        """Σ_l v_l ∂f/∂ε_l: how the logits begin to move along a direction of the gates.

        Direction 1 gives the first-order logit shift of the whole adapter, {name: 1} that of one
        site. The shape is that of `logits`, and so is the unit.

        Cost: one dual forward pass a direction, which takes about 2.5 forward passes; about half of
        that for directions of ones and zeros, which begin at their first block.

        Args:
            direction: v, given as gates are; [*direction, site] for several.
            at: the gates at which the derivative is taken, one point.
            read: what to keep of the tangents, [row, direction, *slot, vocab] → [row, direction,
                *out]. It is called with some directions at a time, so that all are never held.

        Raises:
            ArgumentError: several points in `at`.
            ModelStateError: the model has an operation without a forward-mode derivative.
            NumericsError: a tangent that is not finite.
        """
        directions, shape = points_of(self.lens, direction)
        point = tangents.ExpansionPoint(self.lens, self.rows, one_point(self.lens, at))
        values = tangents.tangents_along(point, directions, read, progress=self.progress)
        require_finite(values, "the tangent of the logits")
        return values.view(*shape, *values.shape[1:])

    @exclusive
    def curvature(
        self, direction: Direction, at: Gates = 0.0
    ) -> Float[Tensor, "*point_and_direction batch site"]:
        """(H v)_l = Σ_m ∂²g/∂ε_l∂ε_m v_m (note, §6, item 4), in the readout's units.

        Its inner product with a second direction w is wᵀHv. If v and w are the indicators of two
        groups of sites, that is the coupling of the groups.

        Cost: one forward and one backward pass a point, and two backward passes for each direction,
        batched. The whole graph of a few prompts is held.

        Args:
            direction: v, given as gates are; [*direction, site] for several.
            at: the gates at which the derivative is taken, [*point, site] for several points.

        Raises:
            ArgumentError: a graph that exceeds the lens's bound on memory.
            NumericsError: a derivative that is not finite, naming the site.
        """
        directions, shape_of_directions = points_of(self.lens, direction)
        points, shape_of_points = points_of(self.lens, at)

        def products(group: Reading) -> Float[Tensor, "some point direction site"]:
            return gate_graph.products_at_points(
                self.lens, group, points, directions, progress=self.progress
            )

        by_prompt = gate_graph.in_groups(self.lens, self.reading, products)
        values = by_prompt.movedim(0, 2)
        return values.reshape(*shape_of_points, *shape_of_directions, *values.shape[2:])

    @exclusive
    def graphed(self, gates: Gates) -> Float[Tensor, "*point batch"]:
        """Evaluate g with its graph, to differentiate by gates or by tensors of your own hooks.

        For a derivative by something other than gates, add a tensor of zeros at a hook point, call
        this within `with model.hooks(…)`, and differentiate. One forward pass, whose whole graph is
        held.

        Args:
            gates: the gates, as for g itself.

        Raises:
            ArgumentError: a graph that exceeds the lens's bound on memory.
        """
        points, shape = points_of(self.lens, gates)
        return self._evaluator.with_graph(points).view(*shape, -1)

    def chosen_mode(self, mode: modes.Mode, readouts: int) -> Literal["forward", "reverse"]:
        """The mode of differentiation; for 'auto', the one that takes less work.

        Args:
            mode: 'auto', 'forward' or 'reverse'.
            readouts: how many numbers are differentiated by every site.

        Raises:
            ArgumentError: another mode.
        """
        return modes.chosen_mode(mode, self.lens, readouts)

    # --- What rounding alone does

    @property
    @exclusive
    def floor(self) -> Float[Tensor, " batch"]:
        """The noise floor σ of `shift`: what rounding alone makes of it. Ten forward passes."""
        base, adapted = self._evaluator.draws_of_ends()
        return rounding.noise_of_ends(base, adapted)

    @exclusive
    def noise(
        self, coefficients: Sequence[float], at: float | Sequence[float] = 1.0
    ) -> Float[Tensor, " batch"]:
        """The noise σ of a sum Σ_k c_k g(ε_k), from rounding alone: √(Σ_k c_k² σ(at_k)²).

        A sum below 3σ may be rounding and nothing else. An interaction of two modules, g(1) − g(1 −
        e_l) − g(1 − e_m) + g(1 − e_l − e_m), has noise((1, −1, −1, 1), at=1).

        σ of one value is measured, not assumed: four times, relative noise of the size of the
        model's rounding is added to the embedding and to what each block reads. It is measured at
        gates ε·1, and may be different at gates far from these, where a large adapter is mostly
        off. For a `KL`, σ at 0 is how far the value at 1 moves with the rounding of the base's
        distribution.

        Cost: five forward passes for each different strength, batched.

        Args:
            coefficients: c_k, one for each value of g in the sum.
            at: the strength ε near which the values lie, one for all or one for each.

        Raises:
            ArgumentError: no coefficients, or another number of strengths.
        """
        factors = numbers_of("coefficients", coefficients)
        scales = scale_of_each(at, len(factors))
        sigma: dict[float, Tensor] = {}
        for scale in dict.fromkeys(scales):
            (draws,) = self._evaluator.draws([scale])
            sigma[scale] = rounding.noise_of_draws(draws)
        squares = [
            (factor * sigma[scale]).square() for factor, scale in zip(factors, scales, strict=True)
        ]
        return torch.stack(squares).sum(0).sqrt()

    @exclusive
    def remainder_noise(self, slopes: Float[Tensor, "batch site"]) -> Noise:
        """The noise σ of g(ε) − g(0), and of what first order leaves of it, at any strength ε.

            rest = g.along(scales) - base - scales[:, None] * slopes.sum(1)
            floor = g.remainder_noise(slopes).of_remainder(scales)  # [batch, scale]

        First order has rounding of its own, which is most of σ for an adapter with large updates.

        Cost: fourteen forward and four backward passes, batched.

        Args:
            slopes: ∂g/∂ε_l at the base, `slopes()`.
        """
        base, adapted = self._evaluator.draws_of_ends()
        of_shift = rounding.noise_of_ends(base, adapted)
        if self.reading.holds_base:
            # At small ε what counts is how far D(0) itself moves, which the slopes' draws show.
            base = self._evaluator.along([0.0])
        near_base, of_slopes = rounding.first_order_noise(
            self.lens, self._evaluator.slope_draws(), base, slopes
        )
        return Noise(of_shift, near_base, of_slopes)

    @exclusive
    def curvature_noise(
        self, half_row_sums: Float[Tensor, "batch site"]
    ) -> Float[Tensor, " batch"]:
        """The noise σ, from rounding alone, of ½ 1ᵀH1 at the base: what second order adds.

        Cost: four forward and eight backward passes, batched.

        Args:
            half_row_sums: ½ (H 1)_l at the base, `curvature(1.0) / 2`.
        """
        return rounding.curvature_noise(self.lens, self.reading, half_row_sums)

    # --- Passes of your own, some of the prompts, another readout or adapter

    @property
    def passes(self) -> OwnPasses:
        """Passes over the same rows under hooks of your own."""
        return OwnPasses(self)

    def groups(
        self, *, graph: bool = False, copies: int = 1, beside: int | None = None
    ) -> list[Function]:
        """The prompts in groups, each small enough for one pass within the lens's bound on memory.

        The pass is one of three:

            g.groups(copies=2)              # a forward pass, with two copies of the rows
            g.groups(graph=True)            # a forward pass with its graph, and a backward pass
            g.groups(graph=True, beside=n)  # the same through values that carry tangents

        Args:
            graph: whether there is a backward pass.
            copies: how many copies of the rows a forward pass holds. A graph is always of one.
            beside: the bytes that are held for each row beside the graph. If they are given, there
                is a backward pass.

        Raises:
            ArgumentError: rows that have to run together exceed the bound.
        """
        if beside is not None:
            readings = memory.groups_beside(self.lens, self.reading, beside)
        elif graph:
            readings = memory.graph_groups(self.lens, self.reading)
        else:
            readings = memory.pass_groups(self.lens, self.reading, copies)
        groups: list[Function] = []
        first = 0
        for reading in readings:
            end = first + reading.batch
            groups.append(self._with_prompts(range(first, end), reading))
            first = end
        return groups

    @staticmethod
    def joined(
        of_groups: Sequence[Float[Tensor, "_some site ..."]],
    ) -> Float[Tensor, "batch site ..."]:
        """Join the slopes of `groups`, with zeros for the positions that a shorter group lacks.

        Args:
            of_groups: the slopes of each group.
        """
        return reverse.join_groups(of_groups)

    def only(self, prompts: Sequence[int]) -> Function:
        """The same function of some of the prompts.

        A readout of your own may read all prompts together; then all of them are kept.

        Args:
            prompts: their indices, each once and in increasing order.

        Raises:
            ArgumentError: indices that are missing, repeated, out of order or out of range.
        """
        indices = self._increasing_prompts(prompts)
        reading = self.reading.only(torch.tensor(indices))
        reads_all_together = reading is self.reading
        if reads_all_together:
            return self
        return self._with_prompts(indices, reading)

    def _increasing_prompts(self, prompts: Sequence[int]) -> list[int]:
        """The indices of some prompts, checked: rows and prompts would be mispaired otherwise."""
        indices = [whole("prompts", index, 0) for index in prompts]
        is_increasing = all(first < second for first, second in itertools.pairwise(indices))
        if not indices or not is_increasing or indices[-1] >= self.reading.batch:
            raise ArgumentError(
                f"prompts={indices}: expected indices in increasing order, each once, of "
                f"{self.reading.batch} prompts."
            )
        return indices

    def _with_prompts(self, prompts: Sequence[int], reading: Reading) -> Function:
        """The same function of these prompts alone, whose reading is known."""
        chosen = self.prompts.chosen(prompts)
        return self._changed(prompts=chosen, rows=reading.rows, _reading=reading)

    def about(
        self, readout: Readout | Callable[[Tensor], Tensor], reading: Reading | None = None
    ) -> Function:
        """The same prompts with another readout: look up its tokens, and make the rows it runs.

        The new function begins without a memory. No pass, unless the readout is a `KL`: it takes
        one, for the base's distribution.

        Args:
            readout: a readout; or a function of what `logits` returns, [row, *slot, vocab], that
                gives one number for each row.
            reading: the rows that are run, and how g is read from their logits, where that is known
                already. By default the readout makes it.

        Raises:
            TokenError, ArgumentError: a readout that does not fit the model, or the prompts.
        """
        # A readout may run the model, as a `KL` does; no other call uses the model meanwhile.
        return run_alone(self.lens, functools.partial(self._about, readout, reading))

    def _about(
        self, readout: Readout | Callable[[Tensor], Tensor], reading: Reading | None
    ) -> Function:
        """The work of `about`, while no other call uses the model."""
        if callable(readout) and not isinstance(readout, Readout):
            return self._read_by_function(readout)
        required = Readout.required(readout)
        if reading is None:
            return self._read_by(required)
        return self._with_reading(required, reading)

    def _read_by_function(self, function: Callable[[Tensor], Tensor]) -> Function:
        """The same rows, each read by a function of the caller's."""
        readout = Readout.of(function)
        of_logits = readout.of_logits(self.lens.model, self.rows.batch)
        return self._with_reading(readout, Reading.one_row_each(self.rows, of_logits))

    def _read_by(self, readout: Readout) -> Function:
        """The same prompts in the rows that the readout makes of them."""
        readout = readout.on(self.prompts)
        logits = self.of_rows(self.prompts)
        # For a readout inside the model, only the sites that can move it have gates. A readout is
        # promised a `LogitFunction`, and given this one it returns a `Function`.
        f = cast("Function", readout.reaching(logits))
        return f._with_reading(readout, readout.reading_beside(f))

    def _with_reading(self, readout: Readout, reading: Reading) -> Function:
        return self._changed(rows=reading.rows, readout=readout, _reading=reading)

    def with_progress(self, shown: bool) -> Function:
        """The same function, with or without bars.

        Args:
            shown: whether long calls show a bar.
        """
        return self._changed(progress=shown)

    def over(self, lens: LoraLens) -> Function:
        """The same rows under another adapter; a `KL` keeps the base's logits. No pass.

        Args:
            lens: another adapter, or another gauge, over the same model.
        """
        return self._changed(lens=lens)

    def of_rows(self, rows: Prompts) -> Function:
        """The same prompts with other rows, such as with their answers, and no readout. No pass.

        Args:
            rows: what is run in place of the prompts.
        """
        return self._changed(rows=rows, readout=None, _reading=None)

    def _changed(self, **fields: Any) -> Function:
        """The same function but for these fields; it has no memory, also where this one has."""
        return Function(**{**self._fields(), **fields})

    def _fields(self) -> dict[str, Any]:
        """The arguments of this function's constructor, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Function)}

    # --- What results say of it

    def header(self) -> Header:
        """The fields that every measured result has: sites, both ends, and `labels`.

        The ends take two forward passes.
        """
        base, adapted = self.ends
        return {"sites": self.lens.sites, "base": base, "adapted": adapted, **self.labels()}

    def labels(self) -> Labels:
        """The fields of every result of a readout: its name and units, the tokens, the model."""
        readout = self._named_readout()
        return {
            "readout": readout.label,
            "units": readout.units,
            "str_tokens": self.str_tokens,
            "meta": self.lens.describe(self.prompts),
        }

    @property
    def str_tokens(self) -> tuple[tuple[str, ...], ...]:
        """Each prompt's tokens and those of its answer; 'a|b' where two answers differ.

        Each knows which of its tokens are the prompt's, so that titles and stories can quote those.
        """
        if self._reading is None or self.rows is self.prompts:
            return self.lens.str_tokens(self.prompts)
        merged = self._reading.tokens_of(self.lens.str_tokens(self.rows))
        texts = [source.said for source in self.prompts.sources]
        return tuple(map(PromptTokens, merged, texts, self.prompts.asked_lengths))

    def response_tokens(self) -> tuple[tuple[str, ...], ...]:
        """The tokens y_1 … y_T of each prompt's response, as strings.

        Raises:
            ArgumentError: the readout is not of one response for each prompt.
        """
        response = self.require_one_response()
        strings: list[tuple[str, ...]] = []
        for prompt in range(response.batch):
            ids = response.tokens[response.owner == prompt].tolist()
            strings.append(tuple(self.lens.decode(ids)))
        return tuple(strings)

    # --- What is refused

    def require_slope_at_base(self) -> None:
        """Refuse a readout whose slope at ε = 0 says nothing, such as a `KL`. No pass.

        Raises:
            ArgumentError: such a readout; it names what to use instead.
        """
        self._named_readout().require_slope_at_base()

    def require_one_response(self) -> LogProbs:
        """Check that the readout is of one response for each prompt; returns how it is read.

        Raises:
            ArgumentError: another readout.
        """
        read = self.reading.read
        if isinstance(read, LogProbs) and read.is_one_response:
            return read
        raise ArgumentError(
            "by='token' splits the log-probability of one response, and the readout is "
            f"{self._named_readout().label}",
            remedy="for the tokens of the prompt use by='position'; for those of a response "
            "AnswerLogProb(response), for a margin once for each answer.",
        )

    def _named_readout(self) -> Readout:
        _ = self.reading  # This refuses a function without a readout.
        assert self.readout is not None, "a reading has a readout"
        return self.readout

    def _require_slope_at(self, points: Points, *, is_single: bool) -> None:
        """Refuse a readout without a slope at the base if that is the only point."""
        # Whether the point is 0 is read from the device only for such a readout.
        if self._named_readout().no_slope_at_base and is_single and not bool(points.any()):
            self.require_slope_at_base()

    # --- How it is evaluated; `Evaluations` overrides these two

    def require_same_model(self) -> None:
        """Check that the model has not changed since the lens was made.

        Raises:
            ModelStateError: it has; the error names what changed.
        """
        self.lens.check_state()

    @property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.lens, self.reading, self.progress)
