"""`prompt=` means the same everywhere: the mean where there is one, else the only prompt."""

from __future__ import annotations

import dataclasses
import math

import by_folder
import numpy as np
import pytest
import torch
from every_result import every_result
from hypothesis import given, settings
from hypothesis import strategies as st
from results_by_hand import (
    HEADER,
    attribution,
    explanation,
    two_prompts,
)
from shapes import share

import lens_lora as ll
from lens_lora.core import tables
from lens_lora.core.analyses.verdict import Noise
from lens_lora.core.results.base import Ranked

activations = by_folder.made_public("core").activations
features = by_folder.made_public("hidden").features

GROUPS = {"layer 0": (0, 1), "layer 2": (2, 3)}


def coupling() -> ll.results.Coupling:
    matrix = torch.tensor([[[2.0, 1.0], [1.0, -1.0]], [[0.0, 3.0], [3.0, 1.0]]])
    return ll.results.Coupling(matrix, GROUPS, 0.0, **HEADER)


def effects() -> ll.results.Effects:
    return ll.results.Effects(torch.tensor([[1.0, -4.0], [3.0, 2.0]]), GROUPS, "add_one", **HEADER)


RANKED = [two_prompts(), effects(), coupling(), activations(by_position=False)]


@pytest.mark.parametrize("result", RANKED, ids=lambda r: type(r).__name__)
def test_top_and_plot_are_of_the_same_prompts(result: Ranked):
    """Without a prompt both are the mean over prompts; with one, both are that prompt's."""
    mean = sum(result.entries(i).values for i in (0, 1)) / 2
    shift = result.shift.double().mean()
    top = result.top(99)
    assert top.iloc[:, -2].abs().tolist() == pytest.approx(sorted(mean.abs().tolist())[::-1])
    assert (top.iloc[:, -2] / float(shift)).tolist() == pytest.approx(top["share"].tolist())
    assert "mean of 2 prompts" in result.plot().layout.title.text
    for i in (0, 1):
        assert result.top(1, i).iloc[0, -2] in result.entries(i).values.tolist()
        assert f"prompt {i} of 2" in result.plot(i).layout.title.text
    for draw in (result.top, result.plot):
        with pytest.raises(
            ll.errors.ArgumentError, match="prompt 2: the result has prompts 0 to 1"
        ):
            draw(prompt=2)


def test_the_mean_of_a_coupling_is_drawn():
    drawn = torch.tensor([list(row) for row in coupling().plot().data[0].z])
    assert torch.equal(drawn, coupling().matrix.mean(0) / 2)


def without_a_mean():
    """What is of one prompt alone, as calls with a prompt."""
    by_position = attribution(
        torch.ones(2, 4, 2).tolist(),
        [0.0] * 2,
        [1.0] * 2,
        by=("position",),
        tokens=(("a", "b"),) * 2,
    )
    margin = explanation().margin
    curve = margin.curve
    curves = dataclasses.replace(
        curve, values=curve.values.expand(2, -1), base=curve.base.expand(2),
        order=curve.order.expand(2), slope=curve.slope.expand(2),
        noise=Noise(*torch.full((3, 2), 1e-6)), str_tokens=curve.str_tokens * 2,
    )  # fmt: skip
    two = dataclasses.replace(
        margin, attribution=by_position, curve=curves, doc=margin.doc * 2, pre=margin.pre * 2,
        flip_scale=margin.flip_scale.expand(2),
    )  # fmt: skip
    flags = explanation().reliability["add_one"]
    flags = dataclasses.replace(
        flags, attribution=by_position, correction=flags.correction.expand(2, -1),
        material=flags.material.expand(2),
    )  # fmt: skip
    return [
        by_position.plot_positions,
        two.story,
        flags.flagged_sites,
        features(by_position=True).top,
        features(by_position=True).plot,
        activations(by_position=True).top,
        activations(by_position=True).plot,
    ]


@pytest.mark.parametrize("call", without_a_mean(), ids=lambda c: c.__qualname__)
def test_what_has_no_mean_asks_for_a_prompt(call):
    with pytest.raises(
        ll.errors.ArgumentError, match=r"of 2 prompts have no mean; .*prompt=…, from 0 to 1"
    ):
        call()
    call(prompt=1)
    with pytest.raises(ll.errors.ArgumentError, match="prompt 2: the result has prompts 0 to 1"):
        call(prompt=2)


def test_ranked_tokens_are_of_the_mean_over_prompts():
    values = torch.tensor([[2.0, -2.0], [4.0, -4.0]])
    shift = ll.results.LogitShift(values, (), (0, 1), ("a", "b"), meta={})
    assert shift.promoted(k=1)["shift"].tolist() == [3.0]
    assert shift.promoted(k=1, prompt=1)["shift"].tolist() == [4.0]
    with pytest.raises(ll.errors.ArgumentError, match="prompt 2: the result has prompts 0 to 1"):
        shift.suppressed(prompt=2)


def test_the_only_prompt_needs_no_name():
    margin = explanation().margin
    assert margin.only_prompt(None) == 0
    assert margin.prompt_rows(None) == slice(None)
    assert margin.story() == margin.story(0)


def test_what_a_result_lacks_is_no_attribute():
    """`hasattr` answers of every result, and numpy reads one without values as the table's rows."""
    for result in every_result():
        is_array = isinstance(getattr(result, "values", None), torch.Tensor)
        assert hasattr(result, "__array_interface__") == is_array
        assert hasattr(result, "n_prompts") == ("batch" in vars(result)["axes"])
        for name in dir(type(result)):
            hasattr(result, name)  # It raises nothing, whatever the result was made without.
    margin = explanation().margin
    assert np.asarray(margin).tolist() == list(margin)


def test_a_part_that_was_not_computed_is_no_attribute():
    """A script may ask with `hasattr`; one that takes the part is told how to compute it."""
    found = two_prompts()
    assert not hasattr(found, "per_token")
    with pytest.raises(ll.errors.ArgumentError, match="by='token'"):
        _ = found.per_token


@settings(max_examples=share(100), deadline=None)
@given(
    values=st.lists(st.floats(allow_infinity=False, width=32), max_size=20), k=st.integers(0, 25)
)
def test_largest_leaves_nan_out(values: list[float], k: int):
    """Against sorting by hand; equal sizes keep their order."""
    known = [i for i, v in enumerate(values) if not math.isnan(v)]
    expected = sorted(known, key=lambda i: -abs(values[i]))[:k]
    assert tables.largest(torch.tensor(values, dtype=torch.float64), k) == expected
