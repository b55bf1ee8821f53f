"""A tokenizer and a chat template that were saved beside an adapter are what it is asked with.

As TRL, Unsloth and Axolotl save them. The oracle is PEFT's active model on the ids that this
tokenizer gives.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import chats
import models
import pytest
import shapes
import torch
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora.cli import app
from lens_lora.errors import AdapterError, ModelStateError

NEWEST = list(models.MAKERS)[-1]
TEMPLATE = "{% for m in messages %}{{ 'w30 ' + m['content'] }}{% endfor %} w31"
QUIET = {"progress": False}


@functools.cache
def tiny() -> tuple[Any, Any]:
    """A base whose embedding has two rows more than its tokenizer has tokens, and PEFT's model."""
    base = models.hf_model("llama")
    return base, models.peft_model("llama", base)


def base_tokenizer() -> PreTrainedTokenizerFast:
    """The tests' own words, without the last two: 'w59' and 'w60' have rows, and no token."""
    fields = json.loads(models.tokenizer().backend_tokenizer.to_str())
    vocabulary = fields["model"]["vocab"]
    for word in ("w59", "w60"):
        del vocabulary[word]
    from tokenizers import Tokenizer

    specials = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    raw = Tokenizer.from_str(json.dumps(fields))
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", **specials)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The folders of a base with its tokenizer, and of an adapter without one."""
    base, peft = tiny()
    copy.deepcopy(base).to(torch.float32).save_pretrained(tmp_path / "base")
    base_tokenizer().save_pretrained(tmp_path / "base")
    adapter = ll.Adapter.from_peft(peft)
    adapter.save(tmp_path / "lora")
    return tmp_path / "base", tmp_path / "lora"


def trained_with(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As a trainer leaves it: an added token, another template, a BOS before each text."""
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<tool>")]})
    tokenizer.chat_template = TEMPLATE
    post = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


def margin_by_peft(ids: list[int]) -> float:
    with torch.no_grad():
        logits = tiny()[1](torch.tensor([ids])).logits[0, -1]
    return float(logits[5] - logits[9])


# --- it is used, and named


@pytest.mark.parametrize("kind", models.MAKERS)
def test_it_is_used_and_named(folders, kind: str):
    """Added tokens that the base has rows for, the template, and whether there is a BOS."""
    base, lora = folders
    own = trained_with(base_tokenizer())
    own.save_pretrained(lora)
    lens = ll.load(base, lora, kind=kind)
    text = "w5 <tool> w6"
    ids = own(text)["input_ids"]
    assert ids == [0, 5, 59, 6] != base_tokenizer()(text)["input_ids"]
    assert lens.prompts(text).tokens.tolist() == [ids]
    margin = ll.fact_margin(lens, text, " w5", " w9", **QUIET)
    assert float(margin.attribution.adapted) == pytest.approx(margin_by_peft(ids), abs=1e-3)
    conversation = [{"role": "user", "content": "w7 w8"}]
    assert lens.prompts(conversation).tokens.tolist() == [[30, 7, 8, 31]]
    said = repr(lens)
    assert "tokenizer: saved with the adapter (1 added token: '<tool>'; its own chat te" in said
    assert "puts <bos> before a text and nothing behind it, the base's puts nothing" in said
    assert "saved with the adapter" in margin.attribution.meta["tokenizer"]


def test_of_an_adapter_that_was_read_before_and_cut(folders):
    base, lora = folders
    trained_with(base_tokenizer()).save_pretrained(lora)
    adapter = ll.load_adapter(lora).only("*.q_proj").scaled(0.5)
    assert ll.load(base, adapter).prompts("w5").tokens.tolist() == [[0, 5]]
    loaded = copy.deepcopy(tiny()[0])
    assert ll.load(loaded, adapter).prompts("w5 <tool>").tokens.tolist() == [[0, 5, 59]]


def test_a_tokenizer_that_is_passed_comes_first(folders):
    """Also before that of a base that is named."""
    base, lora = folders
    trained_with(base_tokenizer()).save_pretrained(lora)
    other = chats.prepending(base_tokenizer())
    other.add_tokens(["w59"])
    lens = ll.load(base, lora, tokenizer=other)
    assert lens.prompts("w5 w59").tokens.tolist() == [[0, 5, 59]]
    assert "tokenizer:" not in repr(lens)
    assert "tokenizer" not in lens.describe()


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_alone_is_put_onto_the_bases_tokenizer(folders, name: str):
    base, lora = folders
    content = TEMPLATE if name.endswith("jinja") else json.dumps({"chat_template": TEMPLATE})
    (lora / name).write_text(content)
    lens = ll.load(base, lora)
    assert lens.prompts([{"role": "user", "content": "w7"}]).tokens.tolist() == [[30, 7, 31]]
    assert "saved with the adapter (its own chat template)" in repr(lens)


@pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json"])
def test_a_damaged_template_is_refused_by_its_file(folders, name: str):
    """It was a JSONDecodeError, which names no file."""
    base, lora = folders
    (lora / name).write_text('{"chat_template": ')
    with pytest.raises(ll.errors.AdapterError, match=rf"{name} cannot be read as JSON"):
        ll.load(base, lora)


def test_without_a_template_of_its_own_the_bases_stays(folders):
    base, lora = folders
    tokenizer = base_tokenizer()
    tokenizer.save_pretrained(lora)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    lens = ll.load(base, lora)
    assert lens.prompts([{"role": "user", "content": "w7"}]).tokens.tolist() == [[30, 7, 31]]


def test_a_reserved_token_may_have_been_given_another_name(folders):
    base, lora = folders
    tokenizer = base_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<reserved>"]})
    tokenizer.save_pretrained(base)
    trained_with(base_tokenizer()).save_pretrained(lora)
    assert ll.load(base, lora).prompts("<tool>").tokens.tolist() == [[0, 59]]


# --- what does not fit


def with_ids(changed: dict[str, int]) -> PreTrainedTokenizerFast:
    """The base's tokenizer with other ids for some words."""
    from tokenizers import Tokenizer

    fields = json.loads(base_tokenizer().backend_tokenizer.to_str())
    fields["model"]["vocab"] |= changed
    raw = Tokenizer.from_str(json.dumps(fields))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", unk_token="<unk>")


@pytest.mark.bad_input
def test_other_ids_are_refused_with_both(folders):
    base, lora = folders
    with_ids({"w7": 8, "w8": 7}).save_pretrained(lora)
    words = (
        "gives 'w8' the id 7, and the base's gives it the id 8; the same holds for 1 other token"
    )
    with pytest.raises(AdapterError, match=words):
        ll.load(base, lora)
    shutil.rmtree(lora)
    ll.Adapter.from_peft(tiny()[1]).save(lora)
    renamed = json.loads(base_tokenizer().backend_tokenizer.to_str())
    renamed["model"]["vocab"]["house"] = renamed["model"]["vocab"].pop("w7")
    from tokenizers import Tokenizer

    raw = Tokenizer.from_str(json.dumps(renamed))
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(lora)
    with pytest.raises(AdapterError, match="the id 7 is 'house' to the .* and 'w7' to the base's"):
        ll.load(base, lora)


@pytest.mark.bad_input
def test_added_tokens_without_a_row_are_refused(folders):
    """Two of them have rows in this base; the third has none."""
    base, lora = folders
    tokenizer = base_tokenizer()
    tokenizer.add_tokens(["a1", "a2", "a3"])
    tokenizer.save_pretrained(lora)
    words = "has the token 'a3' with the id 61, and the base's embedding has 61 rows, from 0 to 60"
    with pytest.raises(AdapterError, match=words):
        ll.load(base, lora)
    wider = copy.deepcopy(tiny()[0])
    wider.resize_token_embeddings(62)
    lens = ll.load(wider, lora, tokenizer=None)
    assert lens.prompts("a3 w5").tokens.tolist() == [[61, 5]]


@pytest.mark.bad_input
def test_rows_that_the_adapter_brings_are_no_lack_of_the_tokenizers(folders):
    """Then it is the lens that says whether they fit the base."""
    base, lora = folders
    tokenizer = base_tokenizer()
    tokenizer.add_tokens(["a1", "a2", "a3"])
    tokenizer.save_pretrained(lora)
    plain = ll.load_adapter(lora)
    weight = torch.zeros(62, 16)
    modules = {**plain.modules, "model.embed_tokens": ll.results.TrainedModule(weight=weight)}
    adapter = ll.Adapter(modules, tokenizer_folder=plain.tokenizer_folder)
    with pytest.raises(ll.errors.LensLoraError) as caught:
        ll.load(base, adapter)
    assert "a3" not in str(caught.value)
    assert "62" in str(caught.value)


@pytest.mark.bad_input
def test_code_of_a_tokenizers_own_is_not_run(folders):
    base, lora = folders
    base_tokenizer().save_pretrained(lora)
    config = json.loads((lora / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (lora / "tokenizer_config.json").write_text(json.dumps(config))
    marker = lora / "ran"
    (lora / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    try:
        ll.load(base, lora)
    except AdapterError as error:
        assert "tokenizer saved with the adapter" in str(error)
    assert not marker.exists()


@pytest.mark.bad_input
@pytest.mark.parametrize("content", ["{", "version https://git-lfs.github.com/spec/v1\n"])
def test_files_that_cannot_be_read(folders, content: str):
    base, lora = folders
    base_tokenizer().save_pretrained(lora)
    (lora / "tokenizer.json").write_text(content)
    with pytest.raises(AdapterError, match="tokenizer.*cannot be read|a Git LFS pointer"):
        ll.load(base, lora)


def test_where_neither_has_one(folders):
    _, lora = folders
    loaded = copy.deepcopy(tiny()[0])
    loaded.config._name_or_path = "nowhere"
    with pytest.raises(ModelStateError, match="no tokenizer was saved with the model 'nowhere'"):
        ll.load(loaded, lora)


# --- a user's own hooked model keeps its tokenizer


def test_a_lens_over_a_hooked_model_warns_once(folders):
    base, lora = folders
    trained_with(base_tokenizer()).save_pretrained(lora)
    plain = ll.load_adapter(lora)
    model = ll.load(base, ll.Adapter(plain.modules)).model
    lens = ll.LoraLens(model, plain, prepend_bos=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lens.prompts(torch.tensor([[5, 6]]))
        assert "tokenizer:" not in repr(lens)
    with pytest.warns(UserWarning, match="saved with the adapter differs.*added token: '<tool>'"):
        assert lens.prompts("w5").tokens.tolist() == [[5]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lens.prompts("w6")
        ll.LoraLens(model, plain, prepend_bos=False).prompts("w7")
        with_adapter = ll.load(base, lora)
        with_adapter.prompts("w7")
        ll.LoraLens(with_adapter.model, plain).prompts("w7")


def tokenise_only(lens: ll.LoraLens) -> None:
    """Read a string by a method of the lens."""
    lens.prompts("w5")


def tokenise_within_an_analysis(lens: ll.LoraLens) -> None:
    """Read a string deep inside an analysis."""
    ll.logit_shift(lens, "w5", **QUIET)


@pytest.mark.parametrize("call", [tokenise_only, tokenise_within_an_analysis])
def test_the_warning_names_the_line_that_called_the_package(folders, call):
    """The caller can find the line to change, however deep in the package the string is read."""
    base, lora = folders
    trained_with(base_tokenizer()).save_pretrained(lora)
    adapter = ll.load_adapter(lora)
    model = ll.load(base, ll.Adapter(adapter.modules)).model
    lens = ll.LoraLens(model, adapter, prepend_bos=False)
    with pytest.warns(UserWarning, match="saved with the adapter differs") as caught:
        call(lens)
    (warning,) = [entry for entry in caught if "saved with" in str(entry.message)]
    if not shapes.CHECKED:  # which has a frame of its own around each call
        line_of_the_call = call.__code__.co_firstlineno + 2
        assert (warning.filename, warning.lineno) == (__file__, line_of_the_call)


# --- commands


def test_commands_use_it(folders, tmp_path):
    base, lora = folders
    trained_with(base_tokenizer()).save_pretrained(lora)
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"prompt": "w5 <tool> w6", "doc": " w5", "pre": " w9"}))
    out = tmp_path / "r.parquet"
    how = ["--prompts", str(records), "--out", str(out), "--model", str(base), "--quiet"]
    done = CliRunner().invoke(app, ["sweep", str(lora), *how])
    assert done.exit_code == 0, done.output
    import pandas as pd

    adapted = pd.read_parquet(tmp_path / "r.prompts.parquet")["adapted"].item()
    assert adapted == pytest.approx(margin_by_peft([0, 5, 59, 6]), abs=1e-3)
    done = CliRunner().invoke(app, ["sweep", str(lora), *how, "--no-bos", "--no-resume"])
    assert done.exit_code == 0, done.output
    adapted = pd.read_parquet(tmp_path / "r.prompts.parquet")["adapted"].item()
    assert adapted == pytest.approx(margin_by_peft([5, 59, 6]), abs=1e-3)


def test_a_scan_of_adapters_with_one_tokenizer_uses_it(folders, tmp_path):
    base, lora = folders
    trained_with(base_tokenizer()).save_pretrained(lora)
    shutil.copytree(lora, tmp_path / "many" / "a")
    shutil.copytree(lora, tmp_path / "many" / "b")
    asked = ["--prompt", "w5 <tool>", "--doc", " w5", "--pre", " w9"]
    how = [*asked, "--model", str(base), "--out", str(tmp_path / "s.parquet")]
    done = CliRunner().invoke(app, ["scan", str(tmp_path / "many"), *how])
    assert done.exit_code == 0, done.output
    import pandas as pd

    lens = ll.load(base, lora)
    expected = ll.first_order(lens, "w5 <tool>", ll.Margin(5, 9)).total.item()
    table = pd.read_parquet(tmp_path / "s.parquet")
    assert set(table["adapter"]) == {"a", "b"}
    totals = table["total"].unique().tolist()
    assert totals == pytest.approx([expected] * len(totals), rel=1e-4, abs=1e-5)
