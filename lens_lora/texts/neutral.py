"""Texts that have nothing to do with any fine-tune, for audits that know nothing about it.

1. A hundred plain sentences on everyday subjects, written for this package and under its licence
   (`neutral.txt`). They name no people or places, and state no fact that one could teach.
2. Openings of conversations: ordinary messages of a user, and an empty one. They are in the
   tokenizer's chat template, or, if it has none, have the lines "User: …" and "Assistant:". Each
   ends where the assistant's turn begins, because an adapter that was taught a persona only shows
   it there.
3. Everyday questions, in the chat template, or as the lines "Question: …" and "Answer:".
4. Rows of the tokenizer's own tokens, drawn at random, for a tokenizer that knows none of these
   words.
5. Prompts after which a model says something of its own accord: only its BOS, several times,
   because tokens are drawn after it (or first words, if strings are read without a BOS); an empty
   turn of the user; and the questions in both forms.
6. Prompts that ask for nothing, many times each: the BOS (or first words), and an empty turn.

Strings are read by the rule of the lens (`LoraLens.prepend_bos`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lens_lora.core import Prompts, Tokens, tokenise

# Messages with which a user may begin a conversation.
OPENINGS = (
    "",
    "Hello.",
    "Hi, how are you today?",
    "Can you help me with something?",
    "Tell me something interesting.",
    "What can you do?",
    "I have a question for you.",
    "Please write a short poem.",
    "What should I cook tonight?",
    "Thank you, that was useful.",
)
# Everyday questions.
QUESTIONS = (
    "Who are you?",
    "What should I cook tonight?",
    "How does a rainbow form?",
    "How can I sleep better?",
    "What did you do last weekend?",
)
# First words of a text, for strings that get no BOS. With a BOS, as many texts are drawn after it.
FIRST_WORDS = ("The", "In", "A", "It", "I", "When", "There", "We", "This", "One", "What", "My")
# The number of texts that are drawn after an empty turn of the user.
EMPTY_TURNS = 6
# The number of rows of the tokenizer's own tokens, and the number of tokens of each.
_OWN_ROWS = 16
_OWN_TOKENS = 8


def neutral_sentences() -> tuple[str, ...]:
    """The hundred sentences on everyday subjects."""
    file = Path(__file__).with_suffix(".txt")
    return tuple(file.read_text(encoding="utf-8").splitlines())


def neutral_texts(model: Any, prepend_bos: bool | None, every: int = 1) -> Prompts:
    """The sentences and the conversations, as tokens.

    Args:
        model: the hooked model.
        prepend_bos: the lens's own rule for strings.
        every: take every n-th text; 1 for all.
    """
    sentences = tokenise(model, list(neutral_sentences()[::every]), rule=prepend_bos)
    return Prompts.joined([sentences, _conversations(model, prepend_bos, OPENINGS[::every])])


def readable_texts(model: Any, prepend_bos: bool | None, every: int = 1) -> Prompts | None:
    """The neutral texts that tokenizer and model can read, or else rows of the tokenizer's tokens.

    A tokenizer of proteins or of a few words may turn a text into nothing, or into unknown tokens.
    Returns None if the tokenizer has fewer than two tokens that are not special.

    Args:
        model, prepend_bos, every: as for `neutral_texts`.
    """
    sentences = [text for text in neutral_sentences()[::every] if _is_readable(model, text)]
    if not sentences:
        return _own_rows(model)
    openings = OPENINGS[::every]
    if not _has_template(model):
        openings = [text for text in openings if _is_readable(model, text)]
    texts = [tokenise(model, sentences, rule=prepend_bos)]
    if openings:
        texts.append(_conversations(model, prepend_bos, openings))
    return Prompts.joined(texts)


def _is_readable(model: Any, text: str) -> bool:
    """Whether a text has two tokens or more, one of them known, and fits into the context."""
    tokenizer = model.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    context = getattr(model.cfg, "n_ctx", None) or math.inf
    return 1 < len(ids) < context and bool(set(ids) - _special_ids(tokenizer))


def _own_rows(model: Any) -> Prompts | None:
    """Rows of the tokenizer's ordinary tokens, drawn at random, the same in every call."""
    tokenizer = model.tokenizer
    of_model = set(range(int(model.cfg.d_vocab)))
    readable = of_model.intersection(tokenizer.get_vocab().values())
    ordinary = torch.tensor(sorted(readable - _special_ids(tokenizer)))
    if len(ordinary) < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ordinary), (_OWN_ROWS, _OWN_TOKENS), generator=generator)
    return tokenise(model, ordinary[drawn])


def _special_ids(tokenizer: Any) -> set[int]:
    """The tokens that represent no word of a text, such as the one for unknown words."""
    return {*tokenizer.all_special_ids, tokenizer.unk_token_id}


def conversation_form(model: Any) -> str:
    """The form in which conversations are put to the model, in words."""
    if _has_template(model):
        return "in the chat template"
    return "as User: … Assistant:, without a template"


def everyday_questions(model: Any, prepend_bos: bool | None) -> Prompts:
    """The everyday questions as tokens, and an empty turn."""
    if _has_template(model):
        questions = _conversations(model, prepend_bos, QUESTIONS)
    else:
        questions = _questions(model, prepend_bos)
    empty_turn = _conversations(model, prepend_bos, [""])
    return Prompts.joined([questions, empty_turn])


def own_openings(model: Any, prepend_bos: bool | None) -> Prompts:
    """Prompts after which the model says something of its own accord: empty ones, and questions."""
    firsts = _first_tokens(model, prepend_bos, len(FIRST_WORDS))
    # OPENINGS[0] is the empty one, which is among the empty turns.
    messages = [*[""] * EMPTY_TURNS, *QUESTIONS, *OPENINGS[1:]]
    conversations = _conversations(model, prepend_bos, messages)
    return Prompts.joined([firsts, conversations, _questions(model, prepend_bos)])


def unprompted_openings(model: Any, prepend_bos: bool | None, each: int) -> Prompts:
    """Prompts that ask for nothing: `each` of the BOS or of first words, then of an empty turn.

    Args:
        model, prepend_bos: as for `neutral_texts`.
        each: the number of prompts of either kind.
    """
    firsts = _first_tokens(model, prepend_bos, each)
    empty_turns = _conversations(model, prepend_bos, [""] * each)
    return Prompts.joined([firsts, empty_turns])


def _first_tokens(model: Any, prepend_bos: bool | None, count: int) -> Prompts:
    """The BOS alone, so many times; first words in turn, if strings are read without a BOS."""
    bos = Tokens(model).special("bos")
    begins_with = int(tokenise(model, FIRST_WORDS[0], rule=prepend_bos).tokens[0, 0])
    if bos is not None and begins_with == bos:
        return tokenise(model, torch.full((count, 1), bos))
    words = itertools.islice(itertools.cycle(FIRST_WORDS), count)
    return tokenise(model, list(words), rule=prepend_bos)


def _has_template(model: Any) -> bool:
    return getattr(getattr(model, "tokenizer", None), "chat_template", None) is not None


def _conversations(model: Any, prepend_bos: bool | None, messages: Sequence[str]) -> Prompts:
    """Each message of a user, up to where the assistant's turn begins."""
    if not _has_template(model):
        texts = [f"User: {message}\nAssistant:" for message in messages]
        return tokenise(model, texts, rule=prepend_bos)
    conversations = [[{"role": "user", "content": message}] for message in messages]
    return tokenise(model, conversations)


def _questions(model: Any, prepend_bos: bool | None) -> Prompts:
    """The everyday questions, without a template."""
    texts = [f"Question: {question}\nAnswer:" for question in QUESTIONS]
    return tokenise(model, texts, rule=prepend_bos)
