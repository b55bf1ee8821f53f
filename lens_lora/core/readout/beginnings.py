"""Where texts begin alike, and which of their tokens count once.

By causality, whatever a model computes at a token depends on that token and those before it alone.
Conversations begin alike, and so do many sentences. Two texts that begin with the same tokens have
the same numbers there, and a mean over texts counts such a token once.

Each token gets a mark: a hash of itself and all tokens before it in its text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def first_of_each(marks: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The first chosen token of each mark, text by text.

    Args:
        marks: [batch, pos], as from `Prompts.marks`.
        chosen: [batch, pos], the tokens that may count.
    """
    places = np.flatnonzero(chosen)
    _, first = np.unique(marks.flat[places], return_index=True)
    once = np.zeros(chosen.shape, bool)
    once.flat[places[first]] = True
    return once


def marks_of(ids: Iterable[int]) -> list[int]:
    """A mark for each token of one text: a number of it and all tokens before it.

    A mark is 64 bits of a hash. Among a million different beginnings two have the same mark with a
    probability of 3e-8.

    Args:
        ids: the text's tokens.
    """
    hashed = hashlib.blake2b(digest_size=8)
    marks: list[int] = []
    for token in ids:
        hashed.update(token.to_bytes(8, "little"))
        marks.append(int.from_bytes(hashed.digest(), "little", signed=True))
    return marks
