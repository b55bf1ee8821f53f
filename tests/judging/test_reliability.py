"""Screen, flag, fix: which first-order numbers are wrong, against interventions one at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import nullcontext

import cases
import models
import pytest
import torch
from differences import largest_difference
from reference import plain_readout
from two_scalars import scalar_lens

import lens_lora as ll
from lens_lora.core import Effects, How
from lens_lora.judging import reliability as module
from lens_lora.judging.reliability import Reliability, reliability, score_of

MARGIN = ll.Margin(5, 9)
QUESTIONS: tuple[How, ...] = ("add_one", "leave_one_out")
END = {"add_one": 0.0, "leave_one_out": 1.0}


@pytest.fixture(autouse=True)
def _float64_but_for_the_real_model(request) -> Iterator[None]:
    with nullcontext() if request.node.get_closest_marker("real") else models.lifted():
        yield


def effects(lens: ll.LoraLens, tokens: torch.Tensor, readout: ll.Readout, how: str) -> torch.Tensor:
    """One forward pass a number, by hooks alone: the reference."""
    count = len(lens.sites)
    alone = torch.eye(count, dtype=torch.float64)
    read = functools.partial(plain_readout, lens, tokens, readout)
    if how == "add_one":
        return torch.stack([read(e) for e in alone], 1) - read(torch.zeros(count))[:, None]
    return read(torch.ones(count))[:, None] - torch.stack([read(1 - e) for e in alone], 1)


def lens_at(strength: float, cls: str, family: str = "llama") -> ll.LoraLens:
    case = cases.case(family, cls, "raw")
    return case.lens.with_adapter(case.lens.adapter.scaled(strength))


def ask(lens: ll.LoraLens, how: How, tokens: torch.Tensor, **options) -> Reliability:
    return reliability(lens, tokens, MARGIN, how=how, progress=False, **options)


@pytest.mark.parametrize("how", QUESTIONS)
@pytest.mark.parametrize("cls", models.MAKERS)
def test_flags_and_fixes_against_interventions(how: How, cls: str):
    """At full strength, of random directions: what was screened is the interventions' own."""
    lens = lens_at(1.0, cls)
    tokens = models.tokens()
    truth = effects(lens, tokens, MARGIN, how)
    found = ask(lens, how, tokens, fix=True, floor=0.0)
    a = found.attribution.values
    assert torch.equal(a, ll.first_order(lens, tokens, MARGIN, at=END[how]).values)
    assert found.flagged.any()
    assert not found.flagged.all()
    assert largest_difference(found.corrected, truth) < 1e-10
    expected = torch.where(found.flagged, truth, a)
    assert found.fixed is not None
    assert largest_difference(found.fixed, expected) < 1e-10
    table = found.against(truth)
    assert table.loc["all", "error_fixed"] < 0.8 * table.loc["all", "error"]
    assert table.loc["all", ["precision", "recall"]].tolist() == [1.0, 1.0]
    assert found.passes == {"first order": 2, "screen": int(found.screened.any(0).sum())}


@pytest.mark.parametrize("how", QUESTIONS)
def test_correction_starts_with_the_taylor_terms(how: How):
    """As the adapter shrinks by t: ½H_ll t² to add one, −½H_ll t² to leave one out."""
    lens = lens_at(1.0, list(models.MAKERS)[-1])
    tokens = models.tokens()
    count = len(lens.sites)
    products = lens.function(tokens, MARGIN).curvature(torch.eye(count, dtype=torch.float64))
    H = products.movedim(0, 2)
    law = H.diagonal(dim1=1, dim2=2) / 2 * (1 - 2 * END[how])
    t = 1e-3
    found = ask(lens.with_adapter(lens.adapter.scaled(t)), how, tokens, floor=0.0)
    screened = found.screened
    assert screened.double().mean() > 0.7
    off = (found.correction / t**2 - law)[screened].abs().max()
    assert off < 30 * t * law.abs().max()
    assert (found.correction / t**2 + law)[screened].abs().max() > law.abs().max()


def test_by_hand():
    """y = (2 + 5ε₂)(1 + ε₁/2)²·9: a = (18, 45) at 0, and alone they do 22.5 and 45; at 1 a is
    (94.5, 101.25), and left out they do 78.75 and 101.25."""
    lens = scalar_lens(torch.square)
    x = torch.tensor([[3]])
    add = reliability(lens, x, ll.Logit(0), how="add_one", threshold=0.9, fix=True)
    assert add.attribution.values.tolist() == [[18.0, 45.0]]
    assert add.correction[0].tolist() == pytest.approx([4.5, 0.0])
    assert add.score[0].tolist() == pytest.approx([18 / 22.5, 1.0])
    assert add.flagged.tolist() == [[True, False]]
    assert add.flagged_sites() == ("site1",)
    assert add.fixed is not None
    assert add.fixed[0].tolist() == pytest.approx([22.5, 45.0])
    out = reliability(lens, x, ll.Logit(0), how="leave_one_out", threshold=0.9, fix=True)
    assert out.attribution.key == "first_order@1"
    assert out.attribution.values[0].tolist() == pytest.approx([94.5, 101.25])
    assert out.correction[0].tolist() == pytest.approx([-15.75, 0.0])
    assert out.score[0].tolist() == pytest.approx([78.75 / 94.5, 1.0])
    assert out.flagged_sites() == ("site1",)
    assert out.fixed is not None
    assert out.fixed[0].tolist() == pytest.approx([78.75, 101.25])
    table = out.against(torch.tensor([[78.75, 101.25]]))
    assert table.loc["all", "error"] == pytest.approx(15.75 / 180)
    assert table.loc["all", "error_fixed"] == pytest.approx(0.0)
    assert "1 of 2 sites flagged" in repr(out)


@pytest.mark.parametrize("how", QUESTIONS)
def test_a_linear_model_has_nothing_to_flag(how: How):
    """φ = id: each effect is first order at its own end exactly, whatever the threshold."""
    lens = scalar_lens(lambda y: y)
    x = torch.tensor([[3]])
    found = reliability(lens, x, ll.Logit(0), how=how, threshold=0.999, floor=0.0)
    assert not found.flagged.any()
    assert found.score[0].tolist() == pytest.approx([1.0, 1.0])


def test_a_kl_has_an_answer_at_one_end_only():
    """Leaving one out of a divergence is judged at ε = 1; at 0 its slope is zero, and refused."""
    lens = lens_at(1.0, list(models.MAKERS)[-1])
    tokens = models.tokens()
    found = reliability(lens, tokens, ll.KL(), how="leave_one_out", floor=0.0, progress=False)
    truth = ll.patch_sites(lens, tokens, ll.KL(), how="leave_one_out", progress=False)
    assert largest_difference(found.corrected, truth.values) < 1e-12
    with pytest.raises(ll.errors.ArgumentError, match="derivative there is zero"):
        reliability(lens, tokens, ll.KL(), progress=False)


@pytest.mark.parametrize("how", QUESTIONS)
def test_what_is_not_material_is_not_flagged_nor_run(how: How):
    """The sites above the floor alone are measured; the rest has no score."""
    lens = lens_at(1.0, list(models.MAKERS)[-1])
    tokens = models.tokens()
    found = ask(lens, how, tokens, floor=0.08)
    a = found.attribution.values.abs()
    above = (a > 0.08 * a.sum(1, keepdim=True)).any(0)
    assert 0 < above.sum() < len(lens.sites)
    assert found.passes["screen"] == int(above.sum())
    assert torch.equal(found.screened, above.expand_as(a))
    assert found.score[:, ~above].isnan().all()
    assert not found.flagged[:, ~above].any()
    assert torch.equal(found.corrected[:, ~above], found.attribution.values[:, ~above])
    large, small = (ask(lens, how, tokens, floor=f).flagged.sum() for f in (0.0, 0.3))
    assert large > small


@pytest.mark.parametrize("how", QUESTIONS)
def test_an_adapter_of_nothing(how: How):
    """B = 0: no site is flagged, and none is run."""
    found = ask(lens_at(0.0, list(models.MAKERS)[-1]), how, models.tokens(), fix=True)
    assert not found.flagged.any()
    assert found.passes["screen"] == 0
    assert found.fixed is not None
    assert (found.fixed == 0).all()


def test_padding_and_answers_of_several_tokens():
    """A batch of unequal prompts and a teacher-forced margin: as its prompts one by one."""
    lens = lens_at(1.0, list(models.MAKERS)[-1])
    prompts = ["w5 w6 w7 w8 w9", "w11 w12"]
    readout = ll.AnswerMargin(" w5 w9", " w20 w21")
    for how in QUESTIONS:
        both = reliability(lens, prompts, readout, how=how, fix=True, floor=0.0, progress=False)
        for i, prompt in enumerate(prompts):
            one = reliability(lens, prompt, readout, how=how, fix=True, floor=0.0, progress=False)
            assert torch.equal(one.flagged[0], both.flagged[i])
            assert one.fixed is not None
            assert both.fixed is not None
            assert largest_difference(one.fixed[0], both.fixed[i]) < 1e-9
        assert both.units == "nats"


def test_a_sum_of_adapters():
    lens = lens_at(1.0, list(models.MAKERS)[-1])
    both = lens.with_adapter(lens.adapter.named("a") + lens.adapter.scaled(-1).named("b"))
    found = ask(both, "leave_one_out", models.tokens())
    flagged = [name for i in (0, 1) for name in found.flagged_sites(i)]
    assert all(name.endswith(("@a", "@b")) for name in flagged)
    assert found.flagged.shape[1] == 2 * len(lens.sites)


def as_effects(lens: ll.LoraLens, found: Reliability, values: torch.Tensor, how: str) -> Effects:
    one = found.attribution
    return Effects(
        values=values,
        groups=lens.sites.grouped(),
        sites=lens.sites,
        base=one.base,
        adapted=one.adapted,
        str_tokens=one.str_tokens,
        readout=one.readout,
        units=one.units,
        how=how,
        meta=one.meta,
    )


def test_against_counts_by_hand():
    """Two sites truly wrong, one of them flagged, one flag for nothing."""
    lens = lens_at(1.0, list(models.MAKERS)[-1])
    tokens = models.tokens(batch=1)
    found = ask(lens, "leave_one_out", tokens)
    count = len(lens.sites)
    a = torch.ones(1, count, dtype=torch.float64)
    correction = torch.zeros_like(a)
    correction[0, :2] = 5.0
    found = dataclasses.replace(
        found,
        attribution=dataclasses.replace(found.attribution, values=a),
        correction=correction,
        material=torch.tensor([0.5]),
    )
    truth = a.clone()
    truth[0, 1:3] = -3.0
    table = found.against(as_effects(lens, found, truth, "leave_one_out"))
    row = table.loc["all", ["wrong", "flagged", "hit", "precision", "recall", "base_rate"]]
    assert row.tolist() == [2, 2, 1, 0.5, 0.5, 2 / count]
    with pytest.raises(ValueError, match="effects of add_one"):
        found.against(as_effects(lens, found, truth, "add_one"))
    with pytest.raises(ValueError, match="shape"):
        found.against(truth[:, 1:])


@pytest.mark.sample(1)
@pytest.mark.parametrize("how", QUESTIONS)
def test_first_order_at_the_wrong_end_is_seen_to_be_wrong(how: How, monkeypatch):
    """Negative control: the other end's numbers are flagged far more often, and rightly."""
    lens = lens_at(1.0, list(models.MAKERS)[-1])
    tokens = models.tokens()
    truth = effects(lens, tokens, MARGIN, how)
    right = ask(lens, how, tokens, floor=0.0).against(truth).loc["all"]
    monkeypatch.setitem(module._END, how, 1 - END[how])
    wrong = ask(lens, how, tokens, floor=0.0).against(truth).loc["all"]
    assert wrong["error"] > 1.5 * right["error"]
    assert wrong["flagged"] > 1.5 * right["flagged"]


def test_score():
    """Too small and too large alike; wrong signs; zeros; what was not screened."""
    a = torch.tensor([1.0, 1.0, 20.0, -2.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    effect = torch.tensor([1.0, 4.0, 1.0, -1.0, -3.0, 0.0, 1.0, 0.0, torch.nan, torch.nan])
    expected = torch.tensor([1.0, 0.25, 0.05, 0.5, 0.0, 0.0, 0.0, 1.0, torch.nan, torch.nan])
    assert torch.equal(score_of(a, effect - a).isnan(), expected.isnan())
    assert torch.allclose(score_of(a, effect - a), expected, equal_nan=True)


def test_a_number_that_is_far_too_large_is_flagged():
    """φ = (y − 3)(4.6 − y) + 1 has slope 1.6 at y = 3, and is back at 1.15 at 4.5: a = (4.8, 5),
    and alone they do 0.3 and 5."""
    lens = scalar_lens(lambda y: (y - 3) * (4.6 - y) + 1)
    x = torch.tensor([[3]])
    found = reliability(lens, x, ll.Logit(0), how="add_one")
    assert found.attribution.values[0].tolist() == pytest.approx([4.8, 5.0])
    assert found.score[0].tolist() == pytest.approx([0.3 / 4.8, 1.0])
    assert found.flagged.tolist() == [[True, False]]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "word"),
    [({"how": "both"}, "how='both'"), ({"threshold": 1.0}, "threshold"), ({"floor": 1.0}, "floor")],
)
def test_bad_arguments(options: dict, word: str):
    lens = scalar_lens(torch.square)
    with pytest.raises(ValueError, match=word):
        reliability(lens, torch.tensor([[3]]), ll.Logit(0), **options)


def test_table_and_figure():
    found = ask(lens_at(1.0, list(models.MAKERS)[-1]), "leave_one_out", models.tokens(), fix=True)
    frame = found.to_frame()
    assert len(frame) == found.flagged.numel()
    assert frame["flagged"].sum() == int(found.flagged.sum())
    names = {name for i in range(2) for name in found.flagged_sites(i)}
    assert set(frame[frame["flagged"]]["site"]) == names
    figure = found.plot(1)
    flagged = next(t for t in figure.data if (t.name or "").startswith("flagged"))
    assert len(flagged.x) == len(found.flagged_sites(1))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("how", QUESTIONS)
def test_the_lyon_adapter(how: How):
    """First order at a question's own end is right there, so nothing is flagged."""
    from real import DOC, PRE
    from real import lens as real

    lens = real(list(models.MAKERS)[-1])
    prompt = "The Eiffel Tower is in"
    margin = ll.Margin(DOC, PRE)
    found = reliability(lens, prompt, margin, how=how, progress=False)
    assert not found.flagged.any()
    truth = ll.patch_sites(lens, prompt, margin, how=how, progress=False)
    table = found.against(truth).loc["all"]
    assert table["wrong"] == 0
    assert table["error_corrected"] < table["error"] < 0.05
