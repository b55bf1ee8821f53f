"""Which mode of differentiation is cheaper, and how many derivatives one pass computes.

1. Which mode. A tangent costs one product with each weight from its site's block on; a covector one
   with each weight on the way back to the first block. In passes through all blocks,

       forward mode    Σ_l share of the blocks at and after l      tangents, whatever the readouts
       reverse mode    k                                           covectors, whatever the sites

   and one forward pass each. Measured, the cost of a tangent and of a covector differs by at most a
   third, for short and long prompts (benchmarks/RESULTS.md); so the smaller number is cheaper.
2. How many at once. Each kind of pass has a bound in tokens, and some in logits: beyond it the data
   no longer fit into the caches, and nothing is gained. Bounds are read at every call.
3. On request also a bound in bytes, from measured sizes of a row and of a pass.

No forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from lens_lora.arguments import word
from lens_lora.engine.memory import Run, prompts_of, rows_of_graph, rows_of_pass
from lens_lora.errors import ArgumentError
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.rows import Reading

__all__ = [
    "BRANCHING_PAYS",
    "GRAPH_TOKENS",
    "Mode",
    "branches_at_once",
    "cheaper_mode",
    "chosen_mode",
    "covectors_at_once",
    "directions_at_once",
    "graph_groups",
    "pass_groups",
    "rows_at_once",
    "slopes_at_once",
    "tangent_passes",
    "tangents_at_once",
]

Mode = Literal["auto", "forward", "reverse"]

ROW_TOKENS = 2048  # forward passes, in rows of one batch
BRANCH_TOKENS, BRANCH_LOGITS = 4096, 2**27  # forward passes that branch, of one prompt at a time
SLOPE_TOKENS = 512  # forward passes that a backward pass follows
GRAPH_TOKENS = 512  # a graph that is kept, and the directions that go back through it
TANGENT_TOKENS, COVECTOR_TOKENS = 2048, 512
FINAL_TOKENS = 8192  # tangents of which nothing is unembedded
_DERIVATIVE_LOGITS = 2**26  # of tangents, and of covectors
# In numbers of `_numbers`: what a pass of dual numbers holds at a time, measured.
_DUAL = 44

# Branching is worth its hooks below this share of the block passes.
BRANCHING_PAYS = 0.75


def tangent_passes(lens: LoraLens, starts: Sequence[int] | None = None) -> float:
    """Passes through all blocks that tangents take.

    Args:
        lens: the adapter over the model.
        starts: the layer at which each tangent starts; None for a tangent of every site.
    """
    layers = lens.plan.host.n_layers
    starts = [site.layer for site in lens.sites] if starts is None else starts
    if not lens.plan.host.grows:
        return float(len(starts))
    return sum(layers - min(max(start, 0), layers - 1) for start in starts) / layers


def cheaper_mode(
    lens: LoraLens, readouts: int, starts: Sequence[int] | None = None
) -> Literal["forward", "reverse"]:
    """Which mode gives every derivative of so many readouts with less work."""
    return "reverse" if readouts <= max(1.0, tangent_passes(lens, starts)) else "forward"


def chosen_mode(
    mode: Mode, lens: LoraLens, readouts: int, starts: Sequence[int] | None = None
) -> Literal["forward", "reverse"]:
    """The given mode; for 'auto' the cheaper one.

    Args:
        mode: 'auto', 'forward' or 'reverse'.
        lens: the adapter over the model.
        readouts: how many numbers of each prompt are differentiated.
        starts: the layer at which each tangent of forward mode would start; None for one of every
            site.

    Raises:
        ArgumentError: another mode.
    """
    word("mode", mode, get_args(Mode))
    return cheaper_mode(lens, readouts, starts) if mode == "auto" else mode


def rows_at_once(lens: LoraLens, run: Run) -> int:
    """How many copies of the prompts make one batch of a forward pass."""
    return _bounded(ROW_TOKENS, run, rows_of_pass(lens, run))


def branches_at_once(lens: LoraLens, run: Run) -> int:
    """How many points of one branching pass: in tokens of a row, and in logits of all rows."""
    prompts = prompts_of(run)
    rows, longest = prompts.tokens.shape
    logits = rows * prompts.slots * int(lens.model.cfg.d_vocab_out)
    points = min(_within(BRANCH_TOKENS, longest), _within(BRANCH_LOGITS, logits))
    fitting = rows_of_pass(lens, run)
    return points if fitting is None else max(1, min(points, fitting - 1))


def slopes_at_once(lens: LoraLens, run: Run) -> int:
    """How many copies of the prompts make one batch of a forward and a backward pass."""
    return _bounded(SLOPE_TOKENS, run, rows_of_graph(lens, run))


def directions_at_once(prompts: Prompts) -> int:
    """How many directions go back at once through a graph of the prompts."""
    return _within(GRAPH_TOKENS, prompts.tokens.numel())


def graph_groups(lens: LoraLens, reading: Reading) -> list[Reading]:
    """The prompts in groups whose forward and backward pass is within the bound of the lens.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.

    Raises:
        ArgumentError: one row takes more.
    """
    return _groups(reading, rows_of_graph(lens, reading))


def pass_groups(lens: LoraLens, reading: Reading) -> list[Reading]:
    """… whose forward pass is; as `graph_groups`."""
    return _groups(reading, rows_of_pass(lens, reading))


def _groups(reading: Reading, rows: int | None) -> list[Reading]:
    if rows is None or rows >= len(reading.owner):
        return [reading]
    return reading.groups(rows * reading.prompts.tokens.shape[1])


def _bounded(tokens: int, run: Run, rows: int | None) -> int:
    prompts = prompts_of(run)
    copies = _within(tokens, prompts.tokens.numel())
    return copies if rows is None else max(1, min(copies, rows // len(prompts.tokens)))


def tangents_at_once(lens: LoraLens, run: Prompts, *, read: int) -> int:
    """How many tangents of what is run make one pass, within the bound of the lens.

    Args:
        lens: the adapter over the model.
        run: the prompts of one pass.
        read: the number of prompts whose logits are held together; 0 where none are.

    Raises:
        ArgumentError: the bound is less than one tangent takes.
    """
    return _derivatives_at_once(TANGENT_TOKENS if read else FINAL_TOKENS, lens, run, read)


def covectors_at_once(lens: LoraLens, run: Prompts) -> int:
    """How many covectors of what is run go back at once; as `tangents_at_once`."""
    return _derivatives_at_once(COVECTOR_TOKENS, lens, run, run.batch)


def _numbers(lens: LoraLens, longest: int) -> int:
    """The numbers of one token's residual stream, hidden layer and attention pattern."""
    cfg = lens.model.cfg
    wide = int(getattr(cfg, "d_mlp", None) or 4 * cfg.d_model)
    return int(cfg.d_model) + wide + int(cfg.n_heads) * longest


def _within(bound: int, size: int) -> int:
    """How many things of this size are within the bound; at least one."""
    return max(1, bound // size)


def _derivatives_at_once(tokens: int, lens: LoraLens, run: Prompts, read: int) -> int:
    logits = read * run.slots * int(lens.model.cfg.d_vocab_out)
    rows = min(_within(tokens, run.tokens.numel()), _within(_DERIVATIVE_LOGITS, max(1, logits)))
    max_memory = lens.max_memory
    if max_memory is None:
        return rows
    needed, always = row_bytes(lens, run, read), pass_bytes(lens)
    # The first row of a pass carries no tangent.
    fitting = int((max_memory - always) // needed) - 1
    if fitting < 1:
        raise ArgumentError(
            f"max_memory={max_memory:.3g} bytes, and a pass of two rows of these prompts "
            f"({tuple(run.tokens.shape)} tokens) takes about {always + 2 * needed:.3g}; allow "
            "more, or pass fewer or shorter prompts at a time."
        )
    return min(rows, fitting)


def pass_bytes(lens: LoraLens) -> int:
    """About what a pass takes whatever its rows, in sizes of W_U, measured as `row_bytes` is."""
    cfg = lens.model.cfg
    return int(
        lens.plan.host.pass_overhead * int(cfg.d_model) * int(cfg.d_vocab_out) * lens.dtype.itemsize
    )


def row_bytes(lens: LoraLens, run: Prompts, read: int) -> int:
    """About the most that one copy of what is run holds at a time, as a dual number.

    The factors are measured: `benchmarks/cost.py` prints what a bound of memory comes to.
    """
    batch, longest = run.tokens.shape
    logits = 8 * run.slots * int(lens.model.cfg.d_vocab_out)
    of_rows = batch * longest * _DUAL * _numbers(lens, longest)
    return (of_rows + read * logits) * lens.gate_dtype.itemsize
