"""The path integral: complete, right site by site, and honest where it cannot be complete."""

from __future__ import annotations

import dataclasses
import math

import cases
import limits
import models
import numpy as np
import pytest
import reference
import torch
from differences import largest_difference
from passes import passes
from targets import hooked, peft_with
from two_scalars import scalar_lens

import lens_lora as ll
from lens_lora.path.path_attribution import path_attribution

float64 = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
ROUND_OFF = 1e-10
TEXTS = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14 w15", "w20"]
X = torch.tensor([[3]])
Y = ll.Logit(0)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def integral(lens: ll.LoraLens, prompts, readout: ll.Readout, **options) -> ll.results.Attribution:
    return path_attribution(lens, prompts, readout, progress=False, **options)


def test_by_hand():
    """c₁ = 9∫(2+5t)(1+t/2)dt = 52.5 and c₂ = 45∫(1+t/2)²dt = 71.25; three nodes are exact."""
    found = integral(scalar_lens(torch.square), X, Y)
    assert found.values[0].tolist() == pytest.approx([52.5, 71.25], rel=1e-14)
    assert found.shift.item() == 123.75
    reached = found.quadrature
    assert reached is not None
    assert (reached.nodes, reached.met, reached.note) == (5, True, "")
    assert reached.error < 1e-15
    assert reached.site_change < 1e-15
    assert found.method == "path"
    assert math.isnan(found.at)


def test_path_is_first_order_where_g_is_linear():
    """y = (2 + 5ε₂)·4: the slope does not depend on ε."""
    lens = scalar_lens(lambda y: 0 * y + 4)
    found = integral(lens, X, Y)
    first = ll.first_order(lens, X, Y)
    assert found.values.tolist() == first.values.tolist() == [[0.0, 20.0]]


@pytest.mark.parametrize("cls", models.MAKERS)
@float64
def test_path_is_first_order_of_a_head(cls: str):
    """A LoRA on the unembedding alone moves logits linearly, embeddings and blocks do not."""
    base, model = hooked("gpt2", cls, "processed")
    for target, is_linear in (("lm_head", True), ("embedding", False), ("positions", False)):
        adapter = ll.Adapter.from_peft(peft_with("gpt2", base, target))
        lens = ll.LoraLens(model, adapter, hf_model=base)
        found = integral(lens, models.tokens(), MARGIN, tol=1e-8, max_nodes=128)
        assert found.quadrature is not None
        assert found.quadrature.met
        off = relative(ll.first_order(lens, models.tokens(), MARGIN).values, found.values)
        assert (off < 1e-12) == is_linear


@pytest.mark.sample(2)
@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
@float64
def test_complete_on_every_family(family: str, cls: str, flags: str):
    """Σ c_l = g(1) − g(0), the ends run plainly, prompt by prompt."""
    lens = cases.case(family, cls, flags).lens
    tokens = models.tokens()
    tol = 1e-7
    found = integral(lens, tokens, MARGIN, tol=tol, max_nodes=256)
    base, adapted = (
        reference.plain_readout(lens, tokens, MARGIN, lens.gates(end)) for end in (0.0, 1.0)
    )
    missing = ((adapted - base - found.total) / (adapted - base)).abs().max()
    reached = found.quadrature
    assert reached is not None
    assert reached.met
    assert not reached.note
    assert missing < 1.001 * tol
    assert abs(float(missing) - reached.error) < ROUND_OFF


@pytest.mark.sample(1)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@float64
def test_sites_equal_a_slow_integral(family: str, cls: str):
    """Simpson's rule on 65 points of ∂g/∂ε with ε in the graph."""
    whole = cases.case(family, cls, "processed")
    lens = ll.LoraLens(whole.model, whole.lens.adapter.scaled(0.07), hf_model=whole.base)
    tokens = models.tokens(1)
    pieces = 64
    slopes = [
        reference.autograd_first_order(lens, tokens, MARGIN, i / pieces) for i in range(pieces + 1)
    ]
    ends = slopes[0] + slopes[-1]
    odd = sum(slopes[1::2])
    even = sum(slopes[2:-1:2])
    slow = (ends + 4 * odd + 2 * even) / (3 * pieces)
    found = integral(lens, tokens, MARGIN, tol=1e-12)
    assert relative(found.values, slow) < 1e-9
    assert relative(ll.first_order(lens, tokens, MARGIN).values, slow) > 1e-2


@pytest.mark.sample(1)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("by", [("position",), ("rank", "position", "head")])
@float64
def test_parts_sum_to_the_site(cls: str, by: tuple[str, ...]):
    """Positions, heads and ranks of a padded batch; each part is the integral of its own slope."""
    lens = cases.case("qwen2", cls, "processed").lens
    whole, split = (integral(lens, TEXTS, MARGIN, by=axes) for axes in ((), by))
    assert relative(split.per_site, whole.values) < ROUND_OFF
    assert split.quadrature is not None
    assert split.nodes == whole.nodes
    plain = torch.zeros_like(split.values)
    for at, weight in zip(*reference.rule_at_cosines(split.nodes), strict=True):
        plain += weight * ll.first_order(lens, TEXTS, MARGIN, at=at, by=by).values
    assert relative(split.values, plain) < ROUND_OFF


@pytest.mark.parametrize("cls", models.MAKERS)
@float64
def test_batches_chunks_and_answers_change_nothing(cls: str, monkeypatch):
    """A padded batch of answers equals its prompts one by one, and one node at a time."""
    lens = cases.case("llama", cls, "raw").lens
    answers = [torch.tensor([5, 9, 12]), torch.tensor([7]), torch.tensor([8, 4])]
    other = torch.tensor([5, 7])
    options = {"tol": 1e-15, "max_nodes": 9, "by": "position"}
    together = integral(lens, TEXTS, ll.AnswerMargin(answers, other), **options)
    for i, text in enumerate(TEXTS):
        alone = integral(lens, text, ll.AnswerMargin(answers[i], other), **options)
        width = alone.values.shape[-1]
        assert relative(together.values[i : i + 1, :, :width], alone.values) < ROUND_OFF
        assert not together.values[i, :, width:].any()
    limits.tokens_at_once(monkeypatch, SLOPE_TOKENS=1)
    one_by_one = integral(lens, TEXTS, ll.AnswerMargin(answers, other), **options)
    assert relative(one_by_one.values, together.values) < ROUND_OFF


@pytest.mark.parametrize("cls", models.MAKERS)
@float64
def test_adapters_of_a_sum_share_the_whole_shift(cls: str):
    """A sum's sites, adapter by adapter, are complete together."""
    case = cases.case("gpt2", cls, "raw")
    first = case.lens.adapter.scaled(0.4)
    second = ll.Adapter.from_peft(models.peft_model("gpt2", case.base, seed=5)).scaled(0.4)
    lens = ll.LoraLens(
        case.model, dataclasses.replace(first, name="a") + dataclasses.replace(second, name="b")
    )
    found = integral(lens, models.tokens(), ll.LogProb(7), tol=1e-8)
    assert found.quadrature is not None
    assert found.quadrature.met
    assert {site.name.partition("@")[2] for site in found.sites} == {"a", "b"}


@pytest.mark.parametrize("readout", [MARGIN, ll.KL()], ids=["margin", "KL"])
@pytest.mark.parametrize("cls", models.MAKERS)
@float64
def test_each_node_is_run_once_and_the_ends_are_nodes(readout: ll.Readout, cls: str):
    """K slopes, and draws for the floor; a KL has no slope at the base, and holds its logits."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens(2)
    is_kl = isinstance(readout, ll.KL)
    with passes(lens) as seen:
        found = integral(lens, tokens, readout, tol=1e-9, max_nodes=9)
    assert found.nodes == 9
    rows = {"graph": 0, "plain": 0}
    for kind, batch, _ in seen:
        rows[kind] += batch
    assert rows["graph"] == len(tokens) * (8 if is_kl else 9)
    assert rows["plain"] <= len(tokens) * (11 if is_kl else 8)
    plain = torch.zeros_like(found.values)
    for at, weight in zip(*reference.rule_at_cosines(9), strict=True):
        if at or not is_kl:
            plain += weight * ll.first_order(lens, tokens, readout, at=at).values
    assert relative(found.values, plain) < ROUND_OFF
    for end, value in ((0.0, found.base), (1.0, found.adapted)):
        alone = lens.function(tokens, readout, progress=False).along([end])[0]
        assert torch.allclose(value, alone, rtol=1e-12, atol=1e-15)


def test_rules_follow_as_far_as_needed():
    """y = (2 + 5ε₂) tanh(20(y₁ − 3.9)): c₂ = ∫5 tanh(30t − 18)dt = (ln cosh 12 − ln cosh 18)/6."""
    lens = scalar_lens(lambda y: torch.tanh(20 * (y - 3.9)))
    exact = (math.log(math.cosh(12)) - math.log(math.cosh(18))) / 6
    nodes = []
    for tol in (0.1, 1e-3, 1e-6):
        found = integral(lens, X, Y, tol=tol, max_nodes=256)
        reached = found.quadrature
        assert reached is not None
        assert reached.met
        assert reached.error <= tol
        off = abs(found.values[0, 1].item() - exact) / found.shift.item()
        assert off <= reached.site_change
        nodes.append(reached.nodes)
    assert nodes == [33, 65, 129]


def test_a_coincidence_at_few_nodes_shows_in_the_change_of_sites():
    """Completeness does not bound a site: errors of two sites that cancel leave a large change."""
    found = integral(scalar_lens(lambda y: torch.tanh(20 * (y - 3.9))), X, Y, tol=0.9)
    reached = found.quadrature
    assert reached is not None
    assert reached.met
    assert reached.site_change > 0.3


def test_kinks_are_reported():
    """y = (2 + 5ε₂) relu(y₁ − 3.9), kink at ε = 0.6: c₁ = 3.6, c₂ = 0.6, reached to 2 %."""
    lens = scalar_lens(lambda y: torch.relu(y - 3.9))
    found = integral(lens, X, Y)
    reached = found.quadrature
    assert reached is not None
    assert not reached.met
    assert reached.nodes == 65
    assert 1e-3 < reached.error < 2e-2
    assert "not smooth" in reached.note
    assert found.values[0].tolist() == pytest.approx([3.6, 0.6], abs=0.02 * 4.2)
    assert "not smooth" in repr(found)
    assert "not within 0.1%" in found._repr_html_()


@pytest.mark.parametrize("cls", models.MAKERS)
@float64
def test_kinks_of_a_relu_model_are_reported(cls: str):
    base, model = hooked("opt", cls, "raw")
    lens = ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model("opt", base)))
    found = integral(lens, models.tokens(), MARGIN, tol=1e-5)
    reached = found.quadrature
    assert reached is not None
    assert not reached.met
    assert "not smooth" in reached.note
    assert reached.error < 0.05


def test_only_the_prompt_that_falls_short_is_named():
    """At x = 1 the kink is not on the path, and y₁² is exact."""
    lens = scalar_lens(lambda y: y**2 + torch.relu(y - 3.9))
    found = integral(lens, torch.tensor([[1], [3]]), Y, tol=1e-5)
    reached = found.quadrature
    assert reached is not None
    assert not reached.met
    assert "prompt 1 is missing" in reached.note
    assert found.completeness_error[0] < 1e-13 < found.completeness_error[1]


def test_too_few_nodes_are_told_from_kinks():
    lens = scalar_lens(lambda y: torch.tanh(20 * (y - 3.9)))
    reached = integral(lens, X, Y, tol=1e-6, max_nodes=100).quadrature
    assert reached is not None
    assert not reached.met
    assert reached.nodes == 65
    assert "raise max_nodes" in reached.note


def test_it_stops_where_more_nodes_do_not_help():
    """A step: neither error nor sites improve over two further rules."""
    reached = integral(scalar_lens(lambda y: torch.tanh(200 * (y - 3.9))), X, Y).quadrature
    assert reached is not None
    assert not reached.met
    assert reached.nodes < 65
    assert "bends sharply" in reached.note


@pytest.mark.parametrize("cls", models.MAKERS)
def test_rounding_is_reported_and_leaves_the_sites_right(cls: str):
    """A tiny adapter in float32: the shift is noise to 0.1 %, the integral of slopes is not."""
    base = models.hf_model("llama", dtype=torch.float32)
    small = ll.Adapter.from_peft(models.peft_model("llama", base)).scaled(1e-4)
    found = integral(ll.LoraLens(models.MAKERS[cls](base), small), models.tokens(), MARGIN)
    reached = found.quadrature
    assert reached is not None
    assert not reached.met
    assert reached.nodes == 5
    assert reached.note.startswith("rounding in float32")
    assert ";" not in reached.note
    with models.lifted():
        case = cases.case("llama", cls, "raw")
        double = ll.LoraLens(case.model, case.lens.adapter.scaled(1e-4))
        exact = integral(double, models.tokens(), MARGIN)
    assert exact.quadrature is not None
    assert exact.quadrature.met
    assert relative(found.values.double(), exact.values) < 1e-4
    assert largest_difference(found.shift, exact.shift) > 3e-4 * exact.shift.abs().max()


def test_no_shift_at_all():
    """x = 0: every value is zero, and completely so."""
    found = integral(scalar_lens(torch.square), torch.tensor([[0]]), Y)
    reached = found.quadrature
    assert not found.values.any()
    assert reached is not None
    assert reached.met
    assert reached.error == reached.site_change == 0


def test_file_and_text_keep_the_quadrature(tmp_path):
    found = integral(scalar_lens(lambda y: torch.relu(y - 3.9)), X, Y)
    loaded = ll.results.Attribution.load(found.save(tmp_path / "path.safetensors"))
    assert loaded.quadrature == found.quadrature
    assert loaded.nodes == 65
    assert math.isnan(loaded.at)
    assert loaded.method == "path"
    assert torch.equal(loaded.values, found.values)
    assert repr(loaded) == repr(found)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tol": 0.0}, "tol=0.0"),
        ({"tol": math.nan}, "tol=nan"),
        ({"max_nodes": 3}, "max_nodes=3"),
        ({"by": "layer"}, "position"),
    ],
)
def test_bad_arguments_are_refused(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        integral(scalar_lens(torch.square), X, Y, **options)


@pytest.mark.parametrize("bug", ["weights", "interval", "Riemann", "no nesting"])
def test_a_wrong_rule_is_not_complete(bug: str, monkeypatch):
    """Negative control: equal weights, [−1, 1] for [0, 1], a left Riemann sum, old weights kept."""

    def wrong(counts: list[int], rule: int, points: np.ndarray, weights: np.ndarray):
        nodes = np.array(counts[rule:])[:, None]
        equal = np.ones_like(weights) / nodes
        rules = {
            "weights": (points, equal),
            "interval": (2 * points - 1, weights),
            "Riemann": (points, np.where(points < 1, 1 / (nodes - 1), 0.0)),
            "no nesting": (points, np.broadcast_to(weights[:1], weights.shape)),
        }
        return rules[bug]

    limits.nodes_of_a_path(monkeypatch, wrong)
    reached = integral(scalar_lens(lambda y: y**4), X, Y).quadrature
    assert reached is not None
    assert not reached.met
    assert reached.error > 1e-3


@pytest.mark.slow
@pytest.mark.real
def test_the_trained_adapter_is_explained_completely():
    """The demo's fact in float32: a thousandth of the shift, sites steady to as much."""
    from real import DOC, PRE, PROMPT, lens

    found = integral(lens(list(models.MAKERS)[-1]), PROMPT, ll.Margin(DOC, PRE))
    reached = found.quadrature
    assert reached is not None
    assert reached.met
    assert reached.nodes <= 9
    assert reached.site_change < 1e-3
    assert not reached.note


@pytest.mark.parametrize("cls", models.MAKERS)
def test_what_rounding_hides_is_not_called_met(cls: str):
    """In bfloat16 a sum within the tolerance may be there by chance."""
    base = models.hf_model("llama", dtype=torch.bfloat16)
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base)).scaled(0.05)
    lens = ll.LoraLens(models.MAKERS[cls](base), adapter)
    for tol in (1e-3, 1e3):
        found = ll.path_attribution(
            lens, models.tokens(batch=1), ll.Margin(5, 9), tol=tol, progress=False
        )
        reached = found.quadrature
        assert reached is not None
        assert reached.met == (tol == 1e3)
        assert ("cannot be measured" in reached.note) == (tol == 1e-3)
