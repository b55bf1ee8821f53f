"""The look of all figures, and the primitives that they are made of.

`heatmap` a cell for every row and column, `kinds_by_layer` a heatmap of sites, `bars`, `curve`,
`points`; `finish` puts the title, the look and the axes on.

A figure's data have colours that read on light and on dark backgrounds; what is around them (text,
grid, paper) comes from its template, so another template restyles the figure. Heatmaps are centred
at zero, which has no colour: blue pushes the readout up and red down. What does not exist is grey.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import pandas as pd

from lens_lora.core import Groups, Site, Sites
from lens_lora.show import go
from lens_lora.show.go import DIVERGING, LOOK, SEQUENTIAL
from lens_lora.show.go import INK as INK
from lens_lora.show.go import PALETTE as PALETTE
from lens_lora.show.text import cut_in_the_middle, label, percent, short_prompt, signed, visible

# --- The look


EXACT = "#2f83c5"
LINEAR = "#e0802b"
FLIP = "#b04fc4"
NEGATIVE = "#c9445a"
NOISE = "#999999"
_BLANK = "rgba(128,128,128,0.32)"

_TOP_LEFT = {"xanchor": "left", "yanchor": "top"}
BELOW: dict[str, Any] = {"orientation": "h", "x": 0, "y": -0.26, **_TOP_LEFT}
BESIDE: dict[str, Any] = {"orientation": "v", "x": 1.02, "y": 1, **_TOP_LEFT}
# How many characters fit beside plotly's buttons at the width of a page: of the heading, which is
# larger, and of the line below it.
_HEADING = 84
_TITLE_LINE = 96

# A heading and the smaller line below it, or the titles of two axes.
Pair = tuple[str, str]
Numbers = Sequence[float]
Texts = Sequence[str]
_Looks = Mapping[str, Mapping[str, Any]]


def finish(
    figure: go.Figure, titles: Pair, axes: Pair, height: int = 420, **layout: Any
) -> go.Figure:
    """Give a figure its title, its axes' titles, and the look that reads on light and dark pages.

    Args:
        figure: a figure with its traces; it is changed, and returned.
        titles: the heading, and the smaller line below it.
        axes: the titles of the horizontal axis and of the vertical one.
        height: the height in pixels.
        layout: further entries of plotly's layout.
    """
    heading, below = titles
    across, upwards = axes
    title = _title(heading, below)
    if len(heading) > _HEADING:
        # The picture's own heading is cut; the caption of a page has it whole.
        figure.update_layout(meta={"heading": label(heading)})
    margin = {"l": 60, "r": 20, "t": 70 + further_lines(title["text"]), "b": 60}
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"}
    figure.update_layout(height=height, template=LOOK, title=title, margin=margin, legend=legend)
    figure.update_xaxes(title_text=across or None).update_yaxes(title_text=upwards or None)
    return figure.update_layout(**layout)


def further_lines(title: str) -> int:
    """The height in pixels of the lines of a title beyond its heading and the line below it."""
    return 15 * max(title.count("<br>") - 1, 0)


def _title(heading: str, below: str) -> dict[str, Any]:
    """A heading and a smaller line below it, escaped; a long one is broken at its ' · '.

    A heading that names a long response would run out of the picture: its middle is left out.
    """
    heading = cut_in_the_middle(heading, _HEADING)
    lines = [below] if len(below) <= _TITLE_LINE else below.split(" · ")
    smaller = "<br>".join(label(line) for line in lines)
    text = f"{label(heading)}<br><span style='font-size:12px'>{smaller}</span>"
    place = {"x": 0, "xref": "container", "y": 1, "yref": "container", "yanchor": "top"}
    return {"text": text, **place, "pad": {"l": 12, "t": 22}, "font": {"size": 15}}


# --- Words on figures, and axes

_PROMPT_WIDTH = 48  # characters of a prompt that is quoted in a title
_PROMPTS_NAMED = 2
# An axis of at most _MOST_TICKS places has a tick at each; a longer one has about _FEW_TICKS.
_MOST_TICKS = 40
_FEW_TICKS = 20
_Item = TypeVar("_Item")


def whose(prompt: int | None, str_tokens: Sequence[Sequence[str]]) -> str:
    """'“The capital of”', 'prompt 1 of 3, “…”', or 'mean of 3 prompts: “…”, “…”, …'."""
    batch = len(str_tokens)
    if prompt is None and batch > 1:
        quoted = [_quoted(tokens) for tokens in str_tokens[:_PROMPTS_NAMED]]
        rest = ", …" if batch > _PROMPTS_NAMED else ""
        return f"mean of {batch} prompts: {', '.join(quoted)}{rest}"
    index = prompt or 0
    number = f"prompt {index} of {batch}, " if batch > 1 else ""
    return number + _quoted(str_tokens[index])


def _quoted(tokens: Sequence[str]) -> str:
    text = short_prompt(tokens)
    if len(text) <= _PROMPT_WIDTH:
        return f"“{text}”"
    _, _, last_words = text[-_PROMPT_WIDTH:].partition(" ")
    return f"“… {last_words}”"


def value_text(value: float | None, shift: float, units: str) -> str:
    """A value with its units and its share of the shift, for a hover."""
    if value is None or math.isnan(value):
        return "not there"
    share = percent(value / shift) if shift else "—"
    return f"{signed(value)} {label(units)}<br>{share} of the shift"


def every_few(items: Sequence[_Item], most: int = _FEW_TICKS) -> Sequence[_Item]:
    """Take evenly spaced items, no more than an axis can name."""
    step = math.ceil(len(items) / most) or 1
    return items[::step]


class Axis(NamedTuple):
    """The rows or the columns of a heatmap, and how plotly draws them."""

    values: Sequence[Any]
    title: str
    layout: Mapping[str, Any]


def names_axis(names: Iterable[object], title: str = "", **layout: Any) -> Axis:
    """An axis with a name for each row or column, the first at the left or at the bottom."""
    return Axis([label(str(name)) for name in names], title, {"type": "category", **layout})


def ticks(places: Iterable[Any], texts: Iterable[str]) -> dict[str, Any]:
    """Where an axis has ticks, and what they say."""
    return {"tickvals": list(places), "ticktext": list(texts)}


def tokens_axis(
    tokens: Sequence[str], shown: Sequence[int] | None = None, title: str = "", first: int = 0
) -> Axis:
    """Positions, or a response's tokens counted from 1, thinned where they are many."""
    columns = range(len(tokens)) if shown is None else shown
    most = _MOST_TICKS if len(columns) <= _MOST_TICKS else _FEW_TICKS
    places = every_few(range(len(columns)), most)
    texts = [f"{columns[i] + first} {label(visible(tokens[columns[i]]))}" for i in places]
    layout = {**ticks(places, texts), "tickfont": {"size": 11}}
    return Axis(range(len(columns)), title, layout)


def layers_axis(sites: Sequence[Any]) -> Axis:
    """Every layer up to the last adapted one; embeddings, where adapted, are layer −1.

    Every few layers are named by number, and what lies outside the layers by its own name.
    """
    adapted = [site.layer for site in sites]
    layers = range(min(0, *adapted), 1 + max(adapted))
    step = math.ceil(len(layers) / _FEW_TICKS)
    names = {layer: str(layer) for layer in layers if layer % step == 0}
    for name, members in Sites(sites).grouped("layer").items():
        if not name.startswith("layer "):
            names[sites[members[0]].layer] = name
    return Axis(layers, "layer", ticks(names, names.values()))


# --- Heatmaps

Cells = Sequence[Sequence[float | None]]
# The hover of a cell, from its row, its column and its value; or one plotly template for all cells.
Says = Callable[[int, int, Any], str] | str
Scale = Literal["pushes", "signed", "amount"]
_COLOUR_MEANS = {"pushes": "blue pushes up", "signed": "blue above zero", "amount": ""}
# With more columns or rows, the gaps between cells would hide the cells.
_MOST_WITH_GAPS = 100


def heatmap(
    titles: Pair,
    z: Cells,
    says: Says,
    x: Axis,
    y: Axis,
    units: str,
    scale: Scale = "pushes",
    *,
    reach: float | None = None,
    note: str = "",
    row_height: int = 18,
) -> go.Figure:
    """Draw a cell for every row and column, coloured by its value; None and NaN are grey.

    Args:
        titles: the heading, and the smaller line below it.
        z: the values, row by row.
        says: the hover of a cell.
        x, y: the columns, and the rows.
        units: the units of the values.
        scale: 'pushes' and 'signed' are coloured from −reach to reach, an 'amount' from zero.
        reach: the value at which the colours end; by default the largest magnitude.
        note: stands above the colour bar.
        row_height: the height of a row in pixels.
    """
    values: list[list[float | None]] = []
    absent: list[list[float | None]] = []
    present: list[float] = []
    for row in z:
        of_row = [_finite_or_none(value) for value in row]
        values.append(of_row)
        # A second heatmap paints the cells without a value grey.
        absent.append([1.0 if value is None else None for value in of_row])
        present += [value for value in of_row if value is not None]
    if reach is None:
        reach = max((abs(value) for value in present), default=0.0)
    places: dict[str, Any] = {
        "x": list(x.values),
        "y": list(y.values),
        "xgap": int(len(x.values) <= _MOST_WITH_GAPS),
        "ygap": int(len(y.values) <= _MOST_WITH_GAPS),
    }
    figure = go.Figure().add_heatmap(
        z=values,
        hoverongaps=False,
        colorbar=_colour_bar(units, scale, note),
        **places,
        **_cell_hover(z, says),
        **_colours(scale, reach or 1.0),
    )
    cells = sum(len(row) for row in values)
    if len(present) < cells:
        grey = [[0, _BLANK], [1, _BLANK]]
        figure.add_heatmap(**places, z=absent, colorscale=grey, showscale=False, hoverinfo="skip")
    height = max(300, 150 + row_height * len(values))
    columns = {"constrain": "domain", **x.layout}
    finish(figure, titles, (x.title, y.title), height, xaxis=columns, yaxis=dict(y.layout))
    return figure.update_xaxes(showgrid=False).update_yaxes(showgrid=False)


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _colours(scale: Scale, reach: float) -> dict[str, Any]:
    """The colour scale of a heatmap, and the values at its ends."""
    if scale == "amount":
        return {"colorscale": SEQUENTIAL, "zmin": 0, "zmax": reach}
    return {"colorscale": DIVERGING, "zmin": -reach, "zmid": 0, "zmax": reach}


def _colour_bar(units: str, scale: Scale, note: str) -> dict[str, Any]:
    """The colour bar of a heatmap; above it stand the units and what the colours mean."""
    lines = [*filter(None, (label(units), _COLOUR_MEANS[scale], note)), "&nbsp;"]
    title = {"text": "<br>".join(lines), "side": "top", "font": {"size": 13}}
    return {"title": title, "thickness": 14, "outlinewidth": 0}


def _cell_hover(z: Cells, says: Says) -> dict[str, Any]:
    """The hover text of every cell, row by row; or one plotly template for all of them."""
    if isinstance(says, str):
        return _hover(says)
    texts: list[list[str]] = []
    for i, row in enumerate(z):
        texts.append([says(i, j, value) for j, value in enumerate(row)])
    return _hover(texts)


# The kinds of modules, in the order of the forward pass.
KINDS = (
    "embed",
    "pos_embed",
    "embed_ln",
    "ln1",
    "q",
    "k",
    "v",
    "q_norm",
    "k_norm",
    "o",
    "ln1_post",
    "ln2",
    "gate",
    "up",
    "fc_in",
    "down",
    "fc_out",
    "ln2_post",
    "ln_final",
    "unembed",
)


def kinds_by_layer(
    titles: Pair,
    sites: Sequence[Any],
    values: Sequence[float],
    says: Sequence[str],
    units: str,
    scale: Scale = "pushes",
    *,
    reach: float | None = None,
) -> go.Figure:
    """Draw layer × kind of module; each cell's hover names its site, and absent sites are grey.

    In a sum of adapters several sites may share a cell. It holds their sum; or, where `reach` is
    given, their mean.

    Args:
        titles: the heading, and the smaller line below it.
        sites: one for each value.
        values: what the cells show.
        says: what a site's hover says below its name and module.
        units: the units of the values.
        scale: as for `heatmap`.
        reach: as for `heatmap`.
    """
    kinds = sorted(dict.fromkeys(site.kind for site in sites), key=_place_of_kind)
    y = layers_axis(sites)
    x = names_axis(kinds, "kind of module")
    hover: list[str] = []
    for site, said in zip(sites, says, strict=True):
        hover.append(f"<b>{label(site.name)}</b><br>{label(site.module)}<br>{said}")

    cell_of_site = [[site.layer for site in sites], [site.kind for site in sites]]
    by_cell: Any = pd.DataFrame({"value": values, "hover": hover}).groupby(cell_of_site)
    in_cell = by_cell["value"]
    numbers = in_cell.sum(min_count=1) if reach is None else in_cell.mean()
    z = numbers.unstack().reindex(index=y.values, columns=kinds).to_numpy().tolist()
    texts = by_cell["hover"].agg("<br>".join)

    def cell_hover(row: int, column: int, _: object) -> str:
        return texts.get((y.values[row], kinds[column]), "")

    return heatmap(titles, z, cell_hover, x, y, units, scale, reach=reach)


def _place_of_kind(kind: str) -> int:
    """The place of a kind of module in the order of the forward pass; others come last."""
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


# --- Bars, curves and points


def bars(
    titles: Pair,
    names: Iterable[str],
    values: Numbers,
    hover: Texts,
    units: str,
    *,
    upwards: bool = False,
) -> go.Figure:
    """Draw one horizontal bar for each name; blue is positive, red negative.

    The first is on top, or at the bottom where they go `upwards`, as layers do in every figure.
    """
    direction = True if upwards else "reversed"
    y = names_axis(names, autorange=direction, showgrid=False)
    marker = {"color": sign_colours(values)}
    bar = go.Bar(x=values, y=y.values, orientation="h", marker=marker, **_hover(hover))
    height = max(240, 130 + 20 * len(values))
    figure = finish(go.Figure(bar), titles, (label(units), ""), height, yaxis=y.layout)
    return figure.update_xaxes(zeroline=True)


def sign_colours(values: Numbers) -> list[str]:
    """A colour for each value: blue if it is positive or zero, red if it is negative."""
    colours: list[str] = []
    for value in values:
        colours.append(EXACT if value >= 0 else NEGATIVE)
    return colours


# One template for all points, a text for each (of a heatmap, row by row), or no hover at all.
Hover = str | Sequence[str] | Sequence[Sequence[str]] | None


def _hover(hover: Hover) -> dict[str, Any]:
    if hover is None:
        return {"hoverinfo": "skip"}
    if isinstance(hover, str):
        return {"hovertemplate": hover}
    return {"hovertext": hover, "hoverinfo": "text"}


def curve(
    x: Sequence[float | None],
    y: Sequence[Any],
    name: str,
    colour: str,
    hover: Hover = None,
    *,
    width: float = 2,
    dash: str = "solid",
    **more: Any,
) -> go.Scatter:
    """A line, with markers where `marker` says how they look."""
    line = {"color": colour, "width": width, "dash": dash}
    mode = "lines+markers" if "marker" in more else "lines"
    return go.Scatter(x=x, y=y, name=name, mode=mode, line=line, **_hover(hover), **more)


def points(
    x: Sequence[float], y: Sequence[Any], hover: Hover, name: str, **marker: Any
) -> go.Scatter:
    """Points alone, which look as `marker` says."""
    return go.Scatter(x=x, y=y, name=name, mode="markers", marker=marker, **_hover(hover))


def grouped_points(
    x: Numbers, y: Numbers, hover: Texts, groups: Texts, looks: _Looks, *, counts: bool = True
) -> list[go.Scatter]:
    """Points of several groups, each with its look and its entry in the legend, with its count."""
    traces: list[go.Scatter] = []
    for group, look in looks.items():
        chosen = [name == group for name in groups]
        xs = list(itertools.compress(x, chosen))
        ys = list(itertools.compress(y, chosen))
        texts = list(itertools.compress(hover, chosen))
        name = f"{label(group)}: {len(xs)} of {len(x)}" if counts else label(group)
        traces.append(points(xs, ys, texts, name, **look))
    return traces


# --- Along ε, the strength of the adapter

EPSILON = "ε, strength of the adapter"


def along_hover(name: str, units: str) -> str:
    """The hover template of a curve along ε, which shows a point's strength and value."""
    return f"ε = %{{x:.3g}}<br>%{{y:.4g}} {units}, {name}<extra></extra>"


# --- Axes of groups of sites, of which there may be many

# An axis names at most _MOST_NAMES groups; of more it names the first group of every few layers.
_MOST_NAMES = 40
_MOST_LAYERS = 16
# The colours of a large matrix end at this quantile of its magnitudes.
_CUT = 0.995


@runtime_checkable
class Grouped(Protocol):
    """A result of groups of sites."""

    @property
    def groups(self) -> Groups:
        """{name: indices into sites}."""
        ...

    @property
    def sites(self) -> Sequence[Site]:
        """The adapted sites."""
        ...


def group_ticks(grouped: Grouped) -> dict[str, Any]:
    """Every group by name; where they are many, the first of every few layers."""
    if len(grouped.groups) <= _MOST_NAMES:
        names = [label(name) for name in grouped.groups]
        return ticks(names, names)
    first: dict[int, str] = {}
    for name, members in grouped.groups.items():
        first.setdefault(grouped.sites[members[0]].layer, label(name))
    shown = every_few(sorted(first.items()), _MOST_LAYERS)
    texts: list[str] = []
    for layer, _ in shown:
        texts.append(f"layer {layer}" if layer >= 0 else "embed")
    return ticks((name for _, name in shown), texts)


def largest_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a heatmap, in their order; if they are too many to read, the largest of them."""
    sizes = table.abs().max(axis=1)
    shown = sizes.nlargest(_MOST_NAMES).index
    return table.loc[table.index.isin(shown)]


class ColourRange(NamedTuple):
    """How far the colours of a heatmap reach.

    Attributes:
        reach: the value at which they end.
        note: what stands above the colour bar, if larger values have the same colour.
    """

    reach: float
    note: str


def cut_colours(values: Any) -> ColourRange:
    """The colours of a heatmap; in a large one a few outliers do not take all of them."""
    sizes = values.abs().flatten()
    is_cut = max(values.shape) > _MOST_NAMES and bool(sizes.quantile(_CUT) > 0)
    if not is_cut:
        return ColourRange(float(sizes.max()), "")
    reach = float(sizes.quantile(_CUT))
    return ColourRange(reach, f"cut at {reach:.2g}")
