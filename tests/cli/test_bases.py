"""The base by name: each error has the remedy of its own cause, in Python and in the shell."""

from __future__ import annotations

import json
import re
import shutil
from unittest.mock import Mock

import huggingface_hub
import models
import pytest
import torch
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora.errors import ModelStateError

run = CliRunner().invoke
NAMED = "The adapter names it as its base"
ASKED = ["--prompt", "w5 w6", "--doc", " w9", "--pre", " w26", "--fast", "--quiet"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base with its tokenizer, and an adapter that names it."""
    folder = tmp_path_factory.mktemp("bases")
    base = models.hf_model("llama", dtype=torch.float32)
    base.save_pretrained(folder / "base")
    models.tokenizer().save_pretrained(folder / "base")
    peft = models.peft_model("llama", base)
    peft.peft_config["default"].base_model_name_or_path = str(folder / "base")
    peft.save_pretrained(folder / "lora")
    return folder


def naming(folders, tmp_path, base: object):
    """The adapter, naming this base."""
    adapter = tmp_path / "lora"
    shutil.copytree(folders / "lora", adapter, dirs_exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


def told(command: list[object]) -> str:
    """What a command that fails prints of it."""
    result = run(cli.app, [*map(str, command)])
    assert result.exit_code == 2, result.output
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.stderr).split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there_is_not_the_base_s_fault(folders, tmp_path):
    with pytest.raises(ModelStateError, match="'cuda' cannot be used") as caught:
        ll.load(None, folders / "lora", device="cuda")
    assert "base" not in str(caught.value)
    page = ["--report", tmp_path / "page.html"]
    text = told(["explain", folders / "lora", *ASKED, *page, "--device", "cuda"])
    assert "'cuda' cannot be used" in text and "base" not in text


def test_a_base_that_is_not_there_has_the_remedy_of_whoever_named_it(folders, tmp_path):
    adapter, gone = naming(folders, tmp_path, tmp_path / "gone"), str(tmp_path / "gone")
    with pytest.raises(ModelStateError, match=f"{gone}: neither a folder nor") as caught:
        ll.load(None, adapter)
    assert str(caught.value).endswith(f"{NAMED}; pass another as the first argument.")
    with pytest.raises(ModelStateError, match="neither a folder nor") as caught:
        ll.load(gone, adapter)
    assert NAMED not in str(caught.value)
    page = ["--report", tmp_path / "page.html"]
    text = told(["explain", adapter, *ASKED, *page])
    assert text.endswith(f"{NAMED}; name another with --model.")
    assert NAMED not in told(["explain", adapter, *ASKED, *page, "--model", gone])


def test_a_base_that_only_the_adapter_names_is_not_fetched(folders, tmp_path, monkeypatch):
    """Whoever made the adapter wrote that name; a user who names the base has it fetched."""
    fetched: list[str] = []

    def download(name, allow_patterns, local_files_only):
        del allow_patterns
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no snapshot")
        fetched.append(name)
        raise huggingface_hub.errors.RepositoryNotFoundError("no network", response=Mock())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    adapter = naming(folders, tmp_path, "owner/base")
    fact = "owner/base: not on this machine, and no base is fetched that you have not named"
    with pytest.raises(ModelStateError, match=fact) as caught:
        ll.load(adapter)
    assert str(caught.value).endswith(
        f"{NAMED}; to fetch it, pass it: ll.load('owner/base', adapter)."
    )
    page = ["--report", tmp_path / "page.html"]
    text = told(["explain", adapter, *ASKED, *page])
    assert text.endswith(f"{NAMED}; to fetch it, name it: --model owner/base.") and not fetched
    with pytest.raises(ModelStateError, match="neither a folder nor a reachable hub id"):
        ll.load("owner/base", adapter)
    assert fetched == ["owner/base"]


DAMAGES = {
    "weights": ("model.safetensors", "transformers cannot load its weights"),
    "tokenizer": ("tokenizer.json", "transformers cannot load its tokenizer"),
}


@pytest.mark.parametrize("file, fact", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_in_a_base_is_named(folders, tmp_path, file, fact):
    """It was told to be no causal language model, or another library's error came through."""
    base = tmp_path / "base"
    shutil.copytree(folders / "base", base)
    (base / file).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{damaged")
    with pytest.raises(ModelStateError, match=f"base: {fact}") as caught:
        ll.load(None, naming(folders, tmp_path, base))
    assert NAMED not in str(caught.value) and caught.value.__cause__ is not None


def test_an_adapter_s_folder_is_no_base(folders):
    """transformers would load the base that it names, with the adapter in it."""
    with pytest.raises(ModelStateError, match="lora holds an adapter.*the base alone"):
        ll.load(str(folders / "lora"), folders / "lora")
    text = told(["inspect", folders / "lora", "--model", folders / "lora"])
    assert text.endswith("Name the base alone with --model.")


def test_another_kind_of_model_is_no_base(folders, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelStateError, match=r"that transformers can read \(its model_type is"):
        ll.load(str(tmp_path), folders / "lora")
