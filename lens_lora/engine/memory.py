"""About how much memory a pass takes, and what fits within the bound of a lens.

Numbers that a block holds for a row of T tokens, fitted to peaks of a model of 135M parameters in
float32 (`benchmarks/memory.py` prints such peaks); h heads, and m = d_model + d_mlp:

    a pass without a graph         T (3 m + 4 h T)     one block at a time
    a graph                        T (8 m + c h T)     every block;  c = 1, and 3 in half precision
    a graph whose blocks run again T (8 m + 7 h T)     one block, and T d_model of every block

Without attention patterns (a fused kernel) the terms with h T fall away. To each row come the
logits of the tokens that are read: 3 times their number in a pass, 8 times in a graph. Of a margin
they are few. Those of a sum over a response are made some tokens at a time, however many the rows,
and a divergence holds those of the base. No forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lens_lora.errors import ArgumentError
from lens_lora.lens import LoraLens
from lens_lora.readouts.divergence import Divergence
from lens_lora.readouts.picks import PICKS, Columns, Picks
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.rows import Reading

__all__ = [
    "Run",
    "must_rerun",
    "prompts_of",
    "require_rows_of_graph",
    "require_second_order",
    "require_tangents",
    "rows_of_graph",
    "rows_of_pass",
]

# What is run: by a reading, only the logits that it needs are made.
Run = Prompts | Reading

_SECOND, _DUALS = 2.5, 1.3  # graphs of a first derivative
_LOGITS, _LOGITS_OF_GRAPH = 3, 8


def prompts_of(run: Run) -> Prompts:
    """The prompts of what is run."""
    return run.prompts if isinstance(run, Reading) else run


class _Need(NamedTuple):
    """Bytes: of one row without and with a graph, and whatever the rows.

    Attributes:
        in_pass, of_graph, of_rerun: of each row.
        always: held by the reading.
        picked, graphed: of the logits that are held together, without and with a graph.
    """

    in_pass: float
    of_graph: float
    of_rerun: float
    always: float
    picked: float
    graphed: float


def must_rerun(lens: LoraLens, run: Run, *, duals: bool = False) -> bool:
    """Whether the graph of these rows is beyond the bound, so that blocks run twice.

    Args:
        lens: the adapter over the model.
        run: what is run at a time.
        duals: the graph is of the values of dual numbers, whose tangents are held as well.
    """
    if lens.max_memory is None:
        return False
    need = _need(lens, run)
    of_rows = len(prompts_of(run).tokens) * need.of_graph + need.graphed
    return (_DUALS if duals else 1) * of_rows + need.always > lens.max_memory


def rows_of_pass(lens: LoraLens, run: Run) -> int | None:
    """How many rows of a pass without a graph are within the bound; None where there is none.

    Args:
        lens: the adapter over the model.
        run: of such length.

    Raises:
        ArgumentError: not even one.
    """
    if lens.max_memory is None:
        return None
    need = _need(lens, run)
    always = need.always + need.picked
    return _rows(lens, run, need.in_pass, always, "a forward pass of one prompt")


def rows_of_graph(lens: LoraLens, run: Run) -> int | None:
    """How many rows go forward and back at once within the bound, blocks run again where needed.

    Args:
        lens: the adapter over the model.
        run: of such length.

    Raises:
        ArgumentError: not even one.
    """
    if lens.max_memory is None:
        return None
    need = _need(lens, run)
    least, always = min(need.of_rerun, need.of_graph), need.always + need.graphed
    return _rows(lens, run, least, always, "a forward and a backward pass of one prompt")


def require_rows_of_graph(lens: LoraLens, run: Run) -> None:
    """Check that all rows go forward and back at once within the bound.

    Args:
        lens: the adapter over the model.
        run: what is run.

    Raises:
        ArgumentError: they do not.
    """
    fitting, rows = rows_of_graph(lens, run), len(prompts_of(run).tokens)
    if fitting is not None and fitting < rows:
        raise ArgumentError(
            f"max_memory={lens.max_memory:.3g} bytes, enough for a forward and a backward pass of "
            f"{fitting} of these {rows} rows; pass fewer prompts at a time, or allow more."
        )


def require_second_order(lens: LoraLens, run: Run) -> None:
    """Check that the graph of a second derivative, which is kept whole, is within the bound.

    Args:
        lens: the adapter over the model.
        run: what is run.

    Raises:
        ArgumentError: it is not.
    """
    if lens.max_memory is None:
        return
    need = _need(lens, run)
    of_rows = _SECOND * (len(prompts_of(run).tokens) * need.of_graph + need.graphed)
    _rows(lens, run, of_rows, need.always, "a second derivative, whose graph is kept whole,")


def require_tangents(lens: LoraLens, prompts: Prompts, names: Sequence[str]) -> None:
    """Check that the tangents of these hook points, which are all kept, are within the bound.

    Args:
        lens: the adapter over the model.
        prompts: what is run.
        names: of hook points, each once.

    Raises:
        ArgumentError: they are not.
    """
    if lens.max_memory is None:
        return
    cfg, longest = lens.model.cfg, prompts.tokens.shape[1]
    wide = max(int(cfg.d_model), int(getattr(cfg, "d_mlp", None) or 0))
    patterns = sum(name.endswith(("hook_pattern", "hook_attn_scores")) for name in names)
    of_token = (len(names) - patterns) * wide + patterns * int(cfg.n_heads) * longest
    needed = prompts.tokens.numel() * lens.dtype.itemsize * of_token
    if needed > lens.max_memory:
        raise ArgumentError(
            f"max_memory={lens.max_memory:.3g} bytes, and the tangents of {len(names)} hook points "
            f"take about {needed:.3g}; name fewer, as in names='blocks.*.hook_out', or allow more."
        )


def _rows(lens: LoraLens, run: Run, of_one: float, always: float, what: str) -> int | None:
    bound = lens.max_memory
    if bound is None:
        return None
    if always + of_one > bound:
        prompts = prompts_of(run)
        longest, slots = prompts.tokens.shape[1], prompts.slots
        read = f", {slots} of them read" if slots > 1 else ""
        raise ArgumentError(
            f"max_memory={bound:.3g} bytes, and {what} takes about {always + of_one:.3g} for "
            f"{longest} tokens{read}; allow more, or pass shorter prompts."
        )
    return int((bound - always) // of_one)


def _need(lens: LoraLens, run: Run) -> _Need:
    cfg, host, longest = lens.model.cfg, lens.plan.host, prompts_of(run).tokens.shape[1]
    width = int(cfg.d_model)
    wide = width + int(getattr(cfg, "d_mlp", None) or 4 * width)
    pattern = int(cfg.n_heads) * longest * host.keeps_patterns
    kept = 1 if lens.dtype.itemsize >= 4 else 3
    of_logits = lens.gate_dtype.itemsize * int(cfg.d_vocab_out)
    by_row, picks = _unembedded(lens, run)
    by_row *= of_logits
    of_token = lens.dtype.itemsize * longest
    return _Need(
        in_pass=of_token * (3 * wide + 4 * pattern) + _LOGITS * by_row,
        of_graph=of_token * host.n_layers * (8 * wide + kept * pattern) + _LOGITS_OF_GRAPH * by_row,
        of_rerun=of_token * (host.n_layers * width + 8 * wide + 7 * pattern)
        + _LOGITS_OF_GRAPH * by_row,
        always=_held(run),
        picked=_LOGITS * of_logits * min(picks, 2 * PICKS),
        graphed=_LOGITS_OF_GRAPH * of_logits * min(picks, PICKS),
    )


def _unembedded(lens: LoraLens, run: Run) -> tuple[int, int]:
    """The tokens of each row whose logits are held together, and those that are made in turn."""
    slots = prompts_of(run).slots
    adapted = any(site.kind == "unembed" for site in lens.sites)
    if isinstance(run, Prompts) or adapted or lens.plan.host.unembedding() is None:
        return slots, 0
    if isinstance(run.read, Picks):
        return 0, len(run.read.rows)
    return (0 if isinstance(run.read, Columns) else slots), 0


def _held(run: Run) -> int:
    """Of the base distribution of a divergence."""
    read = run.read if isinstance(run, Reading) else None
    return read.base.nbytes if isinstance(read, Divergence) else 0
