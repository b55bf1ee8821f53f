"""What analyses take of a model that is not loaded, from its sizes, by the planner's own rules.

The planner of passes (`memory.py`, `footprint.py`) asks a lens for few things: the sizes of its
model, its number types, whether attention patterns are kept, and its bound. `ModelSizes` answers
these from a configuration, so every number here is the one by which the passes of a lens over that
model are divided. There is no second formula.

    plain      rows of a forward pass          copies · in_pass
    graph      a forward and a backward pass   copies · of_graph, or of_rerun within a bound
    dual       a pass of dual numbers          dual_pass + dual_copy
    second     a second derivative             SECOND_ORDER_GRAPHS · of_graph
    quadratic  dual numbers, and a way back    dual_graph_bytes

No pass, and no weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import torch

from lens_lora.core.function import memory
from lens_lora.core.function.footprint import (
    SizedLens,
    dual_copy_bytes,
    dual_pass_bytes,
    footprint_of,
)
from lens_lora.core.model.bridge import BridgeHost
from lens_lora.core.readout.prompts import Prompts
from lens_lora.core.readout.reading import Columns, Reading


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model and of how it is run, as the planner asks a lens for them.

    Attributes:
        n_layers, d_model, d_mlp, n_heads, d_vocab: of the model.
        sites: how many modules the adapter has.
        dtype: of the weights and activations.
        keeps_patterns: whether attention patterns are hook points (eager attention).
        max_memory: a bound in bytes beside the model; None for no bound.
    """

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    d_vocab: int
    sites: int
    dtype: torch.dtype
    keeps_patterns: bool = True
    max_memory: float | None = None

    def as_lens(self) -> SizedLens:
        """What answers the planner's questions as a lens over such a model does."""
        cfg = SimpleNamespace(
            d_model=self.d_model, d_mlp=self.d_mlp, n_heads=self.n_heads, d_vocab_out=self.d_vocab
        )
        host = SimpleNamespace(
            n_layers=self.n_layers,
            keeps_patterns=self.keeps_patterns,
            unembedding=lambda: torch.empty(0),
            pass_overhead=BridgeHost.pass_overhead,
        )
        stand_in = SimpleNamespace(
            model=SimpleNamespace(cfg=cfg),
            host=host,
            plan=SimpleNamespace(activation_rounding=False),
            sites=(),
            dtype=self.dtype,
            gate_dtype=torch.float64 if self.dtype == torch.float64 else torch.float32,
            max_memory=self.max_memory,
        )
        return cast(SizedLens, stand_in)


@dataclasses.dataclass(frozen=True)
class PlannedAnalysis:
    """What one analysis of one prompt will take.

    Attributes:
        name: of the public call.
        forward: forward passes, those of a graph or of dual numbers among them.
        backward: backward passes.
        peak: bytes beside weights and adapter, at the peak; NaN where the bound has no room.
        least: the least bound in bytes within which it can run.
    """

    name: str
    forward: int
    backward: int
    peak: float
    least: float


Bytes = Callable[[SizedLens, Reading], float]


@dataclasses.dataclass(frozen=True)
class _Work:
    """An analysis, its passes, and its bytes.

    Attributes:
        name: of the public call.
        forward, backward: its passes over the prompt.
        peak: its bytes, as the planner divides its passes.
        least: its bytes where as little as possible is run at once.
    """

    name: str
    forward: int
    backward: int
    peak: Bytes
    least: Bytes


def planned_analyses(sizes: ModelSizes, tokens: int) -> list[PlannedAnalysis]:
    """What each analysis of the margin of two tokens will take, on one prompt of so many tokens.

    Args:
        sizes: of the model, and how it is run.
        tokens: of the prompt.
    """
    prompts = Prompts(torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([tokens]))
    margin = Columns(torch.zeros(1, 2, dtype=torch.int64), (1.0, -1.0))
    reading = Reading.one_row_each(prompts, margin)
    lens = sizes.as_lens()
    unbounded = dataclasses.replace(sizes, max_memory=None).as_lens()
    found: list[PlannedAnalysis] = []
    for work in _works(sizes.sites):
        least = work.least(unbounded, reading)
        has_room = sizes.max_memory is None or least <= sizes.max_memory
        peak = work.peak(lens, reading) if has_room else math.nan
        found.append(PlannedAnalysis(work.name, work.forward, work.backward, peak, least))
    return found


def _works(sites: int) -> list[_Work]:
    """The analyses, with the passes that a test counts; those of noise floors are among them."""
    return [
        _Work("a forward pass", 1, 0, _passes(1), _passes(1)),
        _Work("first_order", 2, 1, _slopes(1), _rerun),
        # Nodes at 3, 5 and 9 strengths, each nested in the next; the last four go together.
        _Work("path_attribution", 17, 9, _slopes(4), _rerun),
        # Four draws of first order beside it, g along the path with its draws, and up
        # to six passes for a flip.
        _Work("fact_margin", 41, 5, _largest(_slopes(5), _passes(30)), _rerun),
        _Work("patch_sites", sites + 10, 0, _branches(sites), _passes(2)),
        _Work("kl_shares", 8, 2, _dual_graph, _dual),
        _Work("second_order", 40, 15, _second, _second),
    ]


# --- The bytes of each kind of pass, as the planner has them


def _passes(copies: int) -> Bytes:
    """So many copies of the prompt in forward passes."""

    def peak(lens: SizedLens, run: Reading) -> float:
        footprint = footprint_of(lens, run)
        at_once = min(copies, memory.rows_at_once(lens, run))
        return at_once * footprint.in_pass + footprint.always + footprint.picked

    return peak


def _branches(sites: int) -> Bytes:
    """One point for each site, which share their first blocks with one row more."""

    def peak(lens: SizedLens, run: Reading) -> float:
        footprint = footprint_of(lens, run)
        points = min(sites, memory.branches_at_once(lens, run))
        return (1 + points) * footprint.in_pass + footprint.always + footprint.picked

    return peak


def _slopes(copies: int) -> Bytes:
    """So many copies of the prompt in forward and backward passes."""

    def peak(lens: SizedLens, run: Reading) -> float:
        at_once = min(copies, memory.slopes_at_once(lens, run))
        if memory.must_rerun(lens, run.repeat(at_once)):
            footprint = footprint_of(lens, run)
            return at_once * footprint.of_rerun + footprint.graphed + footprint.always
        return memory.graph_bytes(lens, run.repeat(at_once))

    return peak


def _rerun(lens: SizedLens, run: Reading) -> float:
    """One copy of the prompt in a forward and a backward pass whose blocks run again."""
    footprint = footprint_of(lens, run)
    return footprint.of_rerun + footprint.graphed + footprint.always


def _dual_graph(lens: SizedLens, run: Reading) -> float:
    """A pass of dual numbers, and the way back through the graph of its values."""
    if memory.must_rerun(lens, run, duals=True):
        return max(_dual(lens, run), _rerun(lens, run))
    return memory.dual_graph_bytes(lens, run)


def _dual(lens: SizedLens, run: Reading) -> float:
    """A pass of dual numbers."""
    return dual_pass_bytes(lens) + dual_copy_bytes(lens, run.rows, read=1)


def _second(lens: SizedLens, run: Reading) -> float:
    """A graph of a second derivative, which is kept whole."""
    return memory.SECOND_ORDER_GRAPHS * memory.graph_bytes(lens, run)


def _largest(*parts: Bytes) -> Bytes:
    """The largest of passes that run one after another."""

    def peak(lens: SizedLens, run: Reading) -> float:
        return max(part(lens, run) for part in parts)

    return peak
