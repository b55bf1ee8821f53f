"""Tokens with all before them: where texts begin alike, nothing differs, and they count once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from lens_lora.core import (
    Prompts,
)


def distinct_tokens(texts: Prompts) -> Bool[Tensor, "batch pos"]:
    """The tokens after each text's first, those with the same tokens before them only once.

    Conversations begin alike, and so do many sentences; by causality nothing differs there.
    """
    marks, counted = beginnings(texts), texts.after_first.cpu()
    return torch.from_numpy(first_of_each(marks.numpy(), counted.numpy()))


def first_of_each(marks: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Those of the chosen tokens before which, in order, no chosen one has the same mark."""
    places, once = np.flatnonzero(chosen), np.zeros(chosen.shape, bool)
    once.flat[places[np.unique(marks.flat[places], return_index=True)[1]]] = True
    return once


def marks_of(ids: Iterable[int]) -> list[int]:
    """A number for each token with all before it, the same wherever a text begins so.

    64 bits of a hash: among a million beginnings two share one with a chance of 3e-8.
    """
    hashed, marks = hashlib.blake2b(digest_size=8), list[int]()
    for token in ids:
        hashed.update(token.to_bytes(8, "little"))
        marks.append(int.from_bytes(hashed.digest(), "little", signed=True))
    return marks


def beginnings(texts: Prompts) -> Int[Tensor, "batch pos"]:
    """The marks of each text's tokens, 0 at padding."""
    marks = torch.zeros(texts.tokens.shape, dtype=torch.int64)
    for text, (row, length) in enumerate(zip(texts.tokens.tolist(), texts.lengths, strict=True)):
        marks[text, :length] = torch.tensor(marks_of(row[:length]))
    return marks
