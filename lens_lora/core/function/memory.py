"""How much one pass does at a time: what is worth doing together, and what fits in `max_memory`.

1. Each kind of pass has a bound in tokens, and some in logits: beyond it the data no longer fit
   into the caches, and nothing is gained. The bounds are the constants below; they are read at
   every call.
2. Within `max_memory`, the bound of a lens, from the bytes that a row takes (`footprint.py`).
   `rows_of_…` says how many rows fit, or None without a bound; what does not fit even alone is
   refused. `…_groups` divides the prompts, and `…_at_once` says how many copies of all of them
   (points, tangents, covectors) go together.
3. Where a graph does not fit, blocks keep their inputs alone and run once more on the way back
   (`must_rerun`, `rerun.py`).

Nothing here changes a number but by rounding. No forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from lens_lora.core.function.footprint import (
    LOGITS,
    LOGITS_OF_GRAPH,
    Footprint,
    Run,
    SizedLens,
    dual_copy_bytes,
    dual_pass_bytes,
    footprint_of,
    prompts_of,
)
from lens_lora.core.readout.prompts import Prompts
from lens_lora.core.readout.reading import PICKS, Reading
from lens_lora.errors import ArgumentError, many, named, worded

# --- Bounds in tokens, and in logits

# Forward passes, in rows of one batch.
ROW_TOKENS = 2048

# Forward passes that branch, of one prompt at a time.
BRANCH_TOKENS = 4096
BRANCH_LOGITS = 2**27

# Branching is worth its hooks below this share of the block passes.
BRANCHING_PAYS = 0.75

# Forward passes that a backward pass follows.
SLOPE_TOKENS = 512

# A graph with rows that only show g.
RIDING_TOKENS = 32

# One forward pass instead of two: more of them do not fit into the caches.
SHARED_TOKENS = 512

# A graph that is kept, and the directions that go back through it.
GRAPH_TOKENS = 512

# A graph of second derivatives at several points; more of them cost as much each.
CURVATURE_TOKENS = 64

# Tangents, tangents of which nothing is unembedded, and covectors; and the logits of either.
TANGENT_TOKENS = 2048
FINAL_TOKENS = 8192
COVECTOR_TOKENS = 512
DERIVATIVE_LOGITS = 2**26

# A graph, and the tangents of a branch beside it.
EDGE_TOKENS = 1024

# The graph of a second derivative, in graphs of a first derivative.
SECOND_ORDER_GRAPHS = 3.4
# The tangents that are held beside a graph of the values, in rows of dual numbers.
TANGENTS_BESIDE_GRAPH = 0.6


# --- How many copies of all rows at once


class _CopySize(NamedTuple):
    """The memory that one more copy of all rows takes.

    Attributes:
        of_row: bytes of each row.
        logits: how often the logits of a pick are held.
        picks: of how many picks the logits are held together.
    """

    of_row: float
    logits: float
    picks: int


def rows_at_once(lens: SizedLens, run: Run) -> int:
    """How many copies of the prompts make one batch of a forward pass."""
    rows_of_pass(lens, run)  # This refuses what is beyond the bound by itself.

    def size_of_copy(footprint: Footprint) -> _CopySize:
        return _CopySize(footprint.in_pass, LOGITS, 2 * PICKS)

    return _copies_at_once(ROW_TOKENS, lens, run, size_of_copy)


def slopes_at_once(lens: SizedLens, run: Run) -> int:
    """How many copies of the prompts make one batch of a forward and a backward pass."""
    rows_of_graph(lens, run)

    def size_of_copy(footprint: Footprint) -> _CopySize:
        of_row = min(footprint.of_rerun, footprint.of_graph)
        return _CopySize(of_row, LOGITS_OF_GRAPH, PICKS)

    return _copies_at_once(SLOPE_TOKENS, lens, run, size_of_copy)


def second_orders_at_once(lens: SizedLens, reading: Reading, tokens: int = GRAPH_TOKENS) -> int:
    """How many copies of the prompts have one graph of a second derivative: in so many tokens."""
    rows_of_second_order(lens, reading)

    def size_of_copy(footprint: Footprint) -> _CopySize:
        of_row = SECOND_ORDER_GRAPHS * footprint.of_graph
        return _CopySize(of_row, SECOND_ORDER_GRAPHS * LOGITS_OF_GRAPH, PICKS)

    return _copies_at_once(tokens, lens, reading, size_of_copy)


def _copies_at_once(
    tokens: int, lens: SizedLens, run: Run, size_of_copy: Callable[[Footprint], _CopySize]
) -> int:
    """How many copies of the prompts make one pass: in tokens, and within the bound of the lens.

    c copies take c · rows · of_row bytes, and the logits of c · picks picks, which are made in turn
    where they are many.
    """
    prompts = prompts_of(run)
    most = _count_within(tokens, prompts.tokens.numel())
    if lens.max_memory is None:
        return most
    footprint = footprint_of(lens, run)
    size = size_of_copy(footprint)
    of_copy = len(prompts.tokens) * size.of_row
    of_pick = size.logits * lens.gate_dtype.itemsize * int(lens.model.cfg.d_vocab_out)
    room = lens.max_memory - footprint.always
    with_all_logits = room // (of_copy + of_pick * footprint.picks)
    if footprint.picks:
        with_all_logits = min(with_all_logits, size.picks // footprint.picks)
    with_logits_in_turn = (room - of_pick * size.picks) // of_copy
    fitting = max(with_all_logits, with_logits_in_turn)
    return max(1, min(most, int(fitting)))


def branches_at_once(lens: SizedLens, run: Run) -> int:
    """How many points one branching pass has: in tokens of a row, and in logits of all rows."""
    prompts = prompts_of(run)
    rows, longest = prompts.tokens.shape
    logits = rows * prompts.slots * int(lens.model.cfg.d_vocab_out)
    points = min(_count_within(BRANCH_TOKENS, longest), _count_within(BRANCH_LOGITS, logits))
    fitting = rows_of_pass(lens, run)
    return points if fitting is None else max(1, min(points, fitting - 1))


def directions_at_once(prompts: Prompts) -> int:
    """How many directions go back at once through a graph of the prompts."""
    return _count_within(GRAPH_TOKENS, prompts.tokens.numel())


def tangents_at_once(lens: SizedLens, run: Prompts, *, read: int) -> int:
    """How many tangents of what is run make one pass, with the logits of `read` prompts or none."""
    return derivatives_at_once(TANGENT_TOKENS if read else FINAL_TOKENS, lens, run, read)


def derivatives_at_once(tokens: int, lens: SizedLens, run: Prompts, read: int) -> int:
    """How many tangents make one pass, or how many covectors one way back.

    Args:
        tokens: the bound in tokens.
        lens: the adapter over the model.
        run: the rows.
        read: of how many of them the logits are read.

    Raises:
        ArgumentError: a bound of the lens without room for one.
    """
    logits = read * run.slots * int(lens.model.cfg.d_vocab_out)
    by_tokens = _count_within(tokens, run.tokens.numel())
    by_logits = _count_within(DERIVATIVE_LOGITS, max(1, logits))
    most = min(by_tokens, by_logits)
    if lens.max_memory is None:
        return most
    of_copy = dual_copy_bytes(lens, run, read)
    # The first row of a pass carries no tangent.
    fitting = _rows_within(
        lens.max_memory,
        lens,
        run,
        of_row=of_copy,
        always=dual_pass_bytes(lens) + of_copy,
        what="a pass of two rows of these prompts",
        remedy="pass fewer or shorter prompts at a time",
    )
    return min(most, fitting)


def rides_along(lens: SizedLens, run: Run, copies: int) -> bool:
    """Whether points of which no derivative is taken cost less in such a pass than in their own.

    Beyond a few tokens the way back, which goes through their rows as well, costs more than the
    weights that are read once less. A kernel that rounds activations to 8 bit looks at all rows of
    a batch together, so that others would change what it makes of the first.
    """
    is_small = copies * prompts_of(run).tokens.numel() <= RIDING_TOKENS
    if not is_small or lens.plan.activation_rounding:
        return False
    return copies <= slopes_at_once(lens, run)


def shares_pass(lens: SizedLens, run: Run, copies: int) -> bool:
    """Whether so many copies of the prompts cost less in one forward pass than in two.

    Not where a kernel that rounds to 8 bit would let them change one another (`rides_along`).
    """
    is_small = copies * prompts_of(run).tokens.numel() <= SHARED_TOKENS
    return is_small and not lens.plan.activation_rounding


def _count_within(bound: int, size: int) -> int:
    """How many things of this size are within the bound; at least one."""
    return max(1, bound // size)


# --- The prompts in groups


def graph_groups(lens: SizedLens, reading: Reading) -> list[Reading]:
    """The prompts in groups whose forward and backward pass is within the bound of the lens.

    Raises:
        ArgumentError: the rows that cannot be run apart (those of one prompt, or all of them where
            a user's function reads them) are more than the bound has room for.
    """
    return _groups(lens, reading, rows_of_graph(lens, reading))


def pass_groups(lens: SizedLens, reading: Reading, copies: int = 1) -> list[Reading]:
    """The prompts in groups, so many copies of which go forward within the bound of the lens.

    Raises:
        ArgumentError: as for `graph_groups`, or room for fewer rows than copies.
    """
    fitting = rows_of_pass(lens, reading)
    if fitting is None:
        return _groups(lens, reading, None)
    if fitting < copies:
        raise ArgumentError(
            f"{_bound(lens)}, enough for a forward pass of {many(fitting, 'row')}, and {copies} "
            "are run beside one another; allow more, or pass shorter prompts."
        )
    return _groups(lens, reading, fitting // copies)


def groups_beside(lens: SizedLens, reading: Reading, beside: int) -> list[Reading]:
    """The prompts in groups whose graph, with tangents beside the values, is within the bound.

    Args:
        lens: the adapter over the model.
        reading: what is run and read.
        beside: how many bytes more are held of each row.

    Raises:
        ArgumentError: as for `graph_groups`.
    """
    of_tangents = footprint_of(lens, reading).of_duals
    fitting = rows_of_graph(lens, reading, beside + of_tangents, "the edges")
    return _groups(lens, reading, fitting, EDGE_TOKENS)


def dual_graph_groups(lens: SizedLens, reading: Reading) -> list[Reading]:
    """The prompts in groups that have a pass of dual numbers and a way back within the bound.

    Raises:
        ArgumentError: as for `graph_groups`.
    """
    limits = (rows_of_graph(lens, reading), rows_of_duals(lens, reading.rows))
    fitting = [rows for rows in limits if rows is not None]
    return _groups(lens, reading, min(fitting, default=None))


def second_order_groups(lens: SizedLens, reading: Reading) -> list[Reading]:
    """The prompts in groups whose second derivative is within the bound.

    Raises:
        ArgumentError: as for `graph_groups`.
    """
    return _groups(lens, reading, rows_of_second_order(lens, reading), GRAPH_TOKENS)


def _groups(
    lens: SizedLens, reading: Reading, rows: int | None, tokens: int | None = None
) -> list[Reading]:
    """Groups of at most this many rows and tokens; a single group where neither is limited."""
    longest = reading.rows.tokens.shape[1]
    limits: list[int] = []
    if rows:
        limits.append(rows * longest)
    if tokens:
        limits.append(tokens)
    if not limits or min(limits) >= len(reading.owner) * longest:
        return [reading]
    groups = reading.groups(min(limits))
    largest = max(len(group.owner) for group in groups)
    if rows is not None and largest > rows:
        _refuse_group(lens, reading, rows, largest, is_one=len(groups) == 1)
    return groups


def _refuse_group(
    lens: SizedLens, reading: Reading, rows: int, largest: int, *, is_one: bool
) -> None:
    why = "they are of one prompt"
    remedy = "shorter"
    if is_one and reading.batch > 1:
        why = "a function of yours reads them together"
        remedy = "fewer"
    raise ArgumentError(
        f"{_bound(lens)}, enough for {rows} of {largest} rows that are run at once, as {why}; "
        f"allow more, or pass {remedy} prompts."
    )


# --- How many tokens and rows at once

# A pass that keeps nothing, one that is followed by a way back, or one of dual numbers.
Pass = Literal["plain", "graph", "dual"]


def tokens_at_once(lens: SizedLens, prompts: Prompts, most: int, kind: Pass = "plain") -> int:
    """How many tokens of these prompts make one pass: at most so many, and within the bound."""
    rows_of = {"plain": rows_of_pass, "graph": rows_of_graph, "dual": rows_of_duals}[kind]
    rows = rows_of(lens, prompts)
    return most if rows is None else min(most, rows * prompts.tokens.shape[1])


def row_groups(
    lens: SizedLens, prompts: Prompts, most: int, kind: Pass = "plain"
) -> list[list[int]]:
    """The prompts, by index, in groups of at most so many tokens, and within the bound."""
    tokens = tokens_at_once(lens, prompts, most, kind)
    rows_at_once = _count_within(tokens, prompts.tokens.shape[1])
    rows = torch.arange(prompts.batch, device="cpu")
    return [group.tolist() for group in rows.split(rows_at_once)]


def rows_of_pass(lens: SizedLens, run: Run) -> int | None:
    """How many rows of a pass without a graph are within the bound; None where there is none."""
    if lens.max_memory is None:
        return None
    footprint = footprint_of(lens, run)
    return _rows_within(
        lens.max_memory,
        lens,
        run,
        of_row=footprint.in_pass,
        always=footprint.always + footprint.picked,
        what="a forward pass of one prompt",
    )


def rows_of_logits(lens: SizedLens, prompts: Prompts, held: float) -> int | None:
    """How many rows go forward at once beside `held` bytes of logits; None without a bound."""
    if lens.max_memory is None:
        return None
    footprint = footprint_of(lens, prompts, in_turn=True)
    return _rows_within(
        lens.max_memory,
        lens,
        prompts,
        of_row=footprint.in_pass,
        always=held + footprint.picked,
        what="a forward pass of one prompt, beside the logits that are held,",
    )


def rows_of_graph(
    lens: SizedLens, run: Run, beside: float = 0.0, what: str = "a forward and a backward pass"
) -> int | None:
    """How many rows go forward and back at once; None without a bound.

    Args:
        lens: the adapter over the model.
        run: the rows.
        beside: bytes that each row takes beside its graph.
        what: the pass, as an error names it.

    Raises:
        ArgumentError: a bound without room for one row.
    """
    if lens.max_memory is None:
        return None
    footprint = footprint_of(lens, run)
    return _rows_within(
        lens.max_memory,
        lens,
        run,
        of_row=min(footprint.of_rerun, footprint.of_graph) + beside,
        always=footprint.always + footprint.graphed,
        what=f"{what} of one prompt",
    )


def rows_of_second_order(lens: SizedLens, run: Run) -> int | None:
    """How many rows a graph of a second derivative, which is kept whole, may have."""
    if lens.max_memory is None:
        return None
    footprint = footprint_of(lens, run)
    return _rows_within(
        lens.max_memory,
        lens,
        run,
        of_row=SECOND_ORDER_GRAPHS * footprint.of_graph,
        always=footprint.always + SECOND_ORDER_GRAPHS * footprint.graphed,
        what="a second derivative of one prompt, whose graph is kept whole,",
    )


def rows_of_duals(lens: SizedLens, prompts: Prompts) -> int | None:
    """How many rows of dual numbers, each of which is read, make one pass within the bound."""
    if lens.max_memory is None:
        return None
    rows = len(prompts.tokens)
    return _rows_within(
        lens.max_memory,
        lens,
        prompts,
        of_row=dual_copy_bytes(lens, prompts, rows) / rows,
        always=dual_pass_bytes(lens),
        what="a pass of dual numbers of one prompt",
    )


def _rows_within(
    bound: float,
    lens: SizedLens,
    run: Run,
    *,
    of_row: float,
    always: float,
    what: str,
    remedy: str = "pass shorter prompts",
) -> int:
    """How many rows fit, from the bytes of one and of what comes to all.

    Raises:
        ArgumentError: not even one.
    """
    if always + of_row > bound:
        prompts = prompts_of(run)
        longest = prompts.tokens.shape[1]
        read = f", {prompts.slots} of them read" if prompts.slots > 1 else ""
        raise ArgumentError(
            f"{_bound(lens)}, and {what} takes about {always + of_row:.3g} for "
            f"{longest} tokens{read}; allow more, or {remedy}."
        )
    return int((bound - always) // of_row)


# --- Whether all rows fit


def must_rerun(lens: SizedLens, run: Run, *, duals: bool = False) -> bool:
    """Whether the graph of these rows is beyond the bound, so that blocks run twice."""
    if lens.max_memory is None:
        return False
    needed = dual_graph_bytes(lens, run) if duals else graph_bytes(lens, run)
    return needed > lens.max_memory


def fits_with_covectors(lens: SizedLens, run: Prompts) -> bool:
    """Whether one graph of all prompts fits beside a covector for each, which is as large a row.

    Where it does not, prompts go a few at a time, each group with a graph of its own.
    """
    if lens.max_memory is None:
        return True
    return dual_pass_bytes(lens) + 2 * dual_copy_bytes(lens, run, run.batch) <= lens.max_memory


def graph_bytes(lens: SizedLens, run: Run) -> float:
    """About how many bytes a graph of all rows takes, with what the reading holds."""
    footprint = footprint_of(lens, run)
    rows = len(prompts_of(run).tokens)
    return rows * footprint.of_graph + footprint.graphed + footprint.always


def dual_graph_bytes(lens: SizedLens, run: Run) -> float:
    """About how many bytes dual numbers take where their values have a graph."""
    rows = len(prompts_of(run).tokens)
    of_tangents = rows * TANGENTS_BESIDE_GRAPH * footprint_of(lens, run).of_duals
    return graph_bytes(lens, run) + of_tangents


def require_rows_of_graph(lens: SizedLens, run: Run) -> None:
    """Check that all rows go forward and back at once within the bound."""
    fitting = rows_of_graph(lens, run)
    rows = len(prompts_of(run).tokens)
    if fitting is not None and fitting < rows:
        raise ArgumentError(
            f"{_bound(lens)}, enough for a forward and a backward pass of "
            f"{fitting} of these {rows} rows; pass fewer prompts at a time, or allow more."
        )


def require_graph(lens: SizedLens, run: Run) -> None:
    """Check that a graph of all rows, whose blocks do not run again, is within the bound."""
    require_rows_of_graph(lens, run)
    if must_rerun(lens, run):
        raise ArgumentError(
            f"{_bound(lens)}, and the graph of these rows, which is kept "
            "whole, takes more; pass fewer or shorter prompts at a time, or allow more."
        )


def _bound(lens: SizedLens) -> str:
    """The bound of a lens as its user wrote it, for messages."""
    return f"{named('max_memory')}{worded('=', ' ')}{lens.max_memory:.3g} bytes"
