"""Where a series through a training changes at once: a rule, and nothing else.

A span of consecutive steps is a phase change of a series if, in each of its intervals,

1. the change per step is more than `TIMES` times the median over all intervals, and
2. the change is in one direction, at least `PART` of the range of the series, and more than three
   noise floors,

and the whole span makes up at least `SHARE` of that range. With fewer than four
intervals there is no usual pace to stand out from, and nothing is marked.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lens_lora.results.measured import SIGMAS

__all__ = ["PART", "SHARE", "TIMES", "phase_changes"]

TIMES, PART, SHARE = 3.0, 0.1, 0.25
_FEWEST = 4


def phase_changes(
    steps: Sequence[float], values: Sequence[float], floor: float = 0.0
) -> tuple[tuple[float, float], ...]:
    """(first step, last step) of each phase change.

    Args:
        steps: increasing.
        values: of the series, one a step.
        floor: σ of one value from rounding.
    """
    changes = [b - a for a, b in itertools.pairwise(values)]
    if len(changes) < _FEWEST:
        return ()
    paces = [abs(c) / (b - a) for c, (a, b) in zip(changes, itertools.pairwise(steps), strict=True)]
    usual = sorted(paces)[(len(paces) - 1) // 2]
    span = max(values) - min(values)
    least = max(PART * span, SIGMAS * floor)
    signs = [
        (c > 0) - (c < 0) if pace > TIMES * usual and abs(c) > least else 0
        for c, pace in zip(changes, paces, strict=True)
    ]
    found, start = [], 0
    for sign, run in itertools.groupby(signs):
        end = start + len(list(run))
        if sign and abs(values[end] - values[start]) >= SHARE * span:
            found.append((float(steps[start]), float(steps[end])))
        start = end
    return tuple(found)
