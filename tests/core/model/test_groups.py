"""Groups of sites: by word, by globs, in the order of the sites."""

from __future__ import annotations

import pytest
import torch

import lens_lora as ll
from lens_lora.core import Sites

SITES = tuple(
    ll.results.Site(name, f"module of {name}", layer, kind, "read", "write", 2)
    for name, layer, kind in (
        ("embed", -1, "embed"),
        ("blocks.0.attn.q", 0, "q"),
        ("blocks.0.mlp.down", 0, "down"),
        ("blocks.1.attn.q", 1, "q"),
        ("blocks.1.attn.q@second", 1, "q"),
        ("unembed", 2, "unembed"),
    )
)


def test_sites_are_grouped_by_a_word():
    """By 'site', 'layer' or 'kind'; what lies outside the layers is named by its site."""
    assert Sites(SITES).grouped() == {site.name: (i,) for i, site in enumerate(SITES)}
    assert Sites(SITES).grouped("layer") == {
        "embed": (0,),
        "layer 0": (1, 2),
        "layer 1": (3, 4),
        "unembed": (5,),
    }
    assert Sites(SITES).grouped("kind") == {
        "embed": (0,),
        "q": (1, 3, 4),
        "down": (2,),
        "unembed": (5,),
    }


def test_globs_may_overlap_and_leave_sites_out():
    found = Sites(SITES).grouped({"queries": "*.attn.q*", "first": ["blocks.0.*", "embed"]})
    assert found == {"queries": (1, 3, 4), "first": (0, 1, 2)}
    assert Sites(SITES).grouped({"second": "*@second"}) == {"second": (4,)}


@pytest.mark.parametrize("group", [{"none": "blocks.7.*"}, {"empty": []}, {"empty": ""}])
def test_a_group_without_a_site_is_refused(group: dict):
    with pytest.raises(ll.errors.SiteError):
        Sites(SITES).grouped(group)


@pytest.mark.bad_input
def test_another_word_is_refused():
    with pytest.raises(ValueError, match="'site', 'layer', 'kind'"):
        Sites(SITES).grouped("head")  # type: ignore[arg-type]


def test_an_indicator_has_a_row_for_each_group():
    rows = Sites(SITES[:4]).indicator({"a": (0, 2), "b": (1,)})
    assert torch.equal(rows, torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]]).double())
