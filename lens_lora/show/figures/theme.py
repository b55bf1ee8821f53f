"""The look of all figures as plotly templates: one for any background, and light, dark and print.

A figure's data have colours that read on light and on dark; what is around them (text, grid, paper)
comes from its template, so a figure is restyled by another one.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import plotly.graph_objects as go

from lens_lora.arguments import word

__all__ = ["DIVERGING", "INK", "PALETTE", "SEQUENTIAL", "theme"]

Theme = Literal["any", "light", "dark", "print"]
INK, CLEAR = "#777777", "rgba(0,0,0,0)"
# Zero has no colour of its own, so it is that of the page, light or dark.
DIVERGING = (
    (0.0, "#ba1c30"),
    (0.25, "rgba(219,84,80,0.62)"),
    (0.5, "rgba(128,128,128,0.04)"),
    (0.75, "rgba(63,140,207,0.62)"),
    (1.0, "#1460b0"),
)
SEQUENTIAL = (
    (0.0, "rgba(128,128,128,0.04)"),
    (0.5, "rgba(63,140,207,0.62)"),
    (1.0, "#1460b0"),
)
PALETTE = ("#2f83c5", "#e0802b", "#3a9d5d", "#c9445a", "#8a63c9", "#a8763e", "#c95fa5", "#9a9a2e")


@dataclasses.dataclass(frozen=True)
class _Colours:
    ink: str
    grid: str
    paper: str


_COLOURS = {
    "any": _Colours(INK, "rgba(128,128,128,0.25)", CLEAR),
    "light": _Colours("#24292f", "#e3e7ec", "#ffffff"),
    "dark": _Colours("#d6dbe1", "#333a42", "#15191e"),
    "print": _Colours("#000000", "#cccccc", "#ffffff"),
}


def theme(name: Theme = "any") -> go.layout.Template:
    """The look of this package's figures, as a plotly template.

    A figure of a result has the one that can be read on any background. Another one is put on by
    `figure.update_layout(template=ll.theme("print"))`, before it is written as a PDF, say; and
    `px.line(…, template=ll.theme())` gives a figure of your own the same look.

    Cost: no forward pass.

    Args:
        name: 'any', transparent with mid-grey text; 'light' and 'dark', with paper of their own;
            'print', black on white.

    Raises:
        ArgumentError: another name.
    """
    own = _COLOURS[word("theme", name, get_args(Theme))]
    axis = {
        "gridcolor": own.grid,
        "linecolor": own.ink,
        "tickcolor": own.ink,
        "zeroline": False,
        "zerolinecolor": INK,
        "automargin": True,
        "title": {"font": {"size": 13}, "standoff": 12},
    }
    return go.layout.Template(
        layout={
            "font": {"color": own.ink, "size": 13},
            "paper_bgcolor": own.paper,
            "plot_bgcolor": CLEAR,
            "colorway": list(PALETTE),
            "modebar": {"bgcolor": CLEAR, "color": INK},
            "xaxis": axis,
            "yaxis": axis,
            "title": {"x": 0, "xref": "container", "pad": {"l": 12}, "font": {"size": 15}},
            "colorscale": {"sequential": SEQUENTIAL, "diverging": DIVERGING},
        }
    )
