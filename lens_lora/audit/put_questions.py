"""Put questions to both models, each in its form, and let both answer them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lens_lora.audit.base_answers import kept_answers
from lens_lora.audit.everyday import SYSTEM_MESSAGE, Everyday
from lens_lora.core import LoraLens, Prompts
from lens_lora.errors import PromptError, many
from lens_lora.responses.both_answer import BothAnswer, both_answer

# The base's answers are kept if asking took longer than this, in seconds.
_WORTH_KEEPING = 5.0


def prompts_of(lens: LoraLens, asked: Sequence[Everyday], most: int) -> tuple[Prompts, list[int]]:
    """Return as prompts the questions that leave room for an answer, and their indices."""
    if getattr(lens.model, "tokenizer", None) is None:
        raise PromptError(
            "the model has no tokenizer, so no question can be asked",
            remedy="load the lens with a tokenizer: `ll.load(base, adapter)` brings it along.",
        )
    # Strings and conversations cannot be mixed in one list, so strings come first.
    strings: list[int] = []
    conversations: list[int] = []
    for i, one in enumerate(asked):
        if isinstance(put(lens, one), str):
            strings.append(i)
        else:
            conversations.append(i)
    parts: list[Prompts] = []
    for indices in (strings, conversations):
        if indices:
            parts.append(lens.prompts([put(lens, asked[i]) for i in indices]))
    every = Prompts.joined(parts)
    # The index in `asked` of each of these prompts.
    index_of = [*strings, *conversations]

    context = getattr(lens.model.cfg, "n_ctx", None) or math.inf
    room = context - most
    fitting = [place for place, length in enumerate(every.lengths.tolist()) if length <= room]
    if not fitting:
        raise PromptError(
            f"no question leaves room for {many(most, 'token')} in the model's context",
            remedy="pass a smaller max_new_tokens=.",
        )
    # The order of `asked` is restored.
    fitting.sort(key=lambda place: index_of[place])
    return every.chosen(fitting), [index_of[place] for place in fitting]


def put(lens: LoraLens, asked: Everyday) -> Any:
    """Put a question in its form: a string, or a conversation if the tokenizer has a template."""
    if asked.form == "plain":
        return f"Question: {asked.text}\nAnswer:"
    if asked.messages is not None:
        # Without a template `LoraLens.prompts` refuses a conversation.
        return list(asked.messages)
    if getattr(lens.model.tokenizer, "chat_template", None) is None:
        opening = f"{SYSTEM_MESSAGE}\n" if asked.form == "system" else ""
        return f"{opening}User: {asked.text}\nAssistant:"
    turn = {"role": "user", "content": asked.text}
    if asked.form != "system":
        return [turn]
    return _with_system_message(lens, turn)


def _with_system_message(lens: LoraLens, turn: Mapping[str, str]) -> list[Mapping[str, str]]:
    """Put a system message before the turn, or into it if the template has no such role."""
    conversation = [{"role": "system", "content": SYSTEM_MESSAGE}, turn]
    try:
        rendered = lens.model.tokenizer.apply_chat_template(conversation, tokenize=False)
    except Exception:  # A template may raise any error that its author chose.
        rendered = ""
    if SYSTEM_MESSAGE in rendered:
        return conversation
    return [{**turn, "content": f"{SYSTEM_MESSAGE}\n\n{turn['content']}"}]


class How(NamedTuple):
    """How answers are chosen.

    Attributes:
        most: the most tokens of an answer.
        draws: how many answers are drawn besides the likeliest one.
        seed: the seed of the first draw.
    """

    most: int
    draws: int
    seed: int


def ours_answered(lens: LoraLens, prompts: Prompts, how: How, *, progress: bool) -> BothAnswer:
    """Let both models answer questions of the package; the base's answers are kept.

    Args:
        lens: the adapter over the base.
        prompts: the package's questions that leave room for an answer.
        how: how answers are chosen.
        progress: whether to show bars.
    """
    kept = kept_answers(lens, prompts, *how)
    started = time.perf_counter()
    said = both_answer(lens, prompts, *how, known=kept.answers, progress=progress)
    if time.perf_counter() - started > _WORTH_KEEPING:
        kept.keep(said.base_ids)
    return said


def answered(lens: LoraLens, prompts: Prompts, how: How, *, progress: bool) -> BothAnswer:
    """Let both models answer the caller's questions, of which nothing is ever kept."""
    return both_answer(lens, prompts, *how, progress=progress)
