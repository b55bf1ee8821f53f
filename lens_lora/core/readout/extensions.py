"""Readouts of other folders that the core asks for, provided as `lens_lora/registered.py` says.

The core has readouts of one token. Answers of several tokens stand in a folder above it.
"""

from __future__ import annotations

from typing import Any

from lens_lora.core.provided import declared
from lens_lora.core.readout.prompts import Prompts
from lens_lora.core.readout.readout import Before, Readout
from lens_lora.core.readout.responses import AnswerLike


@declared
def margin_between(model: Any, doc: AnswerLike, pre: AnswerLike, prompts: Prompts) -> Readout:
    """The margin of two answers: of two tokens in logits, and of longer ones in nats.

    Provided by `responses/answers.py`.

    Raises:
        TokenError: an answer that does not fit the model, or a word that lost its leading space.
    """
    raise NotImplementedError


@declared
def answer_ids(
    model: Any, answer: AnswerLike, batch: int, before: Before = ()
) -> list[tuple[int, ...]]:
    """The token ids of each prompt's answer, with which it follows that very prompt.

    Provided by `responses/answers.py`.

    Raises:
        TokenError: an answer that does not fit the model, or a wrong number of them.
    """
    raise NotImplementedError
