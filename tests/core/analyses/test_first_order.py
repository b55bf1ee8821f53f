"""Laws of the first-order shift: two routes, parts and wholes, differences, and the oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import models
import pytest
import reference
import torch
from differences import largest_difference

import lens_lora as ll
from lens_lora.core.function.contraction import HeadedMap, Slots, part_deltas

pytestmark = pytest.mark.usefixtures("float64")
ROUND_OFF = 1e-10
MARGIN = ll.Margin(5, 9)
AXES = [(), ("position",), ("head",), ("rank",), ("position", "head", "rank")]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return largest_difference(found, expected) / float(expected.abs().max())


@pytest.mark.sample(6)
@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
@pytest.mark.parametrize("at", [0.0, 1.0])
def test_forward_equals_reverse(family: str, cls: str, flags: str, at: float):
    """The adjoint identity ⟨u, J δz⟩ = ⟨Jᵀu, δz⟩, at both ends."""
    lens = cases.case(family, cls, flags).lens
    tokens = models.tokens()
    reverse = ll.first_order(lens, tokens, MARGIN, at=at)
    forward = ll.first_order(lens, tokens, MARGIN, at=at, mode="forward", progress=False)
    assert relative(forward.values, reverse.values) < ROUND_OFF


@pytest.mark.sample(2)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("by", AXES[1:])
def test_parts_of_both_modes_agree_and_sum_to_the_site(cls: str, by: tuple[str, ...]):
    """Positions, heads and ranks add up to the site, in both modes, on grouped-query attention."""
    for family in ("gpt2", "qwen2"):
        lens = cases.case(family, cls, "processed").lens
        tokens = models.tokens(pos=4)
        whole = ll.first_order(lens, tokens, MARGIN).values
        reverse = ll.first_order(lens, tokens, MARGIN, by=by)
        forward = ll.first_order(lens, tokens, MARGIN, by=by, mode="forward", progress=False)
        assert relative(reverse.per_site, whole) < ROUND_OFF
        assert relative(forward.values, reverse.values) < ROUND_OFF


@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
def test_equals_epsilon_in_the_graph(family: str, cls: str, flags: str):
    """The streamed contraction equals plain autograd on ε, prompt by prompt, half way along."""
    lens = cases.case(family, cls, flags).lens
    tokens = models.tokens()
    fast = ll.first_order(lens, tokens, MARGIN, at=0.5).values
    slow = reference.autograd_first_order(lens, tokens, MARGIN, at=0.5)
    assert relative(fast, slow) < ROUND_OFF


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
@pytest.mark.parametrize("at", [0.0, 1.0])
def test_equals_differences_of_peft(family: str, cls: str, flags: str, at: float):
    """Against central differences of PEFT's own model, module by module."""
    case = cases.case(family, cls, flags)
    tokens = models.tokens()
    found = ll.first_order(case.lens, tokens, MARGIN, at=at)

    def margin(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 5] - logits[:, 9]

    modules = list(case.lens.adapter.modules)
    differences = reference.peft_first_order(case.peft, tokens, margin, modules, at)
    size = max(float(expected.abs().max()) for expected in differences.values())
    for module, expected in differences.items():
        sites = [i for i, site in enumerate(case.lens.sites) if site.module == module]
        of_module = found.values[:, sites].sum(1)
        assert largest_difference(of_module, expected) < 1e-8 * size, module


@pytest.mark.parametrize("cls", models.MAKERS)
def test_joint_tangent_is_the_sum_of_sites(cls: str):
    """Additivity: all sites together move the logits by the sum of what each moves."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    sites = ll.logit_shift(lens, tokens, progress=False)
    joint = ll.logit_shift(lens, tokens, by_site=False)
    assert relative(sites.joint, joint.values) < ROUND_OFF


@pytest.mark.parametrize("cls", models.MAKERS)
def test_logit_shift_holds_every_readout(cls: str):
    """A margin's first order is the difference of two columns of the whole-vocabulary shift."""
    lens = cases.case("neox", cls, "processed").lens
    tokens = models.tokens()
    shift = ll.logit_shift(lens, tokens, progress=False)
    margin = ll.first_order(lens, tokens, MARGIN)
    assert relative(shift.values[..., 5] - shift.values[..., 9], margin.values) < ROUND_OFF
    some = ll.logit_shift(lens, tokens, tokens=["w7", 9], progress=False)
    assert some.tokens == (7, 9)
    assert some.strings == ("w7", "w9")
    assert relative(some.values, shift.values[..., [7, 9]]) < ROUND_OFF


def test_log_prob_and_callables_are_differentiated_too():
    """Nonlinear readouts: log-probability in nats, and any callable."""
    (cls, *_) = models.MAKERS
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    entropy = ll.Readout.of(lambda logits: torch.distributions.Categorical(logits=logits).entropy())
    for readout in (ll.LogProb("w7"), entropy):
        fast = ll.first_order(lens, tokens, readout)
        slow = reference.autograd_first_order(lens, tokens, readout, at=0.0)
        forward = ll.first_order(lens, tokens, readout, mode="forward", progress=False)
        assert relative(fast.values, slow) < ROUND_OFF
        assert relative(forward.values, slow) < ROUND_OFF


@pytest.mark.parametrize("cls", models.MAKERS)
def test_padded_batch_equals_its_prompts_one_by_one(cls: str):
    """Values, ends and margins of a padded batch are those of each prompt alone."""
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14 w15", "w20"]
    for family in models.CORE:
        lens = cases.case(family, cls, "processed").lens

        together = ll.first_order(lens, texts, MARGIN, by="position")
        for i, text in enumerate(texts):
            alone = ll.first_order(lens, text, MARGIN, by="position")
            length = alone.values.shape[-1]
            values = together.values[i : i + 1, ..., :length]
            padding = together.values[i, ..., length:]
            assert relative(values, alone.values) < ROUND_OFF
            assert not padding.any()
            assert torch.allclose(together.adapted[i], alone.adapted[0], rtol=0, atol=1e-10)

        margins = ll.fact_margin(lens, texts, 5, 9, progress=False)
        for i, text in enumerate(texts):
            alone = ll.fact_margin(lens, text, 5, 9, progress=False)
            assert torch.allclose(margins.m[i], alone.m[0], rtol=0, atol=1e-10)
            torch.testing.assert_close(
                margins.flip_scale[i], alone.flip_scale[0], rtol=0, atol=1e-6, equal_nan=True
            )


@pytest.mark.parametrize("cls", models.MAKERS)
def test_left_padding_tokenizer_changes_nothing(cls: str):
    """The tokenizer's own padding side is irrelevant: prompts are padded on the right, unmasked."""
    lens = cases.case("gpt2", cls, "raw").lens
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13"]
    expected = ll.first_order(lens, texts, MARGIN).values
    lens.model.tokenizer.padding_side = "left"
    try:
        assert relative(ll.first_order(lens, texts, MARGIN).values, expected) < ROUND_OFF
    finally:
        lens.model.tokenizer.padding_side = "right"


@pytest.mark.parametrize("cls", models.MAKERS)
def test_components_multiply_to_the_shift(cls: str):
    """a = ‖δz‖ ‖Jᵀu‖ cos, and the gain is the norm of the whole-vocabulary tangent over ‖δz‖."""
    lens = cases.case("gpt2", cls, "processed").lens
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13"]
    parts = ll.components(lens, texts, MARGIN, progress=False)
    assert relative(parts.first_order, ll.first_order(lens, texts, MARGIN).values) < ROUND_OFF
    shift = ll.logit_shift(lens, texts, progress=False).values
    moved = cases.centred(shift).norm(dim=-1)
    assert relative(parts.gain * parts.delta_norm, moved) < ROUND_OFF
    assert (parts.cosine.abs() <= 1).all()
    assert (parts.delta_norm > 0).all()


@pytest.mark.parametrize("cls", models.MAKERS)
def test_component_norms_are_those_of_the_trajectory(cls: str):
    """‖z‖ and ‖δz‖ against activations cached by TransformerLens itself, padding left out."""
    lens = cases.case("llama", cls, "raw").lens
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13"]
    parts = ll.components(lens, texts, MARGIN, progress=False)
    for row, text in enumerate(texts):
        _, cache = lens.model.run_with_cache(lens.prompts(text).tokens)
        for i, site in enumerate(lens.sites):
            if site.kind not in ("o", "down"):
                continue
            z = cache[site.read].flatten(2)
            headed = HeadedMap.of(lens, site.kind, lens.maps[i])
            delta = part_deltas(headed, z, Slots())
            assert torch.allclose(parts.z_norm[row, i], z.norm(), rtol=1e-12)
            assert torch.allclose(parts.delta_norm[row, i], delta.norm(), rtol=1e-12)


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tangents_are_derivatives_of_every_activation(family: str, cls: str):
    """Each cached tangent against a central difference of the cached activation."""
    lens = cases.case(family, cls, "raw").lens
    tokens = models.tokens()

    def activations(scale: float):
        with torch.no_grad(), lens.applied(scale):
            _, cache = lens.model.run_with_cache(tokens)
        return cache

    step = 1e-5
    up = activations(step)
    down = activations(-step)
    moving = 0
    for name, tangent in ll.tangents(lens, tokens).items():
        if "attn_scores" in name or name not in up:
            continue
        difference = (up[name] - down[name]) / (2 * step)
        if not difference.is_floating_point():
            continue
        size = float(difference.abs().max())
        assert largest_difference(tangent, difference) < 1e-6 * max(size, 1.0), name
        moving += size > 1e-3
    assert moving > 20


@pytest.mark.parametrize("cls", models.MAKERS)
def test_tangents_of_one_site_and_some_names(cls: str):
    """A site's direction alone moves nothing before it."""
    lens = cases.case("llama", cls, "raw").lens
    first = lens.sites[0]
    last = next(site for site in lens.sites if site.name == "blocks.1.mlp.down")
    names = [first.write, last.write]
    cache = ll.tangents(lens, models.tokens(), names, scale={last.name: 1.0})
    assert set(cache.keys()) == set(names)
    assert not cache[first.write].any()
    assert cache[last.write].any()


OPTIONS = [
    {},
    {"at": 1.0},
    {"by": ("position", "rank")},
    {"by": "rank", "gauge": "svd"},
    {"mode": "forward"},
    {"mode": "reverse", "at": 0.5},
    {"rules": ll.results.FrozenRules(attention_patterns=True)},
    {"by": "token", "readouts": [ll.AnswerLogProb(["w5 w7", "w8"]), ll.AnswerLogProb("w9 w5 w6")]},
]


@pytest.mark.sample(4)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_list_of_readouts_equals_one_call_each(cls: str, options: dict[str, Any]):
    """Every field of every attribution, whatever the options; a list of one is a tuple of one."""
    lens = cases.case("llama", cls, "raw").lens
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13"]
    options = {**options, "progress": False}
    readouts = options.pop("readouts", [MARGIN, ll.LogProb("w7"), ll.AnswerMargin("w5 w7", "w8")])
    several = ll.first_order(lens, texts, readouts, **options)
    (only,) = ll.first_order(lens, texts, readouts[:1], **options)
    singles = [ll.first_order(lens, texts, readout, **options) for readout in readouts]
    for found, expected in zip([*several, only], [*singles, singles[0]], strict=True):
        assert_same_fields(found, expected)


def assert_same_fields(found: ll.results.Attribution, expected: ll.results.Attribution) -> None:
    for field in dataclasses.fields(found):
        a = getattr(found, field.name)
        b = getattr(expected, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-13, equal_nan=True), field.name
        else:
            assert a == b, field.name


@pytest.mark.bad_input
def test_what_a_list_of_readouts_refuses():
    """What one readout refuses, and groups, which are for one."""
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw").lens
    tokens = models.tokens()
    several = [MARGIN, ll.Logit(3)]
    for readout in (MARGIN, several):
        with pytest.raises(ll.errors.ArgumentError, match="gauge='svd' decides what a rank is"):
            ll.first_order(lens, tokens, readout, gauge="svd")
        with pytest.raises(ll.errors.ArgumentError, match="sideways"):
            ll.first_order(lens, tokens, readout, mode="sideways")
    for divergence in (ll.KL(), [MARGIN, ll.KL()]):
        with pytest.raises(ll.errors.ArgumentError, match="least at ε = 0"):
            ll.first_order(lens, tokens, divergence)
    with pytest.raises(ll.errors.ArgumentError, match="takes one readout, and these are 2"):
        ll.first_order(lens, tokens, several, by="token", group="layer")
    for nothing in ("w7", 3, None, [], ()):
        with pytest.raises(ll.errors.ArgumentError, match=r"ll\.LogProb|at least one"):
            ll.first_order(lens, tokens, nothing)


@pytest.mark.bad_input
def test_bad_arguments_are_refused():
    (cls, *_) = models.MAKERS
    lens = cases.case("llama", cls, "raw").lens
    with pytest.raises(ValueError, match="layer.*position"):
        ll.first_order(lens, models.tokens(), MARGIN, by="layer")
    with pytest.raises(ValueError, match="sideways"):
        ll.first_order(lens, models.tokens(), MARGIN, mode="sideways")


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("family", ["opt", "gptj", "llama"])
def test_fused_attention_is_differentiated_by_its_formula(family: str):
    """Fused kernels have no forward-mode and no second derivative; attention's formula has."""
    base = models.hf_model(family)
    model = models.bridge(base)
    model.original_model.set_attn_implementation("sdpa")
    lens = ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model(family, base)))
    reverse = ll.first_order(lens, models.tokens(), MARGIN)
    forward = ll.first_order(lens, models.tokens(), MARGIN, mode="forward", progress=False)
    assert relative(forward.values, reverse.values) < ROUND_OFF
    assert ll.coupling(lens, models.tokens(), MARGIN, progress=False).asymmetry.max() < 1e-9
