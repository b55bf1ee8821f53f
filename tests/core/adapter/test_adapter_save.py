"""Saved adapters: PEFT loads them and computes the lens' logits; pruned ones too; or a refusal."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path

import cases
import models
import pandas as pd
import peft
import pytest
import torch
from differences import largest_difference
from safetensors.torch import load_file
from targets import TARGETS, has, peft_with

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
EXACT = 1e-11
MARGIN = ll.Margin(5, 9)


def in_peft(base, folder: Path) -> torch.Tensor:
    """Logits of the Hugging Face base with the saved adapter active: the oracle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
        missing = peft.utils.save_and_load.set_peft_model_state_dict(
            loaded, peft.utils.save_and_load.load_peft_weights(str(folder))
        )
    assert not missing.unexpected_keys
    assert not [key for key in missing.missing_keys if "lora_" in key]
    with torch.no_grad():
        return loaded(models.tokens()).logits


def assert_same(one: ll.Adapter, other: ll.Adapter) -> None:
    """The same modules with the same factors, to the last bit; scales up to one rounding."""
    assert list(one.modules) == list(other.modules)
    assert one.base_model == other.base_model
    for path, update in one.modules.items():
        for field in dataclasses.fields(update):
            value = getattr(update, field.name)
            expected = getattr(other.modules[path], field.name)
            if isinstance(value, torch.Tensor):
                assert value.dtype == expected.dtype, field.name
                assert torch.equal(value, expected), field.name
            elif isinstance(value, float):
                assert value == pytest.approx(expected, rel=1e-15), field.name
            else:
                assert value == expected, field.name


def lens_logits(base, adapter: ll.Adapter) -> torch.Tensor:
    """Logits of a lens over the unprocessed model, of the last class of hooked models."""
    make = list(models.MAKERS.values())[-1]
    return ll.LoraLens(make(base), adapter, hf_model=base).logits(models.tokens())


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("family", "target"),
    [
        (family, target)
        for family in ("gpt2", "llama", "neox")
        for target in TARGETS
        if has(family, target)
    ],
)
def test_peft_loads_what_was_saved(family: str, target: str, tmp_path):
    """Every target: the PEFT model's own logits, the lens' logits, and the same factors back."""
    base = models.hf_model(family)
    original = peft_with(family, base, target)
    adapter = ll.Adapter.from_peft(original)
    folder = adapter.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
    with torch.no_grad():
        expected = original(models.tokens()).logits
        plain = base(models.tokens()).logits
    found = in_peft(base, folder)
    assert largest_difference(found, expected) < EXACT
    assert largest_difference(found, plain) > 0.05
    assert_same(ll.load_adapter(folder), dataclasses.replace(adapter, name="folder"))
    if family == "llama":
        assert largest_difference(lens_logits(base, ll.load_adapter(folder)), found) < 1e-9


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}},
        {"alpha_pattern": {"q_proj": 7, "layers.0.mlp.down_proj": 1.5}, "use_rslora": True},
        {"r": 7, "lora_alpha": 3},
    ],
)
def test_ranks_and_scales_of_each_module(config, tmp_path):
    base = models.hf_model("llama")
    original = models.peft_model("llama", base, **config)
    adapter = ll.Adapter.from_peft(original).scaled(-0.3)
    folder = adapter.save(tmp_path)
    assert_same(ll.load_adapter(folder), dataclasses.replace(adapter, name=tmp_path.name))
    for layer in original.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.scaling["default"] *= -0.3
    with torch.no_grad():
        expected = original(models.tokens()).logits
    assert largest_difference(in_peft(base, folder), expected) < EXACT


def test_whole_alphas_stay_whole_and_the_base_is_named(tmp_path):
    """A plain adapter's config says r and α as PEFT would."""
    base = models.hf_model("llama")
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base, r=3, lora_alpha=5))
    adapter = dataclasses.replace(adapter, base_model="some/base")
    config = json.loads((adapter.save(tmp_path) / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 5)
    assert isinstance(config["lora_alpha"], int)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["base_model_name_or_path"] == "some/base"
    assert sorted(config["target_modules"]) == sorted(adapter.modules)
    assert all(t.dtype == torch.float64 for t in load_file(tmp_path / WEIGHTS).values())


def test_patterns_name_whole_paths(tmp_path):
    """Negative control: 'q_proj' scaled in layer 0 alone must not reach layer 1."""
    base = models.hf_model("llama")
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base, targets=["q_proj", "v_proj"]))
    path = "model.layers.0.self_attn.q_proj"
    modules = {**adapter.modules, path: adapter.modules[path].scaled(4.0)}
    turned = dataclasses.replace(adapter, modules=modules)
    folder = turned.save(tmp_path)
    found = in_peft(base, folder)
    assert largest_difference(found, lens_logits(base, turned)) < 1e-9
    config = json.loads((folder / CONFIG).read_text())
    config["alpha_pattern"] = {"q_proj": next(iter(config["alpha_pattern"].values()))}
    (folder / CONFIG).write_text(json.dumps(config))
    assert largest_difference(in_peft(base, folder), found) > 1e-3


def test_a_path_that_matches_another_is_refused(tmp_path):
    """PEFT's pattern 'a.b' would also match 'x.a.b': never a silently wrong scale."""
    one = torch.ones(1, 1)
    modules = {"a.b": ll.LoRAFactors(one, one, 3.0), "x.a.b": ll.LoRAFactors(one, one, 1.0)}
    modules["c"] = ll.LoRAFactors(one, one, 1.0)
    with pytest.raises(
        ll.errors.UnsupportedAdapterError, match=r"x\.a\.b: PEFT would read its scale as 3"
    ):
        ll.Adapter.from_factors(modules).save(tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("rank", [None, 2])
def test_weight_changes_are_saved_as_lora(rank, tmp_path):
    """A full fine-tune's linear maps, of full rank and cut to one; biases with them."""
    base = models.hf_model("gpt2")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if name.endswith(("c_fc.weight", "c_attn.bias")):
                p.add_(0.2 * torch.randn(p.shape, generator=models.seeded(1), dtype=p.dtype))
    adapter = ll.Adapter.between(base, tuned, rank=rank, progress=False)
    found = in_peft(base, adapter.save(tmp_path))
    if rank is None:
        with torch.no_grad():
            expected = tuned(models.tokens()).logits
    else:
        expected = lens_logits(base, adapter)
    assert largest_difference(cases.centred(found), cases.centred(expected)) < 1e-9


# --- pruned adapters


def raw_case(family: str) -> cases.Case:
    """The case of an unprocessed model, of the last class of hooked models."""
    return cases.case(family, list(models.MAKERS)[-1], "raw")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_top_of_an_attribution_is_a_pruned_adapter(family: str, tmp_path):
    """only(top) keeps those modules whole; saved, PEFT computes the lens with the others off."""
    case = raw_case(family)
    lens = case.lens
    top = ll.first_order(lens, models.tokens(), MARGIN).top(3)
    kept = set(top["module"])
    pruned = lens.adapter.only(top)
    assert set(pruned.modules) == kept
    assert len(pruned) < len(lens.adapter)
    gates = torch.tensor([float(site.module in kept) for site in lens.sites])
    expected = lens.logits(models.tokens(), gates)
    found = in_peft(case.base, pruned.save(tmp_path))
    assert largest_difference(found, expected) < 1e-9
    assert largest_difference(found, lens.logits(models.tokens())) > 1e-2
    assert_same(ll.load_adapter(tmp_path), dataclasses.replace(pruned, name=tmp_path.name))


def test_a_fused_module_is_kept_whole():
    lens = raw_case("gpt2").lens
    module = lens.sites["blocks.1.attn.k"].module
    table = pd.DataFrame({"site": ["blocks.1.attn.k"], "module": [module]})
    assert list(lens.adapter.only(table).modules) == [module]
    with_another = lens.adapter.only(table, "*.0.mlp.c_fc")
    assert set(with_another.modules) == {module, "transformer.h.0.mlp.c_fc"}


def test_a_sum_keeps_the_part_that_the_site_names(tmp_path):
    """'site@name' keeps 'path@name' alone; a table without sites keeps every part of a module."""
    case = raw_case("llama")
    one = ll.Adapter.from_peft(case.peft)
    both = one.named("a") + one.scaled(-0.5).named("b")
    lens = ll.LoraLens(case.model, both)
    frame = ll.first_order(lens, models.tokens(), MARGIN).to_frame()
    of_b = frame[frame["site"] == "blocks.0.attn.q@b"]
    path = "model.layers.0.self_attn.q_proj"
    assert list(both.only(of_b).modules) == [f"{path}@b"]
    assert list(both.only(of_b[["module"]]).modules) == [f"{path}@a", f"{path}@b"]
    with pytest.raises(ll.errors.SiteError, match=r"blocks.0.attn.q@b.*another adapter"):
        one.only(of_b)

    with pytest.raises(
        ll.errors.UnsupportedAdapterError, match=r"two updates.*adapter.only\('\*@name'\)"
    ):
        both.save(tmp_path / "both")
    part = both.only("*@b").save(tmp_path / "b")
    alone = lens.logits(models.tokens(), {"*@b": 1.0})
    assert largest_difference(in_peft(case.base, part), alone) < 1e-9


def test_a_sum_of_adapters_of_different_modules_is_saved(tmp_path):
    """No module has two updates, so the sum is one adapter of PEFT's format."""
    case = raw_case("llama")
    one = ll.Adapter.from_peft(case.peft)
    apart = one.only("*q_proj").named("a") + one.only("*v_proj").named("b")
    found = in_peft(case.base, apart.save(tmp_path))
    expected = ll.LoraLens(case.model, apart).logits(models.tokens())
    assert largest_difference(found, expected) < 1e-9


def test_bad_tables():
    lens = raw_case("llama").lens
    with pytest.raises(ValueError, match=r"'group'.*effects.attribution\(\).top"):
        lens.adapter.only(pd.DataFrame({"group": ["blocks.0.attn.q"]}))
    with pytest.raises(ll.errors.SiteError, match="'model.nothing'.*another adapter"):
        lens.adapter.only(pd.DataFrame({"module": ["model.nothing"]}))
    with pytest.raises(ll.errors.AdapterError, match="adapts no module"):
        lens.adapter.only(pd.DataFrame({"module": []}))


# --- what PEFT's format cannot hold


def factors(**fields) -> ll.LoRAFactors:
    one = torch.ones(4, dtype=torch.float64)
    return ll.LoRAFactors(one[None], one[:, None], **fields)


VECTOR = torch.ones(4, dtype=torch.float64)
REFUSALS = {
    "zero": (
        {"l.q": factors(scale=0.0), "l.v": factors()},
        "l.q: its scale is zero.*adapter.without",
    ),
    "part of a bias": (
        {"l.q": factors(trained_bias=VECTOR, strength=0.5)},
        "l.q: 0.5 times an update that holds a trained bias",
    ),
    "part of DoRA": (
        {"l.q": factors(magnitude=VECTOR, strength=2.0)},
        "l.q: 2 times an update that holds DoRA's magnitude",
    ),
    "mixed DoRA": (
        {"l.k": factors(), "l.q": factors(magnitude=VECTOR)},
        r"l.q is DoRA and l.k is not.*adapter.only",
    ),
    "DoRA with a bias": (
        {"l.q": factors(magnitude=VECTOR, lora_bias=VECTOR)},
        "no DoRA with a lora_bias",
    ),
    "embedding with a bias": ({"m.wte": factors(lora_bias=VECTOR)}, "no embedding with a lora_b"),
    "embedding beside a bias": (
        {"m.wte": factors(), "l.q": factors(lora_bias=VECTOR)},
        "l.q has a lora_bias.*m.wte",
    ),
    "unknown embedding": (
        {"m.tok_embeddings": factors()},
        "an embedding or a linear",
    ),
}


@pytest.mark.parametrize(("modules", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_write_nothing(modules, words: str, tmp_path):
    with pytest.raises(ll.errors.AdapterError, match=words):
        ll.Adapter.from_factors(modules).save(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_strength_is_folded_into_the_scale(tmp_path):
    """Without DoRA or a trained bias, half of an update is an update."""
    half = ll.Adapter.from_factors({"l.q": factors(scale=3.0, lora_bias=VECTOR, strength=0.5)})
    back = ll.load_adapter(half.save(tmp_path)).modules["l.q"]
    assert (back.scale, back.strength) == (1.5, 1.0)
    assert torch.equal(back.lora_bias, VECTOR)


def test_saving_again_replaces(tmp_path):
    first = ll.Adapter.from_factors({"l.q": factors()})
    second = ll.Adapter.from_factors({"l.k": factors()})
    first.save(tmp_path)
    (tmp_path / "README.md").write_text("kept")
    assert list(ll.load_adapter(second.save(str(tmp_path))).modules) == ["l.k"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
