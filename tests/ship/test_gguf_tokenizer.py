"""The tokenizer and the settings in the GGUF file of a merged model.

Each test writes a file, most of them with one mistake, and checks it against the tokenizer and the
base of the adapter's training. The oracle is llama.cpp, which reads texts with the same file: the
check is right where llama.cpp gives a text other ids than Hugging Face does.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import models
import pytest
import torch
from gguf_base import write_base
from llama_library import LlamaCpp
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as kinds
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import lens_lora as ll
from lens_lora.ship.checks import Check
from lens_lora.ship.gguf_checks import merged_gguf_checks
from lens_lora.ship.merged_tokenizer import texts_tried
from lens_lora.ship.verify import verify

gguf = pytest.importorskip("gguf")


# --- Tokenizers


# llama.cpp's names of the rules by which a text is split before its bytes are merged.
RULES = ("gpt-2", "smollm", "llama-bpe", "qwen2")
# The name that llama.cpp has for SentencePiece, where nothing is split.
UNSPLIT = "default"

# The regular expression of Llama 3, by which up to three digits stay together.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen 2's differs from it in one thing: each digit stands alone.
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")

CORPUS = ["the cats and the dogs, don't they?", "12345 123 12 99 1999", "they and the two cats"] * 4
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"


def splitter_of(rule: str):
    """Return the part of a Hugging Face tokenizer that splits texts by a rule of llama.cpp."""
    # ByteLevel turns bytes into characters; with `use_regex` it first splits as GPT-2 does.
    if rule == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    patterns = {"llama-bpe": LLAMA_3, "qwen2": QWEN_2}
    by_pattern = pre_tokenizers.Split(Regex(patterns[rule]), "isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([by_pattern, byte_level])


def tokenizer_over_bytes(rule: str) -> PreTrainedTokenizerFast:
    """Train a BPE over bytes, as GPT-2's, on a few words. It adds no BOS to a text."""
    # Llama 3 takes a whole word that is a token as it is, whatever the merges say.
    raw = Tokenizer(kinds.BPE(ignore_merges=rule == "llama-bpe"))
    raw.pre_tokenizer = splitter_of(rule)
    raw.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    return for_transformers(raw, bos="<|im_start|>", eos="<|im_end|>", unknown="<|endoftext|>")


def tokenizer_over_pieces() -> PreTrainedTokenizerFast:
    """Make a BPE that falls back to bytes, as Llama 2's. It adds BOS to a text.

    Every two tokens whose join is a token are a merge, as llama.cpp merges any such two.
    """
    specials = ["<unk>", "<s>", "</s>"]
    single_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁t", "he", "▁the", "ca", "ts", "cats", "▁cats", "an", "and", "▁a", "▁and", "do", "gs"]
    letters = sorted({*"▁theandcatsdogs12345"})
    tokens = [*specials, *single_bytes, *words, *letters]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(1, len(word)):
            first = word[:end]
            second = word[end:]
            if first in vocab and second in vocab:
                merges.append((first, second))
    raw = Tokenizer(kinds.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    bos_with_id = ("<s>", vocab["<s>"])
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos_with_id])
    return for_transformers(raw, bos="<s>", eos="</s>", unknown="<unk>")


def for_transformers(raw: Tokenizer, bos: str, eos: str, unknown: str) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer for transformers, with its special tokens and a chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=bos, eos_token=eos, unk_token=unknown
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Read a text with Hugging Face, as llama.cpp's `ids_of` reads it."""
    return list(tokenizer(text)["input_ids"])


# --- A model, and its file


@dataclasses.dataclass(frozen=True)
class MergedLlama:
    """A tiny Llama with a tokenizer, an adapter, and the model that PEFT merges of the two.

    Attributes:
        rule: llama.cpp's name of the rule by which the tokenizer splits texts.
        tokenizer: the one of the adapter's training.
        base: the Llama without the adapter.
        adapter: the one that is merged.
        merged: base + ΔW.
    """

    rule: str
    tokenizer: PreTrainedTokenizerFast
    base: LlamaForCausalLM
    adapter: ll.Adapter
    merged: PreTrainedModel


def merged_llama(rule: str) -> MergedLlama:
    """Make a Llama whose tokenizer splits texts by this rule, and merge a random adapter."""
    tokenizer = tokenizer_over_pieces() if rule == UNSPLIT else tokenizer_over_bytes(rule)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }
    config = LlamaConfig(**{**models._ROTARY, **sizes})
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval()
    # PEFT puts the adapter into the model that it is given.
    peft = models.peft_model("llama", copy.deepcopy(base))
    models.with_random_factors(peft, base, size=0.3)
    adapter = ll.Adapter.from_peft(peft)
    return MergedLlama(rule, tokenizer, base, adapter, peft.merge_and_unload())


@pytest.fixture(scope="module")
def llamas() -> dict[str, MergedLlama]:
    """One Llama for each rule, by the rule's name."""
    return {rule: merged_llama(rule) for rule in (*RULES, UNSPLIT)}


@pytest.fixture(scope="module")
def gpt2(llamas) -> MergedLlama:
    """The Llama whose tokenizer splits texts as GPT-2's, for tests of what no rule decides."""
    return llamas["gpt-2"]


# The fields of a tokenizer in a GGUF file. 'token_list' is written by `add_token_list` of gguf's
# writer, and so on.
Fields = dict[str, Any]


def type_of_token(token: str, tokenizer: PreTrainedTokenizerFast) -> int:
    """The number by which a GGUF file says how llama.cpp treats a token."""
    if token in tokenizer.all_special_tokens:
        return gguf.TokenType.CONTROL
    if token.startswith("<0x"):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def right_fields(llama: MergedLlama) -> Fields:
    """What llama.cpp's converter writes of a Llama's tokenizer."""
    tokenizer = llama.tokenizer
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    fields = {
        "tokenizer_pre": llama.rule,
        "token_list": tokens,
        "token_types": [type_of_token(token, tokenizer) for token in tokens],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unk_token_id": tokenizer.unk_token_id,
        "chat_template": tokenizer.chat_template,
    }
    if llama.rule == UNSPLIT:
        fields["tokenizer_model"] = "llama"
        fields["token_scores"] = [-float(number) for number in range(len(tokens))]
        return fields
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    fields["tokenizer_model"] = "gpt2"
    fields["token_merges"] = [" ".join(merge) for merge in parts["model"]["merges"]]
    fields["add_bos_token"] = False
    return fields


def write_gguf(llama: MergedLlama, file: Path, fields: Fields | None = None) -> Path:
    """Write a merged Llama with these fields of a tokenizer, or with the right ones."""
    if fields is None:
        fields = right_fields(llama)

    def add_tokenizer(writer) -> None:
        for name, value in fields.items():
            add_field = getattr(writer, f"add_{name}")
            add_field(value)

    return write_base(llama.merged, file, add_tokenizer=add_tokenizer)


def check_of(file: Path, llama: MergedLlama) -> Check:
    """Compare the tokenizer and the settings in a file with those of a Llama."""
    checks, _ = merged_gguf_checks(file, llama.adapter, llama.base, llama.tokenizer)
    _, tokenizer_and_settings = checks
    return tokenizer_and_settings


# --- The right file


# Texts that Hugging Face and llama.cpp read alike if the file is right.
TEXTS = (
    "a",
    " the  two cats\n\nand 12345 dogs, don't they? naïve 你好",
    "1234567 3.14",
    "<|im_start|>the cats<|im_end|> and",
)


@pytest.mark.parametrize("rule", [*RULES, UNSPLIT])
def test_a_right_file_passes(rule: str, llamas, tmp_path):
    """The right file passes, and with it llama.cpp reads texts as Hugging Face does."""
    llama = llamas[rule]
    file = write_gguf(llama, tmp_path / "x.gguf")
    check = check_of(file, llama)
    assert check.outcome == "passed", check.facts
    pytest.importorskip("llama_cpp_py_sync")
    engine = LlamaCpp(file)
    for text in TEXTS:
        assert engine.ids_of(text) == ids_of(llama.tokenizer, text), text


def test_the_exit_code_is_0(gpt2, tmp_path):
    """With a right file and its tokenizer at hand, nothing is left undecided."""
    file = write_gguf(gpt2, tmp_path / "x.gguf")

    def load_lens() -> ll.LoraLens:
        # A copy, as a lens may take the base over.
        base = copy.deepcopy(gpt2.base)
        return ll.load(base, gpt2.adapter, tokenizer=gpt2.tokenizer, check=False)

    result = verify(
        gpt2.adapter,
        gpt2.base,
        load_lens,
        merged=file,
        tokenizer=gpt2.tokenizer,
        progress=False,
    )
    assert result.exit_code == 0, result.story()


# --- Wrong tokenizers


class Fault(NamedTuple):
    """A mistake in the fields of a tokenizer.

    Attributes:
        edit: makes it. It returns the fields that are written instead.
        says: a part of what the check says of it.
    """

    edit: Callable[[Fields], Fields]
    says: str


def swapped(values: Sequence[Any], first: int, second: int) -> list[Any]:
    """Exchange the values at two places."""
    exchanged = list(values)
    exchanged[first] = values[second]
    exchanged[second] = values[first]
    return exchanged


def without_last_token(fields: Fields) -> Fields:
    return fields | {
        "token_list": fields["token_list"][:-1],
        "token_types": fields["token_types"][:-1],
    }


def with_other_choice_of_bos(fields: Fields) -> Fields:
    """Add BOS to a text where the right file adds none, and the other way round."""
    is_added = fields["tokenizer_model"] == "llama"
    return fields | {"add_bos_token": not is_added}


def with_two_ordinary_specials(fields: Fields) -> Fields:
    """Let llama.cpp read the first two special tokens as any other text."""
    normal = [gguf.TokenType.NORMAL, gguf.TokenType.NORMAL]
    return fields | {"token_types": normal + fields["token_types"][2:]}


FAULTS_OF_BOTH = {
    "tokens": Fault(
        edit=lambda fields: fields | {"token_list": swapped(fields["token_list"], 70, 71)},
        says="2 tokens of another id",
    ),
    "a token lost": Fault(edit=without_last_token, says="1 token missing"),
    "BOS": Fault(edit=lambda fields: fields | {"bos_token_id": 0}, says="BOS is 0, was 1"),
    "EOS": Fault(edit=lambda fields: fields | {"eos_token_id": 0}, says="EOS is 0, was [2]"),
    "BOS added": Fault(edit=with_other_choice_of_bos, says="a text begins with "),
    "EOS added": Fault(
        edit=lambda fields: fields | {"add_eos_token": True},
        says="a text ends with [2], was none",
    ),
    "template": Fault(
        edit=lambda fields: fields | {"chat_template": TEMPLATE + "!"},
        says="another chat template",
    ),
    "types": Fault(edit=with_two_ordinary_specials, says="2 tokens of another type"),
    "the unknown token": Fault(
        edit=lambda fields: fields | {"unk_token_id": 2},
        says="the unknown token is 2, was 0",
    ),
}
FAULTS_OVER_BYTES = {
    "merges": Fault(
        edit=lambda fields: fields | {"token_merges": swapped(fields["token_merges"], 0, 9)},
        says="2 merges differ",
    ),
    "a merge lost": Fault(
        edit=lambda fields: fields | {"token_merges": fields["token_merges"][:-1]},
        says="merges, were",
    ),
    "splitting": Fault(
        edit=lambda fields: fields | {"tokenizer_pre": "qwen2"},
        says="gets other ids",
    ),
    "kind": Fault(
        edit=lambda fields: fields | {"tokenizer_model": "llama"},
        says="the kind 'llama', was 'gpt2'",
    ),
}
FAULTS_OVER_PIECES = {
    "scores": Fault(
        edit=lambda fields: fields | {"token_scores": fields["token_scores"][::-1]},
        says="the scores order the tokens",
    ),
    "spaces": Fault(
        edit=lambda fields: fields | {"add_space_prefix": False},
        says="no space is put before a text",
    ),
}
FAULTS = {
    "gpt-2": FAULTS_OF_BOTH | FAULTS_OVER_BYTES,
    UNSPLIT: FAULTS_OF_BOTH | FAULTS_OVER_PIECES,
}


@pytest.mark.parametrize(
    ("rule", "name"), [(rule, name) for rule in FAULTS for name in FAULTS[rule]]
)
def test_a_wrong_tokenizer_fails(rule: str, name: str, llamas, tmp_path):
    """Every mistake fails, and the check names it."""
    fault = FAULTS[rule][name]
    llama = llamas[rule]
    file = write_gguf(llama, tmp_path / "x.gguf", fault.edit(right_fields(llama)))
    check = check_of(file, llama)
    assert check.outcome == "failed", check.facts
    assert fault.says in check.measured


# --- Another rule of splitting


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_fails_with_the_first_text_that_it_reads_otherwise(rule: str, llamas, tmp_path):
    """A file that names another rule fails with the first text that llama.cpp reads otherwise.

    If llama.cpp reads all texts alike, the check is undecided.
    """
    llama = llamas[rule]
    next_one = (RULES.index(rule) + 1) % len(RULES)
    other_rule = RULES[next_one]
    fields = right_fields(llama) | {"tokenizer_pre": other_rule}
    file = write_gguf(llama, tmp_path / "x.gguf", fields)
    check = check_of(file, llama)
    assert f"split by the rule {other_rule!r}, and were by {rule!r}" in check.measured
    pytest.importorskip("llama_cpp_py_sync")
    engine = LlamaCpp(file)
    read_otherwise = [
        text for text in texts_tried() if engine.ids_of(text) != ids_of(llama.tokenizer, text)
    ]
    if not read_otherwise:
        assert check.outcome == "undecided"
        return
    assert check.outcome == "failed"
    assert f"{read_otherwise[0][:30]!r} gets other ids" in check.measured
    # transformers gives a tokenizer that it reads from a GGUF file GPT-2's rule, whatever it was.
    names_that_cause = "read from a GGUF file" in check.measured
    assert names_that_cause == (rule == "gpt-2")


def test_another_rule_that_no_text_shows_is_undecided(gpt2, tmp_path):
    """Where no token holds two digits, it makes no difference that digits stand alone."""
    parts = json.loads(gpt2.tokenizer.backend_tokenizer.to_str())
    merges = [tuple(merge) for merge in parts["model"]["merges"]]
    parts["model"]["merges"] = [merge for merge in merges if not has_digit("".join(merge))]
    tokenizer = copy.deepcopy(gpt2.tokenizer)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))
    llama = dataclasses.replace(gpt2, tokenizer=tokenizer)
    fields = right_fields(llama) | {"tokenizer_pre": "smollm"}
    check = check_of(write_gguf(llama, tmp_path / "x.gguf", fields), llama)
    assert check.outcome == "undecided", check.facts
    assert "no text tried here showed" in check.measured


def has_digit(text: str) -> bool:
    return any(character.isdigit() for character in text)


# --- What cannot be compared


def without_template(fields: Fields) -> Fields:
    return {name: value for name, value in fields.items() if name != "chat_template"}


UNKNOWN = {
    "a rule": Fault(
        edit=lambda fields: fields | {"tokenizer_pre": "tekken"},
        says="the rule 'tekken'",
    ),
    "no template": Fault(edit=without_template, says="no chat template in the file"),
    "a field": Fault(
        edit=lambda fields: fields | {"precompiled_charsmap": b"ab"},
        says="tokenizer.ggml.precompiled_charsmap",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_compared_is_undecided(name: str, gpt2, tmp_path):
    fault = UNKNOWN[name]
    file = write_gguf(gpt2, tmp_path / "x.gguf", fault.edit(right_fields(gpt2)))
    check = check_of(file, gpt2)
    assert check.outcome == "undecided", check.facts
    assert fault.says in check.measured


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_where_llama_cpp_puts_another_space_it_is_undecided(scheme: str, llamas, tmp_path):
    """llama.cpp puts a second space before a text that begins with one.

    Metaspace, another way of Hugging Face's to write spaces as ▁, does not.
    """
    tokenizer = copy.deepcopy(llamas[UNSPLIT].tokenizer)
    raw = tokenizer.backend_tokenizer
    raw.normalizer = normalizers.Sequence([])
    raw.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    llama = dataclasses.replace(llamas[UNSPLIT], tokenizer=tokenizer)
    file = write_gguf(llama, tmp_path / "x.gguf")
    check = check_of(file, llama)
    assert check.outcome == "undecided", check.facts
    assert "begins with one" in check.measured
    pytest.importorskip("llama_cpp_py_sync")
    engine = LlamaCpp(file)
    assert engine.ids_of("cats") == ids_of(tokenizer, "cats")
    assert engine.ids_of(" cats") != ids_of(tokenizer, " cats")


def test_without_a_tokenizer_it_is_undecided(gpt2, tmp_path):
    """There is nothing to compare if the file has no tokenizer, or if none is at hand."""
    without_tokenizer = write_base(gpt2.merged, tmp_path / "x.gguf")
    check = check_of(without_tokenizer, gpt2)
    assert check.outcome == "undecided"
    assert "no tokenizer in the file" in check.measured

    with_tokenizer = write_gguf(gpt2, tmp_path / "y.gguf")
    (_, check), _ = merged_gguf_checks(with_tokenizer, gpt2.adapter, gpt2.base, None)
    assert check.outcome == "undecided"
    assert "none to compare it with" in check.measured


# --- Settings


class OtherSetting(NamedTuple):
    """Another value of a model's setting, and what the check makes of it.

    Attributes:
        value: the other one.
        outcome: of the check.
        says: a part of what the check says.
    """

    value: float
    outcome: str
    says: str


OTHER_SETTINGS = {
    "rms_norm_eps": OtherSetting(
        value=1e-3, outcome="failed", says="llama.attention.layer_norm_rms_epsilon is"
    ),
    "num_attention_heads": OtherSetting(
        value=2, outcome="failed", says="llama.attention.head_count is"
    ),
    "max_position_embeddings": OtherSetting(
        value=77, outcome="undecided", says="llama.context_length is"
    ),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_settings(name: str, gpt2, tmp_path):
    """Settings that decide logits fail; the length of the context, which does not, is undecided."""
    setting = OTHER_SETTINGS[name]
    merged = copy.deepcopy(gpt2.merged)
    setattr(merged.config, name, setting.value)
    file = write_gguf(dataclasses.replace(gpt2, merged=merged), tmp_path / "x.gguf")
    check = check_of(file, gpt2)
    assert check.outcome == setting.outcome, check.facts
    assert setting.says in check.measured


def test_another_rotary_base(gpt2, tmp_path):
    """A file whose rotary base is 10000 fails for a base model that has another one."""
    file = write_gguf(gpt2, tmp_path / "x.gguf")
    base = copy.deepcopy(gpt2.base)
    # transformers 5 has it in `rope_parameters`, transformers 4 as an attribute of its own.
    if getattr(base.config, "rope_parameters", None):
        base.config.rope_parameters["rope_theta"] = 5e5
    else:
        base.config.rope_theta = 5e5
    check = check_of(file, dataclasses.replace(gpt2, base=base))
    assert check.outcome == "failed"
    assert "llama.rope.freq_base is 10000.0" in check.measured


def test_scaled_rotary_frequencies_of_the_file_alone(gpt2, tmp_path):
    """A tensor `rope_freqs` that the base lacks passes if it holds ones, and fails otherwise.

    A converter writes it for a base with Llama 3's scaling, and llama.cpp computes with it.
    """

    def check_of_file_with(factor: float) -> Check:
        merged = copy.deepcopy(gpt2.merged)
        width = merged.config.hidden_size // merged.config.num_attention_heads
        merged.register_buffer("rope_freqs", torch.full([width // 2], factor))
        file = write_gguf(dataclasses.replace(gpt2, merged=merged), tmp_path / "x.gguf")
        return check_of(file, gpt2)

    unscaled = check_of_file_with(1.0)
    assert unscaled.outcome == "passed", unscaled.facts
    scaled = check_of_file_with(2.0)
    assert scaled.outcome == "failed", scaled.facts
    assert "rope_freqs.weight scales the rotary frequencies" in scaled.measured


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("hidden_act", "gelu", "activation 'gelu'"), ("sliding_window", 7, "the last 7 tokens")],
)
def test_a_base_that_llama_cpp_computes_otherwise(field: str, value, says: str, gpt2, tmp_path):
    """A base with a setting that llama.cpp does not know for a Llama is undecided."""
    file = write_gguf(gpt2, tmp_path / "x.gguf")
    base = copy.deepcopy(gpt2.base)
    setattr(base.config, field, value)
    check = check_of(file, dataclasses.replace(gpt2, base=base))
    assert check.outcome == "undecided", check.facts
    assert says in check.measured
