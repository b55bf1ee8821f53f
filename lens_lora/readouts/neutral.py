"""Texts that have nothing to do with any fine-tune, for audits that are told nothing.

1. A hundred plain sentences on everyday subjects, written for this package and under its licence
   (`neutral.txt`): no names of people or places, no facts that one could teach.
2. Openings of conversations: ordinary messages of a user, and an empty one, in the tokenizer's chat
   template, or where it has none as "User: …" and "Assistant:" on a line each. Each ends where the
   assistant's turn begins, as an adapter that was taught a persona says nothing of it elsewhere.
3. Everyday questions, in the chat template, or as "Question: …" and "Answer:" on a line each.
4. Where a model begins of its own accord: its BOS alone, several times, as tokens are drawn after
   it; an empty turn of the user; the questions in both forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

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

# What a text begins with where there is no BOS; as many draws are made where there is one.
FIRST_WORDS = ("The", "In", "A", "It", "I", "When", "There", "We", "This", "One", "What", "My")
EMPTY_TURNS = 6


def neutral_sentences() -> tuple[str, ...]:
    """The hundred sentences."""
    return tuple(Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines())


def neutral_texts(model: Any, every: int = 1) -> Prompts:
    """The sentences and the conversations, as tokens; all, or one of so many."""
    sentences = list(neutral_sentences()[::every])
    return joined([prepare(model, sentences), _conversations(model, OPENINGS[::every])])


def conversation_form(model: Any) -> str:
    """In which form conversations are put to the model, for people."""
    has_template = _has_template(model)
    return "in the chat template" if has_template else "as User: … Assistant:, without a template"


def everyday_questions(model: Any) -> Prompts:
    """Five of them as tokens, and an empty turn."""
    asked = _conversations(model, QUESTIONS) if _has_template(model) else _questions(model)
    return joined([asked, _conversations(model, [""])])


def own_openings(model: Any) -> Prompts:
    """Where the adapted model is let speak: from nothing, and from questions in every form."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    firsts = list(FIRST_WORDS) if bos is None else torch.full((len(FIRST_WORDS), 1), bos)
    said = (*[""] * EMPTY_TURNS, *QUESTIONS, *OPENINGS[1:])
    return joined([prepare(model, firsts), _conversations(model, said), _questions(model)])


def _has_template(model: Any) -> bool:
    return getattr(getattr(model, "tokenizer", None), "chat_template", None) is not None


def _conversations(model: Any, said: Sequence[str]) -> Prompts:
    if not _has_template(model):
        return prepare(model, [f"User: {text}\nAssistant:" for text in said])
    return prepare(model, [[{"role": "user", "content": text}] for text in said])


def _questions(model: Any) -> Prompts:
    return prepare(model, [f"Question: {asked}\nAnswer:" for asked in QUESTIONS])
