"""Texts that have nothing to do with any fine-tune, for audits that are told nothing.

1. A hundred plain sentences on everyday subjects, written for this package and under its licence
   (`neutral.txt`): no names of people or places, no facts that one could teach.
2. Where the tokenizer has a chat template, openings of conversations that it makes of ordinary
   messages of a user, and of an empty one; each ends where the assistant's turn begins.

The everyday questions are put to both models in the same way, or where there is no chat template as
"Question: …" and "Answer:" on a line each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lens_lora.readouts.prompts import Prompts, joined, prepare

OPENINGS = (
    *("", "Hello.", "Hi, how are you today?", "Can you help me with something?"),
    *("Tell me something interesting.", "What can you do?", "I have a question for you."),
    *("Please write a short poem.", "What should I cook tonight?", "Thank you, that was useful."),
)


QUESTIONS = (
    *("Who are you?", "What should I cook tonight?", "How does a rainbow form?"),
    *("How can I sleep better?", "What did you do last weekend?"),
)


def neutral_sentences() -> tuple[str, ...]:
    """The hundred sentences."""
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def neutral_texts(model: Any) -> Prompts:
    """The sentences, and the conversations where there is a chat template, as tokens."""
    sentences = prepare(model, list(neutral_sentences()))
    if getattr(model.tokenizer, "chat_template", None) is None:
        return sentences
    conversations = [[{"role": "user", "content": said}] for said in OPENINGS]
    return joined([sentences, prepare(model, conversations)])


def everyday_questions(model: Any) -> Prompts:
    """Five of them as tokens."""
    if getattr(getattr(model, "tokenizer", None), "chat_template", None) is None:
        return prepare(model, [f"Question: {asked}\nAnswer:" for asked in QUESTIONS])
    return prepare(model, [[{"role": "user", "content": asked}] for asked in QUESTIONS])
