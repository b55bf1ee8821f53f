"""What the terminal's tables share: their look, and how they are filled."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

__all__ = ["Row", "filled_table", "titled_table"]

Row = tuple[str, ...]


def titled_table(title: str) -> Table:
    """An empty table.

    Args:
        title: stands above it, to the left.
    """
    return Table(
        title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )


def filled_table(
    title: str, heads: Row, rows: Sequence[Row], texts: tuple[int, ...] = (0,)
) -> Table:
    """A table of text, in which nothing is read as rich's markup.

    In a narrow terminal the first column, by which a row is known, and numbers stay whole; headings
    and other text wrap.

    Args:
        title: stands above it, to the left.
        heads: the headings of its columns.
        rows: a cell for each heading.
        texts: the columns that hold text, set to the left; numbers are set to the right.
    """
    table = titled_table(title)
    for i, head in enumerate(heads):
        is_text = i in texts
        whole = i == 0 or not is_text
        widest = max((len(row[i]) for row in rows), default=0)
        table.add_column(
            Text(head),
            justify="left" if is_text else "right",
            overflow="fold",
            no_wrap=i == 0,
            min_width=widest if whole else None,
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table
