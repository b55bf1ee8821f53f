"""Pictures of several prompts are of their mean, where they have one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from every_result import every_result
from results_by_hand import flip_case

import lens_lora as ll
from lens_lora.core import Noise
from lens_lora.errors import ArgumentError

COMPONENTS = next(r for r in every_result() if isinstance(r, ll.results.Components))
SHIFT = next(r for r in every_result() if isinstance(r, ll.results.LogitShift))


def two_margins() -> ll.results.FactMargin:
    """The margin that flips at 0.49, and the same three times as large with other floors."""
    one = flip_case()
    curve = one.curve
    floors = torch.tensor([1e-6, 2e-6])
    both = dataclasses.replace(
        curve,
        values=torch.cat([curve.values, 3 * curve.values]),
        base=torch.cat([curve.base, 3 * curve.base]),
        slope=torch.cat([curve.slope, 3 * curve.slope]),
        noise=Noise(floors, floors, torch.zeros(2)),
        order=curve.order.repeat(2),
        str_tokens=curve.str_tokens * 2,
    )
    att = one.attribution
    attribution = dataclasses.replace(
        att,
        values=torch.cat([att.values, 3 * att.values]),
        base=torch.cat([att.base, 3 * att.base]),
        adapted=torch.cat([att.adapted, 3 * att.adapted]),
        str_tokens=att.str_tokens * 2,
    )
    return ll.results.FactMargin(
        attribution, both, one.flip_scale.repeat(2), one.doc * 2, one.pre * 2
    )


def named(figure: Any, name: str) -> list[Any]:
    return [trace for trace in figure.data if trace.name == name]


def test_curves_along_the_path_are_the_mean():
    """g and its line are means; the share of the remainder is that of the means."""
    path = two_margins().curve
    whole = path.plot()
    for name in ("exact", "first order at ε = 0"):
        (mean,) = named(whole, name)
        alone = [named(path.plot(prompt), name)[0].y for prompt in (0, 1)]
        assert list(mean.y) == pytest.approx([(a + b) / 2 for a, b in zip(*alone, strict=True)])
    (share,) = named(whole, "|R| / |shift|")
    expected = 100 * (path.remainder.mean(0) / path.shift.mean(0)).abs()
    assert list(share.y) == pytest.approx(expected.tolist(), rel=1e-5)
    assert "mean of 2 prompts" in whole.layout.title.text


def test_a_margin_of_several_prompts_shows_each_and_their_mean():
    margin = two_margins()
    whole = margin.plot()
    each = named(whole, "each prompt")
    assert [list(line.y)[0] for line in each] == margin.m0.tolist()
    assert [line.showlegend for line in each] == [True, False]
    assert not any("flips at" in str(note.text) for note in whole.layout.annotations)
    assert named(margin.plot(1), "each prompt") == []
    assert any("flips at" in str(note.text) for note in margin.plot(1).layout.annotations)


def test_tokens_are_ranked_by_the_mean_over_prompts():
    values = torch.tensor([[1.0, 0.0, -1.0], [-4.0, 0.0, 4.0]])
    both = dataclasses.replace(SHIFT, values=values, sites=())
    order = both.promoted(k=3)
    assert order["id"].tolist() == [SHIFT.tokens[2], SHIFT.tokens[1], SHIFT.tokens[0]]
    assert order["shift"].tolist() == [1.5, 0.0, -1.5]
    assert both.promoted(k=1, prompt=0)["id"].item() == SHIFT.tokens[0]
    (bars,) = both.plot(k=1).data
    assert list(bars.x) == [1.5, -1.5]
    assert list(both.plot(k=1, prompt=0).data[0].x) == [1.0, -1.0]


@pytest.mark.parametrize(
    "of", ["z_norm", "delta_norm", "sensitivity", "cosine", "gain", "first_order"]
)
def test_components_are_drawn_one_at_a_time(of: str):
    """The cells are the numbers of the table, of a prompt or of the mean over prompts."""
    for prompt in (None, 1):
        frame = COMPONENTS.to_frame()
        if prompt is not None:
            frame = frame[frame["prompt"] == prompt]
        expected = frame.groupby("site")[of].mean()
        figure = COMPONENTS.plot(of, prompt)
        drawn = figure.data[0]
        for site in COMPONENTS.sites:
            value = drawn.z[list(drawn.y).index(site.layer)][list(drawn.x).index(site.kind)]
            if math.isnan(expected[site.name]):
                assert value is None
            else:
                assert value == pytest.approx(expected[site.name])


@pytest.mark.bad_input
def test_bad_arguments():
    with pytest.raises(ArgumentError, match="of='size'"):
        COMPONENTS.plot("size")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="prompts 0 to"):
        COMPONENTS.plot("gain", 7)
    with pytest.raises(ArgumentError, match="prompts 0 to"):
        two_margins().plot(2)
    with pytest.raises(ArgumentError, match="k=0"):
        SHIFT.plot(k=0)
