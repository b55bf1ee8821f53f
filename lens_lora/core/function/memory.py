"""How much goes into one pass: what is worth doing together, and what fits into `max_memory`.

1. Each kind of pass has a limit in tokens, and some also in logits. Beyond it the data no longer
   fit into the processor's caches, and larger batches gain nothing. The limits are the constants
   below; they are read at every call.
2. The bytes of a row (`footprint.py`) say what fits into `max_memory`, the bound of a lens.
   `rows_of_…` is how many rows fit, or None without a bound; a single row that does not fit is
   refused. `…_groups` divides the prompts, and `…_at_once` says how many copies of all prompts
   (points, tangents, covectors) go into one pass.
3. If a graph does not fit, blocks keep only their inputs, and run once more in the backward pass
   (`must_rerun`, `rerun.py`).

Nothing here changes a number, except by rounding. No forward pass.
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

# --- Limits of one pass in tokens, and in logits

# A forward pass over the rows of a batch.
ROW_TOKENS = 2048

# A forward pass that branches, over one prompt.
BRANCH_TOKENS = 4096
BRANCH_LOGITS = 2**27

# Branching is worth its hooks if it runs less than this share of the block passes.
BRANCHING_PAYS = 0.75

# A forward and a backward pass.
SLOPE_TOKENS = 512

# A forward and a backward pass that includes rows for the value of g alone.
RIDING_TOKENS = 32

# Two forward passes that are joined into one.
SHARED_TOKENS = 512

# A graph that is kept, and the directions that go back through it.
GRAPH_TOKENS = 512

# A graph of second derivatives at several points.
CURVATURE_TOKENS = 64

# Tangents; tangents without an unembedding; covectors; and the logits of any of these.
TANGENT_TOKENS = 2048
FINAL_TOKENS = 8192
COVECTOR_TOKENS = 512
DERIVATIVE_LOGITS = 2**26

# A graph with the tangents of a branch beside it.
EDGE_TOKENS = 1024

# The size of the graph of a second derivative, in graphs of a first derivative.
SECOND_ORDER_GRAPHS = 3.4
# The size of the tangents beside a graph of the values, in rows of dual numbers. On models of 5M to
# 190M parameters a third is within 20 % of the measured peak (`benchmarks/planned.py`).
TANGENTS_BESIDE_GRAPH = 1 / 3


# --- How many copies of all rows go into one pass


class _CopySize(NamedTuple):
    """The memory that one more copy of all rows takes.

    Attributes:
        of_row: the bytes of each row.
        logits: how many times the logits of a pick are held.
        picks: the number of picks whose logits are held together.
    """

    of_row: float
    logits: float
    picks: int


def rows_at_once(lens: SizedLens, run: Run) -> int:
    """How many copies of the prompts go into one forward pass."""
    rows_of_pass(lens, run)  # Refuses a single row that exceeds the bound.

    def size_of_copy(footprint: Footprint) -> _CopySize:
        return _CopySize(footprint.in_pass, LOGITS, 2 * PICKS)

    return _copies_at_once(ROW_TOKENS, lens, run, size_of_copy)


def slopes_at_once(lens: SizedLens, run: Run) -> int:
    """How many copies of the prompts go into one forward and backward pass."""
    rows_of_graph(lens, run)

    def size_of_copy(footprint: Footprint) -> _CopySize:
        of_row = min(footprint.of_rerun, footprint.of_graph)
        return _CopySize(of_row, LOGITS_OF_GRAPH, PICKS)

    return _copies_at_once(SLOPE_TOKENS, lens, run, size_of_copy)


def second_orders_at_once(lens: SizedLens, reading: Reading, tokens: int = GRAPH_TOKENS) -> int:
    """How many copies of the prompts go into one graph of a second derivative."""
    rows_of_second_order(lens, reading)

    def size_of_copy(footprint: Footprint) -> _CopySize:
        of_row = SECOND_ORDER_GRAPHS * footprint.of_graph
        return _CopySize(of_row, SECOND_ORDER_GRAPHS * LOGITS_OF_GRAPH, PICKS)

    return _copies_at_once(tokens, lens, reading, size_of_copy)


def _copies_at_once(
    tokens: int, lens: SizedLens, run: Run, size_of_copy: Callable[[Footprint], _CopySize]
) -> int:
    """How many copies of the prompts go into one pass, by tokens and by the bound of the lens.

    c copies take c · rows · of_row bytes, and the logits of c · picks picks. If these are many,
    they are computed in turn.
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
    """How many points go into one branching pass, by tokens of a row and logits of all rows."""
    prompts = prompts_of(run)
    rows, longest = prompts.tokens.shape
    logits = rows * prompts.slots * int(lens.model.cfg.d_vocab_out)
    points = min(_count_within(BRANCH_TOKENS, longest), _count_within(BRANCH_LOGITS, logits))
    fitting = rows_of_pass(lens, run)
    return points if fitting is None else max(1, min(points, fitting - 1))


def directions_at_once(prompts: Prompts) -> int:
    """How many directions go back in one batch through a graph of the prompts."""
    return _count_within(GRAPH_TOKENS, prompts.tokens.numel())


def tangents_at_once(lens: SizedLens, run: Prompts, *, read: int) -> int:
    """How many tangents go into one pass, with the logits of `read` prompts, or of none."""
    most_tokens = TANGENT_TOKENS if read else FINAL_TOKENS
    return derivatives_at_once(most_tokens, lens, run, read)


def derivatives_at_once(tokens: int, lens: SizedLens, run: Prompts, read: int) -> int:
    """How many tangents go into one forward pass, or how many covectors into one backward pass.

    Args:
        tokens: the limit in tokens.
        lens: the adapter over the model.
        run: the rows.
        read: the number of rows whose logits are read.

    Raises:
        ArgumentError: the bound of the lens has no room for one of them.
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
        lens,
        run,
        of_row=of_copy,
        always=dual_pass_bytes(lens) + of_copy,
        what="a pass of two rows of these prompts",
        remedy="pass fewer or shorter prompts at a time",
    )
    return min(most, fitting)


def rides_along(lens: SizedLens, run: Run, copies: int) -> bool:
    """Whether points without a derivative cost less in a pass with a backward pass than alone.

    They save one reading of the weights, but the backward pass goes through their rows as well,
    which costs more beyond a few tokens. With a kernel that rounds activations to 8 bit they never
    ride along: it looks at all rows of a batch together, so they would change the other rows.
    """
    is_small = copies * prompts_of(run).tokens.numel() <= RIDING_TOKENS
    if not is_small or lens.plan.activation_rounding:
        return False
    return copies <= slopes_at_once(lens, run)


def shares_pass(lens: SizedLens, run: Run, copies: int) -> bool:
    """Whether so many copies of the prompts cost less in one forward pass than in two.

    Never with a kernel that rounds to 8 bit, by which they would change one another
    (`rides_along`).
    """
    is_small = copies * prompts_of(run).tokens.numel() <= SHARED_TOKENS
    return is_small and not lens.plan.activation_rounding


def _count_within(bound: int, size: int) -> int:
    """How many things of this size are within a bound, but at least one."""
    return max(1, bound // size)


# --- The prompts in groups


def graph_groups(lens: SizedLens, reading: Reading) -> list[Reading]:
    """Divide the prompts so that each group's forward and backward pass is within the bound.

    Raises:
        ArgumentError: rows that have to run together (those of one prompt, or all rows if a user's
            function reads them) exceed the bound.
    """
    return _groups(lens, reading, rows_of_graph(lens, reading))


def pass_groups(lens: SizedLens, reading: Reading, copies: int = 1) -> list[Reading]:
    """Divide the prompts so that a forward pass of so many copies of a group is within the bound.

    Raises:
        ArgumentError: as for `graph_groups`; or the bound has room for fewer rows than copies.
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
    """Divide the prompts so that a group's graph and its tangents together are within the bound.

    Args:
        lens: the adapter over the model.
        reading: what is run and read.
        beside: how many more bytes are held for each row.

    Raises:
        ArgumentError: as for `graph_groups`.
    """
    of_tangents = footprint_of(lens, reading).of_duals
    fitting = rows_of_graph(lens, reading, beside + of_tangents, "the edges")
    return _groups(lens, reading, fitting, EDGE_TOKENS)


def dual_graph_groups(lens: SizedLens, reading: Reading) -> list[Reading]:
    """Divide the prompts so that a group's dual pass and backward pass are within the bound.

    Raises:
        ArgumentError: as for `graph_groups`.
    """
    limits = (rows_of_graph(lens, reading), rows_of_duals(lens, reading.rows))
    fitting = [rows for rows in limits if rows is not None]
    return _groups(lens, reading, min(fitting, default=None))


def second_order_groups(lens: SizedLens, reading: Reading) -> list[Reading]:
    """Divide the prompts so that a group's second derivative is within the bound.

    Raises:
        ArgumentError: as for `graph_groups`.
    """
    return _groups(lens, reading, rows_of_second_order(lens, reading), GRAPH_TOKENS)


def _groups(
    lens: SizedLens, reading: Reading, rows: int | None, tokens: int | None = None
) -> list[Reading]:
    """Groups of at most this many rows and tokens; a single group if neither is limited."""
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


# --- How many tokens and rows go into one pass

# A forward pass, a forward and a backward pass, or a pass of dual numbers.
Pass = Literal["plain", "graph", "dual"]


def tokens_at_once(lens: SizedLens, prompts: Prompts, most: int, kind: Pass = "plain") -> int:
    """How many tokens of these prompts go into one pass: at most `most`, and within the bound."""
    rows_of = {"plain": rows_of_pass, "graph": rows_of_graph, "dual": rows_of_duals}[kind]
    rows = rows_of(lens, prompts)
    return most if rows is None else min(most, rows * prompts.tokens.shape[1])


def row_groups(
    lens: SizedLens, prompts: Prompts, most: int, kind: Pass = "plain"
) -> list[list[int]]:
    """Divide the indices of the prompts into groups of at most `most` tokens, within the bound."""
    tokens = tokens_at_once(lens, prompts, most, kind)
    rows_at_once = _count_within(tokens, prompts.tokens.shape[1])
    rows = torch.arange(prompts.batch, device="cpu")
    return [group.tolist() for group in rows.split(rows_at_once)]


def rows_of_pass(lens: SizedLens, run: Run) -> int | None:
    """How many rows of a pass without a graph are within the bound; None without a bound."""
    if lens.max_memory is None:
        return None
    footprint = footprint_of(lens, run)
    return _rows_within(
        lens,
        run,
        of_row=footprint.in_pass,
        always=footprint.always + footprint.picked,
        what="a forward pass of one prompt",
    )


def rows_of_logits(lens: SizedLens, prompts: Prompts, held: float) -> int | None:
    """How many rows a forward pass takes while `held` bytes are in use; None without a bound."""
    if lens.max_memory is None:
        return None
    footprint = footprint_of(lens, prompts, in_turn=True)
    return _rows_within(
        lens,
        prompts,
        of_row=footprint.in_pass,
        always=held + footprint.picked,
        what="a forward pass of one prompt, beside the logits that are held,",
    )


def rows_of_graph(
    lens: SizedLens, run: Run, beside: float = 0.0, what: str = "a forward and a backward pass"
) -> int | None:
    """How many rows go into one forward and backward pass; None without a bound.

    Args:
        lens: the adapter over the model.
        run: the rows.
        beside: the bytes that each row takes beside its graph.
        what: the pass, as an error names it.

    Raises:
        ArgumentError: the bound has no room for one row.
    """
    if lens.max_memory is None:
        return None
    footprint = footprint_of(lens, run)
    return _rows_within(
        lens,
        run,
        of_row=min(footprint.of_rerun, footprint.of_graph) + beside,
        always=footprint.always + footprint.graphed,
        what=f"{what} of one prompt",
    )


def rows_of_second_order(lens: SizedLens, run: Run) -> int | None:
    """How many rows go into one graph of a second derivative; None without a bound."""
    if lens.max_memory is None:
        return None
    footprint = footprint_of(lens, run)
    return _rows_within(
        lens,
        run,
        of_row=SECOND_ORDER_GRAPHS * footprint.of_graph,
        always=footprint.always + SECOND_ORDER_GRAPHS * footprint.graphed,
        what="a second derivative of one prompt, whose graph is kept whole,",
    )


def rows_of_duals(lens: SizedLens, prompts: Prompts) -> int | None:
    """How many rows of dual numbers, all of them read, go into one pass; None without a bound."""
    if lens.max_memory is None:
        return None
    rows = len(prompts.tokens)
    return _rows_within(
        lens,
        prompts,
        of_row=dual_copy_bytes(lens, prompts, rows) / rows,
        always=dual_pass_bytes(lens),
        what="a pass of dual numbers of one prompt",
    )


def _rows_within(
    lens: SizedLens,
    run: Run,
    *,
    of_row: float,
    always: float,
    what: str,
    remedy: str = "pass shorter prompts",
) -> int:
    """How many rows fit into the bound of a lens, which has one.

    Args:
        lens: the adapter over the model.
        run: the rows.
        of_row: the bytes that a row takes.
        always: the bytes that all rows share.
        what: the pass, as an error names it.
        remedy: what to do if not even one row fits.

    Raises:
        ArgumentError: not even one row fits.
    """
    bound = lens.max_memory
    assert bound is not None, "without a bound any number of rows fits"
    if always + of_row > bound:
        prompts = prompts_of(run)
        longest = prompts.tokens.shape[1]
        tokens = f"{longest} tokens"
        if prompts.slots > 1:
            tokens += f", {prompts.slots} of them read"
        raise ArgumentError(
            f"{_bound(lens)}, and {what} takes about {always + of_row:.3g} for {tokens}; "
            f"allow more, or {remedy}."
        )
    return int((bound - always) // of_row)


# --- Whether all rows fit


def must_rerun(lens: SizedLens, run: Run, *, duals: bool = False) -> bool:
    """Whether the graph of these rows exceeds the bound, so that blocks run twice."""
    if lens.max_memory is None:
        return False
    needed = dual_graph_bytes(lens, run) if duals else graph_bytes(lens, run)
    return needed > lens.max_memory


def fits_with_covectors(lens: SizedLens, run: Prompts) -> bool:
    """Whether a graph of all prompts fits together with a covector for each, as large as a row.

    If it does not, the prompts go in groups, each with a graph of its own.
    """
    if lens.max_memory is None:
        return True
    return dual_pass_bytes(lens) + 2 * dual_copy_bytes(lens, run, run.batch) <= lens.max_memory


def graph_bytes(lens: SizedLens, run: Run) -> float:
    """About how many bytes a graph of all rows takes, including what the reading holds."""
    footprint = footprint_of(lens, run)
    rows = len(prompts_of(run).tokens)
    return rows * footprint.of_graph + footprint.graphed + footprint.always


def dual_graph_bytes(lens: SizedLens, run: Run) -> float:
    """About how many bytes dual numbers take if their values have a graph."""
    rows = len(prompts_of(run).tokens)
    of_tangents = rows * TANGENTS_BESIDE_GRAPH * footprint_of(lens, run).of_duals
    return graph_bytes(lens, run) + of_tangents


def require_rows_of_graph(lens: SizedLens, run: Run) -> None:
    """Check that one forward and backward pass of all rows is within the bound."""
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
    """The bound of a lens, as its user wrote it, for messages."""
    return f"{named('max_memory')}{worded('=', ' ')}{lens.max_memory:.3g} bytes"
