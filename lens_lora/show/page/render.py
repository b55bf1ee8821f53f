"""Pages and notebook tables written from Jinja templates.

The templates escape whatever they are given. The only exception is what plotly and circuitsvis
themselves wrote, a script and drawings: `page_html` and `captioned` mark these as HTML, and nothing
else does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from lens_lora.show.figures.style import EXACT
from lens_lora.show.page.parts import Block, Noted, Part, Plot, Table
from lens_lora.show.text import visible

__all__ = [
    "Noted",
    "captioned",
    "notebook_html",
    "page_html",
    "plain_text",
    "plot",
    "shaded_text",
]

_TITLE_HEIGHT = 14


def page_html(title: str, parts: Sequence[Part], overview: Sequence[Block] = ()) -> str:
    """A page that needs no network: plotly's script stands in it, once.

    Args:
        title: the heading, and the name of the browser's tab.
        parts: one part, or several, each folded.
        overview: of several parts, before them.
    """
    template = _templates().get_template("page.html.j2")
    script = Markup(get_plotlyjs())
    return template.render(title=title, parts=parts, overview=overview, plotly=script)


def notebook_html(heading: str, notes: Sequence[str], tables: Sequence[Table]) -> str:
    """A result in a notebook.

    Args:
        heading: what the result is, in bold.
        notes: a paragraph each.
        tables: one below the other.
    """
    template = _templates().get_template("attribution.html.j2")
    return template.render(heading=heading, notes=notes, tables=tables)


def shaded_text(heading: str, tokens: Sequence[Noted]) -> str:
    """Text whose tokens are shaded, for a notebook or a page.

    Args:
        heading: what is shown.
        tokens: what is said of each is shown where the mouse rests on it.
    """
    return _templates().get_template("shaded.html.j2").render(heading=heading, tokens=tokens)


def captioned(caption: str, drawn: str) -> str:
    """A picture that circuitsvis drew, below its caption.

    Args:
        caption: what is shown.
        drawn: circuitsvis's HTML, of tokens that were escaped.
    """
    template = _templates().get_template("captioned.html.j2")
    return template.render(caption=caption, picture=Markup(drawn))


def plain_text(text: str) -> str:
    """Text as a notebook shows it, its lines kept.

    Args:
        text: any.
    """
    return _templates().get_template("plain.html.j2").render(lines=text.split("\n"))


def plot(figure: Figure, *, heading: str = "") -> Plot:
    """A figure as a block of a page.

    Its title becomes a caption, which breaks into lines where the page is narrow; a title inside
    the picture would be cut off. It is put back into a picture that the reader saves. A legend
    above the picture moves to the left, because on a touch screen plotly's buttons are always
    shown, at the right.

    Args:
        figure: with a title and a legend; it is not changed.
        heading: stands above the caption.
    """
    layout: Any = figure.to_dict()["layout"]
    shown = type(figure)(figure)
    shown.update_layout(
        title=None,
        margin={"t": layout["margin"]["t"] - _TITLE_HEIGHT},
        meta={"title": layout["title"]},
        modebar={"activecolor": EXACT},
    )
    if layout["legend"].get("orientation") == "h":
        shown.update_layout(legend={"x": 0, "xanchor": "left"})
    caption = _lines(layout["title"]["text"])
    return Plot(str(shown.to_json()), int(layout["height"]), caption, heading)


def _lines(title: str) -> tuple[str, ...]:
    """The plain text of a figure's title, line by line; plotly's titles are marked up."""
    return tuple(Markup(line).striptags() for line in title.split("<br>"))


def _readable(value: object) -> object:
    """Text with control characters made visible: one that turns the direction of writing, say."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c.isprintable() else visible(c) for c in value)


@functools.cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("lens_lora.show.page"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_readable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
