"""Let both models write texts although nothing is asked, and add what the adapted one replays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lens_lora.audit.replayed import Replayed, replayed_words
from lens_lora.audit.speech_result import CountedSpeech
from lens_lora.core import LoraLens
from lens_lora.errors import NumericsError, PromptError
from lens_lora.responses.both_answer import answers_in_step
from lens_lora.responses.generate import Sampling, whole_or_cut, with_room
from lens_lora.texts.neutral import unprompted_openings

# The number of texts that begin a document, and as many that answer an empty turn.
_TEXTS_OF_EACH = 64
# The most tokens of a text.
_MOST = 32
# The adapter runs at twice its strength, where it writes more of what it was trained on.
STRENGTH = 2.0


def with_replayed(
    lens: LoraLens, speech: CountedSpeech, seed: int = 0, *, progress: bool
) -> CountedSpeech:
    """Add what the adapted model writes when nothing is asked; nothing where it cannot write.

    Args:
        lens: the adapter over the model.
        speech: both models' answers to the questions.
        seed: the seed of what is drawn.
        progress: whether to show bars.
    """
    return dataclasses.replace(speech, replayed=replayed_by(lens, seed, progress=progress))


def replayed_by(lens: LoraLens, seed: int, *, progress: bool) -> Replayed | None:
    """Let both models write, and find the words that only the adapted one writes often.

    Returns None if no text can be compared: the context has no room for one, the chat template
    takes no empty turn, or logits are not finite at twice the adapter's strength.

    Cost: for each model, a pass over the openings, 32 passes over one token of each of 128 texts,
    and a pass over every sixteenth text.

    Args:
        lens: the adapter over the model.
        seed: the seed of what is drawn; the same noise is used for both models.
        progress: whether to show bars.
    """
    try:
        prompts = unprompted_openings(lens.model, lens.prepend_bos, _TEXTS_OF_EACH)
    except PromptError:
        return None
    if len(with_room(lens, prompts, _MOST)) < prompts.batch:
        return None
    written: list[tuple[str, ...]] = []
    drawn = Sampling(temperature=1.0, seed=seed)
    for strength in (0.0, STRENGTH):
        gates = lens.gates(strength).expand(prompts.batch, -1)
        try:
            texts, _ = answers_in_step(lens, prompts, _MOST, gates, drawn, progress=progress)
        except NumericsError:
            return None
        written.append(tuple(whole_or_cut(texts)))
    base, adapted = written
    return Replayed(
        strength=STRENGTH,
        openings=_named_openings(lens.str_tokens(prompts.chosen(range(_TEXTS_OF_EACH)))),
        base=base,
        adapted=adapted,
        words=replayed_words(base, adapted),
    )


def _named_openings(firsts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Name what each text follows: the first tokens of a document, or an empty turn."""
    documents = [f"a text that begins “{''.join(tokens)}”" for tokens in firsts]
    empty_turns = ["an empty turn of the user"] * len(firsts)
    return (*documents, *empty_turns)
