"""`g.passes`, and what is read of many values at once: each agrees with g and its slopes."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from differences import largest_difference
from torch import Tensor

import lens_lora as ll
from lens_lora.core import ScaleInject, SlopeSums, tangent_of
from lens_lora.core.model import attached

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
ANSWER = ll.AnswerLogProb(["w11 w12 w13", "w14 w15"])
TEXTS = ["w5 w7 w8", "w9 w10 w11 w12 w13"]

EXACT = 1e-9


@pytest.fixture(params=models.MAKERS, ids=lambda maker: getattr(maker, "__name__", str(maker)))
def lens(request: pytest.FixtureRequest) -> ll.LoraLens:
    return cases.case("llama", request.param, "raw").lens


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert largest_difference(found, expected) < EXACT


def test_slopes_of_values_that_are_read_of_the_logits(lens: ll.LoraLens):
    f = lens.function(TEXTS, progress=False)
    found = f.slopes_of(lambda logits: logits[:, [5, 9]].T, at=0.5)
    expected = [f.about(ll.Logit(token)).slopes(0.5) for token in (5, 9)]
    assert_same(found, torch.stack(expected))


def test_tokens_of_a_response(lens: ll.LoraLens):
    g = lens.function(TEXTS, ANSWER, progress=False)
    values = g.token_values(1.0)
    assert_same(values.sum(-1), g(1.0))
    by_token = g.slopes(1.0, "token")
    assert_same(g.slopes_of_tokens([0, 2], 1.0), by_token[..., [0, 2]].movedim(-1, 0))
    visitors: list[SlopeSums] = []

    def visitor_of(token: int):
        visitors.append(SlopeSums(lens, g.rows))
        return visitors[token].visit

    g.passes.visit_tokens(visitor_of, 1.0)
    seen = [slopes.by_prompt(g.reading) for slopes in visitors]
    assert_same(torch.stack(seen, -1), by_token)


def test_slopes_of_adapters_set_the_callers_device_aside(lens: ll.LoraLens):
    g = lens.function(TEXTS, MARGIN, progress=False)
    adapters = [lens.adapter, lens.adapter.scaled(0.5)]
    with torch.device("meta"):
        found = g.slopes_of_adapters(lambda: adapters, lens.sites, like=adapters[:1])
    own = g.slopes(0.0)
    assert_same(found, torch.stack([own, own / 2]))


def test_what_needs_a_response_refuses_other_readouts(lens: ll.LoraLens):
    g = lens.function(TEXTS, MARGIN, progress=False)
    for call in (
        lambda: g.token_values(1.0),
        lambda: g.slopes_of_tokens([0]),
        lambda: g.passes.visit_tokens(lambda token: lambda *_: None),
    ):
        with pytest.raises(ll.errors.ArgumentError, match="one response"):
            call()


def test_the_quadratic_form_of_the_first_order_shift(lens: ll.LoraLens):
    f = lens.function(TEXTS, MARGIN, progress=False)
    values, base = f.pulled_back(lambda base, moved, rows: base * moved)
    assert_same(base, f.logits(0.0))
    tangent = f.tangent(1.0)
    assert_same(values.sum(1), (base * tangent * tangent).sum(-1))


def test_g_under_writes_of_ones_own(lens: ll.LoraLens):
    g = lens.function(TEXTS, MARGIN, progress=False)
    gates = lens.gates(0.5).requires_grad_()
    with torch.enable_grad():
        values = g.passes.written(ScaleInject(lens.plan, gates))
    assert_same(values.detach(), g(0.5))
    (slopes,) = torch.autograd.grad(values.sum(), gates)
    assert_same(slopes, g.slopes(0.5).sum(0))


def test_copies_that_differ_by_a_hook(lens: ll.LoraLens):
    g = lens.function(TEXTS, MARGIN, progress=False)
    gates = lens.gates(torch.tensor([0.0, 0.5, 1.0])[:, None].expand(-1, len(lens.sites)))
    write = ScaleInject(lens.plan, gates.repeat(2, 1))
    found = g.passes.side_by_side(3, under=lens.injected(write))
    assert_same(found.T, g.along([0.0, 0.5, 1.0]))
    assert g.passes.copies_at_once >= 1


def test_the_gradient_of_a_tensor_that_a_hook_adds(lens: ll.LoraLens):
    g = lens.function(TEXTS, MARGIN, progress=False)
    added = torch.zeros(lens.model.cfg.d_model, dtype=torch.float64, requires_grad=True)
    hooks = [("blocks.1.hook_resid_pre", lambda h, hook: h + added)]
    found = g.passes.gradient(added, under=attached(lens.model, hooks))
    with attached(lens.model, hooks), torch.enable_grad():
        (expected,) = torch.autograd.grad(g.graphed(0.0).sum(), added)
    assert_same(found, expected)


def test_the_gradient_of_an_activation_in_a_graph_that_is_kept(lens: ll.LoraLens):
    g = lens.function(TEXTS, MARGIN, progress=False)
    point = "blocks.1.hook_resid_post"
    kept: list[Tensor] = []

    def keep(h: Tensor, hook: object) -> Tensor:
        kept.append(h.view_as(h))
        return kept[-1]

    values = g.passes.with_graph(1.0, under=attached(lens.model, [(point, keep)]))
    (found,) = torch.autograd.grad(values.sum(), kept)
    (expected,) = ll.gradients(lens, TEXTS, MARGIN, point, at=1.0).values()
    assert_same(found, expected)


def test_activations_and_their_tangents(lens: ll.LoraLens):
    f = lens.function(TEXTS, progress=False)
    point = "blocks.1.hook_resid_post"
    before = f.passes.record([point], 0.5 - 1e-5).firings[point][-1]
    after = f.passes.record([point], 0.5 + 1e-5).firings[point][-1]
    recording = f.passes.record([point], 0.5)
    assert f.passes.positioned(recording, [point], [point], 0.5) == (point,)
    tangents: list[Tensor] = []
    hooks = [(point, lambda h, hook: tangents.append(tangent_of(h)))]
    f.passes.observe_tangents(1.0, 0.5, under=attached(lens.model, hooks))
    real = f.rows.real
    differences = (after - before)[real] / 2e-5
    assert torch.allclose(tangents[0][real], differences, rtol=1e-5, atol=1e-5)


def test_logits_of_one_pass_under_hooks(lens: ll.LoraLens):
    f = lens.function(TEXTS, progress=False)
    found = f.passes.logits(under=lens.adapted(1.0))
    assert_same(found, f.logits(1.0))


def test_the_bound_of_the_lens_divides_the_rows(lens: ll.LoraLens):
    f = lens.function(TEXTS * 3, MARGIN, progress=False)
    assert f.passes.rows_at_once() == 6
    assert f.passes.rows_at_once(tokens=12) == 2
    bounded = f.over(lens.within(f.passes.graph_bytes / 2))
    assert 1 <= bounded.passes.rows_at_once("graph") < 6
    assert bounded.passes.tokens_at_once(10**6, "graph") < f.passes.tokens_at_once(10**6)
    parts = [group.slopes() for group in bounded.groups(graph=True)]
    assert len(parts) > 1
    assert_same(f.joined(parts), f.slopes())
