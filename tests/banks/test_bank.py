"""The base's half of first order, contracted with an adapter, is that adapter's first order.

The oracle is `ll.first_order`, which runs the model under the adapter's own lens, and PEFT.
"""

from __future__ import annotations

import dataclasses
import functools

import architectures
import cases
import models
import pytest
import reference
import torch
import transformers
from every_family import EVERY, lens_of
from peft import PeftModel
from targets import EVERY as EVERY_TARGET
from targets import base_for, hooked, peft_with

import lens_lora as ll
from lens_lora.banks import bank as bank_module

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
ROUND_OFF = 1e-9
AXES = [(), ("position",), ("head",), ("rank",), ("position", "head", "rank")]
BRIDGE = list(models.MAKERS)[-1]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert found.shape == expected.shape and torch.equal(found.isnan(), expected.isnan())
    return float((found - expected).nan_to_num().abs().max() / expected.nan_to_num().abs().max())


def bank_of(lens: ll.LoraLens, prompts=None, readout=MARGIN, **options):
    """Of the model under a lens, and not of its adapter."""
    prompts = models.tokens() if prompts is None else prompts
    return ll.bank(lens.model, prompts, readout, hf_model=lens._hf_model, progress=False, **options)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("family", "cls", "flags"), EVERY)
def test_equals_first_order(family: str, cls: str, flags: str):
    """Sixteen families, both classes, raw and processed; whole, and split by every axis."""
    lens = lens_of(family, cls, flags)
    tokens = models.tokens()
    bank = bank_of(lens)
    for by in AXES:
        expected = ll.first_order(lens, tokens, MARGIN, by=by)
        found = bank.first_order(lens.adapter, by=by)
        assert off(found.values, expected.values) < ROUND_OFF
        assert found.sites == expected.sites and torch.allclose(found.base, expected.base)
    svd = {"by": "rank", "gauge": "svd"}
    expected = ll.first_order(lens, tokens, MARGIN, **svd)
    assert off(bank.first_order(lens.adapter, **svd).values, expected.values) < ROUND_OFF


def test_modules_are_named_as_peft_writes_them():
    """A path with the beginning of the names in PEFT's files, or without it."""
    lens = lens_of("llama", BRIDGE, "raw")
    path = "model.layers.0.self_attn.o_proj"
    adapter = lens.adapter.only(path)
    expected = bank_of(lens, modules=path).first_order(adapter).values
    found = bank_of(lens, modules=f"base_model.model.{path}").first_order(adapter).values
    assert torch.equal(found, expected)


def test_an_adapter_is_given_as_itself_a_folder_or_a_lens(tmp_path):
    """The same first order and null adapters of each; a model in its place is refused."""
    lens = lens_of("llama", BRIDGE, "raw")
    bank = bank_of(lens)
    lens.adapter.named("one").save(tmp_path / "one")
    expected = bank.first_order(lens.adapter).values
    nulls = bank.null(lens.adapter, draws=2)
    for given in (lens, tmp_path / "one", str(tmp_path / "one")):
        assert torch.allclose(bank.first_order(given).values, expected)
        assert torch.allclose(bank.null(given, draws=2), nulls)
    with pytest.raises(ll.errors.AdapterError, match="the adapter is a"):
        bank.first_order(lens.model)


SOME = [case for case in EVERY_TARGET if case[0] in ("gpt2", "llama", "gemma2", "neox")]


@functools.cache
def _bank(family: str, cls: str, flags: str, has_base: bool):
    base, model = hooked(family, cls, flags)
    options = {"hf_model": base if has_base else None, "progress": False}
    return ll.bank(model, models.tokens(), MARGIN, **options)


@pytest.mark.sample(5)
@pytest.mark.parametrize(("family", "cls", "flags", "target"), SOME)
def test_every_target_equals_first_order_or_is_refused(family, cls, flags, target):
    """DoRA, embeddings, heads, norms, rows and biases; what a lens refuses, a bank does too."""
    base, model = hooked(family, cls, flags)
    base = base_for(base, flags, target)
    adapter = ll.Adapter.from_peft(peft_with(family, hooked(family, cls, flags)[0], target))
    bank = _bank(family, cls, flags, base is not None)
    try:
        lens = ll.LoraLens(model, adapter, hf_model=base)
    except ll.errors.LensLoraError as refusal:
        with pytest.raises(type(refusal)):
            bank.first_order(adapter)
        return
    for by in ((), ("position", "rank")):
        expected = ll.first_order(lens, models.tokens(), MARGIN, by=by).values
        assert off(bank.first_order(adapter, by=by).values, expected) < ROUND_OFF


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("flags", ["raw", "processed"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equals_differences_of_peft(family: str, cls: str, flags: str):
    """Against central differences in ε of Hugging Face with PEFT's adapter, module by module."""
    case = cases.case(family, cls, flags)
    tokens = models.tokens()
    found = bank_of(case.lens).first_order(case.lens.adapter)
    modules = list(case.lens.adapter.modules)

    def read(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 5] - logits[:, 9]

    oracle = reference.peft_first_order(case.peft, tokens, read, modules, 0.0)
    size = max(float(value.abs().max()) for value in oracle.values())
    for module, expected in oracle.items():
        mine = [i for i, site in enumerate(found.sites) if site.module == module]
        assert (found.values[:, mine].sum(1) - expected).abs().max() < 1e-8 * size, module


@models.NEEDS_NEWEST
@pytest.mark.parametrize("name", ["OLMoE", "Granite MoE", "Falcon", "XGLM", "Mamba"])
def test_decoders_that_no_table_lists(name: str):
    """Sites read from the bridge: stacks of experts, routers, projections taken apart."""
    with architectures.in_float64():
        case = architectures.case(name)
        tokens = models.tokens()
        bank = ll.bank(case.model, tokens, MARGIN, hf_model=case.base, progress=False)
        for by in ((), "rank", "expert"):
            expected = ll.first_order(case.lens, tokens, MARGIN, by=by)
            assert off(bank.first_order(case.lens.adapter, by=by).values, expected.values) < 1e-9


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("flags", ["raw", "processed"])
def test_norms_without_gamma(flags: str):
    """OPT's norms may have neither γ nor β, and then are no modules that an adapter changes."""
    config = transformers.OPTConfig(
        vocab_size=models.VOCAB,
        hidden_size=16,
        num_hidden_layers=models.LAYERS,
        ffn_dim=24,
        num_attention_heads=4,
        max_position_embeddings=models.CONTEXT,
        word_embed_proj_dim=16,
        layer_norm_elementwise_affine=False,
    )
    base = models.randomised(transformers.OPTForCausalLM(config), 0, torch.float64)
    peft = models.peft_model("opt", base)
    tokens = models.tokens()
    adapter = ll.Adapter.from_peft(peft)
    model = models.bridge(base, **cases.FLAGS[flags])
    lens = ll.LoraLens(model, adapter, hf_model=base)
    with torch.no_grad():
        expected = cases.centred(peft(tokens).logits)
    torch.testing.assert_close(cases.centred(lens.logits(tokens)), expected, rtol=0, atol=1e-9)
    found = bank_of(lens).first_order(adapter)
    assert off(found.values, ll.first_order(lens, tokens, MARGIN).values) < ROUND_OFF


def _falcon() -> tuple[transformers.PreTrainedModel, PeftModel]:
    """A family that no table lists, whose q, k and v are one projection."""
    base = architectures.hf_model("Falcon")
    return base, architectures.peft_model("Falcon", base)


@models.NEEDS_BRIDGE
def test_a_lens_has_what_a_bank_needs_of_the_base(tmp_path):
    """Its projections were taken apart and verified before the bridge wrapped the base."""
    base, peft = _falcon()
    lens = ll.load(base, ll.Adapter.from_peft(peft), tokenizer=models.tokenizer())
    tokens = models.tokens()
    expected = ll.first_order(lens, tokens, MARGIN).values
    bank = ll.bank(lens, tokens, MARGIN, progress=False)
    assert off(bank.first_order(lens.adapter).values, expected) < ROUND_OFF
    other = lens.adapter.scaled(0.5)
    assert off(bank.first_order(other).values, expected / 2) < ROUND_OFF
    read = ll.load_bank(bank.save(tmp_path / "bank.safetensors"), lens)
    assert off(read.first_order(lens.adapter).values, expected) < ROUND_OFF


@models.NEEDS_BRIDGE
def test_a_module_that_a_lens_has_not_verified_is_refused():
    base, peft = _falcon()
    adapter = ll.Adapter.from_peft(peft)
    dense = adapter.only("*.self_attention.dense")
    lens = ll.load(base, dense, tokenizer=models.tokenizer())
    bank = ll.bank(lens, models.tokens(), MARGIN, progress=False)
    assert bank.first_order(dense).values.any()
    with pytest.raises(ll.errors.ModelStateError, match="takes the projection apart"):
        bank.first_order(adapter)


def test_a_lens_s_own_bound_of_memory_holds():
    case = cases.case("llama", BRIDGE, "raw")
    lens = case.lens.within(1e9)
    assert ll.bank(lens, models.tokens(), MARGIN, progress=False)._lens.max_memory == 1e9
    with pytest.raises(ll.errors.ArgumentError, match="hf_model was given with a lens"):
        ll.bank(lens, models.tokens(), MARGIN, hf_model=case.base)


RESPONSES = ["w5 w7", "w8 w9 w5"]


@pytest.mark.parametrize("cls", models.MAKERS)
def test_responses_padding_and_several_readouts(cls: str):
    """Texts of two lengths; a margin of two answers has rows of its own."""
    lens = cases.case("qwen2", cls, "processed").lens
    texts = ["w5 w7 w8", "w9 w10 w11 w12"]
    readouts = [
        MARGIN, ll.LogProb("w7"), ll.AnswerLogProb(RESPONSES), ll.AnswerMargin("w5 w7", "w8"),
        ll.Readout.of(lambda logits: logits.softmax(-1).square().sum(-1)),
    ]  # fmt: skip
    bank = bank_of(lens, texts, readouts)
    found = bank.first_order(lens.adapter, by="position")
    expected = ll.first_order(lens, texts, readouts, by="position", progress=False)
    for mine, theirs in zip(found, expected, strict=True):
        assert off(mine.values, theirs.values) < ROUND_OFF
        assert (mine.readout, mine.units) == (theirs.readout, theirs.units)
    alone = [sum(t.nbytes for t in bank_of(lens, texts, r)._held.stacks.values()) for r in readouts]
    assert sum(t.nbytes for t in bank._held.stacks.values()) < 0.9 * sum(alone)  # they share z


@pytest.mark.parametrize("cls", models.MAKERS)
def test_by_token(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    texts = ["w5 w7 w8", "w9 w10 w11 w12"]
    readout = ll.AnswerLogProb(RESPONSES)
    bank = bank_of(lens, texts, readout, by_token=True)
    for by in ("token", ("rank", "token"), ("position",), ()):
        expected = ll.first_order(lens, texts, readout, by=by)
        found = bank.first_order(lens.adapter, by=by)
        assert off(found.values, expected.values) < ROUND_OFF
        assert found.response == expected.response
    with pytest.raises(ll.errors.ArgumentError, match="by_token=True"):
        bank_of(lens, texts, readout).first_order(lens.adapter, by="token")
    with pytest.raises(ll.errors.ArgumentError, match="one response"):
        bank_of(lens, texts, MARGIN, by_token=True)


VALUES = (torch.Tensor, str, int, float, bool, type(None))


def held_values(held: object) -> list[object]:
    """Everything within dataclasses, containers and named tuples that is none of these."""
    if dataclasses.is_dataclass(held):
        parts = [getattr(held, field.name) for field in dataclasses.fields(held)]
    elif isinstance(held, dict):
        parts = [*held.keys(), *held.values()]
    elif isinstance(held, tuple | list):
        parts = list(held)
    else:
        return [held]
    leaves: list[object] = []
    for part in parts:
        leaves += held_values(part)
    return leaves


@pytest.mark.parametrize("by_token", [False, True])
def test_what_a_bank_s_file_holds_are_values(by_token: bool):
    """No method, readout or model, from which a file could not be written, or read elsewhere."""
    lens = cases.case("llama", BRIDGE, "raw").lens
    bank = bank_of(lens, ["w5 w7", "w8"], ll.AnswerLogProb(["w9", "w5 w7"]), by_token=by_token)
    leaves = held_values(bank._held)
    assert len(leaves) > 50
    odd = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, VALUES)}
    assert odd == set()
    (readout,) = bank._held.readouts
    assert [len(tokens) for tokens in readout.response] == ([1, 2] if by_token else [])


def test_within_a_bound_of_memory_and_of_sums():
    """Fewer prompts at a time; sums of adapters have sites of both."""
    lens = cases.case("llama", BRIDGE, "raw").lens
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14 w15", "w20", "w21 w22"]
    expected = ll.first_order(lens, texts, MARGIN, by="position").values
    few = bank_of(lens, texts, max_memory=1e5)
    assert len(few._held.readouts[0].halves) > 1
    assert off(few.first_order(lens.adapter, by="position").values, expected) < ROUND_OFF
    both = lens.adapter + lens.adapter.scaled(0.5).only("*.q_proj").named("half")
    expected = ll.first_order(lens.with_adapter(both), texts, MARGIN).values
    assert off(few.first_order(both).values, expected) < ROUND_OFF


def test_the_exact_shift_is_run_only_where_it_is_asked_for():
    lens = cases.case("llama", BRIDGE, "raw").lens
    bank = bank_of(lens)
    expected = ll.first_order(lens, models.tokens(), MARGIN)
    assert bank.first_order(lens.adapter).shift.isnan().all()
    found = bank.first_order(lens.adapter, exact=True)
    assert off(found.shift, expected.shift) < ROUND_OFF
    assert found.relative_norm == expected.relative_norm and "remainder" in repr(found)


def test_live_factors_leave_no_graph():
    """Those of an adapter in training require gradients; its numbers do not."""
    lens = cases.case("llama", BRIDGE, "raw").lens
    live = ll.Adapter.from_factors({
        key: dataclasses.replace(update, A=update.A.clone().requires_grad_())
        for key, update in lens.adapter.modules.items()
    })  # fmt: skip
    found = bank_of(lens).first_order(live).values
    assert not found.requires_grad
    assert torch.equal(found, bank_of(lens).first_order(lens.adapter).values)


# --- What a bank lacks, and what has changed


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_module_that_the_bank_lacks_is_named(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    bank = bank_of(lens, modules=["*.q_proj", "*.v_proj"])
    part = lens.adapter.only("*.v_proj")
    expected = ll.first_order(lens.with_adapter(part), models.tokens(), MARGIN).values
    assert off(bank.first_order(part).values, expected) < ROUND_OFF
    with pytest.raises(ll.errors.SiteError, match=r"self_attn.k_proj.*lacks this module"):
        bank.first_order(lens.adapter)
    with pytest.raises(ll.errors.SiteError, match="no module of this model matches"):
        bank_of(lens, modules="*.query")


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_folded_value_bias_needs_o(cls: str):
    """The constant part of v is added where o writes; without o it is refused, never left out."""
    lens = cases.case("qwen2", cls, "processed").lens
    adapter = ll.Adapter.from_factors({
        key: dataclasses.replace(factors, lora_bias=torch.ones(len(factors.B)).double())
        for key, factors in lens.adapter.only("*.v_proj").modules.items()
    })  # fmt: skip
    expected = ll.first_order(lens.with_adapter(adapter), models.tokens(), MARGIN, by="position")
    found = bank_of(lens).first_order(adapter, by="position")
    assert off(found.values, expected.values) < ROUND_OFF
    with pytest.raises(ll.errors.SiteError, match="the o of this layer"):
        bank_of(lens, modules="*.v_proj").first_order(adapter)


def _double(tensor: torch.Tensor, hook: object) -> torch.Tensor:
    del hook
    return 2 * tensor


HOOKED = ("blocks.0.attn.hook_pattern", "blocks.0.attn.hook_z", "blocks.0.hook_resid_post")


@models.NEEDS_BRIDGE
def test_hooks_of_transformers_that_only_look_are_no_hooks_of_one_s_own():
    """Once its hidden states were shown, a model of transformers 5 keeps some."""
    lens = lens_of("llama", "TransformerBridge", "raw")
    lens.model.original_model(models.tokens(), output_hidden_states=True, output_attentions=True)
    assert bank_of(lens).first_order(lens.adapter).values.isfinite().all()


@pytest.mark.bad_input
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("name", HOOKED)
def test_hooks_of_one_s_own_are_refused(cls: str, name: str, monkeypatch):
    """When the bank is made, and when it is used; unrefused its numbers would be others."""
    lens = cases.case("gpt2", cls, "processed").lens
    tokens = models.tokens()
    bank = bank_of(lens)
    point = lens.model.hook_dict[name]
    point.add_hook(_double)
    try:
        with pytest.raises(ll.errors.ModelStateError, match="hooks of your own are on the model"):
            bank_of(lens)
        with pytest.raises(ll.errors.ModelStateError, match="not as it was when the bank was made"):
            bank.first_order(lens.adapter)
        expected = ll.first_order(lens, tokens, MARGIN).values
        monkeypatch.setattr(bank_module.Bank, "_require_same_model", lambda self: None)
        assert off(bank.first_order(lens.adapter).values, expected) > 1e-3
    finally:
        point.remove_hooks()
    assert (
        off(bank.first_order(lens.adapter).values, ll.first_order(lens, tokens, MARGIN).values)
        < 1e-9
    )


@pytest.mark.bad_input
@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_changed_base_is_refused(cls: str):
    """A weight, a norm's ε, an adapter that is on the model, a hook of `without`."""
    base = models.hf_model("llama")
    adapter = cases.case("llama", cls, "raw").lens.adapter
    model = models.MAKERS[cls](base)
    bank = ll.bank(model, models.tokens(), MARGIN, progress=False)
    lens = ll.LoraLens(model, adapter)
    before = bank.first_order(adapter).values
    for block in (lens.applied(), lens.ablate_directions(torch.eye(16).double()[:1])):
        with block, pytest.raises(ll.errors.ModelStateError):
            bank.first_order(adapter)
    norm = next(m for m in model.modules() if hasattr(m, "variance_epsilon") or hasattr(m, "eps"))
    name = "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"
    old = getattr(norm, name)
    setattr(norm, name, 0.1)
    with pytest.raises(ll.errors.ModelStateError, match=name):
        bank.first_order(adapter)
    setattr(norm, name, old)
    assert torch.equal(bank.first_order(adapter).values, before)
    weight = next(p for p in model.parameters() if p.ndim > 1)
    with torch.no_grad():
        weight.mul_(1.01)
    with pytest.raises(ll.errors.ModelStateError, match="edited in place.*make the bank anew"):
        bank.first_order(adapter)


@pytest.mark.bad_input
def test_bad_arguments():
    lens = cases.case("llama", BRIDGE, "raw").lens
    bank = bank_of(lens)
    for call, words in (
        (lambda: bank.first_order(lens.adapter, by="layer"), "by='layer'"),
        (lambda: bank.first_order(lens.adapter, gauge="svd"), "decides what a rank is"),
        (lambda: bank.first_order("folder"), "folder: no such folder, nor a hub id"),
        (lambda: bank_of(lens, readout=ll.KL()), "least at ε = 0"),
        (lambda: bank_of(lens, readout=[]), "at least one"),
        (lambda: bank_of(lens, max_memory=-1), "max_memory"),
        (lambda: ll.bank(models.hf_model("llama"), models.tokens(), MARGIN), "has no hook points"),
    ):
        with pytest.raises(ll.errors.LensLoraError, match=words):
            call()


def test_a_planted_error_is_seen():
    """Negative control: one wrong gradient of seventy is far beyond the tolerance."""
    lens = cases.case("llama", BRIDGE, "raw").lens
    bank = bank_of(lens)
    expected = ll.first_order(lens, models.tokens(), MARGIN).values
    (half,) = bank._held.readouts[0].halves
    gradient, _ = next(pairs for place, pairs in half.columns[0].items() if place[0] == "v")[0]
    name, index = gradient
    bank._held.stacks[name][index].mul_(1.001)
    assert off(bank.first_order(lens.adapter).values, expected) > 1e-6


# --- Adapters of the same modules and shapes


@pytest.mark.sample(2)
@pytest.mark.parametrize(("family", "cls", "flags"), EVERY)
def test_a_second_adapter_of_the_same_shapes(family: str, cls: str, flags: str):
    """By the products of the first one's plan: other factors, another scale, some modules."""
    lens = lens_of(family, cls, flags)
    tokens = models.tokens()
    bank = bank_of(lens, readout=[MARGIN, ll.LogProb(3)])
    bank.scan([lens.adapter], progress=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        other = ll.Adapter.from_factors({
            key: dataclasses.replace(u, A=torch.randn_like(u.A), scale=0.3 * u.scale)
            for key, u in lens.adapter.modules.items()
        })  # fmt: skip
    given = [other, other.only(*list(other.modules)[1:4]), other.scaled(-2)]
    given = [adapter.named(f"a{i}") for i, adapter in enumerate(given)]
    frame = bank.scan(given, group="site", progress=False)  # the first and the last together
    for adapter in given:
        expected = ll.first_order(lens.with_adapter(adapter), tokens, MARGIN)
        found, _ = bank.first_order(adapter)
        assert off(found.values, expected.values) < ROUND_OFF and found.sites == expected.sites
        values = frame[frame["adapter"] == adapter.name]["value"].to_numpy()
        scanned = torch.tensor(values).view(2, *expected.values.shape)
        assert off(scanned[0], expected.values) < ROUND_OFF
        assert found.relative_norm == pytest.approx(expected.relative_norm, rel=1e-9)
        assert found.meta == expected.meta


def test_plain_factors_are_contracted_by_kind():
    """One batch for each kind of map, without a copy of what was recorded."""
    lens = cases.case("llama", BRIDGE, "raw").lens
    bank = bank_of(lens)
    bank.scan([lens.adapter], progress=False)
    (reach,) = bank._recorded.reaches
    (plan,) = reach.base.plans.values()
    assert len(plan._groups) == 7 and sum(len(group.sites) for group in plan._groups) == 14
    kept = {stack.untyped_storage().data_ptr() for stack in bank._held.stacks.values()}
    views = [tensor for group in plan._groups for pair in group._columns for tensor in pair]
    assert {view.untyped_storage().data_ptr() for view in views} <= kept


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_null_adapters_are_those_of_a_null_test(family: str):
    """gpt2's q, k and v are one module, whose parts keep their own spectra."""
    lens = cases.case(family, BRIDGE, "processed").lens
    bank = bank_of(lens, readout=[MARGIN, ll.LogProb(3)])
    test = ll.null_test(lens, models.tokens(), MARGIN, draws=3, seed=2, progress=False)
    found, _ = bank.null(lens.adapter, draws=3, seed=2, progress=False)
    assert off(found, test.null) < ROUND_OFF
    with pytest.raises(ll.errors.ArgumentError, match="draws=0"):
        bank.null(lens.adapter, draws=0)
