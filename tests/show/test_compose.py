"""Several results as one table and as one figure.

Each number and each cell of the whole is held beside that of the result alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import by_folder
import numpy as np
import pandas as pd
import pytest
from every_result import every_result
from results_by_hand import explanation, two_prompts

import lens_lora as ll
from lens_lora.errors import ArgumentError

checkpoints = by_folder.made_public("two_adapters").checkpoints
of_groups = by_folder.made_public("core").of_groups

BY_POSITION = explanation().first_order
FIRST = dataclasses.replace(BY_POSITION, values=BY_POSITION.per_site, by=())
ADDED = explanation().add_one
CURVE = explanation().margin.curve


def scaled(attribution: ll.results.Attribution, by: float) -> ll.results.Attribution:
    return dataclasses.replace(attribution, values=by * attribution.values)


def axes_of(figure: Any) -> dict[str, Any]:
    """The axes of a figure by the names that traces call them: 'x', 'y2'."""
    layout = figure.to_dict()["layout"]
    return {name[0] + name[5:]: axis for name, axis in layout.items() if name[1:5] == "axis"}


def heatmaps(figure: Any) -> list[Any]:
    return [
        t for t in figure.data if t.type == "heatmap" and t.colorscale[0][1] != t.colorscale[1][1]
    ]


# --- table


def test_each_row_is_that_of_its_result():
    found = ll.table(FIRST, ADDED)
    assert list(found)[0] == "result"
    assert found["result"].unique().tolist() == [
        FIRST.key,
        ADDED.key,
    ]
    for result in (FIRST, ADDED):
        rows = found[found["result"] == result.key].reset_index(drop=True)
        pd.testing.assert_frame_equal(
            rows[list(result.to_frame())], result.to_frame(), check_dtype=False
        )


def test_sites_of_several_results_stand_beside_one_another():
    """The columns have the same names, so that one pivot holds first order beside the effects."""
    wide = ll.table(FIRST, ADDED).pivot(index="site", columns="result", values="value")
    sites = [site.name for site in FIRST.sites]
    assert wide.loc[sites, FIRST.key].tolist() == FIRST.values[0].tolist()
    assert wide.loc[sites, ADDED.key].tolist() == ADDED.values[0].tolist()


def test_every_result_has_a_place_in_one_table():
    results = every_result()
    found = ll.table(*results)
    assert len(found) == sum(len(result.to_frame()) for result in results)
    assert found["result"].nunique() == len(results)
    assert str(found["layer"].dtype) == "Int64"
    assert {"readout", "units"} <= set(found)


def test_names_and_what_differs():
    """Names are the caller's, or keys, and never the same; units are said where they differ."""
    twice = ll.table(FIRST, FIRST)
    assert twice["result"].unique().tolist() == [FIRST.key, f"{FIRST.key} (2)"]
    other = dataclasses.replace(FIRST, meta={**FIRST.meta, "adapter": "other"})
    names = ll.table(FIRST, other)["result"].unique().tolist()
    assert names == [f"{FIRST.key} of {FIRST.meta['adapter']}", f"{FIRST.key} of other"]
    named = ll.table(FIRST, other, names=["seed 0", "seed 1"])
    assert named["result"].unique().tolist() == ["seed 0", "seed 1"]
    assert "units" not in named
    nats = ll.table(FIRST, dataclasses.replace(FIRST, units="nats"))
    assert nats["units"].unique().tolist() == [FIRST.units, "nats"]


# --- panel


def test_two_of_one_name_say_by_what_they_are_split():
    """In the headings of a panel, whose title is the readout that its results are of."""
    whole = ll.panel(FIRST, BY_POSITION, FIRST.plot())
    headings = [note.text for note in whole.layout.annotations if "<b>" in str(note.text)]
    assert "by position" in headings[1]
    assert "by" not in headings[0]
    assert whole.layout.title.text.startswith("margin(")


@pytest.mark.parametrize("shared_scale", [True, False])
def test_every_cell_is_the_figure_of_its_result(shared_scale: bool):
    """The traces have the numbers and the hovers that they have alone, in cells that are apart."""
    results = (FIRST, ADDED, scaled(FIRST, 3), explanation().second_order)
    whole = ll.panel(*results, shared_scale=shared_scale)
    alone = [trace for result in results for trace in result.plot().data]
    assert len(whole.data) == len(alone)
    for moved, trace in zip(whole.data, alone, strict=True):
        assert np.array_equal(np.array(moved.z, float), np.array(trace.z, float), equal_nan=True)
        assert moved.hovertext == trace.hovertext
        assert list(moved.x) == list(trace.x)
    axes = axes_of(whole)
    cells = [(t.xaxis, t.yaxis) for t in heatmaps(whole)]
    assert len(set(cells)) == len(results)
    for (x, y), (other_x, other_y) in itertools.combinations(cells, 2):
        apart = [
            axes[one]["domain"][1] <= axes[two]["domain"][0]
            or axes[two]["domain"][1] <= axes[one]["domain"][0]
            for one, two in ((x, other_x), (y, other_y))
        ]
        assert any(apart)
    for x, y in cells:
        assert axes[x]["anchor"] == y
        assert axes[x]["title"]["text"] == "kind of module"


def test_the_same_colour_is_the_same_number():
    """With a shared scale; without it each figure ends at its own largest number."""
    small = FIRST
    large = scaled(FIRST, 3)
    ends = [float(result.values.abs().max()) for result in (small, large)]
    shared = heatmaps(ll.panel(small, large))
    assert [t.zmax for t in shared] == [max(ends)] * 2
    assert [t.zmin for t in shared] == [-max(ends)] * 2
    assert [t.showscale is not False for t in shared] == [False, True]
    own = heatmaps(ll.panel(small, large, shared_scale=False))
    assert [t.zmax for t in own] == ends
    assert all(t.showscale is not False for t in own)


def test_other_units_have_a_scale_of_their_own():
    nats = dataclasses.replace(scaled(FIRST, 3), units="nats")
    drawn = heatmaps(ll.panel(FIRST, nats))
    assert drawn[0].zmax * 3 == pytest.approx(drawn[1].zmax)
    assert all(trace.showscale is not False for trace in drawn)


def test_curves_of_the_same_units_have_the_same_range():
    """Their axes are tied; a curve's own marks move with it; a name is in the legend once."""
    margin = explanation().margin
    whole = ll.panel(CURVE, margin, names=["curve", "margin"])
    along = [
        axis
        for name, axis in axes_of(whole).items()
        if name[0] == "x" and axis.get("title", {}).get("text")
    ]
    assert [axis.get("matches") for axis in along] == [None, "x2"]
    shown = [trace.name for trace in whole.data if trace.showlegend is not False]
    assert len(shown) == len(set(shown))
    assert "exact" in shown
    texts = [note.text for note in whole.layout.annotations]
    assert "<b>curve</b>" in texts
    assert "<b>margin</b>" in texts
    flip = next(note for note in whole.layout.annotations if "flips" in note.text)
    assert flip.xref == "x3"
    assert flip.yref == "y3 domain"
    own = axes_of(ll.panel(CURVE, margin, shared_scale=False))
    assert "matches" not in own["x3"]


def test_figures_stand_below_one_another_unless_columns_are_given():
    """So that a narrow screen shows them without an overlap."""
    beside = ll.panel(FIRST, ADDED, FIRST.plot(), columns=3).to_dict()["layout"]
    below = ll.panel(FIRST, ADDED, FIRST.plot()).to_dict()["layout"]
    assert len({tuple(beside[name]["domain"]) for name in beside if name[:5] == "xaxis"}) == 3
    assert len({tuple(below[name]["domain"]) for name in below if name[:5] == "xaxis"}) == 1
    assert below["height"] == 3 * beside["height"]


def test_figures_are_taken_as_they_are():
    """Of a result of several prompts, the figure of one."""
    two = two_prompts()
    whole = ll.panel(two.plot(0), two.plot(1), names=["first", "second"])
    assert [np.nanmax(np.array(t.z, float)) for t in heatmaps(whole)] == [
        float(two.values[0].max()),
        float(two.values[1].max()),
    ]


def test_every_picture_has_a_cell():
    """One panel of every result that has a picture without arguments."""
    drawn: list[Any] = []
    for result in every_result():
        try:
            drawn.append(result.plot())  # type: ignore[attr-defined]
        except (AttributeError, ll.errors.LensLoraError):
            continue
    assert len(drawn) > 15
    whole = ll.panel(*drawn)
    assert len(whole.data) == sum(len(figure.data) for figure in drawn)
    names = {trace.xaxis for trace in whole.data} | {trace.yaxis for trace in whole.data}
    assert names <= set(axes_of(whole))
    assert all(re.fullmatch(r"[xy]\d*", name) for name in names)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ll.table(), "no result was given"),
        (lambda: ll.panel(), "no result was given"),
        (lambda: ll.table([FIRST, ADDED]), r"list has no table.*ll\.table\(\*list\)"),
        (lambda: ll.panel([FIRST, ADDED]), r"list has no picture.*ll\.panel\(\*list\)"),
        (lambda: ll.table(FIRST, ADDED, names=["one"]), "for 2 results.*a name for each"),
        (lambda: ll.panel(FIRST, ADDED, names="ab"), "for 2 results.*a name for each"),
        (lambda: ll.panel(FIRST, ADDED, columns=0), "columns"),
    ],
)
def test_bad_arguments(call, message: str):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_a_legend_has_no_trace_without_a_name():
    """Bars beside curves: their figure alone has no legend, and plotly would make up a name."""
    bars = of_groups().plot(0)
    assert not bars.data[0].name, "bars have no name"
    shown = ll.panel(bars, checkpoints()).data
    assert shown[0].showlegend is False
    assert any(trace.name and trace.showlegend is not False for trace in shown)
