"""A prompt's tokens, coloured by what each contributes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import final

__all__ = ["TokenView"]


@final
@dataclasses.dataclass(frozen=True, eq=False)
class TokenView:
    """A prompt's tokens, coloured: shown by a notebook, or saved as a page.

    Attributes:
        tokens: of the prompt.
        values: the attribution at each, summed over sites, in the readout's units.
        html: the whole picture; it works offline.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    html: str

    def save(self, path: str | Path) -> Path:
        """Write it as a page of its own; returns the path.

        Args:
            path: of the page.
        """
        path = Path(path)
        path.write_text(
            f"<!doctype html>\n<meta charset='utf-8'>\n<title>tokens</title>\n{self.html}\n",
            encoding="utf-8",
        )
        return path

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        pairs = zip(self.tokens, self.values, strict=True)
        return "TokenView(" + ", ".join(f"{token!r} {value:+.3g}" for token, value in pairs) + ")"
