"""The matrix H and what second order leaves: by hand, by differences, and their laws."""

from __future__ import annotations

import dataclasses

import cases
import limits
import models
import pytest
import torch
from differences import largest_difference
from torch import Tensor
from two_scalars import scalar_lens

import lens_lora as ll
from lens_lora.core import Sites
from lens_lora.curvature import second_order as curvature
from lens_lora.curvature.coupling import Coupling, coupling
from lens_lora.curvature.second_order import SecondOrder

pytestmark = pytest.mark.usefixtures("float64")
LOG_PROB = ll.LogProb(7)
ANSWERS = ll.AnswerMargin(torch.tensor([5, 9, 12]), torch.tensor([5, 7]))
KINDS = {"attn": "*.attn.*", "mlp": "*.mlp.*"}


@pytest.fixture(params=models.MAKERS)
def lens(request) -> ll.LoraLens:
    return cases.case("llama", request.param, "raw").lens


def padded() -> ll.results.Prompts:
    return ll.results.Prompts(models.tokens(), torch.tensor([7, 4]))


def by_differences(lens, prompts, readout, at: float = 0.0, step: float = 1e-5) -> Tensor:
    """∂²g/∂ε_l ∂ε_m one site at a time, from first order at shifted gates: [batch, site, site]."""
    g = lens.function(prompts, readout)
    moved = step * torch.eye(len(lens.sites), dtype=torch.float64)
    difference = g.slopes(at + moved) - g.slopes(at - moved)
    return difference.movedim(0, 1) / (2 * step)


def matrix_of(lens, readout=LOG_PROB, prompts=None, **options) -> Coupling:
    prompts = padded() if prompts is None else prompts
    return coupling(lens, prompts, readout, progress=False, **options)


def second_of(lens, readout=LOG_PROB, prompts=None, **options) -> SecondOrder:
    prompts = padded() if prompts is None else prompts
    return curvature.second_order(lens, prompts, readout, progress=False, **options)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_two_scalars_by_hand():
    """g = (2 + 5ε₂)(1 + ε₁/2)²·9: H = [[9, 45], [45, 0]] at 0; ½1ᵀH1 = 49.5 of what is 60.75."""
    lens = scalar_lens(torch.square)
    prompt = torch.tensor([[3]])
    found = matrix_of(lens, ll.Logit(0), prompt)
    assert found.matrix.tolist() == [[[9.0, 45.0], [45.0, 0.0]]]
    assert found.self_curvature.tolist() == [[4.5, 0.0]]
    assert found.coupling.tolist() == [[[0.0, 22.5], [22.5, 0.0]]]
    assert found.row_sums.tolist() == [[54.0, 45.0]]
    assert found.total.tolist() == [49.5]
    assert found.asymmetry.tolist() == [0.0]
    shares = found.shares().iloc[0]
    assert shares["self"] == 4.5
    assert shares["coupling"] == 45
    assert shares["self_share"] == 4.5 / 49.5
    (pair,) = found.top(3).itertuples()
    assert (pair.group_a, pair.group_b, pair.value) == ("site1", "site2", 45)
    assert pair.share == 45 / 123.75
    both = matrix_of(lens, ll.Logit(0), prompt, group="layer")
    assert both.matrix.tolist() == [[[99.0]]]
    there = matrix_of(lens, ll.Logit(0), prompt, at=1.0)
    assert there.matrix.tolist() == [[[31.5, 67.5], [67.5, 0.0]]]


def test_second_order_by_hand():
    """Shift 123.75 = 63 (first) + 49.5 (second) + 11.25: nearer, and nearer all the way."""
    lens = scalar_lens(torch.square)
    prompt = torch.tensor([[3]])
    found = second_of(lens, ll.Logit(0), prompt, self_curvature=True)
    assert found.half_row_sums.tolist() == [[27.0, 22.5]]
    assert found.self_curvature.tolist() == [[4.5, 0.0]]
    assert found.coupling.tolist() == [[22.5, 22.5]]
    assert found.corrected.tolist() == [[45.0, 67.5]]
    assert found.shift.item() == 123.75
    assert found.predicted.item() == 112.5
    assert found.remainder.item() == 11.25
    assert found.first_order_remainder.item() == 60.75
    assert found.predicted_at(0.5).item() == 31.5 + 12.375
    assert found.predicted_at(torch.tensor([0.0, 1.0])).tolist() == [[0.0, 112.5]]
    assert found.helps_up_to.item() == 1
    assert str(found.verdict[0]).startswith(
        "nearer: misses 9.1% of the shift at ε = 1, first order 49"
    )
    attribution = found.attribution()
    assert attribution.remainder.item() == 11.25
    assert attribution.method == "second_order"
    assert found.half_row_sums[0, 1].item() == found.coupling[0, 1].item() == 22.5


def test_a_prediction_made_worse_says_so():
    """φ(y) = sin 4y turns within the path: second order overshoots, and must not be used."""
    lens = scalar_lens(lambda y: torch.sin(4 * y))
    found = second_of(lens, ll.Logit(0), torch.tensor([[3]]))
    assert found.remainder.abs() > found.first_order_remainder.abs()
    assert str(found.verdict[0]).startswith("farther, no correction")
    assert 0 < found.helps_up_to.item() < 1
    assert "farther" in repr(found)
    assert "not a correction" in repr(found)


def test_a_linear_readout_has_no_second_order():
    """One site into a linear map: H is zero, and no ratio of zeros is made of it."""
    base = models.hf_model("llama")
    cls = list(models.MAKERS)[-1]
    peft = models.peft_model("llama", base, targets=["lm_head"])
    lens = ll.LoraLens(models.MAKERS[cls](base), ll.Adapter.from_peft(peft))
    found = matrix_of(lens, ll.Margin(5, 9))
    assert found.matrix.abs().max() == 0
    assert found.asymmetry.tolist() == [0.0, 0.0]
    second = second_of(lens, ll.Margin(5, 9))
    assert str(second.verdict[0]).startswith("neither nearer nor farther, within rounding")
    assert torch.isnan(second.order).all()


@pytest.mark.sample(1)
@pytest.mark.parametrize("readout", [LOG_PROB, ANSWERS], ids=["log_prob", "answers"])
@pytest.mark.parametrize("at", [0.0, 0.6])
def test_every_entry_against_differences(lens: ll.LoraLens, readout: ll.Readout, at: float):
    """In a padded batch; symmetric, though the two triangles come from different passes."""
    found = matrix_of(lens, readout, at=at)
    expected = by_differences(lens, padded(), readout, at)
    assert error(found.matrix, expected) < 1e-6
    assert found.asymmetry.max() < 1e-9
    assert found.asymmetry.max() > 0


def test_a_batch_is_its_prompts(lens: ll.LoraLens):
    found = matrix_of(lens, ANSWERS).matrix
    second = second_of(lens, ANSWERS, self_curvature=True)
    for i, length in enumerate((7, 4)):
        prompt = models.tokens()[i : i + 1, :length]
        alone = matrix_of(lens, ANSWERS, prompt).matrix
        assert error(found[i : i + 1], alone) < 1e-10
        one = second_of(lens, ANSWERS, prompt, self_curvature=True)
        assert error(second.half_row_sums[i : i + 1], one.half_row_sums) < 1e-10
        assert error(second.self_curvature[i : i + 1], one.self_curvature) < 1e-10


def test_rows_sum_to_second_order_and_groups_to_sites(lens: ll.LoraLens):
    """H·1 is the row sums; the diagonal is the self-curvature; each group's block is summed."""
    sites = matrix_of(lens)
    second = second_of(lens, self_curvature=True)
    assert error(sites.row_sums / 2, second.half_row_sums) < 1e-10
    assert error(sites.total, second.curvature) < 1e-10
    assert error(sites.self_curvature, second.self_curvature) < 1e-10
    assert error(sites.coupling.sum(2), second.coupling) < 1e-10
    overlapping = {"attn": "*.attn.*", "q": "*.attn.q", "first": "blocks.0.*"}
    for group in ("layer", "kind", KINDS, overlapping):
        rows = lens.sites.indicator(lens.sites.grouped(group))
        found = matrix_of(lens, group=group)
        assert error(found.matrix, rows @ sites.matrix @ rows.T) < 1e-10
        assert list(found.groups) == list(lens.sites.grouped(group))
        if group is overlapping:
            continue
        assert error(found.total, sites.total) < 1e-10
        assert error(found.row_sums, sites.row_sums @ rows.T) < 1e-10
        own, between = (found.shares()[name] for name in ("self", "coupling"))
        assert error(torch.tensor((own + between).to_numpy()), found.total) < 1e-10


@pytest.mark.parametrize(
    "group", [{"attn": "*.attn.*"}, {**KINDS, "q": "*.attn.q"}], ids=["partial", "overlapping"]
)
def test_groups_that_do_not_partition_have_no_row_sums(lens: ll.LoraLens, group: dict):
    found = matrix_of(lens, group=group)
    for name in ("row_sums", "total"):
        with pytest.raises(ValueError, match="some twice or not at all"):
            getattr(found, name)
    assert len(found.shares()) == 2
    assert "Coupling of" in repr(found)
    assert ("strongest pairs" in repr(found)) == (len(group) > 1)
    assert "Empty" not in repr(found)


@pytest.mark.parametrize("tokens", [1, 14 * 5])
def test_chunks_do_not_matter(lens: ll.LoraLens, tokens: int, monkeypatch):
    """One direction at a time, or five (the last chunk is smaller): the same numbers."""
    whole = matrix_of(lens)
    limits.tokens_at_once(monkeypatch, GRAPH_TOKENS=tokens)
    chunks = limits.covectors_at_once(monkeypatch)
    assert error(matrix_of(lens).matrix, whole.matrix) < 1e-12
    groups = 2 if tokens < 14 else 1
    assert max(chunks) == max(1, tokens // 14)
    assert sum(chunks) == groups * len(lens.sites)
    if tokens > 1:
        found = second_of(lens, self_curvature=True).self_curvature
        assert error(found, whole.self_curvature) < 1e-12


def weaker(lens: ll.LoraLens) -> ll.LoraLens:
    """A tenth of the adapter, gentle enough for ε³ to lead over a decade of scales."""
    return ll.LoraLens(lens.model, lens.adapter.scaled(0.1))


@pytest.mark.parametrize("readout", [LOG_PROB, ANSWERS], ids=["log_prob", "answers"])
def test_what_remains_is_of_order_three(lens: ll.LoraLens, readout: ll.Readout):
    """Fitted slope 3 where first order's is 2; halving ε divides what remains by eight.

    From ε = 5e-4 on, where rounding is below a hundredth of what remains. Fitted over all scales,
    the first point may stand at ten times the noise, whose tenth is worth 0.1 of slope.
    """
    weak = weaker(lens)
    far = ll.remainder_curve(weak, padded(), readout, [5e-4, 1e-3, 2e-3, 4e-3])
    found = second_of(weak, readout)
    assert largest_difference(found.order, 3) < 0.2
    assert largest_difference(found.curve.order, 2) < 0.05
    found = dataclasses.replace(found, curve=far)
    assert (found.path_remainder.abs() > 100 * found.noise_floor[:, None]).all()
    assert largest_difference(found.order, 3) < 0.05
    curve = ll.remainder_curve(weaker(lens), padded(), readout, [1e-3, 5e-4])
    rest = curve.shift - found.predicted_at(curve.scales)
    assert largest_difference(rest[:, 1] / rest[:, 0], 8) < 0.1


def test_half_of_the_curvature_would_show(lens: ll.LoraLens):
    """Negative control: with 1ᵀH1, or the self-curvature alone, the order falls back to two."""
    found = second_of(weaker(lens), self_curvature=True)
    for wrong in (2 * found.half_row_sums, found.self_curvature):
        planted = dataclasses.replace(found, half_row_sums=wrong)
        assert largest_difference(planted.order, 2) < 0.1


def test_a_frozen_input_would_show(lens: ll.LoraLens, monkeypatch):
    """Negative control: δ from the base model's z has the same first order and another H."""
    right = matrix_of(lens)
    first = ll.first_order(lens, padded(), LOG_PROB)
    limits.inputs_have_no_tangent(monkeypatch)
    assert error(ll.first_order(lens, padded(), LOG_PROB).values, first.values) < 1e-12
    wrong = matrix_of(lens)
    assert error(wrong.matrix, right.matrix) > 1e-2


def test_a_dropped_coupling_would_show(lens: ll.LoraLens):
    """Negative control: without one off-diagonal pair neither row sums nor symmetry hold."""
    found = matrix_of(lens)
    second = second_of(lens)
    a, b = divmod(int(found.coupling[0].abs().argmax()), len(lens.sites))
    found.matrix[:, a, b] = 0
    assert error(found.row_sums / 2, second.half_row_sums) > 1e-3
    assert found.asymmetry[0] > 0.5


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["bloom", "opt", "gpt2"])
@models.NEEDS_BRIDGE
def test_families_with_layer_norm_on_a_bridge(family: str):
    """F.layer_norm and Bloom's own GELU, whose second derivatives torch gets wrong or refuses."""
    lens = cases.case(family, "TransformerBridge", "raw").lens
    found = matrix_of(lens)
    assert error(found.matrix, by_differences(lens, padded(), LOG_PROB)) < 1e-6
    assert found.asymmetry.max() < 1e-9
    assert largest_difference(second_of(weaker(lens)).order, 3) < 0.05


def test_a_sum_of_adapters(lens: ll.LoraLens):
    """Two adapters on one module are two sites; halves of one adapter share its curvature."""
    half = lens.adapter.scaled(0.5)
    both = ll.LoraLens(lens.model, half + half.named("other"))
    whole = matrix_of(lens)
    found = matrix_of(both)
    assert all("@" in name for name in found.groups)
    assert len(found.groups) == 2 * len(lens.sites)
    assert error(found.total, whole.total) < 1e-10
    by_module = {
        site.name: [s.name for s in both.sites if s.module == site.module] for site in lens.sites
    }
    grouped = matrix_of(both, group=by_module)
    assert error(grouped.matrix, whole.matrix) < 1e-10


def test_tables(lens: ll.LoraLens):
    found = matrix_of(lens, group=KINDS)
    frame = found.to_frame()
    assert list(frame.columns) == ["prompt", "group_a", "group_b", "value"]
    assert len(frame) == 8
    for row in frame.itertuples():
        a, b = (list(KINDS).index(name) for name in (row.group_a, row.group_b))
        assert row.value == float(found.matrix[row.prompt, a, b])
    top = found.top(5, prompt=1)
    value = found.coupling[1, 0, 1] + found.coupling[1, 1, 0]
    assert len(top) == 1
    assert top["value"][0] == pytest.approx(float(value))
    second = second_of(lens).to_frame()
    parts = second["first_order"] + second["curvature"] + second["remainder"]
    assert (second["shift"] - parts).abs().max() < 1e-12
    with pytest.raises(ValueError, match="self_curvature=True"):
        _ = second_of(lens).coupling


def test_figures(lens: ll.LoraLens):
    """Cells are ½H, centred at zero, names as given; the parabola passes through `predicted`."""
    found = matrix_of(lens, group={"<a>": "*.attn.*", "2": "*.mlp.*"})
    figure = found.plot(1)
    (cells,) = figure.data
    assert torch.equal(torch.tensor(cells.z, dtype=torch.float64), found.matrix[1] / 2)
    assert cells.zmin == -cells.zmax
    assert list(cells.x) == ["&lt;a&gt;", "2"]
    assert figure.layout.xaxis.type == "category"
    with pytest.raises(ValueError, match="prompts 0 to 1"):
        found.plot(2)
    second = second_of(lens)
    exact, first, parabola = second.plot_path(1).data
    assert exact.y[-1] == float(second.shift[1])
    assert parabola.y[-1] == float(second.predicted[1])
    assert first.y[-1] == float(second.first_order.total[1])
    assert "curvature at ε = 0" in second.plot().layout.title.text


def test_many_groups_are_labelled_by_layer():
    """Ticks at some layers' first sites; one strong pair does not leave the rest blank."""
    sites = tuple(
        ll.results.Site(f"blocks.{i // 7}.s{i % 7}", "m", i // 7, "q", "r", "w", 1)
        for i in range(210)
    )
    zero = torch.zeros(1)
    matrix = torch.zeros(1, 210, 210)
    groups = Sites(sites).grouped("site")
    matrix[0, :30] = torch.randn(30, 210, generator=models.seeded(3))
    matrix[0, 5, 6] = 1000
    large = Coupling(
        matrix, groups, 0.0, sites=sites, base=zero, adapted=zero, str_tokens=(("a",),),
        readout="r", units="logits", meta={},
    )  # fmt: skip

    figure = large.plot()
    assert figure.data[0].zmax < 5
    assert "cut at" in figure.data[0].colorbar.title.text
    axis = figure.layout.xaxis
    assert list(axis.ticktext)[:2] == ["layer 0", "layer 2"]
    assert len(axis.ticktext) == 15
    assert list(axis.tickvals)[1] == "blocks.2.s0"
