"""The tokens of an answer: a string's, those of ids, one answer or one for each prompt.

A string has the tokens with which it follows its prompt's text; after ids it is tokenised alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from lens_lora import arguments
from lens_lora.errors import TokenError
from lens_lora.readouts.generated import Generated
from lens_lora.readouts.readout import Before
from lens_lora.readouts.tokenising import ids_after

__all__ = ["AnswerLike", "Ids", "answer_ids", "items_of", "pieces"]

AnswerLike = (
    str | int | Int[Tensor, "_token"] | Sequence[str | int | Int[Tensor, "_token"]] | Generated
)
Ids = tuple[int, ...]


def answer_ids(model: Any, answer: AnswerLike, batch: int, before: Before = ()) -> list[Ids]:
    """The token ids of each prompt's answer.

    Args:
        model: the hooked model.
        answer: one, or one per prompt.
        batch: the number of prompts.
        before: the text of each prompt, None where only its ids are known; by default of all.

    Raises:
        TokenError: an empty answer, one that cannot follow its prompt, ids outside the vocabulary,
            no tokenizer, or a number of answers that is neither 1 nor the number of prompts.
    """
    items = items_of(answer, batch)
    if len(items) != batch:
        raise TokenError(
            f"{len(items)} answers for {batch} prompts; pass one answer, or one per prompt."
        )
    texts = before or (None,) * batch
    return [_ids(model, item, text) for item, text in zip(items, texts, strict=True)]


def items_of(answer: AnswerLike, batch: int) -> list[str | int | Tensor]:
    """One answer for each prompt, as given.

    Args:
        answer: one, or one per prompt.
        batch: the number of prompts.

    Raises:
        TokenError: of another type.
    """
    if isinstance(answer, Generated):
        return list(answer.ids)
    if isinstance(answer, str | Tensor) or arguments.is_whole(answer):
        return [answer] * batch
    if isinstance(answer, bytes) or not isinstance(answer, Sequence):
        raise TokenError(
            f"the answer is {answer!r}; expected a string with its leading space, a token id, or "
            "a list with one of them per prompt."
        )
    return list(answer)


def _ids(model: Any, answer: str | int | Tensor, before: str | None) -> Ids:
    if isinstance(answer, str):
        arguments.text("the answer", answer, TokenError)
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise TokenError(f"the model has no tokenizer to look up {answer!r}; pass token ids.")
        ids = ids_after(tokenizer, answer, before)
    elif arguments.is_whole(answer):
        ids = [int(answer)]
    elif isinstance(answer, Tensor):
        ids = _of_tensor(answer)
    else:
        raise TokenError(f"{answer!r} is neither a string nor token ids.")
    if not ids:
        raise TokenError(f"the answer {answer!r} has no token; give it at least one.")
    outside = [i for i in ids if not 0 <= i < model.cfg.d_vocab]
    if outside:
        raise TokenError(
            f"token id {outside[0]} of the answer {answer!r} is outside the vocabulary of "
            f"{model.cfg.d_vocab} tokens."
        )
    return tuple(int(i) for i in ids)


def _of_tensor(answer: Tensor) -> list[int]:
    """The ids of one answer: of [token], or of [1, token] as a tokenizer gives them."""
    ids = arguments.integers("the answer's token ids", answer, TokenError)
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim > 1:
        raise TokenError(
            f"the answer's token ids have the shape {tuple(ids.shape)}; expected [token], or a "
            "list of such tensors, one per prompt."
        )
    return ids.flatten().tolist()


def pieces(model: Any, ids: Ids) -> list[str]:
    """Each token as a string.

    Args:
        model: the hooked model.
        ids: of an answer.
    """
    return [model.tokenizer.decode([i]) for i in ids]
