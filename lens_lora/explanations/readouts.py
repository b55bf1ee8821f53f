"""A readout that is not a margin of two answers, explained: of one prompt or several.

It may be any number that is read from the logits, or a `Projection` at a point inside the model.
Each part is the result of the public function of its name for all prompts together; within one
call they share the numbers that several of them need (`core/function/cache.py`).
"""

from __future__ import annotations

from tqdm import tqdm

from lens_lora.core import Evaluations, Function, Readout, first_order
from lens_lora.curvature.second_order import second_order
from lens_lora.explanations.explanation import ReadoutExplanation
from lens_lora.explanations.in_full import SLOW_STEPS, in_full
from lens_lora.explanations.steps import step
from lens_lora.judging.null_test import NullTest, null_test

# The steps of the bar that are always taken, beside null adapters.
_QUICK_STEPS = 5


def explained_readout(
    f: Function, readout: Readout, *, fast: bool, null: int
) -> ReadoutExplanation:
    """The explanation of a readout, for all prompts together.

    Args:
        f: the logits after the prompts.
        readout: the readout to explain.
        fast: leave out the parts that take many passes.
        null: the number of null adapters to compare with.
    """
    g = Evaluations(f.about(readout))
    steps = _QUICK_STEPS
    if null:
        steps += 1
    if not fast:
        steps += SLOW_STEPS
    with tqdm(total=steps, desc="explain", leave=False, disable=not f.progress) as bar:
        quick = _quick(g, null, bar)
        return quick if fast else in_full(g, quick, bar)


def _quick(g: Evaluations, null: int, bar: tqdm) -> ReadoutExplanation:
    """The part of the explanation that takes few passes."""
    silent = g.with_progress(False)
    with step(bar, "first order by position"):
        by_position = first_order.of(silent, by="position")
    with step(bar, "first order by head"):
        by_head = first_order.of(silent, by="head")
    with step(bar, "first order by rank"):
        by_rank = first_order.of(silent, by="rank")
    with step(bar, "first order at the adapted end"):
        adapted_end = first_order.of(silent, at=1.0)
    with step(bar, "the remainder, and second order"):
        second = second_order.of(silent)
    test: NullTest | None = None
    if null:
        with step(bar, f"{null} null adapters"):
            test = null_test.of(g, draws=null)
    return ReadoutExplanation(
        first_order=by_position,
        by_head=by_head,
        by_rank=by_rank,
        adapted_end=adapted_end,
        second_order=second,
        reliability={},
        null=test,
    )
