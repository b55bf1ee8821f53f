"""How many bytes a pass takes, from the numbers that a row of T tokens holds.

Fitted to peaks of a model of 135M parameters in float32 (`benchmarks/memory.py` and
`benchmarks/cost` print such peaks). With h heads, and m = d_model + d_mlp, a row of T tokens holds

    in a pass without a graph         T (3 m + 4 h T)     numbers: one block at a time
    in a pass of dual numbers         T (44 m + 44 h T)   and a share of the size of W_U
    in a graph                        T (8 m + c h T)     of every block; c = 1, in half precision 3
    in a graph whose blocks run again T (8 m + 7 h T)     of one block, and T d_model of every block

1. Without attention patterns (a fused kernel, never of dual numbers) the terms with h T fall away.
2. To each row come the logits of the tokens that are read: 3 times their number in a pass, 8 times
   in a graph. Of a margin they are few.
3. Those of a sum over a response are made some tokens at a time, however many the rows, and a
   divergence holds those of the base.
"""

from __future__ import annotations

from typing import NamedTuple

from lens_lora.core.model import LoraLens
from lens_lora.core.readout.prompts import Prompts
from lens_lora.core.readout.reading import PICKS, Columns, Picks, Reading

# What is run. Of a reading only the logits that it needs are made.
Run = Prompts | Reading

# How often the logits of a token are held, without and with a graph.
LOGITS = 3
LOGITS_OF_GRAPH = 8

# What a row of dual numbers holds, in units of T (m + h T).
_DUAL_ROW = 44


def prompts_of(run: Run) -> Prompts:
    """The rows of what is run, which are `Prompts` as well."""
    return run.rows if isinstance(run, Reading) else run


class Footprint(NamedTuple):
    """The bytes of one row, and those that are there whatever the rows.

    Attributes:
        in_pass: of a row in a pass without a graph.
        of_graph: of a row in a graph.
        of_rerun: of a row in a graph whose blocks run again.
        of_duals: of a row of dual numbers, without its logits.
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


def footprint_of(lens: LoraLens, run: Run, *, in_turn: bool = False) -> Footprint:
    """The memory that a run's rows take; with `in_turn` logits are made some tokens at a time."""
    cfg = lens.model.cfg
    layers = lens.host.n_layers
    longest = prompts_of(run).tokens.shape[1]
    width = int(cfg.d_model)
    wide = width + int(getattr(cfg, "d_mlp", None) or 4 * width)
    heads_by_key = int(cfg.n_heads) * longest
    pattern = heads_by_key if lens.host.keeps_patterns else 0
    patterns_kept = 1 if lens.dtype.itemsize >= 4 else 3
    of_logits = lens.gate_dtype.itemsize * int(cfg.d_vocab_out)
    logits_of_row, picks = _logits_held(lens, run, in_turn)
    row_logits_in_graph = LOGITS_OF_GRAPH * logits_of_row * of_logits
    of_token = lens.dtype.itemsize * longest
    of_dual_token = lens.gate_dtype.itemsize * longest
    return Footprint(
        in_pass=of_token * (3 * wide + 4 * pattern) + LOGITS * logits_of_row * of_logits,
        of_graph=of_token * layers * (8 * wide + patterns_kept * pattern) + row_logits_in_graph,
        of_rerun=of_token * (layers * width + 8 * wide + 7 * pattern) + row_logits_in_graph,
        of_duals=of_dual_token * _DUAL_ROW * (wide + heads_by_key),
        always=run.held_bytes if isinstance(run, Reading) else 0,
        picks=picks,
        picked=LOGITS * of_logits * min(picks, 2 * PICKS),
        graphed=LOGITS_OF_GRAPH * of_logits * min(picks, PICKS),
    )


def _logits_held(lens: LoraLens, run: Run, in_turn: bool = False) -> tuple[int, int]:
    """How many tokens of each row have their logits held, and of how many they are made in turn."""
    slots = prompts_of(run).slots
    is_adapted = any(site.kind == "unembed" for site in lens.sites)
    if is_adapted or lens.host.unembedding() is None:
        return slots, 0
    if isinstance(run, Prompts):
        return (0, len(run.tokens) * slots) if in_turn else (slots, 0)
    if isinstance(run.read, Picks):
        return 0, len(run.read.rows)
    if isinstance(run.read, Columns):
        return 0, 0
    return slots, 0


def dual_copy_bytes(lens: LoraLens, run: Prompts, read: int) -> float:
    """About the most that one copy of all rows holds at a time, as dual numbers.

    Args:
        lens: the adapter over the model.
        run: the rows.
        read: of how many of them the logits are read.
    """
    logits = read * run.slots * int(lens.model.cfg.d_vocab_out)
    of_logits = LOGITS_OF_GRAPH * logits * lens.gate_dtype.itemsize
    return len(run.tokens) * footprint_of(lens, run).of_duals + of_logits


def dual_pass_bytes(lens: LoraLens) -> int:
    """About what a pass of dual numbers takes whatever its rows."""
    cfg = lens.model.cfg
    of_unembedding = int(cfg.d_model) * int(cfg.d_vocab_out) * lens.dtype.itemsize
    return int(lens.host.pass_overhead * of_unembedding)
