"""Put measured tables into a page, each between its two marks; the text around is left as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def put_in(text: str, tables: Mapping[str, str]) -> str:
    """The page with each table between `<!-- name -->` and `<!-- end of name -->`.

    Args:
        text: the page.
        tables: their bodies by name.

    Raises:
        ValueError: the page lacks the marks of a table.
    """
    for name, body in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not end:
            raise ValueError(f"the page lacks the marks of {name!r}")
        text = f"{before}{mark}\n{body.rstrip()}\n{end}{after}"
    return text


def write(page: Path, tables: Mapping[str, str]) -> None:
    """Put tables into a page.

    Args:
        page: its file.
        tables: their bodies by name.
    """
    page.write_text(put_in(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
