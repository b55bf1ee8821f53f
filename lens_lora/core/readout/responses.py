"""Responses: strings, ids, or what the model itself said after a prompt (`Generated`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn, final

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from lens_lora import guesses
from lens_lora.core.provided import declared
from lens_lora.core.readout.prompts import Prompts
from lens_lora.errors import many


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Generated(guesses.Answering):
    """Responses, one per prompt, which can be passed on wherever a response is taken.

    What is passed on is their ids, because text that is tokenised again may give other tokens.

    Attributes:
        ids: the tokens of each response, including the token that ended it.
        texts: each response as text, without special tokens.
        prompts: the prompts that were answered, as tokens.
        ended: whether each response ended by itself, rather than at `max_new_tokens`.
        is_single: whether a single prompt was given, rather than a list of prompts.
    """

    remedies: ClassVar[Mapping[str, str]] = guesses.OF_GENERATED

    ids: tuple[Int[Tensor, " _token"], ...]
    texts: tuple[str, ...]
    prompts: Prompts
    ended: tuple[bool, ...]
    is_single: bool = False

    @property
    def text(self) -> str | tuple[str, ...]:
        """The text of the response to a single prompt; for a list of prompts, `texts`."""
        return self.texts[0] if self.is_single else self.texts

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt: what was asked (None for ids), the response, its tokens, its end."""
        rows: list[dict[str, object]] = []
        for index, (source, ids) in enumerate(zip(self.prompts.sources, self.ids, strict=True)):
            asked = source.text if source.said is None else source.said
            row: dict[str, object] = {
                "prompt": index,
                "asked": asked,
                "response": self.texts[index],
                "tokens": len(ids),
                "ended": self.ended[index],
            }
            rows.append(row)
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, with ids and prompts; `ll.load_result` reads it.

        Args:
            path: the file to write.

        Raises:
            LensLoraError: the file cannot be written there.
        """
        return save_generated(self, path)

    if not TYPE_CHECKING:  # A type checker refuses an index by itself.

        def __getitem__(self, key: object) -> NoReturn:
            """Refuse to be indexed or iterated, and say what has one response."""
            raise guesses.refused_index(self, key, guesses.INDEX_OF_GENERATED)

    def __repr__(self) -> str:
        says: list[str] = []
        for ids, text, ended in zip(self.ids, self.texts, self.ended, strict=True):
            cut = "" if ended else ", cut off"
            says.append(f"{text!r}, {many(len(ids), 'token')}{cut}")
        return f"Generated({'; '.join(says)})"


@declared
def save_generated(result: Generated, path: str | Path) -> Path:
    """Write responses as one file, as results are written; returns the path.

    Provided by `core/results/storage.py`.

    Raises:
        LensLoraError: a place where no file can be written.
    """
    raise NotImplementedError


OneAnswer = str | int | Int[Tensor, " _token"]
AnswerLike = OneAnswer | Sequence[OneAnswer] | Generated
