"""A string is read as its tokenizer reads it, or as the caller says, and results say which.

The oracle is PEFT's active model on `tokenizer(text).input_ids`.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import chats
import models
import pytest
import torch
from differences import largest_difference
from peft import PeftModel
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

import lens_lora as ll
from lens_lora.core.readout import tokenising
from lens_lora.errors import ModelStateError, PromptError, SweepError

QUIET = {"progress": False}
TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13"]
DOC = " w5"
PRE = " w9"


def appending(tokenizer: Any, single: str) -> Any:
    """The tokenizer, with another rule for its special tokens."""
    specials = [("<bos>", 0), ("<eos>", 1)]
    template = processors.TemplateProcessing(single=single, special_tokens=specials)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def in_memory() -> PreTrainedTokenizerFast:
    """One that names no file."""
    raw = models.tokenizer().backend_tokenizer
    specials = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **specials)


# By name: a tokenizer, and the ids that it puts before and behind a text.
TOKENIZERS: dict[str, tuple[Callable[[], Any], list[int], list[int]]] = {
    "without": (models.tokenizer, [], []),
    "bos": (lambda: chats.prepending(models.tokenizer()), [0], []),
    "bos and eos": (lambda: appending(models.tokenizer(), "<bos> $A <eos>"), [0], [1]),
    "eos": (lambda: appending(models.tokenizer(), "$A <eos>"), [], [1]),
    "in memory": (in_memory, [], []),
    "in memory, bos": (lambda: chats.prepending(in_memory()), [0], []),
}


# The models are made once: by a test without float64 they would have tables of float32.
pytestmark = pytest.mark.usefixtures("float64")


@functools.cache
def tiny() -> tuple[Any, PeftModel]:
    base = models.hf_model("llama")
    return base, models.peft_model("llama", base)


def loaded(tokenizer: Any, kind: str | None = None, **options: Any) -> ll.LoraLens:
    base, peft = tiny()
    adapter = ll.Adapter.from_peft(peft)
    return ll.load(copy.deepcopy(base), adapter, tokenizer=tokenizer, kind=kind, **options)


@functools.cache
def lens_of(kind: str, prepend_bos: bool | None) -> ll.LoraLens:
    return loaded(models.tokenizer(), kind, prepend_bos=prepend_bos)


def expected(ids: list[int]) -> torch.Tensor:
    """PEFT's logits after the last of these."""
    with torch.no_grad():
        return tiny()[1](torch.tensor([ids])).logits[0, -1]


def margin_after(ids: list[int]) -> float:
    logits = expected(ids)
    return float(logits[5] - logits[9])


# --- what is read


@pytest.mark.parametrize("kind", models.MAKERS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_is_read_as_its_tokenizer_reads_it(kind: str, name: str, float64):
    """By `ll.load`, and by the hooked model itself; an EOS at its end is left out."""
    make, before, behind = TOKENIZERS[name]
    tokenizer = make()
    lens = loaded(tokenizer, kind)
    ready = lens.prompts(TEXTS)
    together = ready.at_read(lens.logits(ready))
    for i, text in enumerate(TEXTS):
        own = tokenizer(text)["input_ids"]
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert own == [*before, *plain, *behind]
        read = own[: len(own) - len(behind)]
        assert ready.row(i).tokens[0].tolist() == read
        assert largest_difference(together[i], expected(read)) < 1e-9
        assert lens.model.to_tokens(text)[0].tolist()[: len(read)] == read
    assert ("text, BOS added by its tokenizer" in repr(lens)) == bool(before)
    assert ("EOS left out" in repr(ready)) == bool(behind)


@pytest.mark.parametrize("kind", models.MAKERS)
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_a_text_is_read_as_the_caller_says(kind: str, name: str, prepend_bos: bool):
    """Whatever the tokenizer does; no second BOS, and the model itself reads it so, too."""
    tokenizer = TOKENIZERS[name][0]()
    lens = loaded(tokenizer, kind, prepend_bos=prepend_bos)
    for text in TEXTS:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [0, *plain] if prepend_bos else plain
        assert lens.prompts(text).tokens.tolist() == [ids]
        assert lens.prompts(text, prepend_bos=not prepend_bos).tokens.tolist() == [
            plain if prepend_bos else [0, *plain]
        ]
        assert lens.model.to_tokens(text)[0].tolist()[: len(ids)] == ids
    own = lens.prompts("<bos> w5")
    assert own.tokens.tolist() == [[0, 5]]
    assert "text with its own BOS" in repr(own)


def test_a_rule_of_the_lens_is_no_refusal_of_ids():
    """What is said of these very prompts is one, as before."""
    lens = lens_of(NEWEST, True)
    assert lens.prompts(torch.tensor([[5, 6]])).tokens.tolist() == [[5, 6]]
    with pytest.raises(PromptError, match="is for strings"):
        lens.prompts(torch.tensor([[5, 6]]), prepend_bos=True)


NEWEST = list(models.MAKERS)[-1]


@pytest.mark.parametrize("prepend_bos", [None, True])
def test_a_conversation_has_the_ids_of_its_template(prepend_bos: bool | None):
    """Which begins with a BOS by itself, or does not; the text of one gets no second BOS."""
    tokenizer = models.tokenizer()
    tokenizer.chat_template = chats.TEMPLATE
    lens = loaded(tokenizer, prepend_bos=prepend_bos)
    assert lens.prompts(chats.ASK).tokens.tolist() == [chats.ASK_IDS]
    text = lens.prompts(chats.ASK).texts[0]
    assert lens.prompts(text).tokens.tolist() == [chats.ASK_IDS]
    tokenizer.chat_template = chats.TEMPLATE.removeprefix("{{ bos_token }}")
    lens = loaded(tokenizer, prepend_bos=prepend_bos)
    assert lens.prompts(chats.ASK).tokens.tolist() == [chats.ASK_IDS[1:]]


# --- what follows from it: answers, responses, every analysis


@pytest.mark.parametrize("prepend_bos", [None, True])
def test_margins_after_what_is_read(prepend_bos: bool | None, float64):
    """One token, several tokens, and a response, against PEFT on the same ids."""
    lens = lens_of(NEWEST, prepend_bos)
    bos = [0] if prepend_bos else []
    margin = ll.fact_margin(lens, TEXTS[0], DOC, PRE, **QUIET)
    assert float(margin.attribution.adapted) == pytest.approx(
        margin_after([*bos, 5, 6, 7]), abs=1e-9
    )
    response = ll.remainder(lens, TEXTS[0], ll.AnswerLogProb(" w5 w9"), **QUIET)
    total = 0.0
    for before, token in (([5, 6, 7], 5), ([5, 6, 7, 5], 9)):
        total += float(expected([*bos, *before]).log_softmax(-1)[token])
    assert float(response.adapted) == pytest.approx(total, abs=1e-9)
    longer = ll.fact_margin(lens, TEXTS[0], " w5 w9", " w6", **QUIET)
    other = float(expected([*bos, 5, 6, 7]).log_softmax(-1)[6])
    assert float(longer.attribution.adapted) == pytest.approx(total - other, abs=1e-9)
    said = lens.prompts(TEXTS[0], " w5 w9")
    assert said.tokens.tolist() == [[*bos, 5, 6, 7, 5, 9]]


def _sweep(lens: ll.LoraLens, folder: Any) -> Any:
    record = {"prompt": "w5 w6", "doc": DOC, "pre": PRE}
    return ll.sweep(lens, [record], out=folder / "r.parquet", **QUIET)


def _stream(lens: ll.LoraLens, folder: Any) -> Any:
    return ll.sweep(lens, [{"prompt": "w5 w6"}], "activations", out=folder / "a.parquet", **QUIET)


MARGIN = ll.Margin(5, 9)
CALLS: dict[str, Callable[[ll.LoraLens, Any], Any]] = {
    "first_order": lambda lens, _: ll.first_order(lens, TEXTS, MARGIN),
    "path": lambda lens, _: ll.path_attribution(lens, TEXTS, MARGIN, tol=0.5, **QUIET),
    "second order": lambda lens, _: ll.second_order(lens, TEXTS[0], MARGIN, **QUIET),
    "fact_margin": lambda lens, _: ll.fact_margin(lens, TEXTS[0], DOC, PRE, **QUIET),
    "patch_sites": lambda lens, _: ll.patch_sites(lens, TEXTS, MARGIN, **QUIET),
    "replaced": lambda lens, _: ll.patch_sites(
        lens, TEXTS[0], MARGIN, replace="mean", texts=TEXTS[2], **QUIET
    ),
    "logit_shift": lambda lens, _: ll.logit_shift(lens, TEXTS[0], **QUIET),
    "components": lambda lens, _: ll.components(lens, TEXTS[0], MARGIN, **QUIET),
    "kl_shares": lambda lens, _: ll.kl_shares(lens, TEXTS[0], **QUIET),
    "token_shifts": lambda lens, _: ll.token_shifts(lens, TEXTS[0], " w5 w9"),
    "activations": lambda lens, _: ll.lora_activations(lens, TEXTS[0], " w5 w9"),
    "activation_shift": lambda lens, _: ll.activation_shift(
        lens, TEXTS[2], "blocks.1.hook_resid_post"
    ),
    "contrast": lambda lens, _: ll.contrast(
        lens, ["w5 w6", "w7 w8"], ["w9 w10", "w11 w12"], "blocks.1.hook_resid_post"
    ),
    "constant_part": lambda lens, _: ll.constant_part(lens, ["w5 w6", "w7 w8"], **QUIET),
    "edges": lambda lens, _: ll.edges(lens, TEXTS[0], MARGIN),
    "explain": lambda lens, _: ll.explain(lens, TEXTS[0], DOC, PRE, fast=True, **QUIET),
    "explain a response": lambda lens, _: ll.explain(
        lens, TEXTS[0], response=" w5 w9", fast=True, **QUIET
    ),
    "what_changed": lambda lens, _: ll.what_changed(lens, nulls=1, fast=True, **QUIET),
    "repair": lambda lens, _: ll.repair(
        lens, [(TEXTS[0], MARGIN)], [(TEXTS[2], ll.KL())], steps=1, draws=1, **QUIET
    ),
    "compare_adapters": lambda lens, _: ll.compare_adapters(
        lens, lens.adapter.scaled(0.5).named("half"), TEXTS, draws=0, **QUIET
    ),
    "generate": lambda lens, _: lens.generate(TEXTS[0], 2, **QUIET),
    "sweep": _sweep,
    "stream": _stream,
}
_WITHOUT_META = ("generate",)


@pytest.mark.sample(12)
@pytest.mark.parametrize("name", CALLS)
def test_every_call_reads_as_the_lens_does(name: str, tmp_path, monkeypatch):
    """Also neutral texts, questions and replacements; and each result says how it was read."""
    rules: list[bool | None] = []
    read = tokenising.read_text

    def noted(model: Any, text: str, prepend_bos: bool | None) -> Any:
        rules.append(prepend_bos)
        return read(model, text, prepend_bos)

    lens = lens_of(NEWEST, True)
    monkeypatch.setattr(tokenising, "read_text", noted)
    found = CALLS[name](lens, tmp_path)
    assert rules
    assert set(rules) == {True}
    if name in ("sweep", "stream"):
        assert found.meta["strings"] == "with BOS"
        assert "with BOS" in repr(found)
    elif name not in _WITHOUT_META:
        parts = (getattr(found, part, found) for part in ("attribution", "first_order", "shifts"))
        metas = [part.meta for part in parts if hasattr(part, "meta")]
        assert metas
        assert all("BOS added by prepend_bos=True" in meta["prompts"] for meta in metas)


@pytest.mark.slow
def test_stories_pages_and_tables_say_it():
    for prepend_bos, words in ((None, "text without BOS"), (True, "BOS added by prepend_bos=True")):
        lens = lens_of(NEWEST, prepend_bos)
        explained = ll.explain(lens, TEXTS[0], DOC, PRE, fast=True, **QUIET)
        assert words in repr(lens)
        assert words in explained.story()
        assert words in explained.margin.story()
        assert explained.report().count(words) > 1
        assert words in repr(explained.first_order)
        assert words in explained.first_order._repr_html_()
        assert words in repr(explained.second_order)
        assert words in repr(explained.margin)


# --- a user's own hooked model: as the host reads, with one warning


@pytest.mark.parametrize("kind", models.MAKERS)
def test_a_host_that_adds_what_the_tokenizer_does_not_is_warned_of_once(kind: str):
    base, peft = tiny()
    model = models.MAKERS[kind](copy.deepcopy(base))
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "text, BOS added by TransformerLens" in repr(lens)
        assert ll.LoraLens(model, lens.adapter, prepend_bos=False).prompts("w5").lengths == 1
        assert ll.LoraLens(model, lens.adapter, prepend_bos=True).prompts("w5").lengths == 2
        lens.prompts(torch.tensor([[5, 6]]))
        lens.prompts("<bos> w5")
    with pytest.warns(UserWarning, match="puts the BOS '<bos>' in front.*prepend_bos=False"):
        assert lens.prompts(TEXTS[0]).tokens.tolist() == model.to_tokens(TEXTS[0]).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lens.prompts(TEXTS)
        ll.LoraLens(model, lens.adapter.scaled(0.5)).prompts(TEXTS[0])
        lens.with_adapter(lens.adapter.scaled(0.5)).prompts(TEXTS[0])


@pytest.mark.parametrize("kind", models.MAKERS)
def test_a_host_that_was_told_to_add_none(kind: str, tmp_path, monkeypatch):
    """The other way round: the tokenizer adds one; and where both agree nothing is said."""
    chats.prepending(models.tokenizer()).save_pretrained(tmp_path)
    monkeypatch.setattr(
        models, "tokenizer", lambda: PreTrainedTokenizerFast.from_pretrained(tmp_path)
    )
    base, peft = tiny()
    model = models.MAKERS[kind](copy.deepcopy(base))
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lens.prompts("w5").tokens.tolist() == [[0, 5]]
        assert "BOS added by its tokenizer" in repr(lens)
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    with pytest.warns(UserWarning, match="puts no BOS in front.*prepend_bos=True"):
        assert lens.prompts("w5").tokens.tolist() == [[5]]


# --- what is stored


def test_a_sweep_of_another_reading_is_not_resumed(tmp_path):
    _sweep(lens_of(NEWEST, None), tmp_path)
    with pytest.raises(SweepError, match="strings 'without BOS' there, 'with BOS' here"):
        _sweep(lens_of(NEWEST, True), tmp_path)
    model = lens_of(NEWEST, None).model
    other = ll.LoraLens(model, lens_of(NEWEST, None).adapter, prepend_bos=True)
    with pytest.raises(SweepError, match="strings 'without BOS' there, 'with BOS' here"):
        _sweep(other, tmp_path)


@pytest.mark.parametrize("prepend_bos", [None, True])
def test_a_bank_holds_how_its_prompts_were_read(prepend_bos: bool | None, tmp_path):
    lens = lens_of(NEWEST, None)
    bank = ll.bank(lens.model, TEXTS, MARGIN, prepend_bos=prepend_bos, **QUIET)
    asked = lens.prompts(TEXTS, prepend_bos=prepend_bos)
    alone = ll.first_order(lens, asked, MARGIN)
    words = "BOS added by prepend_bos=True" if prepend_bos else "text without BOS"
    again = ll.load_bank(bank.save(tmp_path / "bank.safetensors"), lens.model)
    for each in (bank, again):
        found = each.first_order(lens.adapter)
        torch.testing.assert_close(found.values, alone.values, rtol=1e-5, atol=1e-6)
        assert words in found.meta["prompts"]
        assert words in repr(each)


# --- tokenizers that cannot be taken


@pytest.mark.parametrize("kind", models.MAKERS)
def test_what_is_no_tokenizer_is_named(kind: str):
    with pytest.raises(ModelStateError, match=r"the tokenizer is a tokenizers\..*PreTrained"):
        loaded(models.tokenizer().backend_tokenizer, kind)

    class Broken(PreTrainedTokenizerFast):
        def __call__(self, *args: Any, **options: Any) -> Any:
            raise OSError("its vocabulary is gone")

    broken = Broken(tokenizer_object=models.tokenizer().backend_tokenizer)
    with pytest.raises(ModelStateError, match="tokenizer Broken cannot be used.*is gone"):
        loaded(broken, kind)


@pytest.mark.parametrize("kind", models.MAKERS)
def test_what_was_set_after_loading_is_kept(kind: str):
    """A token that was added, and the user's own tokenizer, which stays as it is."""
    tokenizer = models.tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("w5 w6", special=True)])
    before = repr(tokenizer), dict(tokenizer.init_kwargs)
    lens = loaded(tokenizer, kind)
    assert lens.model.tokenizer("w5 w6")["input_ids"] == tokenizer("w5 w6")["input_ids"]
    assert (repr(tokenizer), dict(tokenizer.init_kwargs)) == before
