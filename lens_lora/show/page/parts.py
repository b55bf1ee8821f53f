"""What a page is made of, as plain values: parts, their sections, and the blocks of a section."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import re
from collections.abc import Sequence

from lens_lora.show.tables.parts import Row
from lens_lora.show.words.headline import Headline

__all__ = [
    "Block",
    "Downloads",
    "File",
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
        links: where the first cell of each row leads to, on the page; none by default.
    """

    heads: Row
    rows: Sequence[Row]
    texts: tuple[int, ...] = (0,)
    heading: str = ""
    links: Sequence[str] = ()


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
        heading: stands above the table.
    """

    rows: Sequence[tuple[str, Pairs, Pairs]]
    heads: Row = ("site", "promoted", "suppressed")
    heading: str = ""


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
        figure: plotly's JSON.
        height: in pixels.
        caption: the figure's title, line by line.
        heading: stands above the caption.
    """

    figure: str
    height: int
    caption: tuple[str, ...]
    heading: str = ""

    @property
    def packed(self) -> str:
        """The figure as the page's script unpacks it."""
        return packed(self.figure)

    @property
    def file(self) -> str:
        """What it is called when it is saved, without an ending."""
        return slug(self.caption[0])


@dataclasses.dataclass(frozen=True)
class File:
    """A table to be saved by the reader.

    Attributes:
        name: of the file.
        text: its content.
    """

    name: str
    text: str

    @property
    def packed(self) -> str:
        """The content as the page's script unpacks it."""
        return packed(self.text)


@dataclasses.dataclass(frozen=True)
class Downloads(Block):
    """Links that save files."""

    files: tuple[File, ...]


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
        return slug(self.heading)


@dataclasses.dataclass(frozen=True)
class Part:
    """One prompt's share of a page.

    Attributes:
        name: what the reader chooses it by, where there are several.
        subtitle: the readout, the prompt, and the adapter over its model.
        story: what was found, in words, a paragraph each.
        sections: in the order in which one reads them; folded below a headline.
        headline: what stands on top; without one, the story does.
        top: the blocks below the headline, before what is folded.
    """

    name: str
    subtitle: str
    story: Sequence[str]
    sections: Sequence[Section]
    headline: Headline | None = None
    top: Sequence[Block] = ()


def packed(text: str) -> str:
    """Text in gzip and base64: figures and tables of numbers shrink to a fifth.

    Args:
        text: any.
    """
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def slug(text: str) -> str:
    """Text as an id or the name of a file.

    Args:
        text: any.
    """
    return re.sub(r"\W+", "-", text.lower()).strip("-")
