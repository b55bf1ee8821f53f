"""How much one pass does at a time: what is cheaper, what fits, and blocks that run again to fit.

1. Which mode of differentiation. A tangent costs one product with each weight from its site's block
   on; a covector one with each weight on the way back to the first block. In passes through all
   blocks,

       forward mode    Σ_l share of the blocks at and after l      tangents, whatever the readouts
       reverse mode    k                                           covectors, whatever the sites

   and one forward pass each. Measured, the cost of a tangent and of a covector differs by at most a
   third, for short and long prompts (benchmarks/RESULTS.md); so the smaller number is cheaper.
2. How many at once. Each kind of pass has a bound in tokens, and some in logits: beyond it the data
   no longer fit into the caches, and nothing is gained. Bounds are read at every call.
3. Within `max_memory`, from the numbers that a row of T tokens holds, fitted to peaks of a model of
   135M parameters in float32 (`benchmarks/memory.py` and `benchmarks/cost` print such peaks);
   h heads, and m = d_model + d_mlp:

       a pass without a graph         T (3 m + 4 h T)     one block at a time
       a pass of dual numbers         T (44 m + 44 h T)   and a share of the size of W_U
       a graph                        T (8 m + c h T)     every block; c = 1, in half precision 3
       a graph whose blocks run again T (8 m + 7 h T)     one block, and T d_model of every block

   Without attention patterns (a fused kernel, never of dual numbers) the terms with h T fall away.
   To each row come the logits of the tokens that are read: 3 times their number in a pass, 8 times
   in a graph. Of a margin they are few. Those of a sum over a response are made some tokens at a
   time, however many the rows, and a divergence holds those of the base.
4. Where a graph does not fit, blocks keep their inputs alone and run once more on the way back
   (`blocks_rerun`).

No forward pass; one more for each way back through blocks that run again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lens_lora.arguments import word
from lens_lora.compat import Temporary, replace_forward
from lens_lora.core.model.lens import LoraLens
from lens_lora.core.model.passes import ForwardPass
from lens_lora.core.readout.prompts import Prompts
from lens_lora.core.readout.reading import PICKS, Columns, Picks, Reading
from lens_lora.errors import ArgumentError, ModelStateError, many, named, worded

# What is run. Of a reading only the logits that it needs are made.
Run = Prompts | Reading


def prompts_of(run: Run) -> Prompts:
    """The prompts of what is run."""
    return run.prompts if isinstance(run, Reading) else run


# --- Which mode of differentiation

Mode = Literal["auto", "forward", "reverse"]


def chosen_mode(
    mode: Mode, lens: LoraLens, readouts: int, starts: Sequence[int] | None = None
) -> Literal["forward", "reverse"]:
    """The given mode; for 'auto' the one that takes less work for so many readouts."""
    word("mode", mode, get_args(Mode))
    if mode != "auto":
        return mode
    return "reverse" if readouts <= max(1.0, tangent_passes(lens, starts)) else "forward"


def tangent_passes(lens: LoraLens, starts: Sequence[int] | None = None) -> float:
    """Passes through all blocks that tangents take: one from each of these, or of every site's."""
    layers = lens.host.n_layers
    starts = [site.layer for site in lens.sites] if starts is None else starts
    if not lens.host.grows:
        return float(len(starts))
    return sum(layers - min(max(start, 0), layers - 1) for start in starts) / layers


# --- How many at once

ROW_TOKENS = 2048  # forward passes, in rows of one batch
BRANCH_TOKENS, BRANCH_LOGITS = 4096, 2**27  # forward passes that branch, of one prompt at a time
_RIDING_TOKENS = 32  # a graph with rows that only show g
_SHARED_TOKENS = 512  # one forward pass instead of two: more of them do not fit into the caches
SLOPE_TOKENS = 512  # forward passes that a backward pass follows
GRAPH_TOKENS = 512  # a graph that is kept, and the directions that go back through it
TANGENT_TOKENS, COVECTOR_TOKENS = 2048, 512
EDGE_TOKENS = 1024  # a graph, and the tangents of a branch beside it
FINAL_TOKENS = 8192  # tangents of which nothing is unembedded
_DERIVATIVE_LOGITS = 2**26  # of tangents, and of covectors

# Branching is worth its hooks below this share of the block passes.
BRANCHING_PAYS = 0.75


def rows_at_once(lens: LoraLens, run: Run) -> int:
    """How many copies of the prompts make one batch of a forward pass."""
    rows_of_pass(lens, run)  # refuses what is beyond the bound by itself

    def sizes(need: _Need) -> _Copy:
        return _Copy(need.in_pass, _LOGITS, 2 * PICKS)

    return _copies(ROW_TOKENS, lens, run, sizes)


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
    rows_of_graph(lens, run)

    def sizes(need: _Need) -> _Copy:
        return _Copy(min(need.of_rerun, need.of_graph), _LOGITS_OF_GRAPH, PICKS)

    return _copies(SLOPE_TOKENS, lens, run, sizes)


def rides_along(lens: LoraLens, run: Run, copies: int) -> bool:
    """Whether points of which no derivative is taken cost less in such a pass than in their own.

    Beyond a few tokens the way back, which goes through their rows as well, costs more than the
    weights that are read once less. A kernel that rounds activations to 8 bit looks at all rows of
    a batch together, so that others would change what it makes of the first.
    """
    is_small = copies * prompts_of(run).tokens.numel() <= _RIDING_TOKENS
    return is_small and copies <= slopes_at_once(lens, run) and not lens.plan.activation_rounding


def shares_pass(lens: LoraLens, run: Run, copies: int) -> bool:
    """Whether so many copies of the prompts cost less in one forward pass than in two.

    Not where a kernel that rounds to 8 bit would let them change one another (`rides_along`).
    """
    is_small = copies * prompts_of(run).tokens.numel() <= _SHARED_TOKENS
    return is_small and not lens.plan.activation_rounding


def directions_at_once(prompts: Prompts) -> int:
    """How many directions go back at once through a graph of the prompts."""
    return _within(GRAPH_TOKENS, prompts.tokens.numel())


def second_orders_at_once(lens: LoraLens, reading: Reading) -> int:
    """How many copies of the prompts have one graph of a second derivative."""
    rows_of_second_order(lens, reading)

    def sizes(need: _Need) -> _Copy:
        return _Copy(_SECOND * need.of_graph, _SECOND * _LOGITS_OF_GRAPH, PICKS)

    return _copies(GRAPH_TOKENS, lens, reading, sizes)


def graph_groups(lens: LoraLens, reading: Reading) -> list[Reading]:
    """The prompts in groups whose forward and backward pass is within the bound of the lens.

    Raises:
        ArgumentError: the rows that cannot be run apart (those of one prompt, or all of them where
            a user's function reads them) are more than the bound has room for.
    """
    return _groups(lens, reading, rows_of_graph(lens, reading))


def pass_groups(lens: LoraLens, reading: Reading, copies: int = 1) -> list[Reading]:
    """The prompts in groups, so many copies of which go forward within the bound of the lens.

    Raises:
        ArgumentError: as for `graph_groups`, or room for fewer rows than copies.
    """
    fitting = rows_of_pass(lens, reading)
    if fitting is not None and fitting < copies:
        raise ArgumentError(
            f"{_bound(lens)}, enough for a forward pass of {many(fitting, 'row')}, and {copies} "
            "are run beside one another; allow more, or pass shorter prompts."
        )
    return _groups(lens, reading, None if fitting is None else fitting // copies)


def groups_beside(lens: LoraLens, reading: Reading, beside: int) -> list[Reading]:
    """The prompts in groups whose graph, with tangents beside the values, is within the bound.

    As `graph_groups`, with so many bytes more that are held of each row.
    """
    of_tangents = _need(lens, reading).of_duals
    fitting = rows_of_graph(lens, reading, beside + of_tangents, "the edges")
    return _groups(lens, reading, fitting, EDGE_TOKENS)


def dual_graph_groups(lens: LoraLens, reading: Reading) -> list[Reading]:
    """The prompts in groups, each with a pass of dual numbers and a way back; as `graph_groups`."""
    limits = rows_of_graph(lens, reading), rows_of_duals(lens, reading.prompts)
    fitting = [rows for rows in limits if rows is not None]
    return _groups(lens, reading, min(fitting, default=None))


def second_order_groups(lens: LoraLens, reading: Reading) -> list[Reading]:
    """The prompts in groups whose second derivative is within the bound; as `graph_groups`."""
    return _groups(lens, reading, rows_of_second_order(lens, reading), GRAPH_TOKENS)


# A pass that keeps nothing, one that is followed by a way back, or one of dual numbers.
Pass = Literal["plain", "graph", "dual"]


def tokens_at_once(lens: LoraLens, prompts: Prompts, most: int, kind: Pass = "plain") -> int:
    """How many tokens of these prompts make one pass: at most so many, and within the bound."""
    rows_of = {"plain": rows_of_pass, "graph": rows_of_graph, "dual": rows_of_duals}[kind]
    rows = rows_of(lens, prompts)
    return most if rows is None else min(most, rows * prompts.tokens.shape[1])


def row_groups(
    lens: LoraLens, prompts: Prompts, most: int, kind: Pass = "plain"
) -> list[list[int]]:
    """The prompts, by index, in groups of at most so many tokens, and within the bound."""
    tokens = tokens_at_once(lens, prompts, most, kind)
    rows = torch.arange(prompts.batch, device="cpu")
    return [group.tolist() for group in rows.split(_within(tokens, prompts.tokens.shape[1]))]


def _groups(
    lens: LoraLens, reading: Reading, rows: int | None, tokens: int | None = None
) -> list[Reading]:
    """Groups of at most so many rows, and of so many tokens; all at once where neither is given."""
    longest = reading.prompts.tokens.shape[1]
    limits = [limit for limit in (None if rows is None else rows * longest, tokens) if limit]
    if not limits or min(limits) >= len(reading.owner) * longest:
        return [reading]
    groups = reading.groups(min(limits))
    largest = max(len(group.owner) for group in groups)
    if rows is not None and largest > rows:
        is_one = len(groups) == 1 and reading.batch > 1
        why = "a function of yours reads them together" if is_one else "they are of one prompt"
        raise ArgumentError(
            f"{_bound(lens)}, enough for {rows} of {largest} rows that are run at once, as {why}; "
            f"allow more, or pass {'fewer' if is_one else 'shorter'} prompts."
        )
    return groups


def _within(bound: int, size: int) -> int:
    """How many things of this size are within the bound; at least one."""
    return max(1, bound // size)


class _Copy(NamedTuple):
    """What a further copy of the prompts takes.

    Attributes:
        of_row: bytes of a row.
        logits: how often the logits of a pick are held.
        picks: of how many picks at most.
    """

    of_row: float
    logits: float
    picks: int


def _copies(tokens: int, lens: LoraLens, run: Run, sizes: Callable[[_Need], _Copy]) -> int:
    """How many copies of the prompts make one pass: in tokens, and within the bound of the lens.

    c copies take c · rows · of_row bytes, and the logits of c · picks picks, which are made in turn
    where they are many.
    """
    prompts = prompts_of(run)
    most = _within(tokens, prompts.tokens.numel())
    if lens.max_memory is None:
        return most
    need = _need(lens, run)
    of_row, logits, held_at_once = sizes(need)
    of_copy = len(prompts.tokens) * of_row
    of_pick = logits * lens.gate_dtype.itemsize * int(lens.model.cfg.d_vocab_out)
    room = lens.max_memory - need.always
    with_all_logits = room // (of_copy + of_pick * need.picks)
    if need.picks:
        with_all_logits = min(with_all_logits, held_at_once // need.picks)
    with_logits_in_turn = (room - of_pick * held_at_once) // of_copy
    fitting = max(with_all_logits, with_logits_in_turn)
    return max(1, min(most, int(fitting)))


def tangents_at_once(lens: LoraLens, run: Prompts, *, read: int) -> int:
    """How many tangents of what is run make one pass, with the logits of `read` prompts or none."""
    return derivatives_at_once(TANGENT_TOKENS if read else FINAL_TOKENS, lens, run, read)


def derivatives_at_once(tokens: int, lens: LoraLens, run: Prompts, read: int) -> int:
    """As `tangents_at_once`, with so many tokens in a pass, or in the way back of covectors."""
    logits = read * run.slots * int(lens.model.cfg.d_vocab_out)
    rows = min(_within(tokens, run.tokens.numel()), _within(_DERIVATIVE_LOGITS, max(1, logits)))

    def sizes(_: _Need) -> tuple[float, float]:
        of_one = row_bytes(lens, run, read)
        return of_one, pass_bytes(lens) + of_one  # the first row of a pass carries no tangent

    what, remedy = "a pass of two rows of these prompts", "pass fewer or shorter prompts at a time"
    fitting = _rows(lens, run, sizes, what, remedy)
    return rows if fitting is None else min(rows, fitting)


# --- What fits within the bound of a lens

_SECOND, _DUALS = 2.5, 1.3  # graphs of a first derivative
_LOGITS, _LOGITS_OF_GRAPH = 3, 8
_DUAL_ROW = 44


class _Need(NamedTuple):
    """Bytes: of one row, and whatever the rows.

    Attributes:
        in_pass, of_graph, of_rerun, of_duals: bytes of a row; of dual numbers without the logits.
        always: bytes that the reading holds.
        picks: how many tokens' logits are made in turn.
        picked, graphed: bytes of the logits that are held together, without and with a graph.
    """

    in_pass: float
    of_graph: float
    of_rerun: float
    of_duals: float
    always: float
    picks: int
    picked: float
    graphed: float


def must_rerun(lens: LoraLens, run: Run, *, duals: bool = False) -> bool:
    """Whether the graph of these rows is beyond the bound, so that blocks run twice.

    The graph of dual numbers is that of their values, whose tangents are held as well.
    """
    if lens.max_memory is None:
        return False
    need = _need(lens, run)
    of_rows = len(prompts_of(run).tokens) * need.of_graph + need.graphed
    return (_DUALS if duals else 1) * of_rows + need.always > lens.max_memory


def fits_with_covectors(lens: LoraLens, run: Prompts) -> bool:
    """Whether one graph of all prompts fits beside a covector for each, which is as large a row.

    Where it does not, prompts go a few at a time, each group with a graph of its own.
    """
    if lens.max_memory is None:
        return True
    return pass_bytes(lens) + 2 * row_bytes(lens, run, run.batch) <= lens.max_memory


def rows_of_pass(lens: LoraLens, run: Run) -> int | None:
    """How many rows of a pass without a graph are within the bound; None where there is none."""
    what = "a forward pass of one prompt"
    return _rows(lens, run, lambda need: (need.in_pass, need.always + need.picked), what)


def rows_of_logits(lens: LoraLens, prompts: Prompts, held: float) -> int | None:
    """How many rows go forward at once where the logits of all of them stay: so many bytes."""
    what = "a forward pass of one prompt, beside the logits that are held,"
    if lens.max_memory is None:
        return None
    need = _need(lens, prompts, in_turn=True)
    return _rows(lens, prompts, lambda _: (need.in_pass, held + need.picked), what)


def rows_of_graph(
    lens: LoraLens, run: Run, beside: float = 0.0, what: str = "a forward and a backward pass"
) -> int | None:
    """How many rows, with so many bytes beside the graph of each, go forward and back at once."""

    def sizes(need: _Need) -> tuple[float, float]:
        return min(need.of_rerun, need.of_graph) + beside, need.always + need.graphed

    return _rows(lens, run, sizes, f"{what} of one prompt")


def require_rows_of_graph(lens: LoraLens, run: Run) -> None:
    """Check that all rows go forward and back at once within the bound."""
    fitting, rows = rows_of_graph(lens, run), len(prompts_of(run).tokens)
    if fitting is not None and fitting < rows:
        raise ArgumentError(
            f"{_bound(lens)}, enough for a forward and a backward pass of "
            f"{fitting} of these {rows} rows; pass fewer prompts at a time, or allow more."
        )


def require_graph(lens: LoraLens, run: Run) -> None:
    """Check that a graph of all rows, whose blocks do not run again, is within the bound."""
    require_rows_of_graph(lens, run)
    if must_rerun(lens, run):
        raise ArgumentError(
            f"{_bound(lens)}, and the graph of these rows, which is kept "
            "whole, takes more; pass fewer or shorter prompts at a time, or allow more."
        )


def graph_bytes(lens: LoraLens, reading: Reading) -> float:
    """About how many bytes a graph of all rows takes, with what the reading holds."""
    need = _need(lens, reading)
    return len(reading.owner) * need.of_graph + need.graphed + need.always


def require_graphs(lens: LoraLens, readings: Sequence[Reading]) -> None:
    """Check that the graphs of all of these, which are held together, are within the bound."""
    if lens.max_memory is None:
        return
    total = sum(graph_bytes(lens, reading) for reading in readings)
    if total > lens.max_memory:
        raise ArgumentError(
            f"{_bound(lens)}, and the graphs of {many(len(readings), 'question')}, which are held "
            f"together, take about {total:.3g}; pass fewer or shorter prompts, or allow more."
        )


def rows_of_second_order(lens: LoraLens, run: Run) -> int | None:
    """How many rows a graph of a second derivative, which is kept whole, may have."""

    def sizes(need: _Need) -> tuple[float, float]:
        return _SECOND * need.of_graph, need.always + _SECOND * need.graphed

    return _rows(lens, run, sizes, "a second derivative of one prompt, whose graph is kept whole,")


def rows_of_duals(lens: LoraLens, prompts: Prompts) -> int | None:
    """How many rows of dual numbers, each of which is read, make one pass within the bound."""

    def sizes(_: _Need) -> tuple[float, float]:
        rows = len(prompts.tokens)
        return row_bytes(lens, prompts, rows) / rows, pass_bytes(lens)

    return _rows(lens, prompts, sizes, "a pass of dual numbers of one prompt")


def _bound(lens: LoraLens) -> str:
    """The bound of a lens as its user wrote it, for messages."""
    return f"{named('max_memory')}{worded('=', ' ')}{lens.max_memory:.3g} bytes"


_Sizes = Callable[[_Need], tuple[float, float]]


def _rows(
    lens: LoraLens, run: Run, sizes: _Sizes, what: str, remedy: str = "pass shorter prompts"
) -> int | None:
    """How many rows fit, from the bytes of one and of what comes to all; None without a bound."""
    bound = lens.max_memory
    if bound is None:
        return None
    of_one, always = sizes(_need(lens, run))
    if always + of_one > bound:
        prompts = prompts_of(run)
        longest, slots = prompts.tokens.shape[1], prompts.slots
        read = f", {slots} of them read" if slots > 1 else ""
        raise ArgumentError(
            f"{_bound(lens)}, and {what} takes about {always + of_one:.3g} for "
            f"{longest} tokens{read}; allow more, or {remedy}."
        )
    return int((bound - always) // of_one)


def _need(lens: LoraLens, run: Run, *, in_turn: bool = False) -> _Need:
    """What the rows of a run take; with `in_turn` all logits are made some tokens at a time."""
    cfg, host, longest = lens.model.cfg, lens.host, prompts_of(run).tokens.shape[1]
    width = int(cfg.d_model)
    wide = width + int(getattr(cfg, "d_mlp", None) or 4 * width)
    any_pattern = int(cfg.n_heads) * longest
    pattern = any_pattern * host.keeps_patterns
    kept = 1 if lens.dtype.itemsize >= 4 else 3
    of_logits = lens.gate_dtype.itemsize * int(cfg.d_vocab_out)
    by_row, picks = _unembedded(lens, run, in_turn)
    graphed = _LOGITS_OF_GRAPH * by_row * of_logits
    of_token = lens.dtype.itemsize * longest
    return _Need(
        in_pass=of_token * (3 * wide + 4 * pattern) + _LOGITS * by_row * of_logits,
        of_graph=of_token * host.n_layers * (8 * wide + kept * pattern) + graphed,
        of_rerun=of_token * (host.n_layers * width + 8 * wide + 7 * pattern) + graphed,
        of_duals=lens.gate_dtype.itemsize * longest * _DUAL_ROW * (wide + any_pattern),
        always=run.held_bytes if isinstance(run, Reading) else 0,
        picks=picks,
        picked=_LOGITS * of_logits * min(picks, 2 * PICKS),
        graphed=_LOGITS_OF_GRAPH * of_logits * min(picks, PICKS),
    )


def row_bytes(lens: LoraLens, run: Prompts, read: int) -> float:
    """About the most that one copy of what is run holds at a time, as a dual number."""
    logits = read * run.slots * int(lens.model.cfg.d_vocab_out)
    of_logits = _LOGITS_OF_GRAPH * logits * lens.gate_dtype.itemsize
    return len(run.tokens) * _need(lens, run).of_duals + of_logits


def pass_bytes(lens: LoraLens) -> int:
    """About what a pass of dual numbers takes whatever its rows."""
    cfg, share = lens.model.cfg, lens.host.pass_overhead
    return int(share * int(cfg.d_model) * int(cfg.d_vocab_out) * lens.dtype.itemsize)


def _unembedded(lens: LoraLens, run: Run, in_turn: bool = False) -> tuple[int, int]:
    """The tokens of each row whose logits are held together, and those that are made in turn."""
    slots = prompts_of(run).slots
    adapted = any(site.kind == "unembed" for site in lens.sites)
    if adapted or lens.host.unembedding() is None:
        return slots, 0
    if isinstance(run, Prompts):
        return (0, len(run.tokens) * slots) if in_turn else (slots, 0)
    if isinstance(run.read, Picks):
        return 0, len(run.read.rows)
    return (0 if isinstance(run.read, Columns) else slots), 0


# --- Blocks that keep their inputs alone, and run again on the way back
#
# Each block runs under torch's non-reentrant checkpointing: the graph is the same, but what its
# nodes save is thrown away. On the way back a block runs once more, when the first of these tensors
# is asked for, so one block's tensors are held at a time. Hooks within a block therefore fire
# twice, a user's own too, and must be on the model until the way back is done. They see the same
# numbers, with the same draws of torch's random numbers. A second run that returns something else
# than the first (a hook that counts its calls, say) would give wrong derivatives: it is refused.

# A second run would append to a key-value cache, so there is none.
_CACHES = ("cache", "layer_past", "past_key_value", "past_key_values", "past_kv_cache_entry")


def blocks_rerun(lens: LoraLens) -> AbstractContextManager[None]:
    """Within the block, passes with a graph keep no more than the inputs of blocks.

    The lens's hooks must stay on until the way back is done.
    """

    def replace(span: Temporary) -> None:
        for layer, block in enumerate(lens.model.blocks):
            twice = functools.partial(_run_twice, f"blocks.{layer}", block.forward)
            replace_forward(span, block, twice)

    return Temporary(replace)


def _run_twice(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    kwargs = {key: None if key in _CACHES else value for key, value in kwargs.items()}
    once: list[Tensor] = []
    earlier = ForwardPass.under_way()  # over when the block runs again

    def run(*args: Any) -> Any:
        with contextlib.nullcontext() if earlier is None else earlier.goes_on():
            out = forward(*args, **kwargs)
        residual = (out[0] if isinstance(out, tuple) else out).detach()
        if once:
            _require_same(name, once[0], residual)
        else:
            once.append(residual)
        return out

    # To its end, so that there is an output to compare.
    with set_checkpoint_early_stop(False):
        return checkpoint(run, *args, use_reentrant=False)


def _require_same(name: str, first: Tensor, second: Tensor) -> None:
    # Token by token: some have entries that are thousands of times those of the others.
    room = torch.finfo(first.dtype).eps ** 0.5 * first.abs().amax(-1)
    if not bool(((first - second).abs().amax(-1) <= room).all() | first.isnan().any()):
        raise ModelStateError(
            f"{name}: within {named('max_memory')} a block runs again on the way back, and it "
            "returned something else than the first time. A hook of yours depends on how often it "
            "was called, or draws numbers of its own. Make it return the same each time, or allow "
            "more memory."
        )
