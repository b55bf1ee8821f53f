"""What the ways to the same derivatives cost, and how many of them go at once.

Through the blocks a tangent costs one product with each weight from its site's block on, a covector
one with each weight on the way back to the first. So, in passes through all blocks,

    forward mode    Σ_l share of the blocks at and after l      tangents, whatever the readouts
    reverse mode    k                                           covectors, whatever the sites

beside a forward pass each. Measured, a tangent and a covector cost the same to a third, on short
prompts as on long ones (benchmarks/RESULTS.md); so the smaller number is the cheaper way.
"""

from __future__ import annotations

from typing import Literal

from lens_lora.errors import ArgumentError
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts

__all__ = ["COVECTOR_TOKENS", "TANGENT_TOKENS", "cheaper_mode", "rows_at_once", "tangent_passes"]

# More tokens than these at once fall out of the caches and gain nothing.
TANGENT_TOKENS, COVECTOR_TOKENS = 2048, 512
_LOGITS_AT_ONCE = 2**26


def tangent_passes(lens: LoraLens) -> float:
    """Passes through all blocks that a tangent of every site takes."""
    layers = lens.plan.host.n_layers
    if not lens.plan.host.grows:
        return float(len(lens.sites))
    return sum(layers - min(max(site.layer, 0), layers - 1) for site in lens.sites) / layers


def cheaper_mode(lens: LoraLens, readouts: int) -> Literal["forward", "reverse"]:
    """Which mode gives every site's derivative of so many readouts with less work."""
    return "reverse" if readouts <= max(1.0, tangent_passes(lens)) else "forward"


def rows_at_once(
    lens: LoraLens,
    run: Prompts,
    tokens: int,
    max_memory: float | None = None,
    *,
    read: int | None = None,
) -> int:
    """How many copies of what is run go through the model at once.

    Bounded in tokens and logits, which keeps it fast, and in bytes where asked.

    Args:
        run: the prompts of one pass.
        read: the prompts whose logits are held together; those of the pass, if not given.

    Raises:
        ArgumentError: max_memory is less than one copy takes.
    """
    read = run.batch if read is None else read
    logits = read * int(lens.model.cfg.d_vocab_out)
    rows = max(1, min(tokens // run.tokens.numel(), _LOGITS_AT_ONCE // logits))
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
    cfg = lens.model.cfg
    batch, longest = run.tokens.shape
    wide = int(getattr(cfg, "d_mlp", None) or 4 * cfg.d_model)
    of_token = 44 * (int(cfg.d_model) + wide + int(cfg.n_heads) * longest)
    logits = 8 * int(cfg.d_vocab_out)
    return (batch * longest * of_token + read * logits) * lens.gate_dtype.itemsize
