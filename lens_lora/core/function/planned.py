"""The sizes of a model that is not loaded, and what each kind of pass over it takes.

The planner of passes (`memory.py`, `footprint.py`) asks a lens for few things: the sizes of its
model, its number types, whether attention patterns are kept, and its bound. `ModelSizes` answers
these from a configuration, so every number here is the one by which the passes of a lens over that
model are divided. There is no second formula.

    forward      rows of a forward pass          copies · in_pass
    slopes       a forward and a backward pass   copies · of_graph, or of_rerun within a bound
    dual         a pass of dual numbers          dual_pass + dual_copy
    dual_graph   dual numbers, and a way back    dual_graph_bytes
    second       a second derivative             SECOND_ORDER_GRAPHS · of_graph

No pass, and no weights.
"""

from __future__ import annotations

import dataclasses
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

    Its methods say how many bytes each kind of pass takes beside weights and adapter, at its peak,
    over one prompt of so many tokens of which a margin of two tokens is read.

    Attributes:
        n_layers, d_model, d_mlp, n_heads, d_vocab: the sizes of the model.
        sites: how many modules the adapter has.
        dtype: the dtype of the weights and activations.
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
        """A stand-in for a lens over such a model, which answers the planner's questions."""
        cfg = SimpleNamespace(
            d_model=self.d_model, d_mlp=self.d_mlp, n_heads=self.n_heads, d_vocab_out=self.d_vocab
        )
        host = SimpleNamespace(
            n_layers=self.n_layers,
            keeps_patterns=self.keeps_patterns,
            unembedding=lambda: torch.empty(0),
            pass_overhead=BridgeHost.pass_overhead,
        )
        gate_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        stand_in = SimpleNamespace(
            model=SimpleNamespace(cfg=cfg),
            host=host,
            plan=SimpleNamespace(activation_rounding=False),
            sites=(),
            dtype=self.dtype,
            gate_dtype=gate_dtype,
            max_memory=self.max_memory,
        )
        return cast(SizedLens, stand_in)

    # --- The bytes of each kind of pass, as the planner has them

    def forward(self, tokens: int, copies: int = 1) -> float:
        """The bytes of so many copies of the prompt in forward passes.

        Args:
            tokens: how many tokens the prompt has.
            copies: how often the prompt is run.
        """
        lens = self.as_lens()
        run = _margin_of(tokens)
        footprint = footprint_of(lens, run)
        at_once = min(copies, memory.rows_at_once(lens, run))
        return at_once * footprint.in_pass + footprint.always + footprint.picked

    def branches(self, tokens: int, points: int) -> float:
        """The bytes of forward passes at many points, which share their first blocks with one row.

        Args:
            tokens: how many tokens the prompt has.
            points: how many points there are.
        """
        lens = self.as_lens()
        run = _margin_of(tokens)
        footprint = footprint_of(lens, run)
        at_once = min(points, memory.branches_at_once(lens, run))
        return (1 + at_once) * footprint.in_pass + footprint.always + footprint.picked

    def slopes(self, tokens: int, copies: int = 1) -> float:
        """The bytes of so many copies of the prompt in forward and backward passes.

        Args:
            tokens: how many tokens the prompt has.
            copies: how often the prompt is run.
        """
        lens = self.as_lens()
        run = _margin_of(tokens)
        at_once = min(copies, memory.slopes_at_once(lens, run))
        if memory.must_rerun(lens, run.repeat(at_once)):
            footprint = footprint_of(lens, run)
            return at_once * footprint.of_rerun + footprint.graphed + footprint.always
        return memory.graph_bytes(lens, run.repeat(at_once))

    def slopes_rerun(self, tokens: int) -> float:
        """The bytes of a forward and a backward pass whose blocks run again.

        Args:
            tokens: how many tokens the prompt has.
        """
        footprint = footprint_of(self.as_lens(), _margin_of(tokens))
        return footprint.of_rerun + footprint.graphed + footprint.always

    def dual(self, tokens: int) -> float:
        """The bytes of a pass of dual numbers.

        Args:
            tokens: how many tokens the prompt has.
        """
        lens = self.as_lens()
        return dual_pass_bytes(lens) + dual_copy_bytes(lens, _margin_of(tokens).rows, read=1)

    def dual_graph(self, tokens: int) -> float:
        """The bytes of a pass of dual numbers, and of the way back through the graph of its values.

        Args:
            tokens: how many tokens the prompt has.
        """
        lens = self.as_lens()
        run = _margin_of(tokens)
        if memory.must_rerun(lens, run, duals=True):
            return max(self.dual(tokens), self.slopes_rerun(tokens))
        return memory.dual_graph_bytes(lens, run)

    def second(self, tokens: int) -> float:
        """The bytes of the graph of a second derivative, which is kept whole.

        Args:
            tokens: how many tokens the prompt has.
        """
        graph = memory.graph_bytes(self.as_lens(), _margin_of(tokens))
        return memory.SECOND_ORDER_GRAPHS * graph


def _margin_of(tokens: int) -> Reading:
    """The margin of two tokens after one prompt of so many tokens."""
    prompts = Prompts(torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([tokens]))
    margin = Columns(torch.zeros(1, 2, dtype=torch.int64), (1.0, -1.0))
    return Reading.one_row_each(prompts, margin)
