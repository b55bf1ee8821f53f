"""Attributions: labels match numbers, wholes match parts, files match memory."""

from __future__ import annotations

import dataclasses

import cases
import models
import pandas as pd
import pytest
import torch
from results_by_hand import flip_case
from safetensors.torch import save_file

import lens_lora as ll
from lens_lora.core import Result

MARGIN = ll.Margin(5, 9)
TEXTS = ["w5 w7 w8", "w9 w10 w11 w12 w13"]


@pytest.fixture(scope="module")
def attribution() -> ll.results.Attribution:
    (cls, *_) = models.MAKERS
    with models.lifted():
        lens = cases.case("qwen2", cls, "raw").lens
        return ll.first_order(lens, TEXTS, MARGIN, by=("rank", "position", "head"))


def test_frame_holds_every_existing_part_once(attribution: ll.results.Attribution):
    """Rows = parts that exist: padding, absent heads and ranks beyond a site's own are left out."""
    frame = attribution.to_frame()
    lengths = [len(row) for row in attribution.str_tokens]
    rank = 3
    assert lengths[1] == lengths[0] + 2
    slots = sum(h or 1 for h in attribution.heads)
    assert len(frame) == sum(lengths) * rank * slots
    assert frame["value"].sum() == pytest.approx(float(attribution.values.sum()), rel=1e-12)
    keys = ["prompt", "site", "position", "head", "rank"]
    assert not frame.duplicated(keys).any()
    mlp = frame[frame["kind"].isin(["gate", "up", "down"])]
    assert mlp["head"].isna().all()
    assert not frame[frame["kind"] == "q"]["head"].isna().any()
    assert set(frame[frame["kind"] == "k"]["head"]) == {0, 1}


def test_frame_labels_are_those_of_the_values(attribution: ll.results.Attribution):
    """A cell found by its labels is the entry of the tensor at those indices."""
    frame = attribution.to_frame()
    site = next(i for i, s in enumerate(attribution.sites) if s.name == "blocks.1.attn.v")
    row = frame[
        (frame["prompt"] == 1)
        & (frame["site"] == "blocks.1.attn.v")
        & (frame["position"] == 2)
        & (frame["head"] == 1)
        & (frame["rank"] == 0)
    ]
    assert row["value"].item() == attribution.values[1, site, 2, 1, 0].item()
    assert row["token"].item() == attribution.str_tokens[1][2]
    assert row["share"].item() == pytest.approx(row["value"].item() / float(attribution.shift[1]))


@pytest.mark.parametrize("group", ["site", "layer", "kind"])
def test_sums_keep_the_total(attribution: ll.results.Attribution, group: str):
    """Any grouping adds up to Σ a_l."""
    summed = attribution.sum(group)
    assert torch.allclose(torch.tensor(summed.sum().to_numpy()), attribution.total)
    assert summed.index.name == group
    if group == "layer":
        assert list(summed.index) == [0, 1]


@pytest.mark.bad_input
def test_unknown_group_is_refused(attribution: ll.results.Attribution):
    with pytest.raises(ValueError, match="'head'.*'layer'"):
        attribution.sum("head")


def test_top_ranks_by_size_of_the_mean_or_of_one_prompt(attribution: ll.results.Attribution):
    for prompt in (None, 0, 1):
        rows = slice(None) if prompt is None else slice(prompt, prompt + 1)
        expected = attribution.per_site[rows].mean(0)
        top = attribution.top(5, prompt)
        assert top["value"].abs().is_monotonic_decreasing
        assert len(top) == 5
        assert abs(top["value"][0]) == float(expected.abs().max())
    only = attribution.top(3)["module"]
    assert set(only) <= {s.module for s in attribution.sites}


def test_remainder_is_what_the_values_leave(attribution: ll.results.Attribution):
    assert torch.equal(attribution.shift, attribution.adapted - attribution.base)
    assert torch.equal(attribution.remainder, attribution.shift - attribution.total)


def test_save_and_load(attribution: ll.results.Attribution, tmp_path):
    """Every field comes back, labels, prompt, readout and versions included."""
    path = attribution.save(tmp_path / "a.safetensors")
    loaded = ll.results.Attribution.load(path)
    for field in dataclasses.fields(attribution):
        a = getattr(attribution, field.name)
        b = getattr(loaded, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    assert {"model", "adapter", "torch", "lens_lora", "transformer-lens"} <= set(loaded.meta)
    pd.testing.assert_frame_equal(attribution.to_frame(), loaded.to_frame())


def test_loading_another_file_is_refused(tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, str(other))
    with pytest.raises(ll.errors.LensLoraError, match="saved by a result's save"):
        ll.results.Attribution.load(other)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ll.errors.LensLoraError, match="not a safetensors file"):
        ll.results.Attribution.load(tmp_path / "text")


def test_results_are_frozen(attribution: ll.results.Attribution):
    with pytest.raises(dataclasses.FrozenInstanceError):
        attribution.at = 1.0  # type: ignore[misc]


def test_repr_says_what_it_is(attribution: ll.results.Attribution):
    """The text and the notebook's HTML name the readout, and the largest site."""
    largest = attribution.top(1)["site"].item()
    assert "margin(5 − 9)" in repr(attribution)
    assert largest in repr(attribution)
    assert "margin(5 − 9)" in attribution._repr_html_()
    assert largest in attribution._repr_html_()


def test_making_a_result_asks_for_no_field_that_it_lacks(monkeypatch: pytest.MonkeyPatch):
    """`__getattr__` of a result searches the vocabulary for what may be meant."""
    asked: list[str] = []

    def missing(self: Result, name: str) -> None:
        del self
        asked.append(name)
        raise AttributeError(name)

    monkeypatch.setattr(Result, "__getattr__", missing)
    made = flip_case()
    assert asked == []
    assert not hasattr(made, "no_such_name")
    assert asked == ["no_such_name"]
