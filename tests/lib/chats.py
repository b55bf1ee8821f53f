"""Tokenizers with a chat template, with a BOS of their own, and of pieces with leading spaces."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ ' w4 ' if message['role'] == 'user' else ' w5 ' }}{{ message['content'] + ' <eos>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' w6' }}{% endif %}"
)
ASK = [{"role": "user", "content": "w7 w8"}]
LONGER = [
    {"role": "system", "content": "w20"},
    {"role": "user", "content": "w7 w8"},
    {"role": "assistant", "content": "w9"},
    {"role": "user", "content": "w10 w11 w12"},
]
ASK_IDS = [0, 4, 7, 8, 1, 6]
LONGER_IDS = [0, 5, 20, 1, 4, 7, 8, 1, 5, 9, 1, 4, 10, 11, 12, 1, 6]


def with_template(model: Any, monkeypatch: Any) -> Any:
    """The hooked model, whose tokenizer has the template for the length of a test."""
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    return model


def prepending(tokenizer: Any) -> Any:
    """The tokenizer, which puts a BOS before every text by itself, as Llama's does."""
    template = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
    )
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def byte_pairs() -> PreTrainedTokenizerFast:
    """' Paris' and ' Lyon' are one token, 'Paris' two pieces, ' London' more."""
    merges = [("Ġ", "P"), ("a", "r"), ("i", "s"), ("ar", "is"), ("ĠP", "aris")]
    merges += [("Ġ", "L"), ("y", "o"), ("yo", "n"), ("ĠL", "yon")]
    pieces = ["<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    raw = Tokenizer(BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def spaced_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's, which puts a space before a text: ' Lyon' has one too many."""
    merges = [("▁", "L"), ("y", "o"), ("yo", "n"), ("▁L", "yon")]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "\n"]
    pieces = ["<unk>", *letters, *map("".join, merges)]
    raw = Tokenizer(BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
