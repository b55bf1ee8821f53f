"""Half precision beside a float64 run of the same weights: what a result states of its rounding."""

from __future__ import annotations

import copy
import functools
import math

import models
import pytest
import torch
from differences import largest_difference
from half_precision import STATED, Asked, Found, compared, errors_in_floors
from peft import LoraConfig, get_peft_model
from torch import Tensor

import lens_lora as ll
from lens_lora.core import Evaluations
from lens_lora.core.function import evaluator, rounding
from lens_lora.core.model.unembedding import unembed
from lens_lora.core.results.signs import SIGMAS

HALF = (torch.bfloat16, torch.float16)
FAMILIES = ("llama", "gpt2", "qwen2", "neox")
ASKED = Asked(models.tokens(batch=24), 5, 9, torch.tensor([5, 9]))
FACTOR = 3.0
CLS = list(models.MAKERS)[-1]


@functools.cache
def lenses(family: str, dtype: torch.dtype) -> tuple[ll.LoraLens, ll.LoraLens]:
    """The same rounded weights, computed in half precision and in float64."""
    base = models.hf_model(family, dtype=dtype)
    adapter = ll.Adapter.from_peft(models.peft_model(family, base)).scaled(0.3)
    low = ll.LoraLens(models.MAKERS[CLS](base), adapter)
    with models.lifted():
        high = ll.LoraLens(models.MAKERS[CLS](base.double()), adapter)
    return low, high


def assert_few_beyond_three_floors(errors: Tensor) -> None:
    """Check errors in units of their floors: at most one in a hundred is beyond three."""
    assert share_beyond_three_floors(errors) <= 0.01
    assert 1 / FACTOR < rms(errors) < 1.2


def share_beyond_three_floors(errors: Tensor) -> float:
    return float((errors > SIGMAS).double().mean())


def rms(values: Tensor) -> float:
    """The root mean square."""
    return float(values.square().mean().sqrt())


def leave_out_the_rounding_of_the_held_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted error: the floor of a divergence has no draws of p₀, which is held."""

    def without_noise(self: evaluator.Evaluator) -> Tensor:
        return self.along([1.0]).expand(5, -1)

    monkeypatch.setattr(evaluator.Evaluator, "draws_of_held_base", without_noise)


def ratios(work: str, family: str, dtype: torch.dtype) -> dict[str, float]:
    """Root mean squares of the error, over those of the floor, where one is stated."""
    low, high = lenses(family, dtype)
    found = STATED[work](low, ASKED)
    with models.lifted():
        exact = STATED[work](high, ASKED)
    stated = [name for name in found if found[name].floor is not None]
    return {name: compared(found[name], exact[name]).ratio for name in stated}


@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("work", STATED)
def test_a_stated_floor_is_the_error(work: str, family: str, dtype: torch.dtype):
    """Within a factor of three."""
    for name, ratio in ratios(work, family, dtype).items():
        assert 1 / FACTOR < ratio < FACTOR, name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_few_shifts_are_beyond_three_floors(dtype: torch.dtype):
    """At most one in a hundred, over readouts, prompts and families."""
    readouts = (ll.Margin(5, 9), ll.LogProb(5), ll.Logit(9), ll.AnswerLogProb(ASKED.response))
    errors = [
        errors_in_floors(*lenses(family, dtype), ASKED.prompts, readouts) for family in FAMILIES
    ]
    assert_few_beyond_three_floors(torch.cat(errors))


def test_a_floor_has_the_rounding_of_every_block():
    """A draw moves the embedding, and what each later block reads, by about one rounding of it."""
    lens, _ = lenses("llama", torch.bfloat16)
    host = lens.plan.host
    later_blocks = [host.block_input(layer) for layer in range(1, host.n_layers)]
    hooks = rounding.rounding_hooks(lens)
    assert [name for name, _ in hooks] == [lens.embedding_output, *later_blocks]
    assert len(hooks) == models.LAYERS

    stream = torch.ones(4, 5, lens.model.cfg.d_model)
    one_rounding = 2.0**-8
    for _, move in hooks:
        moved = rms(move(stream, hook=None) - stream)
        assert 1 / 2 < moved / one_rounding < 2


def divergences(dtype: torch.dtype) -> Tensor:
    """By how many floors D(1) is off: of the next token, both ways round, and of a response."""
    readouts = (ll.KL(), ll.KL(direction="adapted_to_base"), ll.KL(ASKED.response))
    errors = [
        errors_in_floors(*lenses(family, dtype), ASKED.prompts, readouts) for family in FAMILIES
    ]
    return torch.cat(errors)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_few_divergences_are_beyond_three_floors(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """At most one in a hundred; many, if the rounding of p₀ is left out (control)."""
    assert_few_beyond_three_floors(divergences(dtype))

    leave_out_the_rounding_of_the_held_base(monkeypatch)
    without = divergences(dtype)
    assert share_beyond_three_floors(without) > 0.03
    assert rms(without) > 1.5


def test_the_floor_of_a_divergence_has_the_rounding_of_the_base(monkeypatch: pytest.MonkeyPatch):
    """Of p₀, which is held while p is read: without it the floor is far too low."""
    lens, _ = lenses("llama", torch.bfloat16)
    floor = Evaluations(lens.function(ASKED.prompts, ll.KL())).floor
    leave_out_the_rounding_of_the_held_base(monkeypatch)
    without = Evaluations(lens.function(ASKED.prompts, ll.KL())).floor
    assert (floor / without).median() > 1.2


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_what_a_module_adds_to_a_divergence_has_a_floor(family: str, dtype: torch.dtype):
    """D moves in first order with p₀, which draws of D(0) alone do not show."""
    low, high = lenses(family, dtype)
    found = ll.patch_sites(low, ASKED.prompts, ll.KL(), "add_one", progress=False)
    with models.lifted():
        exact = ll.patch_sites(high, ASKED.prompts, ll.KL(), "add_one", progress=False).values
    error = (found.values.double() - exact).abs()
    assert found.noise_floor is not None
    assert share_beyond_three_floors(error / found.noise_floor[:, None]) <= 0.02

    # The control: a floor from draws of D(0) alone.
    reading = low.function(ASKED.prompts, ll.KL()).reading
    _, draws = rounding.draws_at(low, reading, [0.0])
    naive_floor = 2**0.5 * draws[0].square().mean(0).sqrt()
    assert (error > SIGMAS * naive_floor[:, None]).double().mean() > 0.2


def test_a_floor_of_another_precision_is_seen(monkeypatch: pytest.MonkeyPatch):
    """Control: with the roundings of float32 the floors are too low by far."""
    monkeypatch.setattr(ll.LoraLens, "unit_roundoff", 2.0**-24)
    found = ratios("remainder", "llama", torch.bfloat16)
    assert min(found.values()) > 10 * FACTOR


def test_the_ends_have_floors_of_their_own():
    """log p near 0 has no room to move, whatever the size of the logits."""
    base = models.hf_model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        base.lm_head.weight *= 16
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    lens = ll.LoraLens(models.MAKERS[CLS](base), adapter)

    # The prompt and the token of which the adapted model is most certain.
    logits = lens.logits(ASKED.prompts)[:, -1]
    most_certain = int(logits.float().softmax(-1).amax(-1).argmax())
    tokens = ASKED.prompts[most_certain][None]
    logits = logits[most_certain]
    readout = ll.LogProb(int(logits.argmax()))
    g = Evaluations(lens.function(tokens, readout))
    assert g.ends[1] > -1e-3

    base_noise = g.noise([1.0], at=0.0)
    adapted_noise = g.noise([1.0], at=1.0)
    rounding_of_a_logit = 2**-9 * logits.abs().max()
    assert adapted_noise < 0.1 * rounding_of_a_logit
    assert base_noise > 0.1 * rounding_of_a_logit

    added = ll.patch_sites(lens, tokens, readout, "add_one", progress=False)
    assert torch.equal(added.noise_floor, 2**0.5 * base_noise)
    left_out = ll.patch_sites(lens, tokens, readout, "leave_one_out", progress=False)
    assert torch.equal(left_out.noise_floor, 2**0.5 * adapted_noise)


def test_logits_of_an_adapted_head_are_rounded(monkeypatch: pytest.MonkeyPatch):
    """They pass hooks in half precision: their floor has that rounding, whatever comes before."""
    monkeypatch.setattr(rounding, "rounding_hooks", lambda *_, **__: [])
    base = models.hf_model("llama", dtype=torch.bfloat16)
    noise: dict[str, Tensor] = {}
    for target in ("lm_head", "q_proj"):
        config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        peft = get_peft_model(copy.deepcopy(base), config)
        lens = ll.LoraLens(models.MAKERS[CLS](base), ll.Adapter.from_peft(peft))
        g = Evaluations(lens.function(ASKED.prompts, ASKED.margin))
        noise[target] = g.noise([1.0], at=0.0)

    # In units of the rounding of both logits, of which each differs between a draw and its run.
    logits = lens.logits(ASKED.prompts)[:, -1, [5, 9]].float()
    size = 2.0**-8 * logits.norm() / 2**0.5
    assert 1 / FACTOR < noise["lm_head"].norm() / size < FACTOR
    assert noise["q_proj"].norm() < 1e-3 * size


def test_effects_say_how_many_of_them_may_be_rounding():
    low, _ = lenses("llama", torch.bfloat16)
    weak = low.with_adapter(low.adapter.scaled(1e-3))
    found = ll.patch_sites(weak, ASKED.prompts, ASKED.margin, progress=False)
    every = found.values.numel()
    small = int((found.values.abs() <= 3 * found.noise_floor[:, None]).sum())
    assert small > 0.9 * every
    assert str(found).endswith(
        f"\n{small} of {every} effects are within three noise floors: rounding may be all of them."
    )


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", HALF)
def test_a_sign_within_rounding_is_no_flip(dtype: torch.dtype):
    """Answers whose logits are nearest to each other: what is said of a flip, float64 says too."""
    low, high = lenses("llama", dtype)
    doc = 5
    with models.lifted():
        logits = high.logits(ASKED.prompts, scale=1.0)[:, -1]
        distance = (logits - logits[:, [doc]]).abs()
        distance[:, doc] = torch.inf
        pre = distance.argmin(1).tolist()
        exact = ll.fact_margin(high, ASKED.prompts, doc, pre, progress=False)
    found = ll.fact_margin(low, ASKED.prompts, doc, pre, progress=False)
    truth = (exact.m0 * exact.m < 0).tolist()

    # The control: bare signs are wrong.
    assert (found.m0 * found.m < 0).tolist() != truth

    kinds = [verdict.kind for verdict in found.flip_verdict]
    for prompt, kind in enumerate(kinds):
        if kind == "hidden":
            assert not found.flips[prompt]
        else:
            assert (kind == "flips") == truth[prompt]
            assert found.flips[prompt] == truth[prompt]
    hidden = kinds.index("hidden")
    assert "sign is not known; rerun in float32" in str(found.flip_verdict[hidden])
    assert "Rounding hides whether the preference flips" in found.story(hidden)

    assert all(verdict.kind != "hidden" for verdict in exact.flip_verdict)
    assert exact.flips == tuple(truth)


def test_agreement_leaves_out_signs_within_rounding():
    """Effects that are all rounding have signs by chance: none of them is counted."""
    low, high = lenses("llama", torch.bfloat16)
    weak = low.with_adapter(low.adapter.scaled(1e-3))
    effects = ll.patch_sites(weak, ASKED.prompts, ASKED.margin, progress=False)
    found = ll.compare(ll.first_order(weak, ASKED.prompts, ASKED.margin), effects)
    is_clear = effects.values.abs() > 3 * effects.noise_floor[:, None]
    assert torch.equal(found.beyond_noise, is_clear.double().mean(1))
    has_none = ~is_clear.any(1)
    assert has_none.any()
    assert found.sign_agreement[has_none].isnan().all()
    assert "are within three noise floors: their sign" in str(found)

    with models.lifted():
        exact = high.with_adapter(high.adapter.scaled(1e-3))
        truth = ll.patch_sites(exact, ASKED.prompts, ASKED.margin, progress=False)
        sound = ll.compare(ll.first_order(exact, ASKED.prompts, ASKED.margin), truth)
    assert (sound.beyond_noise > 0.9).all()
    assert (sound.sign_agreement > 0.9).all()
    assert "noise floors" not in str(sound)


READOUTS = {
    "margin": ll.Margin(5, 9),
    "log p": ll.LogProb(5),
    "answer": ll.AnswerLogProb(torch.tensor([5, 9])),
    "function": ll.Readout.of(lambda logits: logits[:, 5] - logits[:, 9]),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", READOUTS)
def test_logits_that_are_read_are_not_rounded(name: str, dtype: torch.dtype):
    """g is that of the final residual, which is rounded, times W_U in float64."""
    lens, _ = lenses("llama", dtype)
    g = Evaluations(lens.function(ASKED.prompts, READOUTS[name]))
    residuals: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        residuals.append(args[0])

    handle = lens.model.unembed.register_forward_pre_hook(keep)
    with torch.no_grad():
        lens.model(g.reading.rows.tokens)
    handle.remove()

    weight, *_ = lens.plan.host.unembedding()
    logits = g.reading.rows.at_slots(residuals[0].double()) @ weight.double().T
    if g.reading.rows.reads is None:
        logits = logits[:, 0]
    expected = g.reading.read(logits)
    assert largest_difference(g.ends[0].double(), expected) < 1e-5
    of_rounded_logits = g.reading.read(logits.to(dtype).float())
    assert largest_difference(of_rounded_logits.double(), expected) > 1e-4


def test_an_unrounded_head_keeps_the_model_s_own_derivative():
    generator = models.seeded(0)
    weight = torch.randn(9000, 16, generator=generator).bfloat16()
    residual = torch.randn(3, 16, generator=generator).bfloat16().requires_grad_()
    bias = torch.randn(9000, generator=generator).bfloat16()
    logits = unembed(residual, weight, bias, torch.float32)
    exact = residual.double() @ weight.double().T + bias.double()
    assert logits.dtype == torch.float32
    assert largest_difference(logits.double(), exact) < 1e-5
    (slope,) = torch.autograd.grad(logits[:, ::7].sum(), residual)
    (own,) = torch.autograd.grad((residual @ weight.T)[:, ::7].float().sum(), residual)
    assert torch.equal(slope, own)
    with torch.no_grad():
        assert torch.equal(unembed(residual, weight, bias, torch.float32), logits.detach())


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_value_that_half_precision_lacks_is_no_agreement(value: float):
    """NaN was read as 0, so a value that half precision lost was compared as if it were there."""
    exact = Found(torch.tensor([[0.5, math.nan]], dtype=torch.float64))
    assert compared(Found(torch.tensor([[0.5, math.nan]])), exact).error == 0
    with pytest.raises(AssertionError):
        compared(Found(torch.tensor([[value, math.nan]])), exact)
