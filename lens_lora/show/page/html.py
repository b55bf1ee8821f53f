"""Building blocks of the HTML pages: sections, figures with captions, tables of tokens."""

from __future__ import annotations

import dataclasses
import html
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lens_lora.show.figures.style import EXACT
from lens_lora.show.tables.results import html_table, token_rows

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from lens_lora.analyses.logit_shift import LogitShift

__all__ = [
    "Plots",
    "Section",
    "contents",
    "provenance",
    "scrolling",
    "section_html",
    "tokens_html",
]

_TOKENS, _SITE_TOKENS = 10, 6
_TITLE_HEIGHT = 14
_BUTTONS = ["zoom2d", "pan2d", "resetScale2d", "toImage"]
_CONFIG = {"responsive": True, "displaylogo": False, "modeBarButtons": [_BUTTONS]}


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, a sentence on how to read what follows, and its HTML."""

    heading: str
    body: str
    lead: str = ""

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.heading.lower()).strip("-")


def section_html(section: Section) -> str:
    """The heading, with an anchor to link to, the lead, and the body."""
    lead = f'<p class="lead">{html.escape(section.lead)}</p>\n' if section.lead else ""
    return f'<h2 id="{section.anchor}">{html.escape(section.heading)}</h2>\n{lead}{section.body}'


def contents(sections: Sequence[Section]) -> str:
    """Links to the sections."""
    links = (f'<a href="#{s.anchor}">{html.escape(s.heading)}</a>' for s in sections)
    return f'<nav class="contents">{" ".join(links)}</nav>'


class Plots:
    """Figures as HTML, with ids of their own within the page.

    A figure's title becomes a caption, which breaks into lines where the page is narrow; a title
    inside the picture would be cut. A legend above the picture goes to the left, since on a touch
    screen the buttons are always at the right.
    """

    def __init__(self, prefix: str = "plot") -> None:
        self._ids: Iterator[str] = (f"{prefix}-{n}" for n in itertools.count())

    def __call__(self, figure: Figure, *, wide: bool = False) -> str:
        """The figure and its caption; a wide one scrolls sideways on a narrow screen."""
        layout: Any = figure.to_dict()["layout"]
        shown = type(figure)(figure)
        shown.update_layout(
            title=None,
            margin={"t": layout["margin"]["t"] - _TITLE_HEIGHT},
            modebar={"activecolor": EXACT},
        )
        if layout["legend"].get("orientation") == "h":
            shown.update_layout(legend={"x": 0, "xanchor": "left"})
        body = shown.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=next(self._ids),
            config=_CONFIG,
            default_width="100%",
        )
        caption = f"<figcaption>{layout['title']['text']}</figcaption>"
        size = "plot wide" if wide else "plot"
        return (
            f'<figure>{caption}<div class="scroll"><div class="{size}">{body}</div></div></figure>'
        )


def scrolling(body: str) -> str:
    """A table or plot that scrolls sideways by itself where the screen is narrower."""
    return f'<div class="scroll">{body}</div>'


def tokens_html(joint: LogitShift, by_site: LogitShift, names: Sequence[str], prompt: int) -> str:
    """All sites together, then the named ones one by one: tokens promoted and suppressed."""
    rows = [("all modules together", *_token_cells(joint, None, prompt, _TOKENS))]
    rows += [(name, *_token_cells(by_site, name, prompt, _SITE_TOKENS)) for name in names]
    body = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{up}</td><td>{down}</td></tr>"
        for name, up, down in rows
    )
    heads = "".join(f"<th align=left>{head}</th>" for head in ("site", "promoted", "suppressed"))
    table = f'<table class="tokens"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return scrolling(table)


def provenance(meta: Mapping[str, str]) -> str:
    """The table of what the page was made with."""
    rows = [(key.replace("_", " "), str(value)) for key, value in meta.items() if value]
    return scrolling(html_table(("what", "value"), rows))


def _token_cells(shift: LogitShift, site: str | None, prompt: int, k: int) -> tuple[str, str]:
    up, down = shift.promoted(site, k, prompt), shift.suppressed(site, k, prompt)
    return _token_cell(up), _token_cell(down)


def _token_cell(tokens: pd.DataFrame) -> str:
    return " ".join(
        f'<span class="pair"><b class="token">{html.escape(token)}</b> '
        f'<span class="share">{value}</span></span>'
        for token, value in token_rows(tokens)
    )
