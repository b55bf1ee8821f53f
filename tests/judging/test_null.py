"""Null adapters keep every size and no direction; `null_test` says what stands out from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import nullcontext

import cases
import models
import pytest
import torch
from differences import largest_difference
from passes import passes
from targets import hooked, peft_with

import lens_lora as ll
from lens_lora.judging.null_test import NullTest, null_test

MARGIN = ll.Margin(5, 9)


@pytest.fixture(autouse=True)
def _float64_but_for_the_real_model(request) -> Iterator[None]:
    with nullcontext() if request.node.get_closest_marker("real") else models.lifted():
        yield


@pytest.fixture(params=models.MAKERS)
def cls(request) -> str:
    return request.param


def spectrum(factors: ll.LoRAFactors, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """Singular values of the dense ΔW, padded: the slow way."""
    return torch.linalg.svdvals(factors.materialise().double()[rows])


def bias_adapter() -> ll.Adapter:
    generator = models.seeded(7)
    A, B, bias = (torch.randn(*n, generator=generator).double() for n in ((3, 16), (24, 3), (24,)))
    path = "model.layers.0.mlp.up_proj"
    return ll.Adapter.from_factors({path: ll.LoRAFactors(A, B, -0.7, lora_bias=bias)}).scaled(3)


def test_a_file_with_another_base_weight_is_refused(cls: str):
    """W₀ − W is a part of the adapter's change, and a draw from its factors lacks it."""
    base, model = hooked("llama", cls, "raw")
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    key = next(key for key in adapter.modules if key.endswith("o_proj"))
    W = base.get_submodule(key).weight.detach()
    for stored in (W, 1.1 * W):
        factors = dataclasses.replace(adapter.modules[key], base_weight=stored)
        lens = ll.LoraLens(model, ll.Adapter.from_factors({key: factors}))
        if stored is W:
            assert null_test(lens, models.tokens(), MARGIN, draws=2, progress=False).draws == 2
            continue
        for call in (
            lambda lens=lens: null_test(lens, models.tokens(), MARGIN, draws=2),
            lambda lens=lens: ll.what_changed(lens, models.tokens(), nulls=1),
        ):
            with pytest.raises(ll.errors.UnsupportedAdapterError, match="holds another weight"):
                call()
        assert not ll.what_changed(lens, models.tokens(), nulls=0, progress=False).nulls


def test_null_keeps_the_length_of_a_bias_and_the_strength():
    """Δb = s·strength·lora_bias: the same length, another direction."""
    adapter = bias_adapter()
    ((key, old),) = adapter.modules.items()
    new = adapter.null(0).modules[key]
    assert old.lora_bias is not None
    assert new.lora_bias is not None
    before = old.scale * old.lora_bias
    after = new.scale * new.lora_bias
    assert after.norm().item() == pytest.approx(before.norm().item(), rel=1e-12)
    assert abs(before @ after) < 0.9 * before.norm() ** 2
    assert torch.allclose(spectrum(new), spectrum(old), atol=1e-12)


def test_null_directions_are_uniform():
    """Over draws the mean of ΔW′ is zero and every entry has variance ‖ΔW‖²/(out·in)."""
    adapter = bias_adapter()
    ((key, old),) = adapter.modules.items()
    drawn = torch.stack([adapter.null(s).modules[key].materialise() for s in range(400)])
    variance = old.norm() ** 2 / old.materialise().numel()
    assert drawn.mean(0).abs().max() < 5 * math.sqrt(variance / 400)
    assert largest_difference(drawn.square().mean(0) / variance, 1) < 0.6
    assert drawn.square().mean().item() == pytest.approx(variance, rel=1e-12)


def test_null_is_its_seed():
    adapter = bias_adapter()
    (a,), (b,), (c,) = (adapter.null(s).modules.values() for s in (5, 5, 6))
    assert torch.equal(a.A, b.A)
    assert torch.equal(a.B, b.B)
    assert not torch.equal(a.A, c.A)
    draws = [next(iter(adapter.null(5, d).modules.values())) for d in (0, 1)]
    assert torch.equal(draws[0].A, a.A)
    assert not torch.equal(draws[1].A, a.A)
    assert not torch.equal(draws[1].A, c.A)
    assert adapter.null(5, 1).name.startswith("null 5.1 of ")
    assert adapter.null().name.startswith("null 0 of ")


def test_the_draws_of_a_seed_are_the_same_everywhere():
    case = cases.case("llama", list(models.MAKERS)[-1], "raw")
    lens = case.lens
    tokens = models.tokens()
    test = null_test(lens, tokens, MARGIN, draws=2, seed=4, progress=False)
    for draw in range(2):
        null = lens.adapter.null(4, draw)
        one = ll.first_order(lens.with_adapter(null), tokens, MARGIN)
        assert torch.allclose(test.null[draw], one.values, atol=1e-12)


@pytest.mark.bad_input
def test_seeds_are_whole_numbers():
    for seed, draw, named in (
        (-1, 0, "seed"),
        (1.5, 0, "seed"),
        (0, -1, "draw"),
        (True, 0, "seed"),
    ):
        with pytest.raises(ll.errors.ArgumentError, match=named):
            bias_adapter().null(seed, draw)


@pytest.mark.parametrize("what", ["magnitude", "trained_bias"])
def test_what_depends_on_the_base_is_refused(what: str):
    ((key, factors),) = bias_adapter().modules.items()
    changed = dataclasses.replace(factors, **{what: torch.ones(24).double()})
    with pytest.raises(ll.errors.UnsupportedAdapterError, match="Adapter.between") as error:
        ll.Adapter.from_factors({key: changed}).null(0)
    assert key in str(error.value)


@pytest.mark.parametrize("flags", ["raw", "processed"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_with_adapter_is_a_fresh_lens(family: str, cls: str, flags: str):
    """Also over a folded model, whose hf_model it keeps; the first lens stays as it was."""
    case = cases.case(family, cls, flags)
    tokens = models.tokens()
    before = case.lens.logits(tokens)
    null = case.lens.adapter.null(3)
    other = case.lens.with_adapter(null)
    fresh = ll.LoraLens(case.model, null, hf_model=case.base if cases.FLAGS[flags] else None)
    assert torch.equal(other.logits(tokens), fresh.logits(tokens))
    assert not torch.allclose(other.logits(tokens), before)
    assert torch.equal(case.lens.logits(tokens), before)
    assert other.adapter is null


@pytest.mark.parametrize("flags", ["raw", "processed"])
def test_null_test_is_first_order_of_each_draw(cls: str, flags: str):
    """Against a fresh lens for each seed; the model keeps its hooks and weights."""
    case = cases.case("gpt2", cls, flags)
    tokens = models.tokens()
    state = {k: v.clone() for k, v in case.model.state_dict().items()}
    hooks = {name: len(p._forward_hooks) for name, p in case.model.hook_dict.items()}
    found = null_test(case.lens, tokens, MARGIN, draws=3, progress=False)
    base = case.base if cases.FLAGS[flags] else None
    for i, null in enumerate(case.lens.null_adapters(found.seed, 3)):
        one = ll.first_order(ll.LoraLens(case.model, null, hf_model=base), tokens, MARGIN)
        assert torch.allclose(found.null[i], one.values, atol=1e-12)
        assert torch.allclose(found.null_shift[i], one.shift, atol=1e-12)
    own = ll.first_order(case.lens, tokens, MARGIN)
    assert torch.allclose(found.observed.values, own.values, rtol=0, atol=1e-12)
    assert torch.allclose(found.observed.shift, own.shift, rtol=0, atol=1e-12)
    assert {name: len(p._forward_hooks) for name, p in case.model.hook_dict.items()} == hooks
    assert all(torch.equal(v, state[k]) for k, v in case.model.state_dict().items())


@pytest.mark.slow
@models.NEEDS_BRIDGE
def test_the_adapted_models_of_many_draws_share_passes():
    """Ten draws are rows of one batch, and the rest of the next; of answers each has two rows."""
    lens = cases.case("llama", "TransformerBridge", "raw").lens
    margin = ll.AnswerMargin("w8 w10", "w9 w11 w4")
    with passes(lens) as seen:
        found = ll.null_test(lens, models.tokens(), margin, draws=12, progress=False)
    rows_of_prompt = 2
    rows = [rows for kind, rows, _ in seen if kind == "plain"]
    batch = rows_of_prompt * len(models.tokens())
    assert 10 * batch in rows
    assert 2 * batch in rows
    drawn = lens.null_adapters(found.seed, 12)
    for shift, null in zip(found.null_shift, drawn, strict=True):
        one = lens.with_adapter(null).function(models.tokens(), margin)
        assert torch.allclose(shift, one.shift, atol=1e-12)


def test_null_spread_against_the_gradient_of_the_weights():
    """std a′ = ‖ΔW‖ ‖∂g/∂W‖ / √(out·in), with ∂g/∂W of the Hugging Face model by autograd."""
    case = cases.case("llama", list(models.MAKERS)[-1], "raw")
    tokens = models.tokens(batch=1)
    draws = 100
    found = null_test(case.lens, tokens, MARGIN, draws=draws, progress=False)
    logits = case.base(tokens).logits[0, -1]
    weights = [case.base.get_submodule(s.module).weight for s in case.lens.sites]
    grads = torch.autograd.grad(logits[5] - logits[9], weights)
    factors = [case.lens.adapter.modules[s.module] for s in case.lens.sites]
    expected = torch.tensor(
        [
            f.norm() * float(g.norm()) / math.sqrt(g.numel())
            for f, g in zip(factors, grads, strict=True)
        ]
    )
    ratio = found.null[:, 0].std(0) / expected
    assert largest_difference(ratio, 1) < 0.25, ratio
    assert (ratio.mean() - 1).abs() < 0.05


@pytest.mark.slow
def test_a_null_adapter_does_not_stand_out_and_a_true_direction_does():
    """p of random directions is uniform; of ΔW along ∂g/∂W, each site's p is the least there is."""
    case = cases.case("llama", list(models.MAKERS)[-1], "raw")
    tokens = models.tokens(batch=1)
    p = [
        null_test(
            case.lens.with_adapter(case.lens.adapter.null(seed)),
            *(tokens, MARGIN),
            draws=9,
            seed=100 + seed,
            progress=False,
        ).p
        for seed in range(6)
    ]
    every = torch.cat(p).flatten()
    counts = torch.bincount((10 * every).round().long(), minlength=11)[1:]
    assert counts.sum() == every.numel() == 6 * 14
    expected = every.numel() / 10
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 27.9, counts  # the 99.9 % point of χ² with 9 degrees of freedom
    aligned = null_test(along_the_gradient(case, tokens), tokens, MARGIN, draws=9, progress=False)
    assert (aligned.p == 0.1).all()
    assert aligned.exceeds_all.item() == 1
    assert (aligned.z > 2).all()
    assert "100% of sites exceed every one of 9 draws (10.0% would by chance)" in str(
        aligned.verdict[0]
    )


def along_the_gradient(case: cases.Case, tokens: torch.Tensor) -> ll.LoraLens:
    """Rank-1 updates along the leading directions of ∂g/∂W: what a fact's adapter would be."""
    logits = case.base(tokens).logits[0, -1]
    modules = {}
    paths = list(case.lens.adapter.modules)
    weights = [case.base.get_submodule(path).weight for path in paths]
    grads = torch.autograd.grad(logits[5] - logits[9], weights)
    for path, grad in zip(paths, grads, strict=True):
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        modules[path] = ll.LoRAFactors(right[:1], 0.01 * left[:, :1])
    return case.lens.with_adapter(ll.Adapter.from_factors(modules))


@pytest.mark.parametrize("target", ["lm_head", "embedding", "positions", "lora_bias"])
def test_every_target(target: str, cls: str):
    """Attached embeddings, the head and biases have nulls of their own size."""
    base, model = hooked("gpt2", cls, "processed")
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft_with("gpt2", base, target)), hf_model=base)
    found = null_test(lens, models.tokens(), MARGIN, draws=2, progress=False)
    assert found.null.shape == (2, 2, len(lens.sites))
    assert (found.null != 0).any(0).all()
    for shift, null in zip(found.null_shift, lens.null_adapters(found.seed, 2), strict=True):
        one = lens.with_adapter(null).function(models.tokens(), MARGIN)
        assert torch.allclose(shift, one.shift, atol=1e-12)
    for key, old in lens.adapter.modules.items():
        new = lens.adapter.null(0).modules[key]
        assert torch.allclose(spectrum(new), spectrum(old), atol=1e-12)


def test_a_sum_of_adapters_keeps_its_sites_apart():
    case = cases.case("llama", list(models.MAKERS)[-1], "raw")
    both = case.lens.adapter.only("*.q_proj").named("a") + case.lens.adapter.named("b")
    lens = case.lens.with_adapter(both)
    found = null_test(lens, models.tokens(), MARGIN, draws=2, progress=False)
    names = [s.name for s in lens.sites]
    assert len(names) == 16
    assert "blocks.0.attn.q@a" in names
    a, b = (found.null[:, 0, names.index(f"blocks.0.attn.q@{x}")] for x in "ab")
    assert (a - b).abs().min() > 0


def test_an_untrained_adapter_is_not_told_from_noise():
    """B = 0: every p is 1, z does not exist, and the verdict says so."""
    case = cases.case("llama", list(models.MAKERS)[-1], "raw")
    found = null_test(
        case.lens.with_adapter(case.lens.adapter.scaled(0.0)),
        *(models.tokens(), MARGIN),
        draws=2,
        progress=False,
    )
    assert (found.p == 1).all()
    assert (found.q == 1).all()
    assert found.z.isnan().all()
    assert all(str(v).startswith("below the noise") for v in found.verdict)


def by_hand() -> NullTest:
    """Two sites, four draws, one prompt."""
    case = cases.case("gpt2", list(models.MAKERS)[-1], "raw")
    found = null_test(case.lens, models.tokens(batch=1), MARGIN, draws=4, progress=False)
    one = dataclasses.replace(
        found.observed,
        values=torch.tensor([[3.0, 1.0]]).double(),
        sites=found.observed.sites[:2],
        heads=found.observed.heads[:2],
        base=torch.tensor([0.0]).double(),
        adapted=torch.tensor([-8.0]).double(),
    )
    null = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, 0.5], [-1.0, -0.5]]).double()
    shifts = torch.tensor([[2.0], [-2.0], [2.0], [-2.0]]).double()
    return dataclasses.replace(found, observed=one, null=null[:, None], null_shift=shifts)


def test_p_z_and_q_by_hand():
    """|3| exceeds all four draws: p = 1/5; |1| is under two of them: p = 3/5."""
    found = by_hand()
    assert found.p.tolist() == [[0.2, 0.6]]
    assert found.q.tolist() == [[0.4, 0.6]]
    expected = [3 / math.sqrt(4 / 3), 1 / math.sqrt(8.5 / 3)]
    assert found.z[0].tolist() == pytest.approx(expected)
    assert found.shift_p.item() == 0.2
    assert found.exceeds_all.item() == 0.5
    assert str(found.verdict[0]).startswith("the adapter's shift is 4 times what random directions")
    frame = found.to_frame()
    assert frame["p"].tolist() == [0.2, 0.6]
    assert list(frame["site"]) == [s.name for s in found.observed.sites]
    assert len(found.plot().data) == 3
    assert "4 times" in repr(found)


def test_a_shift_within_the_nulls_is_said_to_be():
    found = by_hand()
    observed = dataclasses.replace(found.observed, adapted=torch.tensor([1.0]).double())
    (verdict,) = dataclasses.replace(found, observed=observed).verdict
    text = str(verdict)
    assert verdict.kind == "as_random"
    assert text.startswith("no more than random directions")
    assert "(p = 1)" in text


def test_one_draw_is_no_spread():
    case = cases.case("gpt2", list(models.MAKERS)[-1], "raw")
    with pytest.raises(ValueError, match="draws=1"):
        null_test(case.lens, models.tokens(), MARGIN, draws=1)


@pytest.mark.slow
@pytest.mark.real
def test_the_lyon_adapter_is_no_random_direction():
    """Its shift is tens of times that of random directions of the same size."""
    from real import DOC, PRE, PROMPT, lens

    one = lens(list(models.MAKERS)[-1])
    found = null_test(one, PROMPT, ll.Margin(DOC, PRE), draws=4, progress=False)
    rms = found.null_shift.double().square().mean(0).sqrt()
    assert found.observed.shift.abs().item() > 20 * rms.item()
    assert found.shift_p.item() == 0.2
    assert found.exceeds_all.item() > 0.5
