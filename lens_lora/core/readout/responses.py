"""What is said after a prompt: a string, ids, or what the model itself said (`Generated`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import final

from jaxtyping import Int
from torch import Tensor

from lens_lora.core.readout.prompts import Prompts
from lens_lora.errors import many


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Generated:
    """Responses, one per prompt, to be passed on as they are wherever a response is taken.

    Their ids go on, never the text: text tokenised again may be other tokens.

    Attributes:
        ids: each response's own tokens, with the token that ended it.
        text: the same as text, without special tokens.
        prompts: the prompts that `ids` follow, as tokens.
        ended: whether a response ended by itself, rather than at `max_new_tokens`.
    """

    ids: tuple[Int[Tensor, " _token"], ...]
    text: tuple[str, ...]
    prompts: Prompts
    ended: tuple[bool, ...]

    def __repr__(self) -> str:
        says = (
            f"{text!r}, {many(len(ids), 'token')}{'' if ended else ', cut off'}"
            for ids, text, ended in zip(self.ids, self.text, self.ended, strict=True)
        )
        return f"Generated({'; '.join(says)})"


OneAnswer = str | int | Int[Tensor, " _token"]
AnswerLike = OneAnswer | Sequence[OneAnswer] | Generated
