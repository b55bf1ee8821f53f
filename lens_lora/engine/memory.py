"""About how much memory a pass takes, and what fits within the bound of a lens.

Numbers that a block holds for a row of T tokens, fitted to peaks of a model of 135M parameters in
float32 (`benchmarks/memory.py` prints such peaks); h heads, and m = d_model + d_mlp:

    a pass without a graph         T (3 m + 4 h T)     one block at a time
    a graph                        T (8 m + c h T)     every block;  c = 1, and 3 in half precision
    a graph whose blocks run again T (8 m + 7 h T)     one block, and T d_model of every block

Without attention patterns (a fused kernel) the terms with h T fall away. To each come the logits of
the tokens that are read: 3 times their number in a pass, 8 times in a graph. Of a margin they are
few, and those of a response's log-probability are made some tokens at a time. No forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lens_lora.errors import ArgumentError
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.rows import Columns, LogProbs, Reading

__all__ = [
    "PICKS",
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

PICKS = 128  # tokens of a response that are unembedded
_SECOND, _DUALS = 2.5, 1.3  # graphs of a first derivative
_LOGITS, _LOGITS_OF_GRAPH = 3, 8


def prompts_of(run: Run) -> Prompts:
    """The prompts of what is run."""
    return run.prompts if isinstance(run, Reading) else run


class _Row(NamedTuple):
    """Bytes that one row takes."""

    in_pass: float
    of_graph: float
    of_rerun: float


def must_rerun(lens: LoraLens, run: Run, *, duals: bool = False) -> bool:
    """Whether the graph of these rows is beyond the bound, so that blocks run twice.

    Args:
        lens: the adapter over the model.
        run: what is run at a time.
        duals: the graph is of the values of dual numbers, whose tangents are held as well.
    """
    if lens.max_memory is None:
        return False
    needed = len(prompts_of(run).tokens) * _row(lens, run).of_graph
    return (_DUALS if duals else 1) * needed > lens.max_memory


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
    return _rows(lens, run, _row(lens, run).in_pass, "a forward pass of one prompt")


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
    row = _row(lens, run)
    least = min(row.of_rerun, row.of_graph)
    return _rows(lens, run, least, "a forward and a backward pass of one prompt")


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
    needed = len(prompts_of(run).tokens) * _SECOND * _row(lens, run).of_graph
    _rows(lens, run, needed, "a second derivative, whose graph is kept whole,")


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


def _rows(lens: LoraLens, run: Run, of_one: float, what: str) -> int | None:
    bound = lens.max_memory
    if bound is None:
        return None
    if of_one > bound:
        prompts = prompts_of(run)
        longest, slots = prompts.tokens.shape[1], prompts.slots
        read = f", {slots} of them read" if slots > 1 else ""
        raise ArgumentError(
            f"max_memory={bound:.3g} bytes, and {what} takes about {of_one:.3g} for {longest} "
            f"tokens{read}; allow more, or pass shorter prompts."
        )
    return int(bound // of_one)


def _row(lens: LoraLens, run: Run) -> _Row:
    cfg, host, longest = lens.model.cfg, lens.plan.host, prompts_of(run).tokens.shape[1]
    width = int(cfg.d_model)
    wide = width + int(getattr(cfg, "d_mlp", None) or 4 * width)
    pattern = int(cfg.n_heads) * longest * host.keeps_patterns
    kept = 1 if lens.dtype.itemsize >= 4 else 3
    logits = lens.gate_dtype.itemsize * _unembedded(lens, run) * int(cfg.d_vocab_out)
    of_token = lens.dtype.itemsize * longest
    return _Row(
        of_token * (3 * wide + 4 * pattern) + _LOGITS * logits,
        of_token * host.n_layers * (8 * wide + kept * pattern) + _LOGITS_OF_GRAPH * logits,
        of_token * (host.n_layers * width + 8 * wide + 7 * pattern) + _LOGITS_OF_GRAPH * logits,
    )


def _unembedded(lens: LoraLens, run: Run) -> int:
    """The tokens of a row whose logits are held together."""
    slots = prompts_of(run).slots
    adapted = any(site.kind == "unembed" for site in lens.sites)
    if isinstance(run, Prompts) or adapted or lens.plan.host.unembedding() is None:
        return slots
    if isinstance(run.read, LogProbs):
        return min(slots, PICKS)
    return 0 if isinstance(run.read, Columns) else slots
