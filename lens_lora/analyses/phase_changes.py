"""Where a series through a training changes at once: a rule, and nothing else.

A span of consecutive steps is a phase change of a series if, in each of its intervals,

1. the change per step is more than `TIMES` times the median over all intervals, and
2. the change is in one direction, at least `PART` of the range of the series, and more than three
   noise floors: σ of a change is √(σ_a² + σ_b²) of its two values,

and the whole span makes up at least `SHARE` of that range. With fewer than four
intervals there is no usual pace to stand out from, and nothing is marked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from lens_lora.results.measured import SIGMAS

__all__ = ["PART", "SHARE", "TIMES", "phase_changes"]

TIMES, PART, SHARE = 3.0, 0.1, 0.25
_FEWEST = 4


def phase_changes(
    steps: Sequence[float], values: Sequence[float], floors: Sequence[float] | None = None
) -> tuple[tuple[float, float], ...]:
    """(first step, last step) of each phase change.

    Args:
        steps: increasing.
        values: of the series, one a step.
        floors: σ of each value from rounding; none without it.
    """
    changes = [b - a for a, b in itertools.pairwise(values)]
    if len(changes) < _FEWEST:
        return ()
    paces = [abs(c) / (b - a) for c, (a, b) in zip(changes, itertools.pairwise(steps), strict=True)]
    usual = sorted(paces)[(len(paces) - 1) // 2]
    span = max(values) - min(values)
    rounding = [math.hypot(a, b) for a, b in itertools.pairwise(floors or [0.0] * len(values))]
    least = [max(PART * span, SIGMAS * floor) for floor in rounding]
    signs = [
        (c > 0) - (c < 0) if pace > TIMES * usual and abs(c) > enough else 0
        for c, pace, enough in zip(changes, paces, least, strict=True)
    ]
    found, start = [], 0
    for sign, run in itertools.groupby(signs):
        end = start + len(list(run))
        if sign and abs(values[end] - values[start]) >= SHARE * span:
            found.append((float(steps[start]), float(steps[end])))
        start = end
    return tuple(found)
