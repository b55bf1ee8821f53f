"""What a terminal shows: its text, and tables at some width with what is wrong with them."""

from __future__ import annotations

import io
import re

import rich.table
from rich.cells import cell_len
from rich.console import Console

from lens_lora.show.tables import Table

_COLOURS_AND_BOXES = re.compile(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]")


def plain(text: str) -> str:
    """The text without colours, boxes, line breaks and runs of spaces."""
    return " ".join(_COLOURS_AND_BOXES.sub(" ", text).split())


def shown(table: Table | rich.table.Table, width: int) -> list[str]:
    """The lines of a table in a terminal of this width."""
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().splitlines()


def faults(table: Table, lines: list[str], width: int) -> list[str]:
    """The lines that are too wide or hold one letter alone, and the numbers that are broken."""
    text = "\n".join(lines)
    too_wide = [line for line in lines if cell_len(line) > width]
    of_one_letter = [line for line in lines if len("".join(line.split())) == 1]
    broken = [number for number in sorted(_numbers(table)) if number not in text]
    return too_wide + of_one_letter + broken


def _numbers(table: Table) -> set[str]:
    """The cells of the columns that hold no words; a cell with a space may be broken there."""
    return {
        cell
        for row in table.rows
        for column, cell in enumerate(row)
        if column not in table.texts and cell and " " not in cell
    }
