"""Passes over the rows of a function under hooks of your own: `g.passes`.

    f, g                 as the model computes them under your hooks   `logits`, `side_by_side`
    g                    where sites write what you say                `written`
    h                    what hook points hold                         `record`, `observe`
    h + ḣd               the same in dual numbers                      `observe_tangents`
    G = ∂g/∂(output_l)   with what the site reads, on the way back     `visit`, `visit_tokens`
    ∂g/∂t                of a tensor t that your hooks use             `gradient`, `with_graph`

1. Every method runs all rows of the function together. `rows_at_once`, `copies_at_once` and
   `tokens_at_once` say how many the bound of the lens has room for, and `Function.groups` divides
   the prompts by it.
2. `under=` takes a context, such as `attached(lens.model, hooks)` or `lens.injected(write)`, which
   holds during the passes and no longer.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function import forward, memory, recording, reverse
from lens_lora.core.function.corners import one_point
from lens_lora.core.function.duals import dual_forward, dual_level
from lens_lora.core.function.exclusive import OverALens, exclusive
from lens_lora.core.function.rerun import blocks_rerun
from lens_lora.core.function.tangents import JointInject
from lens_lora.core.model import Inject, LoraLens, Scale, ScaleInject
from lens_lora.core.readout import Prompts, Reading
from lens_lora.errors import require_finite

Under = AbstractContextManager[object] | None


@runtime_checkable
class OfRows(OverALens, Protocol):
    """A function as these passes need it: its rows, and how it is read from them.

    A check at run time evaluates properties, so what a function may lack is a method.
    """

    @property
    def rows(self) -> Prompts:
        """The rows that are run."""
        ...

    def require_reading(self) -> Reading:
        """How g of each prompt is read from the logits of the rows.

        Raises:
            ArgumentError: a function without a readout.
        """
        ...

    def require_one_response(self) -> object:
        """Refuse a readout of something else than one response for each prompt."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class OwnPasses:
    """Passes over the rows of a function under hooks of your own; from `g.passes`.

    Attributes:
        g: the function.
    """

    g: OfRows

    @property
    def lens(self) -> LoraLens:
        """The adapter over the model."""
        return self.g.lens

    @property
    def rows(self) -> Prompts:
        """The rows that are run."""
        return self.g.rows

    @property
    def reading(self) -> Reading:
        """How g of each prompt is read from the logits of the rows."""
        return self.g.require_reading()

    def require_same_model(self) -> None:
        """Check that the model is as it was when the lens was made."""
        self.g.require_same_model()

    # --- How much goes at once

    def rows_at_once(
        self, kind: memory.Pass = "plain", *, tokens: int | None = None, logits: bool = True
    ) -> int:
        """How many of the rows go through the model together within the bound of the lens.

        Args:
            kind: 'plain' for a forward pass, 'graph' for one that is walked back, 'dual' for one of
                dual numbers.
            tokens: the most tokens that go together, whatever the bound.
            logits: whether anything is unembedded.

        Raises:
            ArgumentError: a bound without room for one row.
        """
        rows = self.rows if logits else dataclasses.replace(self.rows, reads=None)
        longest = rows.tokens.shape[1]
        most = rows.batch * longest if tokens is None else tokens
        fitting = memory.tokens_at_once(self.lens, rows, most, kind)
        return min(rows.batch, max(1, fitting // longest))

    def tokens_at_once(self, most: int = memory.ROW_TOKENS, kind: memory.Pass = "plain") -> int:
        """How many tokens of these rows go through the model together, within the bound.

        Args:
            most: the most tokens, whatever the bound.
            kind: as for `rows_at_once`.

        Raises:
            ArgumentError: a bound without room for one row.
        """
        return memory.tokens_at_once(self.lens, self.rows, most, kind)

    @property
    def copies_at_once(self) -> int:
        """How many copies of all rows make one forward pass within the bound of the lens."""
        return memory.rows_at_once(self.lens, self.reading)

    @property
    def graph_bytes(self) -> float:
        """About how many bytes the graph of g takes, with what the readout holds."""
        return memory.graph_bytes(self.lens, self.reading)

    # --- Forward

    @exclusive
    def logits(self, *, under: Under = None) -> Float[Tensor, "row *slot vocab"]:
        """The logits where the rows are read, of one forward pass over all of them.

        Args:
            under: what holds during the pass and no longer, such as gates and hooks.
        """
        with torch.no_grad(), _entered(under):
            return forward.read_logits(self.lens, self.rows)

    @exclusive
    def side_by_side(self, copies: int, *, under: Under = None) -> Float[Tensor, "batch copy"]:
        """Evaluate g where each row runs so many times, r0 r0 … r1 r1 …, in one forward pass.

        Args:
            copies: how often; `copies_at_once` fit.
            under: what makes the copies differ: gates and hooks.

        Raises:
            NumericsError: a readout that is not finite.
        """
        with torch.no_grad(), _entered(under):
            values = forward.read_value(self.lens, self.reading.repeat(copies))
        require_finite(values, "the patched readout")
        return values.unflatten(0, (self.reading.batch, copies))

    @exclusive
    def written(self, write: Inject) -> Float[Tensor, " batch"]:
        """Evaluate g where each site writes what `write` says, not ε_l ΔW_l z_l. One forward pass.

        Where gradients are computed the graph is kept, and all prompts run together; otherwise as
        many of them at a time as the bound of the lens has room for.

        Args:
            write: called at every place where a site writes; see `LoraLens.injected`.

        Raises:
            NumericsError: a readout that is not finite.
        """
        groups = [self.reading]
        if not torch.is_grad_enabled():
            groups = memory.pass_groups(self.lens, self.reading)
        with self.lens.injected(write):
            values = torch.cat([forward.read_value(self.lens, group) for group in groups])
        require_finite(values.detach(), "the readout")
        return values

    @exclusive
    def observe(self, watch: Inject, *, under: Under = None, logits: bool = True) -> None:
        """One forward pass, without a graph, for what `watch` sees of it.

        Args:
            watch: called at every place where a site writes, with the index of the injection
                (`lens.injections`), the output there and what the site reads. What it returns
                takes the place of the output; None leaves it as in the base model.
            under: what holds during the pass and no longer, such as hooks.
            logits: False unembeds nothing, unless a hook is on the unembedding.
        """
        with torch.no_grad(), _entered(under), self.lens.injected(watch):
            if logits:
                forward.read_logits(self.lens, self.rows)
            else:
                forward.run_without_logits(self.lens, self.rows)

    @exclusive
    def observe_tangents(self, direction: Scale, at: Scale = 0.0, *, under: Under = None) -> None:
        """One pass of dual numbers along a direction of the gates, for what hooks see of it.

        `tangent_of(activation)` is then the derivative Σ_l v_l ∂h/∂ε_l at a hook point. Nothing is
        unembedded, unless a hook is on the unembedding.

        Args:
            direction: v, as gates are given; or [row, site], that of each row.
            at: the gates at which the derivative is taken; or those of each row.
            under: what holds during the pass and no longer: the hooks.

        Raises:
            SiteError: gates or directions of another number of rows.
            ModelStateError: the model has an operation without a forward-mode derivative.
        """
        gates = self.lens.gates_of_rows(at, self.rows.batch)
        direction_of_gates = self.lens.gates_of_rows(direction, self.rows.batch)
        with dual_forward():
            dual = JointInject(self.lens, gates, direction_of_gates)
            with self.lens.injected(dual), _entered(under):
                forward.run_without_logits(self.lens, self.rows)

    def dual_level(self) -> AbstractContextManager[None]:
        """Within the block your hooks may make dual numbers, which torch's own rules carry on.

        `observe_tangents` is faster where the numbers are those of a direction of the gates.
        """
        return dual_level()

    @exclusive
    def record(
        self, points: Iterable[str], at: Scale, in_full: Iterable[str] | None = None
    ) -> recording.Recording:
        """The activations at hook points. One forward pass, in groups that fit within the bound.

        Args:
            points: their names.
            at: the gates of all rows, or [row, site], those of each.
            in_full: those that must hold activations with the batch as first axis; others that
                hold something else are left out. Without it, all must.

        Raises:
            ModelStateError: a point that must hold such activations, and does not.
            SiteError: gates of another number of rows.
        """
        return recording.record(self.lens, self.rows, at, points, in_full)

    @exclusive
    def positioned(
        self,
        kept: recording.Recording,
        points: Sequence[str],
        in_full: Sequence[str] = (),
        at: float = 0.0,
    ) -> tuple[str, ...]:
        """The points that hold [row, pos, …], so that one token has one entry. A pass of one token.

        In what all rows share, such as rotary angles, no prompt has an activation of its own.

        Args:
            kept: what the points held in these rows.
            points: those that fired.
            in_full: those that were named in full, which must hold such activations.
            at: the gates of the recording.

        Raises:
            ModelStateError: a point named in full that holds no activations by position, or no
                point that does.
        """
        return recording.positioned(self.lens, self.rows, kept, points, in_full, at)

    # --- Forward and back

    @exclusive
    def visit(
        self,
        visitor: reverse.Visit,
        at: Scale = 0.0,
        *,
        write: Inject | None = None,
        primal: Callable[[Tensor], Tensor] | None = None,
        under: Under = None,
        require_all: bool = True,
    ) -> Float[Tensor, " batch"]:
        """Show each site on the way back; returns g. One forward and one backward pass.

        The slope of a site is the sum of weight · ⟨G, δ(z)⟩ over the places where it writes;
        `SlopeSums(g.lens, g.rows, axes).visit` is a visitor that adds them up.

        Args:
            visitor: called with (the place, an `Injection`; its weight, or None for 1; G = ∂g/∂(its
                output) [row, pos, out]; z, what the site reads [row, pos, in]).
            at: the gates, one point.
            write: what each site writes in place of ε_l ΔW_l z_l; it should have the same value.
            primal: the value of a tensor in which `write` lets something ride along.
            under: what holds during the passes and no longer, such as hooks.
            require_all: whether a site that no gradient reaches is refused.

        Raises:
            ModelStateError: a gradient did not reach some site.
        """
        memory.require_rows_of_graph(self.lens, self.reading)
        gates = one_point(self.lens, at)

        def value() -> Float[Tensor, "row value=1"]:
            return forward.read_for_slopes(self.lens, self.reading)[:, None]

        with _entered(under):
            values, taps = reverse.go_back(
                self.lens, self.reading, gates, value, lambda column: visitor, write, primal
            )
        if require_all:
            taps.require_all_seen()
        return values[:, 0]

    @exclusive
    def visit_tokens(
        self,
        visitor_of: Callable[[int], reverse.Visit],
        at: Scale = 0.0,
        *,
        require_all: bool = True,
    ) -> None:
        """Show each site on the way back from the log-probability of each token of a response.

        One forward pass, and a backward pass for each token.

        Args:
            visitor_of: the visitor of a token's way back, from the token's index; see `visit`.
            at: the gates, one point.
            require_all: whether a site that no gradient reaches is refused.

        Raises:
            ArgumentError: a readout of something else than one response for each prompt.
            ModelStateError: a gradient did not reach some site.
        """
        self.g.require_one_response()
        memory.require_rows_of_graph(self.lens, self.reading)
        gates = one_point(self.lens, at)

        def tokens() -> Float[Tensor, "row token"]:
            return forward.differentiable_tokens(self.lens, self.reading)

        _, taps = reverse.go_back(self.lens, self.reading, gates, tokens, visitor_of)
        if require_all:
            taps.require_all_seen()

    @exclusive
    def gradient(self, of: Tensor, *, under: Under = None) -> Tensor:
        """∂(Σ g)/∂t of a tensor t that your hooks use. One forward and one backward pass.

        Args:
            of: t, a leaf that needs a gradient.
            under: what holds during the passes and no longer: gates, and the hooks that use t.
        """
        runs_again = memory.must_rerun(self.lens, self.reading)
        blocks = blocks_rerun(self.lens) if runs_again else contextlib.nullcontext()
        with torch.enable_grad(), blocks, _entered(under):
            value = forward.read_for_slopes(self.lens, self.reading)
            (gradient,) = torch.autograd.grad(value.sum(), of)
        return gradient

    @exclusive
    def with_graph(self, at: Scale, *, under: Under = None) -> Float[Tensor, " batch"]:
        """Evaluate g with its graph, for first derivatives by activations that your hooks keep.

        One forward pass. The graph is kept whole; your hooks need not be on the model any more when
        you go back through it. `Function.graphed` has second derivatives as well.

        Args:
            at: the gates, one point.
            under: what holds during the pass and no longer: the hooks.

        Raises:
            ArgumentError: a graph beyond the bound of the lens.
        """
        memory.require_graph(self.lens, self.reading)
        # A block that ran again on the way back would run without the hooks.
        self.lens.check_backward(once=False)
        inject = ScaleInject(self.lens.plan, one_point(self.lens, at))
        with torch.enable_grad(), self.lens.injected(inject), _entered(under):
            return forward.read_for_slopes(self.lens, self.reading)


def _entered(under: Under) -> AbstractContextManager[object]:
    return contextlib.nullcontext() if under is None else under
