"""The tokenizer and the settings in a merged GGUF file. The oracle is how llama.cpp reads texts."""

from __future__ import annotations

import copy
import json

import models
import pytest
import torch
from gguf_base import write_base
from llama_library import LlamaCpp
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as kinds
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lens_lora as ll
from lens_lora.ship.gguf_checks import merged_gguf_checks
from lens_lora.ship.merged_tokenizer import texts_tried
from lens_lora.ship.verify import verify

gguf = pytest.importorskip("gguf")
NORMAL = 1
CONTROL = 3
USER_DEFINED = 4
BYTE = 6
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "a",
    " the  two cats\n\nand 12345 dogs, don't they? naïve 你好",
    "1234567 3.14",
    "<|im_start|>the cats<|im_end|> and",
)
CORPUS = ["the cats and the dogs, don't they?", "12345 123 12 99 1999", "they and the two cats"] * 4


def split_by(rule: str):
    """How texts are split by a rule that llama.cpp knows by this name."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule in OF_GPT2)
    if rule == "gpt-2":
        return byte_level
    if rule == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    pattern = LLAMA_3 if rule == "llama-bpe" else LLAMA_3.replace("{1,3}", "")
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated", invert=False)
    return pre_tokenizers.Sequence([splitter, byte_level])


OF_GPT2 = ("gpt-2", "smollm")
RULES = (*OF_GPT2, "llama-bpe", "qwen2")


def of_bytes(rule: str, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A BPE over bytes that was trained on a few words."""
    raw = Tokenizer(kinds.BPE(ignore_merges=rule == "llama-bpe"))
    raw.pre_tokenizer = split_by(rule)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        raw.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    return finished(raw, "<|im_start|>", "<|im_end|>", "<|endoftext|>")


def of_pieces() -> PreTrainedTokenizerFast:
    """A BPE with a fallback to bytes, as Llama 2's: every two tokens that join are a merge."""
    specials = ["<unk>", "<s>", "</s>"]
    tokens = specials + [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁t", "he", "▁the", "ca", "ts", "cats", "▁cats", "an", "and", "▁a", "▁and", "do", "gs"]
    tokens += words + sorted({*"▁theandcatsdogs12345"})
    vocab = {token: number for number, token in enumerate(tokens)}
    pairs = [
        (token[:end], token[end:])
        for token in words
        for end in range(1, len(token))
        if token[:end] in vocab and token[end:] in vocab
    ]
    raw = Tokenizer(kinds.BPE(vocab, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return finished(raw, "<s>", "</s>", "<unk>")


def finished(raw: Tokenizer, bos: str, eos: str, unknown: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=bos, eos_token=eos, unk_token=unknown
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def fields_of(tokenizer: PreTrainedTokenizerFast, rule: str) -> dict:
    """What llama.cpp's converter writes of a tokenizer, by the names of the writer's methods."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [by_id[number] for number in range(len(by_id))]
    types = [
        CONTROL if token in tokenizer.all_special_tokens else BYTE if "<0x" in token else NORMAL
        for token in tokens
    ]
    fields = {
        "tokenizer_model": "llama" if rule == "default" else "gpt2",
        "tokenizer_pre": rule,
        "token_list": tokens,
        "token_types": types,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unk_token_id": tokenizer.unk_token_id,
        "chat_template": tokenizer.chat_template,
    }
    if rule == "default":
        return fields | {"token_scores": [-float(number) for number in range(len(tokens))]}
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    merges = [" ".join(merge) for merge in parts["model"]["merges"]]
    return fields | {"token_merges": merges, "add_bos_token": adds_bos}


def add(writer, fields: dict) -> None:
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)


def model_of(tokenizer):
    """A tiny Llama with as many tokens, an adapter of it, and their merge."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32}
    torch.manual_seed(0)
    config = LlamaConfig(**{**models._ROTARY, **sizes, "num_hidden_layers": 1})
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    base = LlamaForCausalLM(config).eval()
    peft = models.peft_model("llama", copy.deepcopy(base))
    models.with_random_factors(peft, base, size=0.3)
    return base, ll.Adapter.from_peft(peft), peft.merge_and_unload()


@pytest.fixture(scope="module")
def made():
    tokenizers = {rule: of_bytes(rule) for rule in RULES} | {"default": of_pieces()}
    return {rule: (tokenizer, *model_of(tokenizer)) for rule, tokenizer in tokenizers.items()}


def written(made_of_rule, rule: str, file, **edits):
    tokenizer, _, _, merged = made_of_rule
    fields = {k: v for k, v in (fields_of(tokenizer, rule) | edits).items() if v is not None}
    return write_base(merged, file, add_tokenizer=lambda writer: add(writer, fields))


def rest_of(made_of_rule, file):
    tokenizer, base, adapter, _ = made_of_rule
    (_, rest), _ = merged_gguf_checks(file, adapter, base, tokenizer)
    return rest


@pytest.mark.parametrize("rule", [*RULES, "default"])
def test_a_right_file_passes(rule: str, made, tmp_path):
    """And llama.cpp reads the texts as Hugging Face does."""
    file = written(made[rule], rule, tmp_path / "x.gguf")
    rest = rest_of(made[rule], file)
    assert rest.outcome == "passed", rest.facts
    pytest.importorskip("llama_cpp_py_sync")
    engine = LlamaCpp(file)
    for text in TEXTS:
        assert engine.ids_of(text) == made[rule][0](text)["input_ids"], text


def test_the_exit_code_is_0(made, tmp_path):
    tokenizer, base, adapter, _ = made["gpt-2"]
    file = written(made["gpt-2"], "gpt-2", tmp_path / "x.gguf")

    def lens_over():
        return ll.load(copy.deepcopy(base), adapter, tokenizer=tokenizer, check=False)

    options = {"merged": file, "tokenizer": tokenizer, "progress": False}
    result = verify(adapter, base, lens_over, **options)
    assert result.exit_code == 0, result.story()


def swapped(values, first: int, second: int):
    values = list(values)
    values[first], values[second] = values[second], values[first]
    return values


FAULTS = {
    "tokens": (
        lambda f: {"token_list": swapped(f["token_list"], 70, 71)},
        "2 tokens of another id",
    ),
    "a token lost": (
        lambda f: {"token_list": f["token_list"][:-1], "token_types": f["token_types"][:-1]},
        "1 token missing",
    ),
    "BOS": (lambda f: {"bos_token_id": 0}, "BOS is 0, was 1"),
    "EOS": (lambda f: {"eos_token_id": 0}, "EOS is 0, was [2]"),
    "BOS added": (
        lambda f: {"add_bos_token": f["tokenizer_model"] != "llama"},
        "a text begins with ",
    ),
    "EOS added": (lambda f: {"add_eos_token": True}, "a text ends with [2], was none"),
    "template": (lambda f: {"chat_template": TEMPLATE + "!"}, "another chat template"),
    "types": (
        lambda f: {"token_types": [NORMAL, NORMAL, *f["token_types"][2:]]},
        "2 tokens of another type",
    ),
    "the unknown token": (lambda f: {"unk_token_id": 2}, "the unknown token is 2, was 0"),
}
OF_BYTES = {
    "merges": (lambda f: {"token_merges": swapped(f["token_merges"], 0, 9)}, "2 merges differ"),
    "a merge lost": (lambda f: {"token_merges": f["token_merges"][:-1]}, "merges, were"),
    "splitting": (lambda f: {"tokenizer_pre": "qwen2"}, "gets other ids"),
    "kind": (lambda f: {"tokenizer_model": "llama"}, "the kind 'llama', was 'gpt2'"),
}
OF_PIECES = {
    "scores": (lambda f: {"token_scores": f["token_scores"][::-1]}, "the scores order the tokens"),
    "spaces": (lambda f: {"add_space_prefix": False}, "no space is put before a text"),
}
ALL_FAULTS = [("gpt-2", name) for name in (*FAULTS, *OF_BYTES)]
ALL_FAULTS += [("default", name) for name in (*FAULTS, *OF_PIECES)]


@pytest.mark.parametrize(("rule", "name"), ALL_FAULTS)
def test_a_wrong_tokenizer_fails(rule: str, name: str, made, tmp_path):
    """By the name of what is wrong."""
    edit, says = {**FAULTS, **OF_BYTES, **OF_PIECES}[name]
    edits = edit(fields_of(made[rule][0], rule))
    rest = rest_of(made[rule], written(made[rule], rule, tmp_path / "x.gguf", **edits))
    assert rest.outcome == "failed" and says in rest.measured, rest.facts


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_fails_with_the_first_text_that_it_reads_otherwise(rule: str, made, tmp_path):
    """As llama.cpp reads it. One that reads all texts alike is undecided."""
    tokenizer = made[rule][0]
    other = RULES[(RULES.index(rule) + 1) % len(RULES)]
    file = written(made[rule], rule, tmp_path / "x.gguf", tokenizer_pre=other)
    rest = rest_of(made[rule], file)
    assert f"split by the rule {other!r}, and were by {rule!r}" in rest.measured
    pytest.importorskip("llama_cpp_py_sync")
    engine = LlamaCpp(file)
    others = [text for text in texts_tried() if engine.ids_of(text) != tokenizer(text)["input_ids"]]
    assert rest.outcome == ("failed" if others else "undecided")
    if others:
        assert f"{others[0][:30]!r} gets other ids" in rest.measured
        assert ("read from a GGUF file" in rest.measured) == (rule == "gpt-2")


def test_another_rule_that_no_text_shows_is_undecided(made, tmp_path):
    """Where no token holds two digits, it makes no difference that digits stand alone."""
    tokenizer, base, adapter, merged = made["gpt-2"]
    alone = copy.deepcopy(tokenizer)
    parts = json.loads(alone.backend_tokenizer.to_str())
    letters = [m for m in parts["model"]["merges"] if not any(c.isdigit() for c in "".join(m))]
    parts["model"]["merges"] = letters
    alone._tokenizer = Tokenizer.from_str(json.dumps(parts))
    changed = (alone, base, adapter, merged)
    file = written(changed, "smollm", tmp_path / "x.gguf")
    rest = rest_of(changed, file)
    assert rest.outcome == "undecided" and "no text tried here showed" in rest.measured, rest.facts


UNKNOWN = {
    "a rule": ({"tokenizer_pre": "tekken"}, "the rule 'tekken'"),
    "no template": ({"chat_template": None}, "no chat template in the file"),
    "a field": ({"precompiled_charsmap": b"ab"}, "tokenizer.ggml.precompiled_charsmap"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_compared_is_undecided(name: str, made, tmp_path):
    edits, says = UNKNOWN[name]
    rest = rest_of(made["gpt-2"], written(made["gpt-2"], "gpt-2", tmp_path / "x.gguf", **edits))
    assert rest.outcome == "undecided" and says in rest.measured, rest.facts


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_where_llama_cpp_puts_another_space_it_is_undecided(scheme: str, made, tmp_path):
    """As it reads a text that begins with a space."""
    old, base, adapter, merged = made["default"]
    tokenizer = copy.deepcopy(old)
    raw = tokenizer.backend_tokenizer
    raw.normalizer = normalizers.Sequence([])
    raw.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    changed = (tokenizer, base, adapter, merged)
    file = written(changed, "default", tmp_path / "x.gguf")
    rest = rest_of(changed, file)
    assert rest.outcome == "undecided" and "begins with one" in rest.measured, rest.facts
    pytest.importorskip("llama_cpp_py_sync")
    engine = LlamaCpp(file)
    assert engine.ids_of("cats") == tokenizer("cats")["input_ids"]
    assert engine.ids_of(" cats") != tokenizer(" cats")["input_ids"]


def test_without_a_tokenizer_it_is_undecided(made, tmp_path):
    """In the file, or at hand."""
    tokenizer, base, adapter, merged = made["gpt-2"]
    (_, rest), _ = merged_gguf_checks(
        write_base(merged, tmp_path / "x.gguf"), adapter, base, tokenizer
    )
    assert rest.outcome == "undecided"
    assert "no tokenizer in the file" in rest.measured
    file = written(made["gpt-2"], "gpt-2", tmp_path / "y.gguf")
    (_, rest), _ = merged_gguf_checks(file, adapter, base, None)
    assert rest.outcome == "undecided"
    assert "none to compare it with" in rest.measured


SETTINGS = {
    "rms_norm_eps": (1e-3, "failed", "llama.attention.layer_norm_rms_epsilon is"),
    "num_attention_heads": (2, "failed", "llama.attention.head_count is"),
    "max_position_embeddings": (77, "undecided", "llama.context_length is"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings(name: str, made, tmp_path):
    """What decides logits fails, and the length of the context does not."""
    value, outcome, says = SETTINGS[name]
    tokenizer, base, adapter, merged = made["gpt-2"]
    other = copy.deepcopy(merged)
    setattr(other.config, name, value)
    file = written((tokenizer, base, adapter, other), "gpt-2", tmp_path / "x.gguf")
    rest = rest_of(made["gpt-2"], file)
    assert rest.outcome == outcome and says in rest.measured, rest.facts


def test_another_rotary_base(made, tmp_path):
    """The file says 10000."""
    tokenizer, base, adapter, _ = made["gpt-2"]
    other = copy.deepcopy(base)
    if getattr(other.config, "rope_parameters", None):
        other.config.rope_parameters["rope_theta"] = 5e5
    else:
        other.config.rope_theta = 5e5
    file = written(made["gpt-2"], "gpt-2", tmp_path / "x.gguf")
    (_, rest), _ = merged_gguf_checks(file, adapter, other, tokenizer)
    assert rest.outcome == "failed"
    assert "llama.rope.freq_base is 10000.0" in rest.measured


def test_scaled_rotary_frequencies_of_the_file_alone(made, tmp_path):
    """As a file has them of a base with Llama 3's scaling. llama.cpp computes with them."""
    tokenizer, base, adapter, merged = made["gpt-2"]
    with_frequencies = copy.deepcopy(merged)
    width = merged.config.hidden_size // merged.config.num_attention_heads
    for factor, outcome in ((1.0, "passed"), (2.0, "failed")):
        frequencies = torch.full([width // 2], factor)
        with_frequencies.register_buffer("rope_freqs", frequencies)
        file = written((tokenizer, base, adapter, with_frequencies), "gpt-2", tmp_path / "x.gguf")
        rest = rest_of(made["gpt-2"], file)
        assert rest.outcome == outcome, rest.facts
    assert "rope_freqs.weight scales the rotary frequencies" in rest.measured


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("hidden_act", "gelu", "activation 'gelu'"), ("sliding_window", 7, "the last 7 tokens")],
)
def test_a_base_that_llama_cpp_computes_otherwise(field: str, value, says: str, made, tmp_path):
    tokenizer, base, adapter, _ = made["gpt-2"]
    other = copy.deepcopy(base)
    setattr(other.config, field, value)
    file = written(made["gpt-2"], "gpt-2", tmp_path / "x.gguf")
    (_, rest), _ = merged_gguf_checks(file, adapter, other, tokenizer)
    assert rest.outcome == "undecided" and says in rest.measured, rest.facts
