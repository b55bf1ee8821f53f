"""Modules, rows and biases that were trained whole: how they are read, added, scaled and saved."""

from __future__ import annotations

import copy
import math
import warnings

import models
import pytest
import torch
from adapter_files import CONFIG, WEIGHTS, rename_keys, saved, set_config
from differences import largest_difference
from safetensors.torch import load_file, save_file
from trained import base_of, in_peft, logits, trained

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
EXACT = 1e-11
PREFIX = "base_model.model."
ONES = torch.ones(2, 3, dtype=torch.float64)
EVERYTHING = {
    "targets": ["q_proj", "v_proj"],
    "modules_to_save": ["lm_head", "norm", "o_proj"],
    "trainable_token_indices": [9, 10, 11, 12],
}


def lens_of(base, adapter: ll.Adapter, **flags) -> ll.LoraLens:
    maker = list(models.MAKERS.values())[-1]
    return ll.LoraLens(maker(base, **flags), adapter, hf_model=base)


@pytest.fixture(scope="module")
def everything():
    """A base, and PEFT's model that trains a bit of all."""
    with models.lifted():
        base = models.hf_model("llama")
        return base, trained("llama", base, **EVERYTHING)


# --- what is read


def test_what_an_adapter_holds(everything, tmp_path):
    """The same live and from the file; each kind of it as PEFT's tensors."""
    _, model = everything
    live = ll.Adapter.from_peft(model)
    read = ll.load_adapter(saved(model, tmp_path))
    assert list(live.modules) == list(read.modules)
    for path, update in live.modules.items():
        other = read.modules[path]
        assert type(update) is type(other)
        if isinstance(update, ll.results.TrainedModule):
            assert torch.equal(update.weight, other.weight)
            assert update.tied == other.tied
    body = model.base_model.model.model
    rows = live.modules["model.embed_tokens"]
    assert rows.tokens.tolist() == [9, 10, 11, 12]
    assert rows.tied
    assert torch.equal(rows.weight, body.embed_tokens.token_adapter.trainable_tokens_delta.default)
    norm = live.modules["model.layers.1.post_attention_layernorm"]
    assert norm.weight.shape == (16,)
    assert norm.bias is None
    assert not norm.tied
    assert repr(read).endswith("13 modules, rank [3], 9 without factors)")


def with_names(key: str) -> str:
    """As a state dictionary has it."""
    for name in ("o_proj", "norm", "lm_head"):
        key = key.replace(f"{name}.weight", f"{name}.modules_to_save.default.weight")
    key = key.replace("tokens_delta", "tokens_delta.default")
    return key.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")


def test_keys_that_carry_the_adapter_s_name(everything, tmp_path):
    """PEFT takes it out when it saves."""
    base, model = everything
    state = set(model.state_dict())
    rename_keys(saved(model, tmp_path), with_names)
    assert set(load_file(tmp_path / WEIGHTS)) <= state
    with pytest.warns(UserWarning, match="its keys carry the adapter's name, 'default'"):
        adapter = ll.load_adapter(tmp_path)
    assert largest_difference(logits(lens_of(base, adapter)), logits(model)) < EXACT


WRAPPED = {
    "torch.compile": lambda key: key.replace(PREFIX, PREFIX + "_orig_mod."),
    "PEFT twice": lambda key: key.replace(PREFIX, PREFIX + PREFIX),
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "a language model's part": lambda key: key.replace(PREFIX, PREFIX + "language_model."),
    "one model too many": lambda key: key.replace(PREFIX, PREFIX + "model."),
}


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_what_wraps_a_model_is_left_out(rename, everything, tmp_path):
    base, model = everything
    rename_keys(saved(model, tmp_path), rename)
    with pytest.warns(UserWarning, match="is read as|lack PEFT's prefix"):
        adapter = ll.load_adapter(tmp_path)
    assert largest_difference(logits(lens_of(base, adapter)), logits(model)) < EXACT


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trained_on_the_model_without_its_head(family: str, tmp_path):
    """AutoModel's paths: 'embed_tokens', 'norm', 'wte', 'ln_f'."""
    base = models.hf_model(family)
    tuned = copy.deepcopy(base)
    body = base.base_model_prefix
    names = ["embed_tokens", "norm"] if family == "llama" else ["wpe", "ln_f"]
    model = trained(family, getattr(tuned, body), modules_to_save=names)
    setattr(tuned, body, model.get_base_model())
    with pytest.warns(UserWarning, match="headless model"):
        adapter = ll.load_adapter(saved(model, tmp_path))
    assert largest_difference(logits(lens_of(base, adapter)), logits(tuned)) < EXACT


def test_biases_beside_copies(tmp_path):
    """bias="all" stores a copy's bias three times, of which PEFT uses one."""
    base = models.hf_model("qwen2")
    model = trained("qwen2", base, targets=["o_proj"], bias="all", modules_to_save=["q_proj"])
    tensors = load_file(saved(model, tmp_path) / WEIGHTS)
    q = f"{PREFIX}model.layers.0.self_attn.q_proj"
    extra = {"bias", "modules_to_save.bias", "original_module.bias"}
    assert {f"{q}.{name}" for name in extra} <= set(tensors)
    for adapter in (ll.Adapter.from_peft(model), ll.load_adapter(tmp_path)):
        for flags in ({}, models.PROCESSED):
            assert (
                largest_difference(logits(lens_of(base, adapter, **flags)), logits(model)) < EXACT
            )
    tensors[f"{q}.modules_to_save.bias"] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ll.errors.AdapterError, match="one tensor, and differ in the file"):
        ll.load_adapter(tmp_path)


def test_parameters_that_the_config_does_not_name(tmp_path):
    """PEFT loads them into the base; so they are updates, and are saved again as that."""
    base = models.hf_model("gpt2")
    folder = saved(trained("gpt2", base, targets=["c_attn"]), tmp_path / "one")
    generator = models.seeded(3)
    tensors = load_file(folder / WEIGHTS)
    for name in ("h.0.mlp.c_fc.weight", "h.1.mlp.c_proj.bias", "ln_f.weight"):
        old = base.get_parameter(f"transformer.{name}")
        noise = 0.3 * torch.randn(old.shape, generator=generator, dtype=torch.float64)
        tensors[f"{PREFIX}transformer.{name}"] = (old + noise).detach()
    save_file(tensors, folder / WEIGHTS)
    adapter = ll.load_adapter(folder)
    expected = in_peft(base, folder)
    assert largest_difference(expected, logits(base)) > 0.1
    assert largest_difference(logits(lens_of(base, adapter)), expected) < EXACT
    again = adapter.save(tmp_path / "two")
    assert largest_difference(in_peft(base, again), expected) < EXACT


def test_one_adapter_of_several():
    """Copies and rows of the named adapter, not of another."""
    base = models.hf_model("llama")
    model = trained("llama", base, targets=["q_proj"], modules_to_save=["lm_head"])
    second = models.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["o_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", second)
    one, two = (ll.Adapter.from_peft(model, name) for name in ("default", "second"))
    assert "lm_head" in one.modules
    assert not any("o_proj" in path for path in one.modules)
    assert "lm_head" not in two.modules
    assert any("o_proj" in path for path in two.modules)
    assert largest_difference(logits(lens_of(base, one)), logits(model)) < EXACT


# --- config and file disagree


def refused(
    folder, *needles: str, kind: type[ll.errors.AdapterError] = ll.errors.AdapterError
) -> None:
    with warnings.catch_warnings(), pytest.raises(kind) as caught:
        warnings.simplefilter("ignore")
        ll.load_adapter(folder)
    for needle in needles:
        assert needle in str(caught.value)


def test_what_the_config_names_and_the_file_lacks(everything, tmp_path):
    _, model = everything
    folder = saved(model, tmp_path)
    set_config(folder, modules_to_save=["lm_head", "norm", "o_proj", "up_proj"])
    refused(folder, "modules_to_save names 'up_proj'", "lacks model.layers.0.mlp.up_proj")
    set_config(folder, modules_to_save=["lm_head", "norm", "o_proj", "classifier"])
    refused(folder, "modules_to_save names 'classifier'", "do not belong together")
    set_config(folder, modules_to_save=["lm_head", "norm", "o_proj", "wte"])
    assert len(ll.load_adapter(folder)) == 13  # GPT-2's name for what a Llama has under another
    set_config(folder, modules_to_save=["lm_head", "norm", "o_proj"], trainable_token_indices=None)
    refused(folder, "model.embed_tokens", "trainable_token_indices gives None")
    set_config(folder, trainable_token_indices={"embed_tokens": [9, 10, 11, 12], "wpe": [1]})
    refused(folder, "the file holds no rows of wpe")


@pytest.mark.parametrize("value", ["lm_head", {"lm_head": 1}, [1], 7], ids=str)
def test_modules_to_save_that_is_no_list(value, everything, tmp_path):
    """A string would be taken letter by letter, and a number ends in Python's own error."""
    _, model = everything
    folder = saved(model, tmp_path)
    set_config(folder, modules_to_save=value)
    refused(folder, f"modules_to_save is {value!r}", "expected a list of module names")


@pytest.mark.parametrize(
    "name", ["lm_head", "layers.0.input_layernorm", "layers.1.self_attn.o_proj"]
)
def test_a_copy_that_is_missing(name: str, everything, tmp_path):
    """PEFT cannot load such a file."""
    base, model = everything
    folder = saved(model, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    save_file({k: t for k, t in tensors.items() if f"{name}.weight" not in k}, folder / WEIGHTS)
    with pytest.raises(KeyError):
        in_peft(base, folder)
    refused(folder, "modules_to_save names", f"lacks {'model.' * ('.' in name)}{name}")


@pytest.mark.parametrize("ids", [[9, 10], [9, 10, 11, 11], [9, 10, 11, -1], [9, 10, 11, "x"], "x"])
def test_ids_that_are_no_rows(ids, everything, tmp_path):
    _, model = everything
    folder = saved(model, tmp_path)
    set_config(folder, trainable_token_indices=ids)
    refused(folder, "model.embed_tokens")


def test_an_id_beyond_the_vocabulary(everything, tmp_path):
    base, model = everything
    folder = saved(model, tmp_path)
    set_config(folder, trainable_token_indices=[9, 10, 11, 61])
    with pytest.raises(ll.errors.AdapterError, match="row of token 61, and the model has 61 rows"):
        lens_of(base, ll.load_adapter(folder))


def test_rows_of_a_head_that_the_config_does_not_name(tmp_path):
    """PEFT stores a tied head's once more; others belong to another config."""
    base = base_of("llama", tied=True)
    model = trained("llama", base, trainable_token_indices=[9, 10])
    folder = saved(model, tmp_path, save_embedding_layers=True)
    tensors = load_file(folder / WEIGHTS)
    key = f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"
    assert largest_difference(logits(lens_of(base, ll.load_adapter(folder))), logits(model)) < EXACT
    tensors[key] += 1
    save_file(tensors, folder / WEIGHTS)
    refused(folder, "lm_head", "lacks it")


UNKNOWN = ["score", "model.layers.0.rotary", "model.layers.0.self_attn.q_proj.lora_C"]


@pytest.mark.parametrize("path", UNKNOWN)
def test_parameters_of_no_known_module(path: str, everything, tmp_path):
    _, model = everything
    folder = saved(model, tmp_path)
    tensors = load_file(folder / WEIGHTS) | {f"{PREFIX}{path}.weight": torch.ones(2, 16).double()}
    save_file(tensors, folder / WEIGHTS)
    refused(folder, "1 tensors are no LoRA factors", f"{path}.weight", "not dropped silently")


# --- arithmetic


def halved(model, base):
    """PEFT's model with half of every update."""
    half = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in half.named_parameters():
            if "modules_to_save" in name or "tokens_delta" in name:
                path = name.removeprefix(PREFIX).replace(".modules_to_save.default", "")
                if "tokens_delta" in name:
                    old = base.model.embed_tokens.weight[EVERYTHING["trainable_token_indices"]]
                else:
                    old = base.get_parameter(path)
                p.copy_((p + old) / 2)
        for module in half.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] /= 2
    return half


def test_half_of_everything(everything, tmp_path):
    """`scaled`, and gates of ½, are the base plus half of each change; PEFT cannot hold that."""
    base, model = everything
    expected = logits(halved(model, base))
    adapter = ll.Adapter.from_peft(model)
    assert largest_difference(logits(lens_of(base, adapter.scaled(0.5))), expected) < EXACT
    found = lens_of(base, adapter).logits(models.tokens(), 0.5)
    assert largest_difference(found - found.mean(-1, keepdim=True), expected) < EXACT
    with pytest.raises(
        ll.errors.UnsupportedAdapterError, match="0.5 times an update that holds a module"
    ):
        adapter.scaled(0.5).save(tmp_path)
    with pytest.raises(ll.errors.AdapterError, match="scale is zero"):
        adapter.only("lm_head").scaled(0).save(tmp_path)


def test_parts_and_sums(everything):
    """The parts of an adapter add up to it where no module is in two of them."""
    base, model = everything
    adapter = ll.Adapter.from_peft(model)
    globs = ("lm_head", "*norm")
    one = adapter.only(*globs)
    other = adapter.without_modules(*globs).named("rest")
    assert len(one) == 6
    assert len(one) + len(other) == len(adapter)
    assert largest_difference(logits(lens_of(base, one + other)), logits(model)) < EXACT
    twice = lens_of(base, adapter.only("lm_head") + adapter.only("lm_head").named("again"))
    assert {site.name for site in twice.sites} == {"unembed@default", "unembed@again"}
    half = {"unembed@default": 0.5, "unembed@again": 0.5}
    alone = lens_of(base, adapter.only("lm_head")).logits(models.tokens())
    assert largest_difference(twice.logits(models.tokens(), half), alone) < EXACT


def test_a_part_is_saved_as_peft_has_it(everything, tmp_path):
    """Without any factors too; nothing else is in the file."""
    base, model = everything
    part = ll.Adapter.from_peft(model).only("lm_head", "*norm", "*embed_tokens")
    folder = part.save(tmp_path)
    assert not any("lora_" in key for key in load_file(folder / WEIGHTS))
    expected = logits(lens_of(base, part))
    assert (
        largest_difference(in_peft(base, folder), expected)
        < EXACT
        < 0.1
        < largest_difference(expected, logits(base))
    )
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_what_needs_the_base_says_so(everything):
    """‖ΔW‖ without a lens, and null adapters."""
    adapter = ll.Adapter.from_peft(everything[1])
    head = adapter.modules["lm_head"]
    with pytest.raises(ll.errors.AdapterError, match=r"lens\.delta_w"):
        head.norm()
    assert head.bias_norm() == 0.0
    assert math.isnan(ll.results.TrainedModule(bias=torch.ones(3).double()).bias_norm())
    with pytest.raises(ll.errors.UnsupportedAdapterError, match="trained whole"):
        adapter.null(0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("fields", "needle"),
    [
        ({}, "neither"),
        ({"weight": ONES[None]}, r"weight is \(1, 2, 3\)"),
        ({"weight": ONES / 0}, "NaN"),
        ({"weight": ONES.to(torch.int8)}, "floating point"),
        ({"weight": 1e300 * ONES}, "too large"),
        ({"bias": ONES}, "expected a vector"),
        ({"weight": ONES, "tokens": torch.tensor([1])}, "one row each"),
        ({"weight": ONES, "tokens": torch.tensor([1, 1])}, "each once"),
        ({"weight": ONES, "tokens": [1, 2]}, "tensor of ids"),
        ({"weight": ONES, "strength": math.inf}, "finite number"),
    ],
)
def test_tensors_that_do_not_fit_together(fields, needle):
    with pytest.raises(ll.errors.AdapterError, match=needle):
        ll.results.TrainedModule(**fields)
