"""Several results as one table, and as one figure.

`table` puts their tables below one another. This works because a column has the same name in all of
them (`docs/columns.md` lists the names).

`panel` puts their figures below or beside one another:

1. Each figure gets a cell of a grid. Its axes, its annotations and its shapes are moved into the
   cell, and its axes get numbers that no other figure has.
2. With a shared scale, heatmaps of the same units have the same colours for the same numbers and
   one colour bar; curves and bars whose axes have the same title have the same range.
3. A name that is in several legends is shown once.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import pandas as pd

from lens_lora.arguments import whole as whole_number
from lens_lora.core import drawing
from lens_lora.errors import ArgumentError
from lens_lora.show import go
from lens_lora.show.figures import finish
from lens_lora.show.text import cut_in_the_middle, key_text, label

# Below one another, figures fit a phone and a notebook's column alike.
_IN_A_ROW = 1
_GAP = 0.09  # between two cells of a row, as a share of the figure's width
_ROW_GAP = 110  # pixels between two rows, which hold the titles of the lower one
_BAR = 0.07  # the share of a cell's width that its colour bar takes
_BAR_ROOM = 100  # pixels at the right where one column of figures has a colour bar with its title
_HEADING_WIDTH = 120  # characters of the headings of one row
_HEIGHT = 420  # pixels of a figure that states none
# Room for the titles above, and for a legend at the lower end.
_ROOM: dict[str, Any] = {
    "margin": {"l": 60, "r": 40, "t": 110, "b": 100},
    "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
}


@runtime_checkable
class Tabular(Protocol):
    """A result that has a table."""

    def to_frame(self) -> pd.DataFrame:
        """The numbers as a table."""
        ...


@runtime_checkable
class Plottable(Protocol):
    """A result that has a picture."""

    def plot(self) -> drawing.Figure:
        """The picture."""
        ...


# --- One table


def table(*results: Tabular, names: Sequence[str] | None = None) -> pd.DataFrame:
    """The tables of several results in one, with a first column that names each row's result.

    One column name means one thing in every table, so that `value` is comparable where the units
    are. A column that one of the tables lacks is empty there.

        ll.table(first_order, add_one).pivot(index="site", columns="result", values="value")

    Args:
        results: any results; from a list, `ll.table(*list)`.
        names: what the column `result` says of each; by default its key, such as 'first_order@0'
            or 'leave_one_out', or else the name of its class. Results of one name are
            told apart by their adapters, if these differ; a second one of a name is 'name (2)'.

    Returns:
        One row for each row of each result. The columns `readout` and `units` come after `result`
        if the results differ in them.

    Raises:
        ArgumentError: no result, something that has no table, or more or fewer names than results.
    """
    for result in results:
        if not isinstance(result, Tabular):
            raise ArgumentError(
                f"a {type(result).__name__} has no table",
                remedy="give results, ll.table(first_order, effects), of a list ll.table(*list).",
            )
    differing = _differing(results)
    frames: list[pd.DataFrame] = []
    for name, result in zip(_names_of(results, names), results, strict=True):
        frame = result.to_frame().copy()
        frame.insert(0, "result", name)
        for place, column in enumerate(differing, start=1):
            if column not in frame:
                frame.insert(place, column, getattr(part_with_readout(result), column, None))
        frames.append(frame)
    return pd.concat(_with_gaps(frames), ignore_index=True)


def part_with_readout(result: Any) -> Any:
    """The result itself, or the attribution in it that knows the readout."""
    parts = (result, getattr(result, "attribution", None), getattr(result, "first_order", None))
    for part in parts:
        if hasattr(part, "readout"):
            return part
    return result


def _differing(results: Sequence[object]) -> list[str]:
    """List which of `readout` and `units` differ among the results that state them."""
    differing: list[str] = []
    for column in ("readout", "units"):
        stated = {getattr(part_with_readout(result), column, None) for result in results}
        if len(stated - {None}) > 1:
            differing.append(column)
    return differing


def _with_gaps(frames: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """The tables, whose integers and booleans keep their type where others lack the column."""
    filled: list[pd.DataFrame] = []
    for frame in frames:
        types: dict[str, str] = {}
        for column in frame:
            is_in_all = all(column in other for other in frames)
            if pd.api.types.is_bool_dtype(frame[column]) and not is_in_all:
                types[str(column)] = "boolean"
            elif pd.api.types.is_integer_dtype(frame[column]) and not is_in_all:
                types[str(column)] = "Int64"
        filled.append(frame.astype(types))
    return filled


def _names_of(results: Sequence[object], names: Sequence[str] | None) -> list[str]:
    """A name for each result, no two of them the same.

    Raises:
        ArgumentError: no result, or more or fewer names than results.
    """
    own = _own_names(results)
    if names is None:
        return _distinct(own)
    if isinstance(names, str) or len(names) != len(results):
        raise ArgumentError(
            f"names={names!r} for {len(results)} results", remedy="give a name for each."
        )
    return _distinct(names)


def _own_names(results: Sequence[object]) -> list[str]:
    """The key or class of each result, with its adapter where that tells two of them apart.

    Raises:
        ArgumentError: no result.
    """
    if not results:
        raise ArgumentError("no result was given", remedy="give at least one.")
    own = [_name_of(result) for result in results]
    adapters = [getattr(result, "meta", {}).get("adapter", "") for result in results]
    adapters_of: dict[str, set[str]] = {}
    for name, adapter in zip(own, adapters, strict=True):
        adapters_of.setdefault(name, set()).add(adapter)
    wanted: list[str] = []
    for name, adapter in zip(own, adapters, strict=True):
        is_of_one_adapter = len(adapters_of[name]) == 1
        wanted.append(name if is_of_one_adapter else f"{name} of {adapter}")
    return wanted


def _with_their_axes(results: Sequence[object], names: Sequence[str]) -> list[str]:
    """The names; where two are equal, each says how its result is split: 'by position'."""
    distinguished: list[str] = []
    for result, name in zip(results, names, strict=True):
        axes = getattr(result, "by", ())
        is_split = isinstance(axes, tuple) and len(axes) > 0
        is_repeated = names.count(name) > 1
        if is_split and is_repeated:
            name = f"{name} by {' and '.join(axes)}"
        distinguished.append(name)
    return distinguished


def _distinct(wanted: Sequence[str]) -> list[str]:
    """The names; a second one of the same name is 'name (2)'."""
    distinct: list[str] = []
    for name in wanted:
        free = name
        number = 2
        while free in distinct:
            free = f"{name} ({number})"
            number += 1
        distinct.append(free)
    return distinct


def _name_of(result: object) -> str:
    """Its key, such as 'first_order@0', or the name of its class."""
    key = getattr(result, "key", None)
    return key if isinstance(key, str) else type(result).__name__


# --- One figure


@dataclasses.dataclass(frozen=True)
class _Cell:
    """The place of one figure, in shares of the whole one.

    Attributes:
        left, right, bottom, top: its ends.
    """

    left: float
    right: float
    bottom: float
    top: float

    def across(self, share: float) -> float:
        """A horizontal place of the figure, as one of the whole."""
        return _within(self.left + share * (self.right - self.left))

    def upwards(self, share: float) -> float:
        """A vertical place of the figure, as one of the whole."""
        return _within(self.bottom + share * (self.top - self.bottom))


def _within(place: float) -> float:
    """A place, rounded so as not to lie just beyond an end; a note may stand outside its cell."""
    return round(place, 9)


def panel(
    *results: Plottable | drawing.Figure,
    shared_scale: bool = True,
    names: Sequence[str] | None = None,
    columns: int = _IN_A_ROW,
) -> drawing.Figure:
    """The figures of several results in one, below or beside one another.

        ll.panel(ll.first_order(lens, prompt, margin), ll.patch_sites(lens, prompt, margin))

    Args:
        results: results that have a `plot`; or figures, such as `result.plot(prompt=1)`.
        shared_scale: whether a colour, a height or a length stands for the same number in all
            figures of the same units. Without it each figure has the range of its own numbers.
        names: the heading of each figure; by default its own heading.
        columns: how many figures stand beside one another; 2 or 3 need a wide screen.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: no result, something that has no picture, more or fewer names than results,
            no column, or a result of several prompts whose picture is of one; give its figure,
            `result.plot(0)`.
    """
    most_columns = whole_number("columns", columns, least=1)
    figures = [_figure_of(result) for result in results]
    headings = _headings(results, figures, names)
    in_a_row = min(len(figures), most_columns)
    rows = math.ceil(len(figures) / in_a_row)
    height = max(int(_layout(figure).get("height", _HEIGHT)) for figure in figures)
    cells = _cells(len(figures), in_a_row, rows, rows * height)

    whole = go.Figure()
    for figure, cell, heading in zip(figures, cells, headings, strict=True):
        _move_into(whole, figure, cell)
        width = _HEADING_WIDTH // in_a_row
        whole.add_annotation(
            text=f"<b>{label(cut_in_the_middle(heading, width))}</b>",
            x=cell.left,
            y=cell.top,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            yshift=6,
            showarrow=False,
            font={"size": 13},
        )
    if shared_scale:
        _share_colours(whole)
        _share_ranges(whole)
    _name_once(whole)
    below = "each figure has a scale of its own"
    if shared_scale:
        below = "figures of the same units share one scale"
    axis_titles = _axis_titles(whole)
    room = dict(_ROOM)
    if in_a_row == 1 and _heatmaps(whole):
        room["margin"] = {**room["margin"], "r": _BAR_ROOM}
    finish(whole, (_common_heading(results), below), ("", ""), rows * height, **room)
    return whole.update_layout(axis_titles)


def _figure_of(result: object) -> go.Figure:
    """The figure itself, or that of a result.

    Raises:
        ArgumentError: something that has no picture.
    """
    if isinstance(result, go.AnyFigure):
        return result
    if not isinstance(result, Plottable):
        raise ArgumentError(
            f"a {type(result).__name__} has no picture",
            remedy="give results with a plot, or plotly figures; of a list ll.panel(*list).",
        )
    return result.plot()


def _headings(
    results: Sequence[object], figures: Sequence[go.Figure], names: Sequence[str] | None
) -> list[str]:
    """The heading of each figure: the name that was given, its method, or its own title."""
    if names is not None:
        return _names_of(results, names)
    headings = _own_names(results)
    for place, (result, figure) in enumerate(zip(results, figures, strict=True)):
        if isinstance(getattr(result, "key", None), str):
            continue
        title = _layout(figure).get("title", {}).get("text") or type(result).__name__
        first_line, _, _ = title.partition("<br>")
        headings[place] = html.unescape(re.sub(r"<[^>]*>", "", first_line))
    texts = [key_text(heading) for heading in headings]
    return _distinct(_with_their_axes(results, texts))


def _layout(figure: go.Figure) -> dict[str, Any]:
    """The layout of a figure as plain data."""
    return cast("dict[str, Any]", figure.to_dict()["layout"])


def _common_heading(results: Sequence[object]) -> str:
    """The readout that all results have in common, or how many results there are."""
    readouts = {getattr(part_with_readout(result), "readout", None) for result in results}
    readouts.discard(None)  # results about no readout, such as those of all tokens
    only = readouts.pop() if len(readouts) == 1 else None
    return str(only) if only else f"{len(results)} figures"


def _cells(count: int, columns: int, rows: int, height: int) -> list[_Cell]:
    """The place of each figure, row by row from the top."""
    width = (1 - _GAP * (columns - 1)) / columns
    gap = min(_ROW_GAP / height, 0.3)
    tall = (1 - gap * (rows - 1)) / rows
    cells: list[_Cell] = []
    for index in range(count):
        row, column = divmod(index, columns)
        left = column * (width + _GAP)
        top = 1 - row * (tall + gap)
        cells.append(_Cell(left, left + width, top - tall, top))
    return cells


def _move_into(whole: go.Figure, figure: go.Figure, cell: _Cell) -> None:
    """Put a figure's traces, axes, annotations and shapes into a cell of the whole one."""
    layout = _layout(figure)
    drawn: Any = figure.data
    traces = [trace.to_plotly_json() for trace in drawn]
    # The part of the cell beside its colour bar.
    plot = cell
    if any(_has_bar(trace) for trace in traces):
        plot = dataclasses.replace(cell, right=cell.across(1 - _BAR))
    number = _Numbering(first=_axes_in(whole))
    for trace in traces:
        whole.add_trace(_moved_trace(trace, plot, number))
    whole.update_layout(_moved_axes(layout, plot, number))
    for annotation in layout.get("annotations", ()):
        whole.add_annotation(_moved_item(dict(annotation), plot, number))
    for shape in layout.get("shapes", ()):
        whole.add_shape(_moved_item(dict(shape), plot, number))


def _has_bar(trace: dict[str, Any]) -> bool:
    """Whether a trace has a colour bar."""
    return trace["type"] == "heatmap" and trace.get("showscale", True)


def _moved_trace(trace: dict[str, Any], plot: _Cell, number: _Numbering) -> dict[str, Any]:
    """A trace on the axes of its cell, with the colour bar at their right."""
    trace["xaxis"] = number.axis(trace.get("xaxis", "x"))
    trace["yaxis"] = number.axis(trace.get("yaxis", "y"))
    if trace["type"] == "heatmap":
        bar = {
            "x": plot.right,
            "xanchor": "left",
            "xpad": 4,
            "y": plot.upwards(0.5),
            "len": plot.top - plot.bottom,
        }
        trace["colorbar"] = {**trace.get("colorbar", {}), **bar}
    return trace


def _moved_axes(layout: dict[str, Any], plot: _Cell, number: _Numbering) -> dict[str, Any]:
    """All axes of a figure within its cell, by their names in the whole figure."""
    axes: dict[str, Any] = {}
    for name, axis in layout.items():
        if re.fullmatch(r"[xy]axis\d*", name):
            axes[number.layout_name(name)] = _moved_axis(name, dict(axis), plot, number)
    for letter in "xy":
        # A figure that says nothing of its axes has them all the same.
        name = number.layout_name(f"{letter}axis")
        axes.setdefault(name, _moved_axis(f"{letter}axis", {}, plot, number))
    return axes


def _axes_in(whole: go.Figure) -> int:
    """The largest number of an axis that the figure has."""
    numbers = [0]
    for name in _layout(whole):
        match = re.fullmatch(r"[xy]axis(\d*)", name)
        if match:
            numbers.append(int(match[1] or 1))
    return max(numbers)


@dataclasses.dataclass(frozen=True)
class _Numbering:
    """New numbers for the axes of a figure: those of the whole one come first.

    Attributes:
        first: how many numbers are taken.
    """

    first: int

    def axis(self, name: str) -> str:
        """'x2' as it is called in the whole figure."""
        letter = name[0]
        number = self.first + int(name[1:] or 1)
        return letter if number == 1 else f"{letter}{number}"

    def layout_name(self, name: str) -> str:
        """'xaxis2' as it is called in the whole figure."""
        letter, _, number = name.partition("axis")
        axis = self.axis(letter + number)
        return f"{axis[0]}axis{axis[1:]}"

    def reference(self, name: str) -> str:
        """The reference of an annotation or a shape: 'x2', 'y domain', or 'paper'."""
        if not name or name == "paper" or name[0] not in "xy":
            return name or "paper"
        axis, space, domain = name.partition(" ")
        return f"{self.axis(axis)}{space}{domain}"


def _moved_axis(name: str, axis: dict[str, Any], cell: _Cell, number: _Numbering) -> dict[str, Any]:
    """An axis within its cell, tied to the other axis of its own pair."""
    if name.startswith("x"):
        place = cell.across
        other = "y"
    else:
        place = cell.upwards
        other = "x"
    low, high = axis.get("domain", (0, 1))
    axis["domain"] = [place(low), place(high)]
    anchor = axis.get("anchor") or f"{other}{name[5:]}"
    axis["anchor"] = anchor if anchor == "free" else number.axis(anchor)
    for tied in ("matches", "overlaying", "scaleanchor"):
        if axis.get(tied):
            axis[tied] = number.axis(axis[tied])
    return axis


def _moved_item(item: dict[str, Any], cell: _Cell, number: _Numbering) -> dict[str, Any]:
    """An annotation or a shape within its cell."""
    for letter, place in (("x", cell.across), ("y", cell.upwards)):
        reference = item.get(f"{letter}ref", "paper")
        item[f"{letter}ref"] = number.reference(reference)
        if reference != "paper":
            # Its coordinates are those of an axis, which moves as a whole.
            continue
        for name in (letter, f"{letter}0", f"{letter}1"):
            if item.get(name) is not None:
                item[name] = place(item[name])
    return item


# --- The same scale in all cells


def _heatmaps(whole: go.Figure) -> list[Any]:
    """The heatmaps of a figure."""
    traces: Any = whole.data
    return [trace for trace in traces if trace.type == "heatmap"]


def _share_colours(whole: go.Figure) -> None:
    """Give heatmaps of the same units the same colours for the same numbers, and one bar."""
    by_units: dict[str, list[Any]] = {}
    for trace in _heatmaps(whole):
        if trace.showscale is not False:
            by_units.setdefault(str(trace.colorbar.title.text), []).append(trace)
    for heatmaps in by_units.values():
        high = max(trace.zmax for trace in heatmaps)
        low = min(trace.zmin for trace in heatmaps)
        for trace in heatmaps:
            trace.update(zmin=low, zmax=high, showscale=trace is heatmaps[-1])


def _share_ranges(whole: go.Figure) -> None:
    """Tie the axes of curves, bars and points whose titles agree; categories stay as they are."""
    of_heatmaps: set[str] = set()
    for trace in _heatmaps(whole):
        of_heatmaps |= {trace.xaxis, trace.yaxis}
    first_of: dict[tuple[str, str], str] = {}
    for name, axis in _layout(whole).items():
        match = re.fullmatch(r"([xy])axis(\d*)", name)
        if match is None or axis.get("type") == "category":
            continue
        reference = match[1] + match[2]
        title = axis.get("title", {}).get("text")
        if not title or reference in of_heatmaps or axis.get("matches"):
            continue
        first = first_of.setdefault((match[1], title), reference)
        if first != reference:
            whole.update_layout({name: {"matches": first}})


def _name_once(whole: go.Figure) -> None:
    """Show each name once in the legend, and no trace that has none.

    A figure of one trace has no legend. In a panel plotly would call such a trace "trace 1".
    """
    seen: set[str] = set()
    traces: Any = whole.data
    for trace in traces:
        if not trace.name:
            # Heatmaps are never in a legend, and some have no such property.
            if "showlegend" in trace:
                trace.showlegend = False
            continue
        if trace.showlegend is False:
            continue
        if trace.name in seen:
            trace.showlegend = False
        seen.add(trace.name)


def _axis_titles(whole: go.Figure) -> dict[str, Any]:
    """The titles that the axes have, so that they stay while the whole figure gets its own."""
    titles: dict[str, Any] = {}
    for name, axis in _layout(whole).items():
        if re.fullmatch(r"[xy]axis\d*", name):
            titles[name] = {"title": {"text": axis.get("title", {}).get("text")}}
    return titles
