"""The function g(ε) with a memory: the cache of one public call.

Several analyses ask the same of one g: both ends, g along the path, what rounding does. Within one
public call the model and its hooks do not change, so what is asked for most is kept:

1. g at strengths ε·1, which include the base and the adapted model, with draws of its rounding;
2. ∂g/∂ε_l of whole sites at strengths, with draws of their sum.

These are a few numbers for each prompt and site. Everything else is run again each time: corners,
points at which sites have different gates, and slopes by position, head, expert, rank or token,
which may be large. What is not known yet is run in one batch: the ends ride along with the first
corners, or with the first slopes.

A public call makes g in two lines, whatever its arguments are (`@analysis` writes them for most):

    f = lens.function(prompts)  # tokenises the prompts, and checks the model
    g = Evaluations(f.about(readout))  # looks up the readout's tokens, and begins with no number
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function.function import Function
from lens_lora.core.function.remembering import ByPrompt, Known, Remembering
from lens_lora.core.model import by_axes


class Evaluations(Function):
    """The function g with a memory of its values and whole slopes at strengths ε·1, for one call.

    Corners, split slopes, and slopes under a context of yours are not kept, and are run again when
    they are asked for again.

    Its memory does not notice hooks that you put on the model, or take off it, after it was made.
    `lens_lora.analysis` makes one for each call; `Evaluations.of(g)` makes one of a `Function`.

    Attributes:
        lens, prompts, rows, readout, progress: see `Function`.
    """

    def __init__(self, g: Function) -> None:
        """Begin an empty memory of g.

        Args:
            g: a function with a readout, whose model has not changed since the lens was made.
        """
        super().__init__(**g._fields())
        self._known = Known()
        base = self._named_readout().base_value
        if base is not None:
            self.know(0.0, g.lens.gates(0.0).new_full((g.reading.batch,), base))

    @classmethod
    def of(cls, g: Function) -> Evaluations:
        """The same function with a memory, which is empty unless g has one already.

        Args:
            g: a function with a readout.
        """
        if isinstance(g, Evaluations):
            return g
        g.require_same_model()
        return cls(g)

    def know(self, at: float, value: ByPrompt) -> None:
        """Remember g(ε·1) from a pass that was run for something else.

        Args:
            at: the strength ε.
            value: g there.

        Raises:
            NumericsError: a value that is not finite.
        """
        self._evaluator.know(at, value)

    def slopes_with_noise(
        self, along: Sequence[float] = (), by: tuple[str, ...] | str = ()
    ) -> Float[Tensor, "batch site *by"]:
        """∂g/∂ε_l at the base; the same passes give the draws for `noise` and `remainder_noise`.

        It takes five forward and backward passes, ten forward passes, and one for each strength,
        batched. Slopes of whole sites that are known already are not run again.

        Args:
            along: strengths at which g is evaluated as well.
            by: any of 'position', 'head', 'expert' and 'rank', as in `slopes`.

        Raises:
            NumericsError: a derivative that is not finite, naming the site.
        """
        axes = by_axes(by)
        if not axes and 0.0 in self._known.slopes:
            return self._known.slopes[0.0]
        return self._evaluator.slopes_with_draws(along, axes)

    @property
    def str_tokens(self) -> tuple[tuple[str, ...], ...]:
        """See `Function.str_tokens`."""
        if self._known.str_tokens is None:
            self._known.str_tokens = super().str_tokens
        return self._known.str_tokens

    def with_progress(self, shown: bool) -> Evaluations:
        """The same function and memory, with or without bars.

        Args:
            shown: whether long calls show a bar.
        """
        other = Evaluations(super().with_progress(shown))
        other._known = self._known
        return other

    def require_same_model(self) -> None:
        """Check nothing: the model was checked when the call began and does not change in it."""

    @property
    def _evaluator(self) -> Remembering:
        return Remembering(self.lens, self.reading, self.progress, self._known)
