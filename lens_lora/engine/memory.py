"""About how much memory a pass takes, and what fits within the bound of a lens.

Numbers that a block holds for a row of T tokens, fitted to peaks of a model of 135M parameters in
float32 (`benchmarks/memory.py` prints such peaks); h heads, and m = d_model + d_mlp:

    a pass without a graph         T (3 m + 4 h T)     one block at a time
    a graph                        T (8 m + c h T)     every block;  c = 1, and 3 in half precision
    a graph whose blocks run again T (8 m + 7 h T)     one block, and T d_model of every block

Without attention patterns (a fused kernel) the terms with h T fall away. No forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lens_lora.errors import ArgumentError
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts

__all__ = [
    "must_rerun",
    "require_rows_of_graph",
    "require_second_order",
    "require_tangents",
    "rows_of_graph",
    "rows_of_pass",
]

_SECOND = 2.5  # graphs of a first derivative


class _Row(NamedTuple):
    """Bytes that one row takes."""

    in_pass: float
    of_graph: float
    of_rerun: float


def must_rerun(lens: LoraLens, prompts: Prompts) -> bool:
    """Whether the graph of these rows is beyond the bound, so that blocks run twice.

    Args:
        lens: the adapter over the model.
        prompts: what is run at a time.
    """
    if lens.max_memory is None:
        return False
    return len(prompts.tokens) * _row(lens, prompts).of_graph > lens.max_memory


def rows_of_pass(lens: LoraLens, prompts: Prompts) -> int | None:
    """How many rows of a pass without a graph are within the bound; None where there is none.

    Args:
        lens: the adapter over the model.
        prompts: of such length.

    Raises:
        ArgumentError: not even one.
    """
    if lens.max_memory is None:
        return None
    return _rows(lens, prompts, _row(lens, prompts).in_pass, "a forward pass of one prompt")


def rows_of_graph(lens: LoraLens, prompts: Prompts) -> int | None:
    """How many rows go forward and back at once within the bound, blocks run again where needed.

    Args:
        lens: the adapter over the model.
        prompts: of such length.

    Raises:
        ArgumentError: not even one.
    """
    if lens.max_memory is None:
        return None
    row = _row(lens, prompts)
    least = min(row.of_rerun, row.of_graph)
    return _rows(lens, prompts, least, "a forward and a backward pass of one prompt")


def require_rows_of_graph(lens: LoraLens, prompts: Prompts) -> None:
    """Check that all rows go forward and back at once within the bound.

    Args:
        lens: the adapter over the model.
        prompts: what is run.

    Raises:
        ArgumentError: they do not.
    """
    fitting, rows = rows_of_graph(lens, prompts), len(prompts.tokens)
    if fitting is not None and fitting < rows:
        raise ArgumentError(
            f"max_memory={lens.max_memory:.3g} bytes, enough for a forward and a backward pass of "
            f"{fitting} of these {rows} rows; pass fewer prompts at a time, or allow more."
        )


def require_second_order(lens: LoraLens, prompts: Prompts) -> None:
    """Check that the graph of a second derivative, which is kept whole, is within the bound.

    Args:
        lens: the adapter over the model.
        prompts: what is run.

    Raises:
        ArgumentError: it is not.
    """
    if lens.max_memory is None:
        return
    row = _row(lens, prompts)
    needed = len(prompts.tokens) * _SECOND * row.of_graph
    _rows(lens, prompts, needed, "a second derivative, whose graph is kept whole,")


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


def _rows(lens: LoraLens, prompts: Prompts, of_one: float, what: str) -> int | None:
    bound = lens.max_memory
    if bound is None:
        return None
    if of_one > bound:
        longest = prompts.tokens.shape[1]
        raise ArgumentError(
            f"max_memory={bound:.3g} bytes, and {what} takes about {of_one:.3g} for {longest} "
            "tokens; allow more, or pass shorter prompts."
        )
    return int(bound // of_one)


def _row(lens: LoraLens, prompts: Prompts) -> _Row:
    cfg, host, longest = lens.model.cfg, lens.plan.host, prompts.tokens.shape[1]
    width = int(cfg.d_model)
    wide = width + int(getattr(cfg, "d_mlp", None) or 4 * width)
    pattern = int(cfg.n_heads) * longest * host.keeps_patterns
    size = lens.dtype.itemsize
    kept = 1 if size >= 4 else 3
    return _Row(
        size * longest * (3 * wide + 4 * pattern),
        size * longest * host.n_layers * (8 * wide + kept * pattern),
        size * longest * (host.n_layers * width + 8 * wide + 7 * pattern),
    )
