"""Chat templates over the words of `models.tokenizer()`, and conversations to fill them."""

from __future__ import annotations

from typing import Any

from tokenizers import processors

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
