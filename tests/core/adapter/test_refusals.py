"""A refusal says what a person can do: the call, the command, or the folder to give."""

from __future__ import annotations

import json
import shutil
import warnings

import models
import peft
import pytest
import torch
from adapter_files import CONFIG, WEIGHTS, peft_of, saved, set_config
from differences import largest_difference
from safetensors.torch import load_file, save_file

import lens_lora as ll


@pytest.fixture
def folder(tmp_path):
    """A valid saved adapter, to be spoiled."""
    return saved(peft_of(targets=["q_proj", "v_proj"]), tmp_path / "adapter")


def refusal(path, kind: type[ll.errors.AdapterError] = ll.errors.AdapterError, **where) -> str:
    """What `load_adapter` says."""
    with warnings.catch_warnings(), pytest.raises(kind) as caught:
        warnings.simplefilter("ignore")
        ll.load_adapter(path, **where)
    return str(caught.value)


MERGEABLE = {
    "IA3": peft.IA3Config(target_modules=["v_proj", "up_proj"], feedforward_modules=["up_proj"]),
    "OFT": peft.OFTConfig(target_modules=["q_proj"], r=4, oft_block_size=0),
    "VERA": peft.VeraConfig(target_modules=["q_proj"], r=2),
    "LOHA": peft.LoHaConfig(target_modules=["q_proj"], r=2),
    "LOKR": peft.LoKrConfig(target_modules=["q_proj"], r=2),
    "ADALORA": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "HRA": peft.HRAConfig(target_modules=["q_proj"], r=2),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", MERGEABLE)
@pytest.mark.usefixtures("float64")
def test_the_remedy_of_other_methods_is_exact(kind, tmp_path):
    """Without the base: to pass it. The difference of PEFT's merged model is exact as well."""
    base = models.hf_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(models.hf_model("llama"), MERGEABLE[kind]).eval()
        generator = models.seeded(3)
        with torch.no_grad():
            for name, p in tuned.named_parameters():
                if p.requires_grad and "ranknum" not in name:  # which PEFT does not save
                    p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        tuned.to(torch.float64).save_pretrained(tmp_path)
    message = refusal(tmp_path, ll.errors.UnsupportedAdapterError)
    assert f"an adapter of the method {kind}" in message
    assert "ll.load_adapter(folder, base=AutoModelForCausalLM.from_pretrained(…))" in message
    with torch.no_grad():
        expected = tuned(models.tokens()).logits
        plain = base(models.tokens()).logits
    assert largest_difference(expected, plain) > 1e-3, "control: the adapter changes the model"
    measured = ll.load_adapter(tmp_path, base=base)
    difference = ll.Adapter.between(base, tuned.merge_and_unload(), progress=False)
    maker = list(models.MAKERS.values())[-1]
    for adapter in (measured, difference):
        found = ll.LoraLens(maker(base), adapter, hf_model=base).logits(models.tokens())
        assert largest_difference(found, expected) < 1e-9


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_changed_initialisations(init, folder):
    """Also there the merged model tells, against the true base."""
    set_config(folder, init_lora_weights=init)
    message = refusal(folder, ll.errors.UnsupportedAdapterError)
    assert "path_initial_model_for_weight_conversion" in message
    assert "that training began from: ll.Adapter.between(base, peft_model.merge" in message


def test_a_classifier(folder):
    """By its config, or by a head that the config does not name."""
    set_config(folder, task_type="SEQ_CLS", modules_to_save=["score"])
    said = "a classifier (SEQ_CLS), not a language model"
    assert said in refusal(folder, ll.errors.UnsupportedAdapterError)
    set_config(folder, modules_to_save=None)
    head = {"base_model.model.score.weight": torch.ones(2, 16)}
    save_file({**load_file(folder / WEIGHTS), **head}, folder / WEIGHTS)
    assert said in refusal(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_git_lfs_pointer(name, folder):
    """Either file may never have been fetched."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13648\n"
    (folder / name).write_text(pointer)
    message = refusal(folder)
    assert name in message
    assert "run git lfs pull" in message


def test_an_mlx_folder(folder):
    """Its weights have a name of their own."""
    (folder / WEIGHTS).rename(folder / "adapters.safetensors")
    assert "MLX" in refusal(folder)
    assert "adapters.safetensors" in refusal(folder)
    (folder / CONFIG).write_text(json.dumps({"fine_tune_type": "lora", "num_layers": 16}))
    shutil.copy(folder / "adapters.safetensors", folder / WEIGHTS)
    assert "adapters.safetensors holds its weights" in refusal(folder)


@pytest.mark.parametrize("inner", ["foo", "foo/bar"])
def test_an_adapter_in_a_subfolder(inner, folder, tmp_path):
    """What is proposed works."""
    outer = tmp_path / "outer"
    shutil.copytree(folder, outer / inner)
    assert f"give the folder of one: {outer / inner}." in refusal(outer)
    assert len(ll.load_adapter(outer / inner)) == 4
    assert len(ll.load_adapter(outer, subfolder=inner)) == 4


def test_a_trainer_s_run_folder(folder, tmp_path):
    """The last checkpoint by its step, not by its name."""
    run = tmp_path / "run"
    for step in (15, 105, 30, 45):
        shutil.copytree(folder, run / f"checkpoint-{step}")
    shutil.copytree(folder, run / "best")
    others = "(also checkpoint-45, checkpoint-30, checkpoint-15)"
    assert f"give the folder of one: {run / 'checkpoint-105'} {others}." in refusal(run)


def test_a_subfolder_of_a_hub_repository(monkeypatch, tmp_path):
    """The repository's list of files is asked where the two are not at its top."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    files = ["README.md", f"run/last/{CONFIG}", f"run/last/{WEIGHTS}"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *a, **k: files)
    message = refusal("lab/lora")
    assert message == f"lab/lora: no {CONFIG}; give the folder of one: lab/lora/run/last."
    message = refusal("lab/lora/run/first")
    assert message.endswith(f"no {CONFIG} in run/first; give the folder of one: lab/lora/run/last.")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_in_place_of_its_folder(name, folder):
    message = refusal(folder / name)
    assert "give the folder" in message
    assert str(folder) in message


def test_no_peft_type(folder):
    fields = json.loads((folder / CONFIG).read_text())
    del fields["peft_type"]
    (folder / CONFIG).write_text(json.dumps(fields))
    assert "`peft_type` is missing" in refusal(folder)


def test_alpha_in_quotation_marks(folder):
    set_config(folder, lora_alpha="16")
    assert "lora_alpha is '16', a string" in refusal(folder)
