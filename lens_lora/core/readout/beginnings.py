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
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from lens_lora.core.readout.prompts import Prompts


def distinct_tokens(texts: Prompts) -> Bool[Tensor, "batch pos"]:
    """The tokens after each text's first, where those with the same tokens before them count once.

    The first token of a text is an attention sink, and is left out.

    Args:
        texts: any prompts, with their responses where they hold them.
    """
    marks = beginnings(texts).numpy()
    after_first = texts.after_first.cpu().numpy()
    return torch.from_numpy(first_of_each(marks, after_first))


def first_of_each(marks: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The first chosen token of each mark, text by text.

    Args:
        marks: [batch, pos], as from `beginnings`.
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


def beginnings(texts: Prompts) -> Int[Tensor, "batch pos"]:
    """The marks of each text's tokens, 0 at padding.

    Args:
        texts: any prompts.
    """
    marks = torch.zeros(texts.tokens.shape, dtype=torch.int64)
    lengths = texts.lengths.tolist()
    for text, row in enumerate(texts.tokens.tolist()):
        length = lengths[text]
        marks[text, :length] = torch.tensor(marks_of(row[:length]))
    return marks
