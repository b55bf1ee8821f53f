"""Plotly, imported at the first figure: the text of a result does not wait for it.

    from lens_lora.show import go

    go.Figure(go.Scatter(x=x, y=y))

1. The names are those of `plotly.graph_objects`, with `make_subplots` and `get_plotlyjs`. `Figure`
   answers Matplotlib's names with Plotly's (`matplotlib_names`); `AnyFigure` is Plotly's own class.
2. Importing plotly here registers this package's templates by name, so that users' own figures can
   have them too: the look of this package's figures, which can be read on any background, and three
   with a paper of their own. If a program has imported plotly itself, they are registered at the
   next name of `lens_lora` that it uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Bar as Bar
    from plotly.graph_objects import Box as Box
    from plotly.graph_objects import Figure as AnyFigure  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from plotly.graph_objects import Figure as Figure
    from plotly.graph_objects import Scatter as Scatter
    from plotly.graph_objs.layout import Template
    from plotly.offline import get_plotlyjs as get_plotlyjs
    from plotly.subplots import make_subplots as make_subplots


INK = "#777777"
CLEAR = "rgba(0,0,0,0)"
# Zero is transparent, so that it has the colour of the page, light or dark.
DIVERGING = (
    (0.0, "#ba1c30"),
    (0.25, "rgba(219,84,80,0.62)"),
    (0.5, "rgba(128,128,128,0.04)"),
    (0.75, "rgba(63,140,207,0.62)"),
    (1.0, "#1460b0"),
)
# The blue half of the above.
SEQUENTIAL = (
    (0.0, "rgba(128,128,128,0.04)"),
    (0.5, "rgba(63,140,207,0.62)"),
    (1.0, "#1460b0"),
)
PALETTE = ("#2f83c5", "#e0802b", "#3a9d5d", "#c9445a", "#8a63c9", "#a8763e", "#c95fa5", "#9a9a2e")

LOOK = "lens_lora"
# The colours of text, grid and paper of each template, by the ending of its name.
_INK_GRID_PAPER = {
    "": (INK, "rgba(128,128,128,0.25)", CLEAR),
    ".light": ("#24292f", "#e3e7ec", "#ffffff"),
    ".dark": ("#d6dbe1", "#333a42", "#15191e"),
    ".print": ("#000000", "#cccccc", "#ffffff"),
}


def __getattr__(name: str) -> Any:
    """Import plotly for the first of its names, and give it the templates (PEP 562)."""
    if name.startswith("__"):
        raise AttributeError(name)
    import plotly.graph_objects
    from plotly.offline import get_plotlyjs
    from plotly.subplots import make_subplots

    from lens_lora.show.matplotlib_names import Figure

    def subplots(*rows_and_columns: Any, **grid: Any) -> Figure:
        """A grid of plots, in a figure that answers to Matplotlib's names."""
        return make_subplots(*rows_and_columns, **grid, figure=Figure())

    register_templates()
    others: dict[str, Any] = {
        "AnyFigure": plotly.graph_objects.Figure,
        "Figure": Figure,
        "get_plotlyjs": get_plotlyjs,
        "make_subplots": subplots,
    }
    found = others.get(name) or getattr(plotly.graph_objects, name)
    globals()[name] = found
    return found


def register_templates() -> None:
    """Give plotly the templates of this package, unless it has them."""
    import plotly.io

    if LOOK in plotly.io.templates:
        return
    for ending, (ink, grid, paper) in _INK_GRID_PAPER.items():
        plotly.io.templates[f"{LOOK}{ending}"] = _template(ink, grid, paper)


def _template(ink: str, grid: str, paper: str) -> Template:
    from plotly.graph_objs.layout import Template

    lines = {"gridcolor": grid, "linecolor": ink, "tickcolor": ink, "zerolinecolor": INK}
    axis_title = {"font": {"size": 13}, "standoff": 12}
    axis = {**lines, "zeroline": False, "automargin": True, "title": axis_title}
    return Template(
        layout={
            "font": {"color": ink, "size": 13},
            "paper_bgcolor": paper,
            "plot_bgcolor": CLEAR,
            "colorway": list(PALETTE),
            "modebar": {"bgcolor": CLEAR, "color": INK},
            "xaxis": axis,
            "yaxis": axis,
            "title": {"x": 0, "xref": "container", "pad": {"l": 12}, "font": {"size": 15}},
            "colorscale": {"sequential": SEQUENTIAL, "diverging": DIVERGING},
        }
    )
