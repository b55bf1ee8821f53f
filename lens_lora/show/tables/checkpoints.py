"""A training in the terminal: one row per checkpoint and prompt."""

from __future__ import annotations

from rich.table import Table

from lens_lora.results.checkpoints import Checkpoints
from lens_lora.show.tables.parts import Row, filled_table
from lens_lora.show.text import magnitude, short_prompt, signed

__all__ = ["checkpoints_heads", "checkpoints_rows", "checkpoints_table"]


def checkpoints_heads(found: Checkpoints) -> Row:
    """The headings.

    Args:
        found: with the units of its readout.
    """
    units = found.units
    return ("step", "prompt", f"value, {units}", "first order", "remainder", "flips at ε", "angle")


def checkpoints_rows(found: Checkpoints) -> list[Row]:
    """The base model first, as step 0.

    Args:
        found: a training.
    """
    prompts = list(map(short_prompt, found.str_tokens))
    rows: list[Row] = [
        ("0", prompt, signed(float(found.base[p])), "", "", "", "")
        for p, prompt in enumerate(prompts)
    ]
    for k, step in enumerate(found.steps):
        for p, prompt in enumerate(prompts):
            series = (found.adapted, found.first_order, found.remainder)
            value, first, rest = (signed(float(of[k, p])) for of in series)
            flip = magnitude(float(found.flip_scale[k, p]))
            rows.append((f"{step:g}", prompt, value, first, rest, flip, f"{found.angle[k]:.0f}°"))
    return rows


def checkpoints_table(found: Checkpoints) -> Table:
    """The readout at every checkpoint.

    Args:
        found: a training.
    """
    title = f"{found.readout} through the training"
    return filled_table(title, checkpoints_heads(found), checkpoints_rows(found), texts=(1,))
