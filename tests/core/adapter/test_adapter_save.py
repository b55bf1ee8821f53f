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
    assert list(one.modules) == list(other.modules)
    assert one.base_model == other.base_model
    for a, b in zip(one.modules.values(), other.modules.values(), strict=True):
        for field in dataclasses.fields(a):
            x = getattr(a, field.name)
            y = getattr(b, field.name)
            if isinstance(x, torch.Tensor):
                assert x.dtype == y.dtype and torch.equal(x, y), field.name
            else:
                assert x == y if x is None else x == pytest.approx(y, rel=1e-15), field.name


def lens_logits(base, adapter: ll.Adapter) -> torch.Tensor:
    """Of the last class, unprocessed."""
    maker = list(models.MAKERS.values())[-1]
    return ll.LoraLens(maker(base), adapter, hf_model=base).logits(models.tokens())


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("family", "target"),
    [(f, t) for f in ("gpt2", "llama", "neox") for t in TARGETS if has(f, t)],
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
    assert largest_difference(found, expected) < EXACT < 0.05 < (found - plain).abs().max()
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
        assert largest_difference(in_peft(base, folder), original(models.tokens()).logits) < EXACT


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
    with torch.no_grad():
        expected = tuned(models.tokens()).logits if rank is None else lens_logits(base, adapter)
    off = cases.centred(found) - cases.centred(expected)
    assert off.abs().max() < 1e-9


# --- pruned adapters


def lens_of(family: str) -> tuple[ll.LoraLens, cases.Case]:
    case = cases.case(family, list(models.MAKERS)[-1], "raw")
    return case.lens, case


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_top_of_an_attribution_is_a_pruned_adapter(family: str, tmp_path):
    """only(top) keeps those modules whole; saved, PEFT computes the lens with the others off."""
    lens, case = lens_of(family)
    top = ll.first_order(lens, models.tokens(), MARGIN).top(3)
    pruned = lens.adapter.only(top)
    assert set(pruned.modules) == set(top["module"])
    assert len(pruned) < len(lens.adapter)
    gates = torch.tensor([float(s.module in set(top["module"])) for s in lens.sites])
    expected = lens.logits(models.tokens(), gates)
    found = in_peft(case.base, pruned.save(tmp_path))
    assert largest_difference(found, expected) < 1e-9
    assert largest_difference(found, lens.logits(models.tokens())) > 1e-2
    assert_same(ll.load_adapter(tmp_path), dataclasses.replace(pruned, name=tmp_path.name))


def test_a_fused_module_is_kept_whole():
    lens, _ = lens_of("gpt2")
    (module,) = {s.module for s in lens.sites if s.name == "blocks.1.attn.k"}
    table = pd.DataFrame({"site": ["blocks.1.attn.k"], "module": [module]})
    assert list(lens.adapter.only(table).modules) == [module]
    assert set(lens.adapter.only(table, "*.0.mlp.c_fc").modules) == {
        module,
        "transformer.h.0.mlp.c_fc",
    }


def test_a_sum_keeps_the_part_that_the_site_names(tmp_path):
    """'site@name' keeps 'path@name' alone; a table without sites keeps every part of a module."""
    _, case = lens_of("llama")
    one = ll.Adapter.from_peft(case.peft)
    both = one.named("a") + one.scaled(-0.5).named("b")
    lens = ll.LoraLens(case.model, both)
    frame = ll.first_order(lens, models.tokens(), MARGIN).to_frame()
    (row,) = [i for i, s in enumerate(frame["site"]) if s == "blocks.0.attn.q@b"][:1]
    path = "model.layers.0.self_attn.q_proj"
    assert list(both.only(frame[row : row + 1]).modules) == [f"{path}@b"]
    assert list(both.only(frame[row : row + 1][["module"]]).modules) == [f"{path}@a", f"{path}@b"]
    with pytest.raises(ll.errors.SiteError, match=r"blocks.0.attn.q@b.*another adapter"):
        one.only(frame[row : row + 1])

    with pytest.raises(
        ll.errors.UnsupportedAdapterError, match=r"two updates.*adapter.only\('\*@name'\)"
    ):
        both.save(tmp_path / "both")
    part = both.only("*@b").save(tmp_path / "b")
    alone = lens.logits(models.tokens(), {"*@b": 1.0})
    assert largest_difference(in_peft(case.base, part), alone) < 1e-9
    apart = one.only("*q_proj").named("a") + one.only("*v_proj").named("b")
    found = in_peft(case.base, apart.save(tmp_path / "apart"))
    assert largest_difference(found, ll.LoraLens(case.model, apart).logits(models.tokens())) < 1e-9


def test_bad_tables():
    lens, _ = lens_of("llama")
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
    first, second = (ll.Adapter.from_factors({m: factors()}) for m in ("l.q", "l.k"))
    first.save(tmp_path)
    (tmp_path / "README.md").write_text("kept")
    assert list(ll.load_adapter(second.save(str(tmp_path))).modules) == ["l.k"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
