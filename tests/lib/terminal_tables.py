"""Tables as a terminal of some width shows them, and what is wrong with that."""

from __future__ import annotations

import io

import rich.table
from rich.cells import cell_len
from rich.console import Console

from lens_lora.show.tables import Table


def shown(table: Table | rich.table.Table, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().splitlines()


def faults(table: Table, lines: list[str], width: int) -> list[str]:
    """Of a table as printed: lines that are too wide or hold one letter, numbers in parts."""
    numbers = {c for row in table.rows for i, c in enumerate(row) if i not in table.texts if c}
    numbers = {number for number in numbers if " " not in number}
    found = [line for line in lines if cell_len(line) > width]
    found += [line for line in lines if len("".join(line.split())) == 1]
    return found + [number for number in sorted(numbers) if number not in "\n".join(lines)]
