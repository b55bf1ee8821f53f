"""How many bytes a pass takes, from the numbers that a row of T tokens holds.

Fitted to peaks of models of 5M, 30M and 135M parameters in float32 (`benchmarks/planned.py`). With
h heads, d = d_model and m = d_model + d_mlp, a row of T tokens holds

    in a pass without a graph         T (3 m + 4 h T)     numbers: one block at a time
    in a pass of dual numbers         T (44 m + 44 h T)   and a share of the size of W_U
    in a graph                        T (8 d + 4 d_mlp + c h T)  of every block; c = 2, in half
                                                          precision 4
    in a graph whose blocks run again T (8 m + 7 h T)     of one block, and T d of every block

1. Without attention patterns (a fused kernel, never of dual numbers) the terms with h T fall away.
2. To each row come the logits of the tokens that are read: 3 times their number in a pass, 8 times
   in a graph. Of a margin they are few.
3. Those of a sum over a response are made some tokens at a time, however many the rows, and a
   divergence holds those of the base.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from lens_lora.core.model.host import Host
from lens_lora.core.model.plan import Plan
from lens_lora.core.model.sites import Site
from lens_lora.core.readout.prompts import Prompts
from lens_lora.core.readout.reading import PICKS, Columns, Picks, Reading

# What is run. Of a reading only the logits that it needs are made.
Run = Prompts | Reading

# How often the logits of a token are held, without and with a graph.
LOGITS = 3
LOGITS_OF_GRAPH = 8

# What a row of dual numbers holds, in units of T (m + h T).
_DUAL_ROW = 44


@runtime_checkable
class SizedLens(Protocol):
    """A lens as the planner sees it, or a configuration that stands for one (`planned.py`)."""

    @property
    def model(self) -> Any:
        """The hooked model; only the sizes in its `cfg` are read."""
        ...

    @property
    def host(self) -> Host:
        """The host, which knows the number of layers, and whether patterns are kept."""
        ...

    @property
    def plan(self) -> Plan:
        """The plan, which knows whether a kernel rounds activations to 8 bit."""
        ...

    @property
    def sites(self) -> tuple[Site, ...]:
        """The adapted modules."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The number type of activations."""
        ...

    @property
    def gate_dtype(self) -> torch.dtype:
        """The number type of gates, and of what is read."""
        ...

    @property
    def max_memory(self) -> float | None:
        """The bound in bytes; None for no bound."""
        ...


def prompts_of(run: Run) -> Prompts:
    """The rows of what is run, which are `Prompts` as well."""
    return run.rows if isinstance(run, Reading) else run


class Footprint(NamedTuple):
    """The bytes of one row, and those that are there whatever the rows.

    Attributes:
        in_pass: the bytes of a row in a pass without a graph.
        of_graph: the bytes of a row in a graph.
        of_rerun: the bytes of a row in a graph whose blocks run again.
        of_duals: the bytes of a row of dual numbers, without its logits.
        always: what the reading holds.
        picks: how many tokens' logits are made in turn.
        picked: the logits of those that are held together, without a graph.
        graphed: the same in a graph.
    """

    in_pass: float
    of_graph: float
    of_rerun: float
    of_duals: float
    always: float
    picks: int
    picked: float
    graphed: float


def footprint_of(lens: SizedLens, run: Run, *, in_turn: bool = False) -> Footprint:
    """The memory that a run's rows take; with `in_turn` logits are made some tokens at a time."""
    # The names are those of the formulas above.
    cfg = lens.model.cfg
    layers = lens.host.n_layers
    T = prompts_of(run).tokens.shape[1]
    d_model = int(cfg.d_model)
    d_mlp = int(getattr(cfg, "d_mlp", None) or 4 * d_model)
    m = d_model + d_mlp
    hT = int(cfg.n_heads) * T
    hT_kept = hT if lens.host.keeps_patterns else 0
    c = 2 if lens.dtype.itemsize >= 4 else 4

    in_pass = T * (3 * m + 4 * hT_kept)
    of_graph = T * layers * (8 * d_model + 4 * d_mlp + c * hT_kept)
    of_rerun = T * (layers * d_model + 8 * m + 7 * hT_kept)
    of_duals = T * _DUAL_ROW * (m + hT)

    number = lens.dtype.itemsize
    fine_number = lens.gate_dtype.itemsize
    tokens_of_row, tokens_in_turn = _logits_held(lens, run, in_turn)
    logits_of_token = fine_number * int(cfg.d_vocab_out)
    logits_of_row = tokens_of_row * logits_of_token
    held_bytes = 0
    if isinstance(run, Reading):
        held_bytes = run.held_bytes
    return Footprint(
        in_pass=number * in_pass + LOGITS * logits_of_row,
        of_graph=number * of_graph + LOGITS_OF_GRAPH * logits_of_row,
        of_rerun=number * of_rerun + LOGITS_OF_GRAPH * logits_of_row,
        of_duals=fine_number * of_duals,
        always=held_bytes,
        picks=tokens_in_turn,
        picked=LOGITS * logits_of_token * min(tokens_in_turn, 2 * PICKS),
        graphed=LOGITS_OF_GRAPH * logits_of_token * min(tokens_in_turn, PICKS),
    )


class _LogitsHeld(NamedTuple):
    """The number of tokens whose logits a run holds.

    Attributes:
        of_row: tokens of each row, whose logits are held together.
        in_turn: tokens of all rows, whose logits are made a few at a time.
    """

    of_row: int
    in_turn: int


def _logits_held(lens: SizedLens, run: Run, in_turn: bool = False) -> _LogitsHeld:
    """The number of tokens whose logits are held."""
    slots = prompts_of(run).slots
    of_all_slots = _LogitsHeld(of_row=slots, in_turn=0)
    is_adapted = any(site.kind == "unembed" for site in lens.sites)
    if is_adapted or lens.host.unembedding() is None:
        return of_all_slots
    if isinstance(run, Prompts):
        every_slot = len(run.tokens) * slots
        return _LogitsHeld(of_row=0, in_turn=every_slot) if in_turn else of_all_slots
    if isinstance(run.read, Picks):
        return _LogitsHeld(of_row=0, in_turn=len(run.read.rows))
    if isinstance(run.read, Columns):
        return _LogitsHeld(of_row=0, in_turn=0)
    return of_all_slots


def dual_copy_bytes(lens: SizedLens, run: Prompts, read: int) -> float:
    """About the most that one copy of all rows holds at a time, as dual numbers.

    Args:
        lens: the adapter over the model.
        run: the rows.
        read: the number of rows whose logits are read.
    """
    logits = read * run.slots * int(lens.model.cfg.d_vocab_out)
    of_logits = LOGITS_OF_GRAPH * logits * lens.gate_dtype.itemsize
    return len(run.tokens) * footprint_of(lens, run).of_duals + of_logits


def dual_pass_bytes(lens: SizedLens) -> int:
    """About what a pass of dual numbers takes whatever its rows."""
    cfg = lens.model.cfg
    of_unembedding = int(cfg.d_model) * int(cfg.d_vocab_out) * lens.dtype.itemsize
    return int(lens.host.pass_overhead * of_unembedding)
