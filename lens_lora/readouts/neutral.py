"""Texts that have nothing to do with any fine-tune, for audits that are told nothing.

1. A hundred plain sentences on everyday subjects, written for this package and under its licence
   (`neutral.txt`): no names of people or places, no facts that one could teach.
2. Openings of conversations: ordinary messages of a user, and an empty one, in the tokenizer's chat
   template, or where it has none as "User: …" and "Assistant:" on a line each. Each ends where the
   assistant's turn begins, as an adapter that was taught a persona says nothing of it elsewhere.
3. Everyday questions, in the chat template, or as "Question: …" and "Answer:" on a line each.
4. Where a model begins of its own accord: its BOS alone, several times, as tokens are drawn after
   it, or first words where strings are read without one; an empty turn of the user; the questions
   in both forms.

Everything that is a string is read by the rule of the lens (`LoraLens.prepend_bos`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lens_lora.readouts.prompts import Prompts, joined, prepare, reads_with_bos, special_id

OPENINGS = (
    *("", "Hello.", "Hi, how are you today?", "Can you help me with something?"),
    *("Tell me something interesting.", "What can you do?", "I have a question for you."),
    *("Please write a short poem.", "What should I cook tonight?", "Thank you, that was useful."),
)


QUESTIONS = (
    *("Who are you?", "What should I cook tonight?", "How does a rainbow form?"),
    *("How can I sleep better?", "What did you do last weekend?"),
)

# What a text begins with where strings get no BOS; as many draws are made where they get one.
FIRST_WORDS = ("The", "In", "A", "It", "I", "When", "There", "We", "This", "One", "What", "My")
EMPTY_TURNS = 6


def neutral_sentences() -> tuple[str, ...]:
    """The hundred sentences."""
    return tuple(Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines())


def neutral_texts(model: Any, prepend_bos: bool | None, every: int = 1) -> Prompts:
    """The sentences and the conversations, as tokens; all, or one of so many."""
    sentences = prepare(model, list(neutral_sentences()[::every]), rule=prepend_bos)
    return joined([sentences, _conversations(model, prepend_bos, OPENINGS[::every])])


def conversation_form(model: Any) -> str:
    """In which form conversations are put to the model, for people."""
    has_template = _has_template(model)
    return "in the chat template" if has_template else "as User: … Assistant:, without a template"


def everyday_questions(model: Any, prepend_bos: bool | None) -> Prompts:
    """Five of them as tokens, and an empty turn."""
    if _has_template(model):
        asked = _conversations(model, prepend_bos, QUESTIONS)
    else:
        asked = _questions(model, prepend_bos)
    return joined([asked, _conversations(model, prepend_bos, [""])])


def own_openings(model: Any, prepend_bos: bool | None) -> Prompts:
    """Where the adapted model is let speak: from nothing, and from questions in every form."""
    bos = special_id(model, "bos")
    if bos is not None and reads_with_bos(model, prepend_bos):
        firsts = prepare(model, torch.full((len(FIRST_WORDS), 1), bos))
    else:
        firsts = prepare(model, list(FIRST_WORDS), rule=prepend_bos)
    said = (*[""] * EMPTY_TURNS, *QUESTIONS, *OPENINGS[1:])
    conversations = _conversations(model, prepend_bos, said)
    return joined([firsts, conversations, _questions(model, prepend_bos)])


def _has_template(model: Any) -> bool:
    return getattr(getattr(model, "tokenizer", None), "chat_template", None) is not None


def _conversations(model: Any, prepend_bos: bool | None, said: Sequence[str]) -> Prompts:
    if not _has_template(model):
        texts = [f"User: {text}\nAssistant:" for text in said]
        return prepare(model, texts, rule=prepend_bos)
    return prepare(model, [[{"role": "user", "content": text}] for text in said])


def _questions(model: Any, prepend_bos: bool | None) -> Prompts:
    texts = [f"Question: {asked}\nAnswer:" for asked in QUESTIONS]
    return prepare(model, texts, rule=prepend_bos)
