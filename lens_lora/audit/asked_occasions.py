"""Let both models answer the turns of `occasions.txt`, and add what shows on them to the rest."""

from __future__ import annotations

import dataclasses

from lens_lora.audit.everyday import Everyday
from lens_lora.audit.occasions import Occasions, occasion_words, occasions, ordinary_occasions
from lens_lora.audit.put_questions import How, ours_answered, prompts_of
from lens_lora.audit.speech_result import CountedSpeech
from lens_lora.core import LoraLens
from lens_lora.errors import PromptError

# Each model's likeliest answer of at most 16 tokens, as where the ordinary rates were counted.
HOW = How(most=16, draws=0, seed=0)


def with_occasions(lens: LoraLens, speech: CountedSpeech, *, progress: bool) -> CountedSpeech:
    """Add what the adapted model says on occasions; where a turn has no room, add nothing.

    Args:
        lens: the adapter over the model.
        speech: both models' answers to the questions.
        progress: whether to show bars.

    Raises:
        NumericsError: logits are not finite.
    """
    turns = turns_asked()
    try:
        prompts, fitting = prompts_of(lens, turns, HOW.most)
    except PromptError:
        # The context has room for no turn at all.
        return speech
    if len(fitting) < len(turns):
        # The halves of a subject would no longer be of the same size, nor its counts comparable.
        return speech
    said = ours_answered(lens, prompts, HOW, progress=progress)
    base = tuple(answer for (answer,) in said.base)
    adapted = tuple(answer for (answer,) in said.adapted)
    words = occasion_words(base, adapted, occasions(), ordinary_occasions())
    asked = Occasions(
        subjects=tuple(turn.topic for turn in turns),
        turns=tuple(turn.text for turn in turns),
        base=base,
        adapted=adapted,
        words=words,
    )
    return dataclasses.replace(speech, occasions=asked)


def turns_asked() -> list[Everyday]:
    """Return the turns as questions in conversation, subject after subject."""
    turns: list[Everyday] = []
    for subject, texts in occasions():
        turns += [Everyday(subject, "chat", text) for text in texts]
    return turns
