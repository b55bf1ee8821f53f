"""The base by name: each error has the remedy of its own cause, in Python and in the shell."""

from __future__ import annotations

import json
import re
import shutil
from unittest.mock import Mock

import command_line
import huggingface_hub
import limits
import models
import pytest
import torch
from folders import save_naming, saved_llama
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
    base = saved_llama(folder / "base")
    save_naming(models.peft_model("llama", base), folder / "lora", base=folder / "base")
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


# --- The embedded model


@pytest.fixture
def embedded_folder(monkeypatch, tmp_path):
    """The embedded model lies in a folder; the hub's own files are not on this machine."""
    command_line.embedded_model_is_at(monkeypatch, tmp_path)
    return str(tmp_path)


def test_no_base_is_guessed_for_an_adapter_that_names_none(folders, tmp_path):
    adapter = naming(folders, tmp_path, "")
    with pytest.raises(ModelStateError, match="names no base model; pass it as the first argument"):
        ll.load(adapter)
    text = told(["explain", adapter, *ASKED, "--report", tmp_path / "page.html"])
    assert text.endswith("the adapter names no base model; name it with --model.")


ON_A_PROMPT = ["--prompt", "w5 w6", "--doc", " w9", "--pre", " w26"]
# How each command is called with an adapter alone, LORA; None where it loads no base by the
# adapter's name: it has one of its own, takes --model alone, or runs no model.
WITH_AN_ADAPTER_ALONE = {
    "demo": ["LORA", "--report", "OUT/page.html"],
    "explain": ["LORA", *ON_A_PROMPT, "--report", "OUT/page.html"],
    "diff": ["LORA", "--report", "OUT/page.html"],
    "audit": ["OUT/list.yaml", "--out", "OUT/audit"],
    "inspect": None,
    "compare": ["LORA", "LORA"],
    "checkpoints": ["OUT/run", *ON_A_PROMPT, "--report", "OUT/page.html"],
    "repair": ["LORA", *ON_A_PROMPT, "--drop", "OUT/texts.txt", "--out", "OUT/repaired"],
    "verify": ["LORA", "--merged", "OUT"],
    "forms": ["LORA", "--prompt", "w5"],
    "card": ["LORA"],
    "sweep": ["LORA", "--prompts", "OUT/p.jsonl", "--out", "OUT/r.parquet"],
    "scan": ["LORA", *ON_A_PROMPT, "--out", "OUT/s.parquet"],
    "gather": None,
    "plan": None,
}


# One of them is quick; all others together take half a minute.
COMMANDS = [
    pytest.param(name, marks=[] if name == "explain" else [pytest.mark.slow])
    for name in (command.__name__ for command in cli._COMMANDS)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_warns_once_of_embedded_weights(
    folders, tmp_path, monkeypatch, embedded_folder, command
):
    """As Python does; the model itself is not loaded here."""
    asked_for: list[str] = []

    def load_base(place, how=None, *, of_adapter=False):
        asked_for.append(place)
        raise ModelStateError("it is not loaded here")

    limits.bases_are_loaded_by(monkeypatch, load_base)
    adapter = naming(folders, tmp_path, command_line.EMBEDDED_HUB_ID)
    in_python = pytest.warns(ll.errors.LensLoraWarning, match="rounded to 4 bit")
    with in_python, pytest.raises(ModelStateError, match="not loaded here"):
        ll.load(adapter)
    arguments = WITH_AN_ADAPTER_ALONE[command]
    if arguments is None:
        return
    for step in (1, 2):
        shutil.copytree(adapter, tmp_path / f"run/checkpoint-{step}")
    (tmp_path / "texts.txt").write_text("w5 w6\n")
    (tmp_path / "list.yaml").write_text(f"adapters: [{{name: one, adapter: {adapter}}}]\n")
    record = {"prompt": "w5 w6", "doc": " w9", "pre": " w26"}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    asked_for.clear()
    filled = [
        text.replace("LORA", str(adapter)).replace("OUT", str(tmp_path)) for text in arguments
    ]
    result = run(cli.app, [command, *filled])
    words = " ".join(result.stderr.split())
    assert words.count("rounded to 4 bit; name a folder of its own weights") == 1, result.output
    assert set(asked_for) <= {embedded_folder}
