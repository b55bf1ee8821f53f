"""What a page is made of, as plain values: parts, their sections, and the blocks of a section."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from markupsafe import Markup

from lens_lora.show.tables.parts import Row

__all__ = [
    "Block",
    "HowToRead",
    "HowToReadChanges",
    "HowToReadResponse",
    "Noted",
    "Paragraph",
    "Part",
    "Plot",
    "Section",
    "ShadedText",
    "Table",
    "Tables",
    "TokenTable",
]

Pairs = Sequence[tuple[str, str]]
Noted = tuple[str, float, Sequence[str]]
"""A token, its shade from 0 to 1, and what is said of it, line by line."""


class Block:
    """A piece of a section, written by the macro of its class's name in blocks.html.j2."""

    @property
    def macro(self) -> str:
        """The macro's name."""
        return type(self).__name__


@dataclasses.dataclass(frozen=True)
class Table(Block):
    """A table of text.

    Attributes:
        heads: the headings of its columns.
        rows: a cell for each heading.
        texts: the columns that hold text, set to the left; numbers are set to the right.
        heading: stands above the table.
    """

    heads: Row
    rows: Sequence[Row]
    texts: tuple[int, ...] = (0,)
    heading: str = ""


@dataclasses.dataclass(frozen=True)
class Tables(Block):
    """Tables side by side where the screen is wide enough."""

    tables: tuple[Table, ...]


@dataclasses.dataclass(frozen=True)
class TokenTable(Block):
    """Tokens that sites promote and suppress, or sites that raise and lower a token.

    Attributes:
        rows: (site, (token, shift) of each token promoted, the same of those suppressed).
        heads: the headings of its columns.
    """

    rows: Sequence[tuple[str, Pairs, Pairs]]
    heads: Row = ("site", "promoted", "suppressed")


@dataclasses.dataclass(frozen=True)
class ShadedText(Block):
    """A response whose tokens are shaded; the numbers of the one pointed at stand below.

    Attributes:
        tokens: of the response.
        scale: what the lightest, the middle and the darkest shade stand for.
        chosen: the token whose numbers are shown at first.
    """

    tokens: Sequence[Noted]
    scale: tuple[str, str, str]
    chosen: int


@dataclasses.dataclass(frozen=True)
class Plot(Block):
    """A plotly figure.

    Attributes:
        drawing: plotly's own HTML.
        caption: the figure's title, line by line.
        heading: stands above the caption.
        wide: whether it scrolls sideways on a narrow screen rather than shrink.
    """

    drawing: Markup
    caption: tuple[str, ...]
    heading: str = ""
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Paragraph(Block):
    """A sentence or more."""

    text: str


@dataclasses.dataclass(frozen=True)
class HowToRead(Block):
    """How the numbers of a margin are to be read; the same on every page."""


@dataclasses.dataclass(frozen=True)
class HowToReadResponse(Block):
    """How the numbers of a response are to be read."""


@dataclasses.dataclass(frozen=True)
class HowToReadChanges(Block):
    """How the numbers of an audit without a question are to be read."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, a sentence on how to read what follows, and the blocks that follow."""

    heading: str
    blocks: Sequence[Block]
    lead: str = ""

    @property
    def anchor(self) -> str:
        """The heading as an id to link to."""
        return re.sub(r"\W+", "-", self.heading.lower()).strip("-")


@dataclasses.dataclass(frozen=True)
class Part:
    """One prompt's share of a page.

    Attributes:
        name: what the reader chooses it by, where there are several.
        subtitle: the readout, the prompt, and the adapter over its model.
        story: what was found, in words, a paragraph each.
        sections: in the order in which one reads them.
        has_contents: whether links to the sections stand before them.
    """

    name: str
    subtitle: str
    story: Sequence[str]
    sections: Sequence[Section]
    has_contents: bool = False
