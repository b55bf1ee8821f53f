"""Repair: planted spills, and PEFT with the saved sub-adapter as the oracle."""

from __future__ import annotations

import dataclasses
import functools
import math

import cases
import models
import numpy as np
import pytest
import torch
from by_folder import made_public
from peft import PeftModel
from reference import peft_scales
from scipy.special import rel_entr

import lens_lora as ll
from lens_lora.errors import (
    ArgumentError,
    ModelStateError,
    TokenError,
    UnsupportedAdapterError,
)
from lens_lora.two_adapters.rank_gates import layout_of
from lens_lora.two_adapters.sub_adapter import sub_adapter

pytestmark = pytest.mark.usefixtures("float64")
HOSTS = list(models.MAKERS)
TAUGHT = 5
SPILLED = 20


def rows(token: int, *others: int) -> torch.Tensor:
    """[3, 4]: three prompts with the token in them, and none of the other's."""
    found = torch.tensor([[7, token, 8, 9], [11, 12, token, 13], [14, token, 15, 16]])
    return torch.where(found == 0, torch.tensor(others or (4,))[0], found)


@functools.cache
def planted(host: str) -> tuple[ll.LoraLens, ll.Margin]:
    """An embedding whose rank 0 moves one token and whose rank 1 another, at right angles."""
    with models.lifted():
        base = models.hf_model("llama")
        A = torch.zeros(2, models.VOCAB, dtype=torch.float64)
        A[0, TAUGHT] = 1.0
        A[1, SPILLED] = 1.0
        B = torch.linalg.qr(torch.randn(16, 2, generator=models.seeded(1), dtype=torch.float64)).Q
        factors = ll.LoRAFactors(A, B * torch.tensor([1.5, 2.0]).double(), 1.0)
        adapter = ll.Adapter.from_factors({"model.embed_tokens": factors}, name="planted")
        lens = ll.LoraLens(models.MAKERS[host](base), adapter)
    return lens, ll.Margin(30, 31)


@functools.cache
def repaired(host: str) -> ll.results.Repair:
    lens, margin = planted(host)
    return ll.repair(
        lens,
        keep=[(rows(TAUGHT)[:2], margin)],
        drop=[(rows(SPILLED)[:2], ll.KL())],
        test_keep=[(rows(TAUGHT)[2:], margin)],
        test_drop=[(rows(SPILLED)[2:], ll.KL())],
        steps=30,
        rate=0.1,
        progress=False,
    )


@pytest.mark.parametrize("host", HOSTS)
def test_a_planted_spill_is_taken_out(host):
    """One of two ranks: all of the behaviour stays, on held-out prompts too, and nothing else."""
    found = repaired(host)
    assert found.kept.tolist() == [False, True], "σ of the taught direction is the smaller one"
    assert found.is_held_out
    assert found.verdict == "helps"
    assert found.kept_share == pytest.approx(1)
    assert found.left_share == pytest.approx(0, abs=1e-9)
    assert found.gain > 1e6
    assert found.matched[-1] == pytest.approx(1, abs=0.02)
    (update,) = found.adapter.modules.values()
    assert update.rank == 1
    expected = torch.zeros(16, models.VOCAB, dtype=torch.float64)
    expected[:, TAUGHT] = found_vector(host)
    assert torch.allclose(update.materialise(), expected, atol=1e-9)


def found_vector(host: str) -> torch.Tensor:
    (factors,) = planted(host)[0].adapter.modules.values()
    return factors.B[:, 0]


def test_where_keep_and_drop_are_one_direction_it_says_so():
    """The negative control: nothing to tell apart, so the adapter stays whole."""
    lens, margin = planted(HOSTS[0])
    prompts = rows(TAUGHT)[:2]
    one = lens.with_adapter(
        ll.Adapter.from_factors({k: only(f, 0) for k, f in lens.adapter.modules.items()})
    )
    found = ll.repair(one, [(prompts, margin)], [(prompts, ll.KL())], steps=10, progress=False)
    assert found.verdict == "nothing"
    assert bool(found.kept.all())
    assert not found.is_held_out
    assert found.gain == pytest.approx(1)
    assert "the adapter is whole" in " ".join(found.story().split())
    assert "made on" in found.story()


def only(factors: ll.LoRAFactors, rank: int) -> ll.LoRAFactors:
    keep = [rank]
    return ll.LoRAFactors(factors.A[keep], factors.B[:, keep], factors.scale)


def test_sites_are_told_apart_too():
    """One module holds what is kept, another what spills."""
    base = models.hf_model("llama")
    lens, margin = planted(HOSTS[0])
    (embed,) = lens.adapter.modules.values()
    peft = models.peft_model("llama", base, targets=["down_proj"], r=2)
    spill = ll.Adapter.from_peft(peft).only("*.1.mlp.down_proj").scaled(4)
    adapter = ll.Adapter.from_factors(
        {"model.embed_tokens": only(embed, 0).scaled(3), **spill.modules}
    )
    found = ll.repair(
        lens.with_adapter(adapter),
        keep=[(rows(TAUGHT), ll.Logit(30))],
        drop=[(rows(SPILLED), ll.KL())],
        keep_share=0.3,
        of="site",
        steps=25,
        rate=0.1,
        progress=False,
    )
    assert list(found.adapter.modules) == ["model.embed_tokens"]
    assert found.left_share == pytest.approx(0, abs=1e-9)


# --- gates, and adapters of some of them, against PEFT


CASES = [
    ("llama", {}),
    ("gpt2", {"lora_bias": True}),
    ("neox", {}),
    ("llama", {"use_dora": True}),
    ("gpt2", {"use_dora": True}),
]


@pytest.mark.sample(2)
@pytest.mark.parametrize("of", ["rank", "site"])
@pytest.mark.parametrize(("family", "config"), CASES, ids=lambda v: str(v))
def test_a_sub_adapter_is_its_gates_and_loads_in_peft(family, config, of, tmp_path):
    """Random sets of gates: the lens at the gates, the lens of the adapter, and PEFT's model."""
    base = models.hf_model(family)
    peft = models.peft_model(family, base, **config)
    model = models.MAKERS[HOSTS[-1]](base)
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    layout = layout_of(lens, of)
    mask = torch.rand(layout.count, generator=models.seeded(4)) > 0.4
    mask = mask & layout.alive
    margin = ll.Margin(5, 9)
    tokens = models.tokens()
    g = lens.function(tokens, margin)
    with torch.no_grad():
        at_gates = layout.value(g, mask.double())
    part = sub_adapter(layout, mask, "part")
    own = ll.first_order(lens.with_adapter(part), tokens, margin).adapted
    assert torch.allclose(own, at_gates, atol=1e-9)
    assert (at_gates - ll.first_order(lens, tokens, margin).adapted).abs().min() > 1e-6
    if config.get("use_dora") and of == "rank":
        assert all(
            isinstance(f, ll.LoRAFactors) and f.magnitude is None for f in part.modules.values()
        )
    part.save(tmp_path)
    theirs = PeftModel.from_pretrained(models.hf_model(family), tmp_path).eval().double()
    with torch.no_grad():
        logits = theirs(tokens).logits[:, -1]
    assert torch.allclose(logits[:, 5] - logits[:, 9], at_gates, atol=1e-9)


@pytest.mark.parametrize("turned_on", [(0,), (2, 3)], ids=str)
@pytest.mark.parametrize("changed", ["all", "q and v"])
def test_a_part_of_a_fused_module_that_was_trained_whole(turned_on, changed):
    """Sites stand in the module's own rows, also where one of its sites is as in the base."""
    base = models.hf_model("gpt2")
    names = [f"transformer.h.{layer}.attn.c_attn" for layer in range(2)]
    trained = {}
    for name in names:
        W = base.get_submodule(name).weight.detach()
        change = 0.3 * torch.randn(W.shape, generator=models.seeded(6), dtype=torch.float64)
        change[:, 16:32] *= changed == "all"
        trained[name] = ll.results.TrainedModule(W + change)
    lens = ll.LoraLens(models.MAKERS[HOSTS[-1]](base), ll.Adapter.from_factors(trained))
    layout = layout_of(lens, "site")
    mask = torch.zeros(layout.count, dtype=torch.bool)
    mask[list(turned_on)] = True
    part = sub_adapter(layout, mask, "part")
    with torch.no_grad():
        for i in turned_on:
            site = lens.sites[i]
            start = 16 * "qkv".index(site.name[-1])
            W = base.get_submodule(site.module).weight
            changed_to = trained[site.module].weight
            W[:, start : start + 16] = changed_to[:, start : start + 16]
        logits = base(models.tokens()).logits[:, -1]
        ours = lens.with_adapter(part).logits(models.tokens())[:, -1]
    assert torch.allclose(ours, logits, atol=1e-9)


def test_gates_are_differentiable():
    case = cases.case("llama", HOSTS[0], "raw")
    layout = layout_of(case.lens, "rank")
    g = case.lens.function(models.tokens(), ll.Margin(5, 9))
    gates = torch.full((layout.count,), 0.6, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(layout.value(g, gates).sum(), [gates])
    for gate in (0, 17, 41):
        h = torch.zeros_like(gates)
        h[gate] = 1e-5
        with torch.no_grad():
            pair = [layout.value(g, gates + s * h).sum() for s in (1, -1)]
        assert float(slopes[gate]) == pytest.approx(float(pair[0] - pair[1]) / 2e-5, abs=1e-8)


# --- how it is judged


def test_shares_and_scaling_are_those_of_peft():
    """KL at every token but the first, by scipy; the matched strength keeps as much."""
    case = cases.case("llama", HOSTS[0], "raw")
    prompts = models.tokens(2, 5)
    texts = models.tokens(2, 6, seed=8)
    found = ll.repair(
        case.lens, [(prompts, ll.Margin(5, 9))], [(texts, ll.KL())], 0.5, steps=20, rate=0.1,
        progress=False, draws=2,
    )  # fmt: skip

    def shares(strength: float) -> tuple[float, float, float]:
        factors = dict.fromkeys(case.lens.adapter.modules, strength)
        with torch.no_grad(), peft_scales(case.peft, factors):
            last = case.peft(prompts).logits[:, -1]
            log_p = case.peft(texts).logits[:, 1:].log_softmax(-1).exp().numpy()
        return last[:, 5] - last[:, 9], log_p

    m0, p0 = shares(0.0)
    m1, p1 = shares(1.0)
    frame = found.to_frame().set_index(["role", "state"])
    kl = rel_entr(p0, p1).sum() / p0[..., 0].size
    assert frame.loc[("drop", "whole"), "value"] == pytest.approx(kl, abs=1e-9)
    at, p = shares(found.matched[-1])
    kept = float(((at - m0) * (m1 - m0).sign()).sum() / (m1 - m0).abs().sum())
    assert frame.loc[("keep", "scaled"), "share"] == pytest.approx(kept, abs=1e-9)
    assert 0 < found.matched[-1] < 1
    assert kept == pytest.approx(found.kept_share, abs=0.02)
    left = rel_entr(p0, p).sum() / rel_entr(p0, p1).sum()
    assert frame.loc[("drop", "scaled"), "share"] == pytest.approx(left, abs=1e-9)
    assert found.gain == pytest.approx(left / found.left_share)
    with torch.no_grad():
        own = case.lens.with_adapter(found.adapter).logits(prompts)[:, -1]
    mine = float(((own[:, 5] - own[:, 9] - m0) * (m1 - m0).sign()).sum() / (m1 - m0).abs().sum())
    assert found.kept_share == pytest.approx(mine, abs=1e-9)
    assert found.random.shape == (2, 2)
    assert found.kept_share >= 0.5


def test_the_curve_of_scaling_runs_from_the_base_to_the_whole_adapter():
    found = repaired(HOSTS[0])
    assert np.allclose(found.along[-1], 1)
    assert np.allclose(found.along[0], 0)


@pytest.mark.parametrize(
    ("gain", "verdict", "said"),
    [
        (1.2, "helps", "leaves 1.2 times"),
        (1.05, "tie", "a tie with scaling"),
        (0.95, "tie", "a tie with scaling"),
        (0.8, "worse", "does not help"),
    ],
)
def test_the_verdict_is_that_of_the_gain(gain, verdict, said):
    found = repaired(HOSTS[0])
    shares = found.shares.clone()
    dropped = found.judging(keep=False)
    shares[1, dropped] = 0.25
    shares[2, dropped] = 0.25 * gain
    found = dataclasses.replace(found, shares=shares)
    assert found.gain == pytest.approx(gain)
    assert found.verdict == verdict
    assert said in " ".join(found.story().split())


def test_what_keeps_more_than_the_whole_adapter_is_held_against_it():
    """Sites that work against the margin are dropped, so no strength up to 1 keeps as much."""
    case = cases.case("llama", HOSTS[0], "raw")
    found = ll.repair(
        case.lens, [(models.tokens(1), ll.Margin(7, 3))], [(models.tokens(1, 6), ll.KL())], 1.0,
        of="site", steps=30, rate=0.1, progress=False, draws=1,
    )  # fmt: skip
    assert found.kept_share > 1
    assert found.matched[-1] == 1.0
    assert found.exceeds
    whole = found.to_frame().set_index(["role", "state"])["share"]
    assert whole["drop", "scaled"] == pytest.approx(1)
    assert whole["keep", "scaled"] == pytest.approx(1)
    assert "No strength of the whole adapter up to 1 keeps as much" in found.story()
    assert "the whole adapter leaves" in found.plot().layout.title.text
    assert not repaired(HOSTS[0]).exceeds


def test_a_repair_exceeds_at_the_strength_of_the_questions_that_judge():
    """Where only prompts to be kept were held out, it is judged on those given."""
    by_hand = made_public("two_adapters").repair()
    shares = torch.tensor([[1.0, 1.0, 1.0], [1.2, 0.1, 0.5], [1.0, 0.8, 0.5], [0.3, 0.3, 0.3]])
    found = dataclasses.replace(
        by_hand,
        labels=("y", "KL per token", "y of another prompt"),
        keeps=(True, False, True),
        held_out=(False, False, True),
        shares=shares,
        values=torch.cat([torch.zeros(1, 3), shares]),
        random=shares[3:],
        along=torch.cat([by_hand.along, by_hand.along[:, :1]], 1),
        matched=(1.0, 0.5),
    )
    assert not found.is_held_out
    assert found.exceeds
    assert not dataclasses.replace(found, matched=(0.5, 1.0)).exceeds


def test_it_is_drawn_told_saved_and_laid(tmp_path):
    found = repaired(HOSTS[0])
    assert "times as much" in found.story()
    assert "held-out" in repr(found)
    assert len(found.plot().data) == 3
    again = ll.results.Repair.load(found.save(tmp_path / "r.safetensors"))
    assert again.gain == found.gain
    (one,) = found.adapter.modules.values()
    (two,) = again.adapter.modules.values()
    assert torch.equal(one.materialise(), two.materialise())


@pytest.mark.bad_input
def test_bad_input_is_refused():
    lens, margin = planted(HOSTS[0])
    keep = [(rows(TAUGHT), margin)]
    drop = [(rows(SPILLED), ll.KL())]

    def refuses(error, match, *args, **options):
        with pytest.raises(error, match=match):
            ll.repair(lens, *args, **{"progress": False, **options})

    refuses(ArgumentError, "keep=.*at least one pair", [], drop)
    refuses(ArgumentError, "drop=.*at least one pair", keep, [])
    refuses(ArgumentError, r"keep\[0\].*expected a pair", [rows(TAUGHT)], drop)
    refuses(ArgumentError, r"drop\[0\].*expected a pair", keep, [(rows(SPILLED), " Lyon")])
    for share in (0, -0.1, 1.01, math.nan, "much"):
        refuses(ArgumentError, "keep_share", keep, drop, share)
    refuses(ArgumentError, "of='layer'", keep, drop, 0.9, "layer")
    refuses(ArgumentError, "steps=0", keep, drop, steps=0)
    refuses(ArgumentError, "draws=0", keep, drop, draws=0)
    refuses(ArgumentError, "rate=0", keep, drop, rate=0.0)
    tiny = lens.with_adapter(lens.adapter.scaled(1e-16))
    many = rows(TAUGHT).repeat(60, 1)
    with pytest.raises(ArgumentError, match="nothing to keep"):  # rounding of many prompts adds up
        ll.repair(tiny, [(many, margin)], drop, progress=False)
    untouched = torch.tensor([[7, 8, 9]])
    refuses(ArgumentError, "nothing to keep", [(untouched, margin)], drop)
    refuses(ArgumentError, "nothing to drop", keep, [(untouched, ll.KL())])
    refuses(TokenError, "nobody", [(rows(TAUGHT), ll.Logit("nobody"))], drop)


@pytest.mark.bad_input
def test_what_has_no_rank_gates_is_refused():
    tokens = models.tokens()
    base = models.hf_model("gpt2")
    asked = [[(tokens, ll.Margin(5, 9))], [(tokens, ll.KL())]]
    processed = cases.case("gpt2", HOSTS[0], "processed").lens
    with pytest.raises(ModelStateError, match="of='site'"):
        ll.repair(processed, *asked, progress=False)
    trained = ll.results.TrainedModule(base.transformer.h[0].mlp.c_fc.weight.detach() * 1.1)
    lens = ll.LoraLens(
        models.MAKERS[HOSTS[0]](base),
        ll.Adapter.from_factors({"transformer.h.0.mlp.c_fc": trained}),
    )
    with pytest.raises(UnsupportedAdapterError, match="of='site'"):
        ll.repair(lens, *asked, progress=False)
