"""Constants and the bar of steps that explanations of margins and of responses share."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from tqdm import tqdm

# The path integral of an explanation: an error of 1 % of the shift is small enough for a ranking.
PATH_TOLERANCE = 1e-2
PATH_NODES = 17
# The most tokens of each model's answer.
_ANSWER_TOKENS = 48
_ANSWER_TOKENS_FAST = 12


def answer_tokens(*, fast: bool) -> int:
    """The largest number of tokens of an answer that is shown with an explanation."""
    return _ANSWER_TOKENS_FAST if fast else _ANSWER_TOKENS


@contextlib.contextmanager
def step(bar: tqdm, name: str) -> Generator[None]:
    """Name the step that is done within the block; the bar moves on after it."""
    bar.set_description(name)
    yield
    bar.update()
