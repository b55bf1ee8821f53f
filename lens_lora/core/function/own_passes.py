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
    """A function as these passes need it: its rows, and how g is read from them.

    A check of this protocol at run time evaluates properties, so whatever may raise is a method.
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
        """Check that the readout is of one response for each prompt."""
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
        """Check that the model has not changed since the lens was made."""
        self.g.require_same_model()

    # --- How much fits into one pass

    def rows_at_once(
        self, kind: memory.Pass = "plain", *, tokens: int | None = None, logits: bool = True
    ) -> int:
        """How many of the rows fit into one pass, within the lens's bound on memory.

        Args:
            kind: 'plain' for a forward pass, 'graph' for a forward and a backward pass, 'dual' for
                a pass of dual numbers.
            tokens: the largest number of tokens of one pass, whatever the bound.
            logits: whether anything is unembedded.

        Raises:
            ArgumentError: the bound has no room for one row.
        """
        rows = self.rows if logits else dataclasses.replace(self.rows, reads=None)
        longest = rows.tokens.shape[1]
        most = rows.batch * longest if tokens is None else tokens
        fitting = memory.tokens_at_once(self.lens, rows, most, kind)
        return min(rows.batch, max(1, fitting // longest))

    def tokens_at_once(self, most: int = memory.ROW_TOKENS, kind: memory.Pass = "plain") -> int:
        """How many tokens of these rows fit into one pass, within the lens's bound on memory.

        Args:
            most: the largest number of tokens of one pass, whatever the bound.
            kind: the kind of pass, as for `rows_at_once`.

        Raises:
            ArgumentError: the bound has no room for one row.
        """
        return memory.tokens_at_once(self.lens, self.rows, most, kind)

    @property
    def copies_at_once(self) -> int:
        """How many copies of all rows fit into one forward pass, within the lens's bound."""
        return memory.rows_at_once(self.lens, self.reading)

    @property
    def graph_bytes(self) -> float:
        """About how many bytes the graph of g takes, including what the readout holds."""
        return memory.graph_bytes(self.lens, self.reading)

    # --- Forward

    @exclusive
    def logits(self, *, under: Under = None) -> Float[Tensor, "row *slot vocab"]:
        """The logits where the rows are read. One forward pass over all of them.

        Args:
            under: a context that is entered for the pass alone, such as gates and hooks.
        """
        with torch.no_grad(), _entered(under):
            return forward.read_logits(self.lens, self.rows)

    @exclusive
    def side_by_side(self, copies: int, *, under: Under = None) -> Float[Tensor, "batch copy"]:
        """Evaluate g for several copies of each row, r0 r0 … r1 r1 …, in one forward pass.

        Args:
            copies: the number of copies; `copies_at_once` of them fit.
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

        If gradients are computed, the graph is kept and all prompts run together. Otherwise they
        run in groups that fit within the lens's bound on memory.

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
        """Run one forward pass without a graph, for what `watch` sees.

        Args:
            watch: called at every place where a site writes, with the index of the injection
                (`lens.injections`), the output there and what the site reads. What it returns
                replaces the output; None leaves it as in the base model.
            under: a context that is entered for the pass alone, such as hooks.
            logits: False unembeds nothing, unless a hook is on the unembedding.
        """
        with torch.no_grad(), _entered(under), self.lens.injected(watch):
            if logits:
                forward.read_logits(self.lens, self.rows)
            else:
                forward.run_without_logits(self.lens, self.rows)

    @exclusive
    def observe_tangents(self, direction: Scale, at: Scale = 0.0, *, under: Under = None) -> None:
        """Run one pass of dual numbers along a direction of the gates, for what hooks see.

        In a hook, `tangent_of(activation)` is the derivative Σ_l v_l ∂h/∂ε_l at that hook point.
        Nothing is unembedded, unless a hook is on the unembedding.

        Args:
            direction: v, given as gates are; or [row, site], one for each row.
            at: the gates at which the derivative is taken; or [row, site], those of each row.
            under: a context that is entered for the pass alone: the hooks.

        Raises:
            SiteError: gates or directions for another number of rows.
            ModelStateError: the model has an operation without a forward-mode derivative.
        """
        gates = self.lens.gates_of_rows(at, self.rows.batch)
        direction_of_gates = self.lens.gates_of_rows(direction, self.rows.batch)
        with dual_forward():
            dual = JointInject(self.lens, gates, direction_of_gates)
            with self.lens.injected(dual), _entered(under):
                forward.run_without_logits(self.lens, self.rows)

    def dual_level(self) -> AbstractContextManager[None]:
        """Within the block your hooks may make dual numbers, to which torch's own rules apply.

        For derivatives along a direction of the gates, `observe_tangents` is faster.
        """
        return dual_level()

    @exclusive
    def record(
        self, points: Iterable[str], at: Scale, in_full: Iterable[str] | None = None
    ) -> recording.Recording:
        """The activations at hook points. One forward pass, in groups that fit within the bound.

        Args:
            points: the names of the points.
            at: the gates of all rows, or [row, site], those of each row.
            in_full: the points that must hold activations with the batch as first axis; any other
                point that does not is left out. By default all must.

        Raises:
            ModelStateError: a point that must hold such activations does not.
            SiteError: gates for another number of rows.
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
        """The points that hold [row, pos, …], with an entry for each token. A pass of one token.

        A point whose tensor all rows share, such as rotary angles, is left out.

        Args:
            kept: what the points held in these rows.
            points: the points that fired.
            in_full: the points that were named in full, which must hold such activations.
            at: the gates of the recording.

        Raises:
            ModelStateError: a point named in full holds no activations by position, or no point
                does.
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
        """Visit each site in a backward pass; returns g. One forward and one backward pass.

        The slope of a site is the sum of weight · ⟨G, δ(z)⟩ over the places where it writes;
        `SlopeSums(g.lens, g.rows, axes).visit` is a visitor that adds them up.

        Args:
            visitor: called with the place (an `Injection`), its weight (None for 1), the gradient
                G = ∂g/∂(output) [row, pos, out], and z, what the site reads [row, pos, in].
            at: the gates, one point.
            write: what each site writes in place of ε_l ΔW_l z_l; it should have the same value.
            primal: takes the value out of a tensor in which `write` carries something beside it.
            under: a context that is entered for the passes alone, such as hooks.
            require_all: whether a site that no gradient reaches is refused.

        Raises:
            ModelStateError: a gradient did not reach some site.
        """
        memory.require_rows_of_graph(self.lens, self.reading)
        gates = one_point(self.lens, at)

        def value() -> Float[Tensor, "row value=1"]:
            return forward.read_for_slopes(self.lens, self.reading)[:, None]

        with _entered(under):
            passes = reverse.tapped(self.lens, self.reading, gates, write, primal)
            values, taps = reverse.go_back(passes, value, lambda column: visitor)
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
        """Visit each site in a backward pass from the log-probability of each response token.

        One forward pass, and one backward pass for each token.

        Args:
            visitor_of: turns the index of a token into the visitor of its backward pass; see
                `visit`.
            at: the gates, one point.
            require_all: whether a site that no gradient reaches is refused.

        Raises:
            ArgumentError: the readout is not of one response for each prompt.
            ModelStateError: a gradient did not reach some site.
        """
        self.g.require_one_response()
        memory.require_rows_of_graph(self.lens, self.reading)
        gates = one_point(self.lens, at)

        def tokens() -> Float[Tensor, "row token"]:
            return forward.differentiable_tokens(self.lens, self.reading)

        passes = reverse.tapped(self.lens, self.reading, gates)
        _, taps = reverse.go_back(passes, tokens, visitor_of)
        if require_all:
            taps.require_all_seen()

    @exclusive
    def gradient(self, of: Tensor, *, under: Under = None) -> Tensor:
        """∂(Σ g)/∂t by a tensor t that your hooks use. One forward and one backward pass.

        Args:
            of: t, a leaf that needs a gradient.
            under: a context that is entered for the passes alone: gates, and the hooks that use t.
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

        One forward pass, whose whole graph is held. Your hooks need not be on the model any more
        when you differentiate. `Function.graphed` has second derivatives as well.

        Args:
            at: the gates, one point.
            under: a context that is entered for the pass alone: the hooks.

        Raises:
            ArgumentError: a graph that exceeds the lens's bound on memory.
        """
        memory.require_graph(self.lens, self.reading)
        # A block that ran again on the way back would run without the hooks.
        self.lens.check_backward(once=False)
        inject = ScaleInject(self.lens.plan, one_point(self.lens, at))
        with torch.enable_grad(), self.lens.injected(inject), _entered(under):
            return forward.read_for_slopes(self.lens, self.reading)


def _entered(under: Under) -> AbstractContextManager[object]:
    return contextlib.nullcontext() if under is None else under
