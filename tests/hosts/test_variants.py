"""Decoders that TransformerLens makes and cannot run as it makes them: exact by `ll.load`.

The oracle is PEFT's active adapter on the Hugging Face model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import architectures
import cases
import models
import pytest
import reference
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lens_lora as ll

pytestmark = [models.NEEDS_BRIDGE, pytest.mark.usefixtures("float64")]
MARGIN = ll.Margin(5, 9)


def _opt(**options: Any) -> hf.PreTrainedModel:
    sizes = {
        "vocab_size": models.VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": models.LAYERS,
        "ffn_dim": 24,
        "num_attention_heads": 4,
        "max_position_embeddings": models.CONTEXT,
        "word_embed_proj_dim": 16,
    }
    return hf.OPTForCausalLM(hf.OPTConfig(**{**sizes, **options}))


def _codegen() -> hf.PreTrainedModel:
    sizes = {"n_positions": models.CONTEXT, "n_ctx": models.CONTEXT, "n_embd": 16, "n_layer": 2}
    config = hf.CodeGenConfig(**sizes, n_head=4, rotary_dim=2, n_inner=24, vocab_size=models.VOCAB)
    return hf.CodeGenForCausalLM(config)


def _granite_hybrid() -> hf.PreTrainedModel:
    """At its default, without any position embedding."""
    _, _, sizes = architectures.ARCHITECTURES["Granite hybrid"]
    config = hf.GraniteMoeHybridConfig(**{**architectures._SIZES, **sizes})
    config._experts_implementation = "eager"
    return hf.GraniteMoeHybridForCausalLM(config)


MADE: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "OPT, norms after": lambda: _opt(do_layer_norm_before=False),
    "OPT-350m": lambda: _opt(do_layer_norm_before=False, word_embed_proj_dim=8),
    "OPT, no last norm": lambda: _opt(_remove_final_layer_norm=True),
    "Granite hybrid": _granite_hybrid,
    "CodeGen": _codegen,
}
OF_OPT = [name for name in MADE if name.startswith("OPT")]


def base_and_peft(name: str) -> tuple[hf.PreTrainedModel, PeftModel]:
    base = models.randomised(MADE[name](), 0, torch.float64)
    linears = [
        path
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear) and not path.endswith("lm_head")
    ]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=linears)
    peft = get_peft_model(copy.deepcopy(base), config).eval()
    return base, models.with_random_factors(peft, base)


def loaded(name: str) -> tuple[PeftModel, ll.LoraLens]:
    base, peft = base_and_peft(name)
    adapter = ll.Adapter.from_peft(peft)
    return peft, ll.load(base, adapter, kind="TransformerBridge", tokenizer=models.tokenizer())


@pytest.mark.parametrize("name", MADE)
def test_logits_and_slopes_are_peft_s(name: str):
    peft, lens = loaded(name)
    tokens = models.tokens()
    with torch.no_grad():
        expected = cases.centred(peft(tokens).logits)
    torch.testing.assert_close(cases.centred(lens.logits(tokens)), expected, rtol=0, atol=1e-11)

    def read(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 5] - logits[:, 9]

    modules = list(lens.adapter.modules)
    assert {site.module for site in lens.sites} == set(modules)
    ours = ll.first_order(lens, tokens, MARGIN, at=1.0).values
    few = modules[:: len(modules) // 3]
    theirs = reference.peft_first_order(peft, tokens, read, few, 1.0)
    for module, value in theirs.items():
        sites = [site.module == module for site in lens.sites]
        torch.testing.assert_close(ours[:, sites].sum(1), value, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["OPT, norms after", "CodeGen"])
def test_a_second_lens_of_one_base_names_the_copy(name: str):
    """Its bridge finds the modules that the first one put into the base."""
    base, peft = base_and_peft(name)
    adapter = ll.Adapter.from_peft(peft)
    options: Any = {"kind": "TransformerBridge", "tokenizer": models.tokenizer()}
    copied = copy.deepcopy(base)
    first = ll.load(base, adapter, **options)
    logits = first.logits(models.tokens())
    with pytest.raises(ll.errors.LensLoraError) as error:
        ll.load(base, adapter, **options)
    assert torch.equal(first.logits(models.tokens()), logits), "the first one goes on working"
    for remedy in ("ll.load(copy.deepcopy(base), adapter)", "lens.with_adapter(adapter)"):
        assert remedy in str(error.value)
    lens = ll.load(copy.deepcopy(copied), adapter, **options)
    again = ll.load(copied, adapter.scaled(0.5), **options).with_adapter(adapter)
    with torch.no_grad():
        expected = peft(models.tokens()).logits
    for made in (lens, again):
        torch.testing.assert_close(made.logits(models.tokens()), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["OPT, norms after", "CodeGen"])
def test_a_base_that_no_lens_could_be_made_of_is_as_it_was(name: str):
    """After a refused adapter: modules, hooks and settings, and the right adapter goes over it."""
    base, peft = base_and_peft(name)
    adapter = ll.Adapter.from_peft(peft)
    wrong = ll.Adapter.from_factors(
        {path: ll.LoRAFactors(f.A[:, 1:], f.B, 1.0) for path, f in adapter.modules.items()}
    )
    modules = list(base.modules())
    hooks = [len(module._forward_hooks) for module in modules]
    attention = base.config._attn_implementation
    options: Any = {"kind": "TransformerBridge", "tokenizer": models.tokenizer()}
    with pytest.raises(ll.errors.AdapterError):
        ll.load(base, wrong, **options)
    assert list(base.modules()) == modules
    assert [len(module._forward_hooks) for module in modules] == hooks
    assert base.config._attn_implementation == attention
    with torch.no_grad():
        expected = peft(models.tokens()).logits
    found = ll.load(base, adapter, **options).logits(models.tokens())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_an_error_over_a_fresh_base_says_nothing_of_a_copy():
    """Negative control: an adapter of another architecture."""
    base, _ = base_and_peft("CodeGen")
    _, peft = base_and_peft("OPT, norms after")
    adapter = ll.Adapter.from_peft(peft)
    with pytest.raises(ll.errors.LensLoraError) as error:
        ll.load(base, adapter, kind="TransformerBridge", tokenizer=models.tokenizer())
    assert "deepcopy" not in str(error.value)


@pytest.mark.parametrize("name", MADE)
def test_interventions_are_peft_s(name: str):
    """With their noise floors, for which the stream is moved at every block."""
    peft, lens = loaded(name)
    tokens = models.tokens()
    site = lens.sites[-1]
    effects = ll.patch_sites(lens, tokens, MARGIN, how="add_one", sites=[site.name])
    with torch.no_grad():
        for path, module in peft.named_modules():
            if hasattr(module, "lora_B") and not path.endswith(site.module):
                module.lora_B["default"].weight.zero_()
        added = peft(tokens).logits[:, -1]
        with peft.disable_adapter():
            base = peft(tokens).logits[:, -1]
    expected = (added - base)[:, 5] - (added - base)[:, 9]
    torch.testing.assert_close(effects.values[:, 0], expected, rtol=0, atol=1e-11)
    assert bool((effects.noise_floor < 1e-12).all())


@pytest.mark.parametrize("name", MADE)
def test_activations_are_those_of_the_merged_model(name: str):
    """With a hook at every point, which must change nothing, and none fails at."""
    peft, lens = loaded(name)
    tokens = models.tokens()
    with torch.no_grad():
        expected = cases.centred(peft(tokens).logits)
        with lens.applied() as model:
            logits, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(cases.centred(logits), expected, rtol=0, atol=1e-11)
    merged = architectures.bridge(copy.deepcopy(peft).merge_and_unload())
    with torch.no_grad():
        _, of_merged = merged.run_with_cache(tokens)
    assert set(cache) == set(of_merged)
    for point, value in of_merged.items():
        torch.testing.assert_close(cache[point], value, rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", MADE)
def test_generation_is_peft_s(name: str):
    peft, lens = loaded(name)
    text = models.tokens(1, 5)
    said = lens.generate(text, 3, eos_token_id=(), progress=False)
    for _ in range(3):
        with torch.no_grad():
            text = torch.cat([text, peft(text).logits[:, -1:].argmax(-1)], 1)
    assert said.ids[0].tolist() == text[0, 5:].tolist()


@pytest.mark.parametrize("name", [name for name in MADE if name != "OPT-350m"])
def test_a_bridge_that_cannot_run_is_refused_by_name(name: str):
    """As boot_transformers makes it, which is not changed."""
    base, peft = base_and_peft(name)
    place = {"Granite hybrid": "rotary_emb", "CodeGen": "embed_positions"}
    model = models.bridge(base)
    with pytest.raises(ll.errors.ModelStateError, match=place.get(name, "final_layer_norm")) as of:
        ll.LoraLens(model, ll.Adapter.from_peft(peft))
    assert "ll.load" in str(of.value)


def test_a_bridge_of_opt_350m_is_taken_as_it_is():
    """TransformerLens knows that it has a projection in place of a last norm."""
    base, peft = base_and_peft("OPT-350m")
    lens = ll.LoraLens(models.bridge(base), ll.Adapter.from_peft(peft))
    with torch.no_grad():
        expected = peft(models.tokens()).logits
    torch.testing.assert_close(lens.logits(models.tokens()), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", OF_OPT)
def test_what_an_opt_without_a_last_norm_lacks_is_named(name: str):
    """Its entry among the families says what follows what in a stream that is not its own."""
    _, lens = loaded(name)
    tokens = models.tokens()
    with pytest.raises(ll.errors.ModelStateError, match="no norm between its blocks and its head"):
        ll.edges(lens, tokens, MARGIN, progress=False)
    lens.model.enable_compatibility_mode(**models.RAW)
    with pytest.raises(ll.errors.ModelStateError, match="OPTForCausalLM: this model has no"):
        ll.LoraLens(lens.model, lens.adapter)


@pytest.mark.parametrize("name", OF_OPT)
def test_without_a_last_norm_the_stream_s_end_reads_as_the_logits(name: str):
    """No norm is there to be held: what Δh behind the last block reads as is the logits' change."""
    base_model, peft = base_and_peft(name)
    behind_the_stream = peft.base_model.model.model.decoder.project_out
    if behind_the_stream is not None:
        nn.init.zeros_(behind_the_stream.lora_B["default"].weight)
    lens = ll.load(base_model, ll.Adapter.from_peft(peft), tokenizer=models.tokenizer())
    tokens = models.tokens(1)
    point = "blocks.1.hook_resid_post"
    shift = ll.activation_shift(lens, tokens, point, positions=-1)
    with torch.no_grad():
        adapted = peft(tokens).logits[0, -1]
        with peft.disable_adapter():
            base = peft(tokens).logits[0, -1]
    torch.testing.assert_close(shift.readings[point], adapted - base, rtol=0, atol=1e-11)


def test_an_opt_of_the_usual_form_has_its_entry():
    """As a control: what is not built otherwise is read from the table of families."""
    lens = ll.LoraLens(
        models.bridge(models.hf_model("opt")),
        ll.Adapter.from_peft(models.peft_model("opt", models.hf_model("opt"))),
    )
    assert lens.plan.host.final_norm is not None
    assert not lens.plan.host.family.is_probed
