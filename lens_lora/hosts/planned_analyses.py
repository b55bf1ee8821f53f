"""The passes and the memory that analyses of a model will take, before it is loaded.

Each row of `_works` is a public analysis of the margin of two tokens on one prompt. It has the
number of passes, which a test counts, and the kinds of passes that decide the peak. How many bytes
these take is computed by the planner (`ModelSizes`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from lens_lora.core import ModelSizes

# A function that computes bytes from the sizes of a model and the number of tokens of the prompt.
_Bytes = Callable[[ModelSizes, int], float]


@dataclasses.dataclass(frozen=True)
class PlannedAnalysis:
    """The cost of one analysis of one prompt.

    Attributes:
        name: the name of the public call.
        forward: the number of forward passes, including those with a graph or dual numbers.
        backward: the number of backward passes.
        peak: the bytes at the peak, beside weights and adapter; NaN if the bound is too low for it.
        least: the lowest bound, in bytes, within which it can run.
    """

    name: str
    forward: int
    backward: int
    peak: float
    least: float


@dataclasses.dataclass(frozen=True)
class _Work:
    """An analysis, its passes, and its bytes.

    Attributes:
        name: the name of the public call.
        forward, backward: the number of its passes over the prompt.
        peak: its bytes as the planner divides its passes.
        least: its bytes if as little as possible runs at once.
    """

    name: str
    forward: int
    backward: int
    peak: _Bytes
    least: _Bytes


def planned_analyses(sizes: ModelSizes, tokens: int) -> list[PlannedAnalysis]:
    """Plan each analysis of the margin of two tokens on one prompt.

    Args:
        sizes: the sizes of the model, and how it is run.
        tokens: how many tokens the prompt has.
    """
    unbounded = dataclasses.replace(sizes, max_memory=None)
    planned: list[PlannedAnalysis] = []
    for work in _works(sizes.sites):
        least = work.least(unbounded, tokens)
        has_room = sizes.max_memory is None or least <= sizes.max_memory
        peak = work.peak(sizes, tokens) if has_room else math.nan
        planned.append(PlannedAnalysis(work.name, work.forward, work.backward, peak, least))
    return planned


def _works(sites: int) -> list[_Work]:
    """The analyses with the passes that a test counts, including those for noise floors."""
    return [
        _Work("a forward pass", 1, 0, _forward(1), _forward(1)),
        _Work("first_order", 2, 1, _slopes(1), ModelSizes.slopes_rerun),
        # Nodes at 3, 5 and 9 strengths, each nested in the next; the last four go together.
        _Work("path_attribution", 17, 9, _slopes(4), ModelSizes.slopes_rerun),
        # Five with a graph (first order and four draws of it), 30 along the path (22 strengths,
        # and four draws at each end), and at most six for a flip, which mostly takes two or four.
        _Work("fact_margin", 41, 5, _largest(_slopes(5), _forward(30)), ModelSizes.slopes_rerun),
        _Work("patch_sites", sites + 10, 0, _branches(sites), _forward(2)),
        _Work("kl_shares", 8, 2, ModelSizes.dual_graph, ModelSizes.dual),
        _Work("second_order", 40, 15, ModelSizes.second, ModelSizes.second),
    ]


def _forward(copies: int) -> _Bytes:
    """The bytes of forward passes over several copies of the prompt at once."""
    return lambda sizes, tokens: sizes.forward(tokens, copies)


def _branches(points: int) -> _Bytes:
    """The bytes of passes to several points, which share their first blocks."""
    return lambda sizes, tokens: sizes.branches(tokens, points)


def _slopes(copies: int) -> _Bytes:
    """The bytes of forward and backward passes over several copies of the prompt at once."""
    return lambda sizes, tokens: sizes.slopes(tokens, copies)


def _largest(*parts: _Bytes) -> _Bytes:
    """The largest bytes among passes that run one after another."""
    return lambda sizes, tokens: max(part(sizes, tokens) for part in parts)
