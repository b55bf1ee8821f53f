"""The words of the page of edges."""

from __future__ import annotations

import dataclasses

import torch
from by_folder import made_public

import lens_lora as ll

EDGES = made_public("edge_attribution").edges(by_position=False)


def page_of(edges: ll.results.Edges) -> str:
    """The page's text with its spaces run together."""
    return " ".join(edges.report().split())


def test_the_headline_has_the_share_and_the_largest_edges():
    page = page_of(EDGES)
    assert "% of the shift." in page
    assert "The largest are " in page


def test_without_a_shift_there_is_no_share_of_it():
    page = page_of(dataclasses.replace(EDGES, adapted=EDGES.base))
    assert " sum to " in page
    assert "— of the shift" not in page


def test_without_edges_none_is_the_largest():
    nothing = torch.zeros_like(EDGES.values)
    no_edges = dataclasses.replace(EDGES, values=nothing, exists=nothing[0].bool())
    assert "The largest are" not in page_of(no_edges)
