"""Self-contained pages and notebook views, written from Jinja templates.

A page has parts, a part has sections, and a section has blocks. A block is a plain value, and the
macro named after its class in `blocks.html.j2` writes it. The templates escape everything that they
are given, except the script and the drawings that plotly and circuitsvis themselves wrote: these
alone are marked as HTML.
"""

from __future__ import annotations

import base64
import dataclasses
import difflib
import functools
import gzip
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lens_lora.errors import CallError
from lens_lora.show import go
from lens_lora.show.figures import EXACT, further_lines
from lens_lora.show.tables import Pairs, Row, Table
from lens_lora.show.text import Answered, readable, short_prompt

# --- The blocks of a section

Kind = Literal[
    "margin", "attribution", "response", "changes", "training", "repair", "verification", "edges"
]


class TokenRow(NamedTuple):
    """The tokens that one site promotes and suppresses, or the sites that raise and lower a token.

    Attributes:
        name: the site, or the token.
        up: what it promotes, or what raises it, each with a number.
        down: what it suppresses, or what lowers it, each with a number.
    """

    name: str
    up: Pairs
    down: Pairs


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """Tokens that sites promote and suppress, or sites that raise and lower a token.

    Attributes:
        rows: one for each site, or for each token.
        heads: the headings of its columns.
        heading: stands above the table.
    """

    rows: Sequence[TokenRow]
    heads: Row = ("site", "promoted", "suppressed")
    heading: str = ""


class NotedToken(NamedTuple):
    """A token of a shaded text.

    Attributes:
        text: the token.
        shade: from 0 to 1, the darkest.
        note: what is said of it, line by line.
    """

    text: str
    shade: float
    note: Sequence[str]


@dataclasses.dataclass(frozen=True)
class ShadedText:
    """A response whose tokens are shaded; the numbers of the one pointed at stand below.

    Attributes:
        tokens: the tokens of the response.
        scale: what the lightest, the middle and the darkest shade stand for.
        chosen: the token whose numbers are shown at first.
    """

    tokens: Sequence[NotedToken]
    scale: tuple[str, str, str]
    chosen: int


class Piece(NamedTuple):
    """A part of an answer, between two places where both answers begin or cease to differ.

    Attributes:
        space: the white space before its words, which is not marked.
        text: its words.
        differs: whether the other answer lacks them.
    """

    space: str
    text: str
    differs: bool


class AnswerPair(NamedTuple):
    """One prompt, with the base model's answer and the adapted one's."""

    prompt: str
    base: Sequence[Piece]
    adapted: Sequence[Piece]


@dataclasses.dataclass(frozen=True)
class Answers:
    """Both models' answers side by side.

    Attributes:
        pairs: one for each prompt.
    """

    pairs: Sequence[AnswerPair]


def answers_of(asked: Sequence[Answered | None]) -> list[Block]:
    """Both models' answers with the differing words marked; no block where there are no answers."""
    pairs: list[AnswerPair] = []
    for answered in asked:
        if answered:
            prompt = short_prompt([answered.prompt])
            base, adapted = _compared(answered.base, answered.adapted)
            pairs.append(AnswerPair(prompt, base, adapted))
    return [Answers(pairs)] if pairs else []


# The white space before a word, and the word.
_Word = tuple[str, str]


def _compared(base: str, adapted: str) -> tuple[list[Piece], list[Piece]]:
    """Cut two texts, word by word, into pieces that are the same in both or differ."""
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
        of_base = base_words[base_first:base_end]
        of_adapted = adapted_words[first:end]
        # Words that were added stand in one answer alone.
        if of_base:
            base_pieces.append(_joined(of_base, differs=differs))
        if of_adapted:
            adapted_pieces.append(_joined(of_adapted, differs=differs))
    return base_pieces, adapted_pieces


def _words_of(text: str) -> list[_Word]:
    """The words of a text; white space around a line break is the line break alone."""
    return re.findall(r"(\s*)(\S+)", re.sub(r"\s*\n\s*", "\n", text.strip()))


def _joined(words: Sequence[_Word], *, differs: bool) -> Piece:
    """Some words as one piece."""
    space, _ = words[0]
    whole = "".join(space_before + word for space_before, word in words)
    return Piece(space, whole.removeprefix(space), differs)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plotly figure, drawn when the reader opens its section.

    Attributes:
        figure: the figure as JSON.
        height: the height in pixels.
        caption: its title, line by line.
        heading: stands above it.
    """

    figure: str
    height: int
    caption: tuple[str, ...]
    heading: str = ""


@dataclasses.dataclass(frozen=True)
class Download:
    """A table that the reader can save, as the name of a file and its content."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class HowToRead:
    """The explanation of the numbers that every page of these results has at its end."""

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

    Raises:
        CallError: the figure has no title, margin or height.
    """
    layout: Any = figure.to_dict()["layout"]
    missing = [part for part in ("title", "margin", "height", "legend") if part not in layout]
    if missing:
        raise CallError(
            f"a figure of a page needs a {missing[0]}, and this one has none",
            remedy="lens_lora.show.figures.finish(figure, titles, axes) sets it.",
        )
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
    return Plot(str(shown.to_json()), int(layout["height"]), _caption(layout), heading)


def _caption(layout: Mapping[str, Any]) -> tuple[str, ...]:
    """A figure's title as one or two lines of text; the page breaks the second where it must."""
    first, *others = layout["title"]["text"].split("<br>")
    whole_heading = layout.get("meta", {}).get("heading", first)
    heading = Markup(whole_heading).striptags()
    if not others:
        return (heading,)
    return (heading, " · ".join(Markup(line).striptags() for line in others))


# A picture without its title is lower by this number of pixels.
_TITLE_HEIGHT = 14


# --- Sections, parts and the page


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, and the blocks below it.

    Attributes:
        heading: the section's name.
        blocks: its content.
        lead: a paragraph on how to read the blocks; by default what `leads.html.j2` has for the
            heading.
    """

    heading: str
    blocks: Sequence[Block]
    lead: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """A page, or one prompt's share of it.

    Attributes:
        subtitle: the readout, the prompt, and the adapter over its model.
        headline: the three sentences on top.
        numbers: the four numbers below them, each as (value, what it is).
        top: the blocks below these, with one figure.
        sections: the folded sections, in the order in which they are read.
        warnings: stand before any number.
        name: the entry of this part in the page's list, where there are several parts.
    """

    subtitle: str
    headline: Sequence[str]
    numbers: Pairs
    top: Sequence[Block]
    sections: Sequence[Section]
    name: str = ""
    warnings: Sequence[str] = ()


# A page has a part for at most this number of prompts: each adds figures, which a browser draws.
MOST_PARTS = 20


def parts_shown(prompts: int) -> int:
    """How many of the prompts of a result have a part of its page."""
    return min(prompts, MOST_PARTS)


def without_part(prompts: int) -> list[Block]:
    """A sentence on the prompts that have no part of the page; nothing where each has one.

    Args:
        prompts: the number of prompts of the result.
    """
    left = prompts - MOST_PARTS
    if left <= 0:
        return []
    others = f"the other {left} here, run the analysis on them"
    if left == 1:
        others = "the other one here, run the analysis on it"
    return [
        f"Of the {prompts} prompts only the first {MOST_PARTS} have a part below. The numbers of "
        f"all are in to_frame(). To see {others} alone."
    ]


Meta = Mapping[str, str]


def made_by(meta: Meta) -> str:
    """'the adapter over the model · text without BOS'."""
    names = " over ".join(meta[key] for key in ("adapter", "model") if key in meta)
    return " · ".join(filter(None, (names, meta.get("prompts"))))


def warned(meta: Meta) -> list[str]:
    """The warning that was given when the lens was made, if there was one."""
    if "warning" not in meta:
        return []
    return [f"Warning: {meta['warning']}"]


def folded(story: str, sections: Sequence[Section], kind: Kind, meta: Meta) -> list[Section]:
    """The folded sections of a part: the story, those that are not empty, and how to read them.

    Args:
        story: the story in words, a paragraph a line.
        sections: the sections of the question.
        kind: the kind of results, for the explanation of the numbers.
        meta: model, adapter, dtype and versions.
    """
    shown: list[Section] = []
    for section in sections:
        if any(_is_shown(block) for block in section.blocks):
            shown.append(section)
    rows = [(key.replace("_", " "), str(value)) for key, value in meta.items() if value]
    return [
        Section("The whole story in words", story.split("\n")),
        *shown,
        Section("How to read this", [HowToRead(kind)]),
        Section("Made with", [Table(("what", "value"), rows, texts=(0, 1))]),
    ]


def _is_shown(block: Block) -> bool:
    """Whether a block has something to show: a table without rows has nothing."""
    return not isinstance(block, Table) or bool(block.rows)


def _drawn(blocks: Sequence[Block]) -> list[Block]:
    """The blocks that are shown, with figures as plots."""
    drawn: list[Block] = []
    for block in filter(_is_shown, blocks):
        shown = plot(block) if isinstance(block, go.AnyFigure) else block
        drawn.append(shown)
    return drawn


def page_html(
    title: str, parts: Sequence[Part], overview: Sequence[Block] = (), subtitle: str = ""
) -> str:
    """Write a page that needs no network: plotly's script is part of it, once.

    Args:
        title: what the page is about.
        parts: what is shown, folded where there are several.
        overview: what stands before several parts.
        subtitle: the adapter over its model, which stands below the title of several parts; a
            single part has a subtitle of its own.
    """
    return rendered(
        "page",
        title=title,
        subtitle=subtitle,
        parts=parts,
        overview=overview,
        plotly=Markup(go.get_plotlyjs()),
    )


def rendered(template: str, **values: object) -> str:
    """Fill in one of the templates, as HTML."""
    return _templates().get_template(f"{template}.html.j2").render(values)


# --- How templates write


def packed(text: str) -> str:
    """Compress text by gzip and base64, which shrinks figures and tables to a fifth."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def slug(text: str) -> str:
    """Turn text into an id, or into the name of a file."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def _readable(value: object) -> object:
    """A value as a template writes it: control characters of plain text are made visible."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return readable(value)
    return value


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
