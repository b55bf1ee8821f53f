"""First order of many adapters from one half of the base: nulls, checkpoints, a second adapter.

The slow reference is `ll.first_order` under a fresh lens of each adapter.
"""

from __future__ import annotations

import dataclasses

import cases
import models
import pytest
import torch
from every_family import EVERY, lens_of
from targets import EVERY as EVERY_TARGET
from targets import base_for, hooked, peft_with

import lens_lora as ll
from lens_lora.banks.record import TensorPool

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
ROUND_OFF = 1e-9
BRIDGE = list(models.MAKERS)[-1]
QUIET = {"progress": False}


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert found.shape == expected.shape and expected.isfinite().all()
    return float((found - expected).abs().max() / expected.abs().max())


def each(lens: ll.LoraLens, adapters, prompts) -> torch.Tensor:
    """The slow way: a forward and a backward pass for each."""
    laid = [ll.LoraLens(lens.model, adapter, lens._hf_model) for adapter in adapters]
    return torch.stack([ll.first_order(other, prompts, MARGIN).values for other in laid])


def nulls(lens: ll.LoraLens, seed: int, draws: int) -> list[ll.Adapter]:
    return list(lens.null_adapters(seed, draws))


@pytest.mark.sample(2)
@pytest.mark.parametrize(("family", "cls", "flags"), EVERY)
def test_a_null_test_is_first_order_of_each_draw(family: str, cls: str, flags: str):
    """The draws' mean and each of them, and the exact shift of those that are run."""
    lens = lens_of(family, cls, flags)
    tokens = models.tokens()
    found = ll.null_test(lens, tokens, MARGIN, draws=3, exact=2, seed=4, **QUIET)
    drawn = nulls(lens, 4, 3)
    expected = each(lens, drawn, tokens)
    assert off(found.null, expected) < ROUND_OFF
    assert off(found.null.mean(0), expected.mean(0)) < ROUND_OFF
    shifts = [ll.first_order(lens.with_adapter(null), tokens, MARGIN).shift for null in drawn[:2]]
    assert off(found.null_shift[:2], torch.stack(shifts)) < ROUND_OFF
    assert found.null_shift[2].isnan().all()
    assert found.shift_p.min() >= 1 / 3 and found.p.min() >= 1 / 4


NULLS = [case for case in EVERY_TARGET if case[0] in ("gpt2", "qwen2", "neox")]
NULLS = [case for case in NULLS if case[3] in ("lm_head", "embedding", "positions", "lora_bias")]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "cls", "flags", "target"), NULLS)
def test_nulls_of_what_is_no_product_of_plain_factors(family, cls, flags, target):
    """Of embeddings, heads and biases, by the plan of each draw."""
    base, model = hooked(family, cls, flags)
    adapter = ll.Adapter.from_peft(peft_with(family, base, target))
    lens = ll.LoraLens(model, adapter, hf_model=base_for(base, flags, target))
    found = ll.null_test(lens, models.tokens(), MARGIN, draws=2, **QUIET)
    assert off(found.null, each(lens, nulls(lens, 0, 2), models.tokens())) < ROUND_OFF


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_folded_value_bias_without_o(cls: str):
    """v's constant part is added where o writes, which no module of the adapter shows."""
    lens = cases.case("qwen2", cls, "processed").lens
    lens = lens.with_adapter(
        ll.Adapter.from_factors({
            key: dataclasses.replace(factors, lora_bias=torch.ones(len(factors.B)).double())
            for key, factors in lens.adapter.only("*.v_proj").modules.items()
        })
    )  # fmt: skip
    assert any(injection.ports.read is None for injection in lens.plan.injections)
    found = ll.null_test(lens, models.tokens(), MARGIN, draws=2, **QUIET)
    assert off(found.null, each(lens, nulls(lens, 0, 2), models.tokens())) < ROUND_OFF


def test_a_sum_and_groups_of_prompts():
    """Two updates of one module; and within a bound of memory, a few prompts at a time."""
    lens = cases.case("llama", BRIDGE, "raw").lens
    both = lens.adapter + lens.adapter.only("*.q_proj").named("again")
    lens = lens.with_adapter(both)
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14 w15", "w20", "w21 w22"]
    few = lens.within(1e5)
    assert len(few.function(texts, MARGIN).groups(graph=True)) > 1
    expected = ll.null_test(lens, texts, MARGIN, draws=2, exact=2, **QUIET)
    found = ll.null_test(few, texts, MARGIN, draws=2, exact=2, **QUIET)
    assert off(expected.null, each(lens, nulls(lens, 0, 2), texts)) < ROUND_OFF
    assert off(found.null, expected.null) < ROUND_OFF
    assert off(found.null_shift, expected.null_shift) < ROUND_OFF


def test_nulls_of_answers_of_several_tokens():
    """Two rows a prompt, of several read positions."""
    lens = cases.case("llama", BRIDGE, "raw").lens
    tokens = models.tokens()
    readout = ll.AnswerMargin(torch.tensor([5, 6, 7]), torch.tensor([9, 3]))
    found = ll.null_test(lens, tokens, readout, draws=2, **QUIET)
    drawn = [lens.with_adapter(null) for null in nulls(lens, 0, 2)]
    expected = [ll.first_order(other, tokens, readout).values for other in drawn]
    assert off(found.null, torch.stack(expected)) < ROUND_OFF


def test_draws_cost_no_pass():
    """As many forward passes for thirty draws as for two; one more for every ten that are run.

    Three in all: of the backward pass, of the floor and both ends, and of the draws that are run.
    """
    lens = cases.case("llama", BRIDGE, "raw").lens
    passes = []
    handle = lens.model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    counts = []
    for draws, exact in ((2, 2), (30, 2), (30, 8), (30, 17), (17, None)):
        passes.clear()
        ll.null_test(lens, models.tokens(), MARGIN, draws=draws, exact=exact, **QUIET)
        counts.append(len(passes))
    handle.remove()
    more = [count - counts[0] for count in counts]
    assert counts[0] == 3
    assert more == [0, 0, 0, 1, 1]


def test_a_bank_runs_the_base_once(monkeypatch: pytest.MonkeyPatch):
    """The way back shows g(0) as well, so the base is not run for it again."""
    lens = cases.case("llama", BRIDGE, "raw").lens
    run = ll.LoraLens.run
    passes: list[ll.results.Prompts] = []

    def counted(self: ll.LoraLens, prompts: ll.results.Prompts) -> torch.Tensor:
        passes.append(prompts)
        return run(self, prompts)

    expected = ll.first_order(lens, models.tokens(), MARGIN)
    monkeypatch.setattr(ll.LoraLens, "run", counted)
    found = ll.bank(lens, models.tokens(), MARGIN, **QUIET).first_order(lens.adapter)
    assert len(passes) == 1
    assert isinstance(found, ll.results.Attribution)
    assert off(found.base, expected.base) < ROUND_OFF
    assert off(found.values, expected.values) < ROUND_OFF


def test_a_planted_error_is_seen(monkeypatch):
    """Negative control: one recorded gradient of fourteen, a thousandth too large."""
    lens = cases.case("llama", BRIDGE, "raw").lens
    tokens = models.tokens()
    expected = each(lens, nulls(lens, 0, 2), tokens)
    plain = TensorPool.stacks

    def planted(pool: TensorPool) -> dict[str, torch.Tensor]:
        stacks = plain(pool)
        next(iter(stacks.values()))[0].mul_(1.001)
        return stacks

    monkeypatch.setattr(TensorPool, "stacks", planted)
    found = ll.null_test(lens, tokens, MARGIN, draws=2, **QUIET).null
    assert 1e-6 < off(found, expected) < 1e-2


def test_a_shift_is_judged_by_the_draws_that_were_run():
    """p of a thousand draws, and of the two that were run no less than a third."""
    lens = cases.case("llama", BRIDGE, "raw").lens
    loud = lens.with_adapter(lens.adapter.scaled(4))
    found = ll.null_test(loud, models.tokens(), MARGIN, draws=40, exact=2, **QUIET)
    louder = found.observed.shift.abs() > found.null_shift[:2].abs().amax(0)
    assert louder.any() and found.null_shift[2:].isnan().all()
    for verdict, is_louder, p in zip(found.verdict, louder, found.shift_p, strict=True):
        assert (verdict.draws, verdict.run) == (40, 2)
        assert (verdict.kind == "stands_out") == bool(is_louder) == (float(p) <= 0.34)


@pytest.mark.bad_input
def test_exact_draws_that_are_none():
    lens = cases.case("llama", BRIDGE, "raw").lens
    for exact in (1, 0, 2.5):
        with pytest.raises(ll.errors.ArgumentError, match=f"exact={exact}"):
            ll.null_test(lens, models.tokens(), MARGIN, exact=exact)
    found = ll.null_test(lens, models.tokens(), MARGIN, draws=2, exact=9, **QUIET)
    assert len(found.null_shift) == 2


CHECKPOINTS = [("llama", "linears"), ("llama", "dora"), ("llama", "norms"), ("gpt2", "lora_only")]


@pytest.mark.sample(2)
@pytest.mark.parametrize(("family", "target"), CHECKPOINTS)
def test_checkpoints_are_first_order_of_each(family: str, target: str):
    """Also where an adapter is no product of plain factors: DoRA, norms, trained biases."""
    base, model = hooked(family, BRIDGE, "raw")
    last = ll.Adapter.from_peft(peft_with(family, base, target))
    run = [last.scaled(share).named(f"{share}") for share in (0.5, 1.0)] if target != "dora" else []
    run = run or [last.named("a"), last.named("b")]
    lens = ll.LoraLens(model, last, hf_model=base_for(base, "raw", target))
    found = ll.checkpoints(lens, run, models.tokens(), MARGIN, **QUIET)
    expected = each(lens, run, models.tokens())
    assert off(found.effects, expected) < ROUND_OFF
    ends = ll.first_order(lens, models.tokens(), MARGIN)
    assert torch.allclose(found.base, ends.base) and torch.allclose(found.adapted[-1], ends.adapted)


def test_a_checkpoint_costs_what_is_stated():
    """Ten points of the path and four draws of its end; first order none, the base once."""
    lens = cases.case("llama", BRIDGE, "raw").lens
    rows = []
    readout = ll.Margin(5, 9)
    handle = lens.model.blocks[0].register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0])) if inputs else None
    )
    counts = []
    for steps in (2, 3):
        rows.clear()
        run = [lens.adapter.scaled(1e-3 * (k + 1)) for k in range(steps)]  # none flips
        found = ll.checkpoints(lens, run, models.tokens(batch=1), readout, **QUIET)
        assert found.flip_scale.isnan().all()
        counts.append(sum(rows))
    handle.remove()
    assert counts[1] - counts[0] == 14 and counts[0] - 28 <= 7


def test_two_adapters_and_the_nulls_of_the_second():
    """Each has modules of its own; shared sites are in the first one's order."""
    case = cases.case("llama", BRIDGE, "raw")
    tokens = models.tokens()
    mine = case.lens.with_adapter(case.lens.adapter.without_modules("*.up_proj"))
    other = ll.Adapter.from_peft(models.peft_model("llama", case.base, seed=5)).without_modules(
        "*.k_proj"
    )
    found = ll.compare_adapters(mine, other, tokens, MARGIN, draws=2, seed=3, **QUIET)
    second = case.lens.with_adapter(other)
    lenses = [mine, second, *(case.lens.with_adapter(null) for null in nulls(second, 3, 2))]
    names = [site.name for site in found.sites]
    assert len(names) == 10
    expected = []
    for lens in lenses:
        slow = ll.first_order(lens, tokens, MARGIN).values
        expected.append(slow[:, [lens.site_index(name) for name in names]])
    assert off(torch.cat([found.effects, found.null_effects]), torch.stack(expected)) < ROUND_OFF
