"""The checks before edge attribution patching is timed."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import edge_peers
from benchmarks.edge_peers import Errors


def test_an_error_is_relative_to_the_largest_score():
    expected = torch.tensor([1.0, -4.0, 0.0])
    assert edge_peers.relative_error(expected + 0.5, expected) == 0.125
    assert math.isnan(edge_peers.relative_error(torch.zeros(3), torch.zeros(3)))
    with_nan = torch.tensor([math.nan, -4.0, 0.0])
    assert math.isnan(edge_peers.relative_error(with_nan, expected))


@pytest.mark.parametrize(
    "errors", [Errors(eap=math.nan, integrated=0.0), Errors(eap=0.0, integrated=math.nan)]
)
def test_scores_that_are_no_numbers_are_refused(errors: Errors, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(edge_peers, "errors_of_scores", lambda by_head: errors)
    with pytest.raises(SystemExit, match="not those of finite differences"):
        edge_peers.check_scores()


def test_scores_within_the_tolerance_pass(monkeypatch: pytest.MonkeyPatch):
    errors = Errors(eap=1e-8, integrated=1e-8)
    monkeypatch.setattr(edge_peers, "errors_of_scores", lambda by_head: errors)
    edge_peers.check_scores()


@pytest.mark.parametrize(
    "errors", [{"mlp.down": math.nan, "attn.o": 0.0}, {"mlp.down": 0.0, "attn.o": math.nan}]
)
def test_a_module_whose_edges_are_no_numbers_is_refused(errors, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(edge_peers, "text_prompts", lambda *args: None)
    monkeypatch.setattr(
        edge_peers, "error_beside_edges", lambda lens, prompts, by_head, kind: errors[kind]
    )
    with pytest.raises(SystemExit, match="disagree"):
        edge_peers.check_against_edges(None)
