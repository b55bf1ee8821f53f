"""Self-contained pages and notebook views, written from Jinja templates.

A page has parts, a part has sections, and a section has blocks. Each block is a plain value,
written by the macro of its class's name in `blocks.html.j2`. The templates escape whatever they are
given. The only exception is what plotly and circuitsvis themselves wrote, a script and drawings:
they are marked as HTML, and nothing else is.
"""

from __future__ import annotations

import base64
import dataclasses
import difflib
import functools
import gzip
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lens_lora.show import go
from lens_lora.show.figures import EXACT, further_lines
from lens_lora.show.tables import Pairs, Row, Table
from lens_lora.show.text import Answered, readable, short_prompt

# --- The blocks of a section

Kind = Literal["margin", "response", "changes", "training", "repair", "verification"]
# A token, its shade from 0 to 1, and what is said of it, line by line.
Noted = tuple[str, float, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class TokenTable:
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
class ShadedText:
    """A response whose tokens are shaded; the numbers of the one pointed at stand below.

    Attributes:
        tokens: of the response.
        scale: what the lightest, the middle and the darkest shade stand for.
        chosen: the token whose numbers are shown at first.
    """

    tokens: Sequence[Noted]
    scale: tuple[str, str, str]
    chosen: int


# White space, the words after it, and whether the other text lacks them.
Piece = tuple[str, str, bool]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What both models answer: (prompt, the base model's answer in pieces, the adapted model's)."""

    pairs: Sequence[tuple[str, Sequence[Piece], Sequence[Piece]]]


def answers_of(asked: Sequence[Answered | None]) -> list[Block]:
    """Both models' answers, differing words marked; no block where there are none."""
    pairs = [(short_prompt([a.prompt]), *_compared(a.base, a.adapted)) for a in asked if a]
    return [Answers(pairs)] if pairs else []


# A word, and the white space before it.
_Word = tuple[str, str]


def _compared(base: str, adapted: str) -> tuple[list[Piece], list[Piece]]:
    """Two texts in pieces that are the same or differ, word by word."""
    base_words = _words_of(base)
    adapted_words = _words_of(adapted)
    matcher = difflib.SequenceMatcher(
        None,
        [word for _, word in base_words],
        [word for _, word in adapted_words],
        autojunk=False,
    )
    base_pieces: list[Piece] = []
    adapted_pieces: list[Piece] = []
    for how, base_first, base_end, first, end in matcher.get_opcodes():
        differs = how != "equal"
        base_pieces += _piece_of(base_words[base_first:base_end], differs)
        adapted_pieces += _piece_of(adapted_words[first:end], differs)
    return base_pieces, adapted_pieces


def _words_of(text: str) -> list[_Word]:
    """The words of a text; white space around a line break is the line break alone."""
    return re.findall(r"(\s*)(\S+)", re.sub(r"\s*\n\s*", "\n", text.strip()))


def _piece_of(words: Sequence[_Word], differs: bool) -> list[Piece]:
    """Some words as one piece; none where there are no words."""
    if not words:
        return []
    space, _ = words[0]
    whole = "".join(space_before + word for space_before, word in words)
    return [(space, whole.removeprefix(space), differs)]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plotly figure as JSON, its height in pixels, and its title, line by line, as a caption."""

    figure: str
    height: int
    caption: tuple[str, ...]
    heading: str = ""


@dataclasses.dataclass(frozen=True)
class Download:
    """A table that the reader can save: the file's name, and its content."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class HowToRead:
    """How numbers are to be read; the same on every page of these results."""

    kind: Kind


Shown = Table | tuple[Table, ...] | TokenTable | ShadedText | Answers | Plot | Any  # a Figure
# Tables in a tuple stand side by side where the screen is wide enough; text is a paragraph.
Block = Shown | Download | HowToRead | str


def plot(figure: go.Figure, *, heading: str = "") -> Plot:
    """A figure as a block of a page.

    Its title becomes a caption, which breaks into lines where the page is narrow; a title inside
    the picture would be cut off. It is put back into a picture that the reader saves. A legend
    above the picture moves to the left, because on a touch screen plotly's buttons are always
    shown, at the right.
    """
    layout: Any = figure.to_dict()["layout"]
    shown = type(figure)(figure)
    top = layout["margin"]["t"] - _TITLE_HEIGHT - further_lines(layout["title"]["text"])
    shown.update_layout(
        title=None,
        margin={"t": top},
        meta={"title": layout["title"]},
        modebar={"activecolor": EXACT},
    )
    if layout["legend"].get("orientation") == "h":
        shown.update_layout(legend={"x": 0, "xanchor": "left"})
    # What is below the heading breaks where the page does, and not where the picture would.
    large, *smaller = layout["title"]["text"].split("<br>")
    whole = layout.get("meta", {}).get("heading", large)
    first, *below = (Markup(line).striptags() for line in (whole, *smaller))
    caption = (first, " · ".join(below)) if below else (first,)
    return Plot(str(shown.to_json()), int(layout["height"]), caption, heading)


_TITLE_HEIGHT = 14  # pixels by which a picture without its title is lower


# --- Sections, parts and the page


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, and the blocks below it.

    How to read them stands before them: `lead`, or what `leads.html.j2` has for the heading.
    """

    heading: str
    blocks: Sequence[Block]
    lead: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """A page, or one prompt's share of it.

    Attributes:
        subtitle: the readout, the prompt, and the adapter over its model.
        headline: the three sentences that stand on top.
        numbers: the four that stand below them, each (value, what it is).
        top: the blocks below these, with one figure.
        sections: what is folded, in the order in which one reads it.
        warnings: what the reader should know before any number.
        name: what the reader chooses it by, where there are several.
    """

    subtitle: str
    headline: Sequence[str]
    numbers: Pairs
    top: Sequence[Block]
    sections: Sequence[Section]
    name: str = ""
    warnings: Sequence[str] = ()


Meta = Mapping[str, str]


def made_by(meta: Meta) -> str:
    """'the adapter over the model · text without BOS'."""
    names = " over ".join(meta[key] for key in ("adapter", "model") if key in meta)
    return " · ".join(filter(None, (names, meta.get("prompts"))))


def warned(meta: Meta) -> list[str]:
    """What was warned of when the lens was made."""
    return [f"Warning: {meta['warning']}"] if "warning" in meta else []


def folded(story: str, sections: Sequence[Section], kind: Kind, meta: Meta) -> list[Section]:
    """The story, a paragraph a line; the sections that have something to show; how to read them."""
    rows = [(key.replace("_", " "), str(value)) for key, value in meta.items() if value]
    return [
        Section("The whole story in words", story.split("\n")),
        *(section for section in sections if any(map(_is_shown, section.blocks))),
        Section("How to read this", [HowToRead(kind)]),
        Section("Made with", [Table(("what", "value"), rows, texts=(0, 1))]),
    ]


def _is_shown(block: Block) -> bool:
    return not isinstance(block, Table) or bool(block.rows)


def _drawn(blocks: Sequence[Block]) -> list[Block]:
    """The blocks that have something to show, figures as plots."""
    return [plot(b) if isinstance(b, go.Figure) else b for b in filter(_is_shown, blocks)]


def page_html(title: str, parts: Sequence[Part], overview: Sequence[Block] = ()) -> str:
    """A page that needs no network: plotly's script stands in it, once."""
    plotly = Markup(go.get_plotlyjs())
    return rendered("page", title=title, parts=parts, overview=overview, plotly=plotly)


def rendered(template: str, **values: object) -> str:
    """The HTML that a template writes."""
    return _templates().get_template(f"{template}.html.j2").render(values)


# --- How templates write


def packed(text: str) -> str:
    """Text in gzip and base64: figures and tables of numbers shrink to a fifth."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def slug(text: str) -> str:
    """Text as an id or the name of a file."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def _readable(value: object) -> object:
    return readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("lens_lora.show"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_readable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {"packed": packed, "slug": slug, "drawn": _drawn}
    environment.filters.update(filters)
    return environment
