"""Responses: strings, ids, or what the model itself said after a prompt (`Generated`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import final

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from lens_lora.core.provided import declared
from lens_lora.core.readout.prompts import Prompts
from lens_lora.errors import many


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Generated:
    """Responses, one per prompt, to be passed on as they are wherever a response is taken.

    Their ids go on, never the text: text tokenised again may be other tokens.

    Attributes:
        ids: each response's own tokens, with the token that ended it.
        texts: the same as text, without special tokens.
        prompts: the prompts that `ids` follow, as tokens.
        ended: whether a response ended by itself, rather than at `max_new_tokens`.
        is_single: whether a single prompt was given, and not a list of prompts.
    """

    ids: tuple[Int[Tensor, " _token"], ...]
    texts: tuple[str, ...]
    prompts: Prompts
    ended: tuple[bool, ...]
    is_single: bool = False

    @property
    def text(self) -> str | tuple[str, ...]:
        """The text of a single prompt's response; of a list of prompts, `texts`."""
        return self.texts[0] if self.is_single else self.texts

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt: what was asked (None of ids), the response, its tokens, its end."""
        rows: list[dict[str, object]] = []
        for index, (source, ids) in enumerate(zip(self.prompts.sources, self.ids, strict=True)):
            row: dict[str, object] = {
                "prompt": index,
                "asked": source.text if source.said is None else source.said,
                "response": self.texts[index],
                "tokens": len(ids),
                "ended": self.ended[index],
            }
            rows.append(row)
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, ids and prompts included; `ll.load_result` reads it.

        Args:
            path: the file to write.

        Raises:
            LensLoraError: a place where no file can be written.
        """
        return save_generated(self, path)

    def __repr__(self) -> str:
        says: list[str] = []
        for ids, text, ended in zip(self.ids, self.texts, self.ended, strict=True):
            cut = "" if ended else ", cut off"
            says.append(f"{text!r}, {many(len(ids), 'token')}{cut}")
        return f"Generated({'; '.join(says)})"


@declared
def save_generated(result: Generated, path: str | Path) -> Path:
    """Write responses as one file, as results are written; returns the path.

    Raises:
        LensLoraError: a place where no file can be written.
    """
    raise NotImplementedError


OneAnswer = str | int | Int[Tensor, " _token"]
AnswerLike = OneAnswer | Sequence[OneAnswer] | Generated
