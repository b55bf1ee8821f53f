"""Tables of text: built once, and shown in a terminal, in a notebook and on a page."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import rich.table
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group
from rich.text import Text

from lens_lora.show import text

# --- What a table is

Row = tuple[str, ...]
Pairs = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        heads: the headings of its columns.
        rows: a cell for each heading.
        texts: the columns that hold text, set to the left; numbers are set to the right.
        title: what a terminal writes above it; on a page its section has a heading.
        heading: what a page writes above it where it stands beside or below another table.
        links: where the first cell of each row leads to, on the page; none by default.
    """

    heads: Row
    rows: Sequence[Row]
    texts: tuple[int, ...] = (0,)
    title: str = ""
    heading: str = ""
    links: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """Write the table into a terminal; no cell is read as rich's markup.

        Where the terminal is narrow, numbers stay whole, text wraps, and a word longer than its
        column is cut in the middle.
        """
        if self.title:
            yield Text(self.title, style="bold")
        table = rich.table.Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        spaces = 2 * len(self.heads)
        widths = self._widths(options.max_width - spaces)
        for i, (head, width) in enumerate(zip(self.heads, widths, strict=True)):
            justify = "left" if i in self.texts else "right"
            table.add_column(Text(head), justify=justify, overflow="fold", width=width)
        for row in self.rows:
            cells = [Text(_fitted(cell, width)) for cell, width in zip(row, widths, strict=True)]
            table.add_row(*cells)
        yield table

    def _widths(self, room: int) -> list[int]:
        """The width of each column.

        Each column has room for the longest word of its heading; a number is never cut. Any
        room that is left goes first to headings in three lines, then to whole words, to whole
        cells, and to headings in one line, each time to the narrowest column first.
        """
        columns: list[list[str]] = []
        for i in range(len(self.heads)):
            columns.append([row[i] for row in self.rows])
        cells = [_longest(column) for column in columns]
        words = [_longest_word(column) for column in columns]
        heads = [cell_len(head) for head in self.heads]
        heads_in_three_lines = [head // 3 for head in heads]
        widths: list[int] = []
        for i, head in enumerate(self.heads):
            least = cells[i]
            if i in self.texts:
                least = min(least, _NARROWEST_TEXT)
            widths.append(max(_longest_word([head]), least))
        for wanted in (heads_in_three_lines, words, cells, heads):
            _widen(widths, wanted, room)
        return widths


# A column of text of fewer characters cannot be read.
_NARROWEST_TEXT = 8


def _widen(widths: list[int], wanted: Sequence[int], room: int) -> None:
    """Widen columns towards the widths wanted, the narrowest first, while there is room."""
    while sum(widths) < room:
        short = [i for i, width in enumerate(widths) if width < wanted[i]]
        if not short:
            return
        narrowest = min(short, key=lambda i: widths[i])
        widths[narrowest] += 1


def _longest(texts: Iterable[str]) -> int:
    return max((cell_len(written) for written in texts), default=0)


def _longest_word(cells: Iterable[str]) -> int:
    words = itertools.chain.from_iterable(cell.split() for cell in cells)
    return _longest(words)


def _fitted(cell: str, width: int) -> str:
    """The cell's text, in which each word longer than a line is cut in the middle."""

    def cut(word: re.Match[str]) -> str:
        return text.cut_in_the_middle(word[0], width)

    return re.sub(rf"\S{{{width + 1},}}", cut, cell)


def _said(words: str) -> str:
    return text.readable(words.strip())


def _with_visible_spaces(promoted: str) -> str:
    """Tokens in quotes, in which a leading space is written as '·'."""
    return re.sub(r"((?:^|, )['\"]) ", r"\1·", promoted)


# How a cell is written, by the name of its column. Numbers of other columns have their sign.
_WRITTEN: dict[str, Callable[[Any], str]] = {
    "share": text.percent,
    "undone": text.percent,
    "token": text.visible,
    "context": _said,
    "says": _said,
    "base_says": _said,
    "promoted": _with_visible_spaces,
    "kl": text.magnitude,
    "mean_kl": text.magnitude,
    "kl_base_to_adapted": text.magnitude,
    "scale": text.magnitude,
}


def table_of(frame: pd.DataFrame, heads: Mapping[str, str], **options: Any) -> Table:
    """Write the columns of a frame that have a heading as a table of text.

    How a cell is written follows from the name of its column; other numbers are written with their
    sign. Rows of zeros alone are left out, and the title counts them.

    Args:
        frame: the numbers and their labels.
        heads: headings by the name of a column; a name that the frame lacks is passed over.
        options: the other fields of the table.
    """
    names = [name for name in heads if name in frame]
    floats = frame[names].select_dtypes("float")
    is_zero = (floats == 0).all(axis=1) & bool(floats.columns.size)
    columns: list[list[str]] = []
    for name in names:
        write = _WRITTEN.get(name, _written)
        columns.append([write(value) for value in frame[name][~is_zero].tolist()])
    rows = list(zip(*columns, strict=True))
    if is_zero.any():
        options["title"] = f"{options.get('title', '')} ({is_zero.sum()} that are zero left out)"
    return Table(tuple(heads[name] for name in names), rows, **options)


def _written(value: object) -> str:
    return text.signed(value) if isinstance(value, float) else str(value)


def in_terminal(*tables: Table) -> Group:
    """Put the tables that have rows one below the other."""
    return Group(*(table for table in tables if table.rows))
