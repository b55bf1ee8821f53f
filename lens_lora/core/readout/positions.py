"""Which tokens of a text are meant: one spelling, wherever `positions` is an argument.

    None          every token; whoever takes a mean, or intervenes, leaves sinks out and says so
    "each"        every token, one by one
    "prompt"      those before the response, "response" those of it
    3, −1         an index, negative ones from the end
    slice(1, 4)   a slice
    [0, 2]        indices

A text's first token is a sink: its ‖h‖ is up to hundreds of times the others', whatever it says,
and later tokens attend to it. So a mean over tokens is a mean about it, and what is done there
changes the model everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from lens_lora.arguments import is_whole, one_entry, whole, word
from lens_lora.errors import ArgumentError

Named = Literal["each", "prompt", "response"]
Positions = Named | int | slice | Sequence[int] | None
Checked = Named | slice | tuple[int, ...] | None
_EXPECTED = "None, 'each', 'prompt', 'response', an index, a slice, or indices"


def checked(positions: object) -> Checked:
    """The positions in a plain form; a single index as a tuple of it.

    Raises:
        ArgumentError: something that means no positions.
    """
    plain = one_entry(positions)
    if plain is None or isinstance(plain, slice):
        return plain
    if isinstance(plain, str):
        word("positions", plain, ("each", "prompt", "response"))
        return cast(Named, plain)
    several = plain if isinstance(plain, Iterable) else [plain]
    indices = [one_entry(index) for index in several]
    if not indices or not all(is_whole(index) for index in indices):
        raise ArgumentError(f"positions={positions!r}: expected {_EXPECTED}.")
    return tuple(whole("positions", index) for index in indices)


def chosen_positions(positions: object, length: int, start: int) -> NDArray[np.bool_]:
    """[token]: which of a text's tokens are meant.

    Indices beyond the text mean none of its tokens.

    Args:
        positions: as the module says.
        length: how many tokens it has.
        start: where its response begins; its length where it has none.
    """
    plain = checked(positions)
    mask = np.zeros(length, bool)
    if plain is None or plain == "each":
        return ~mask
    if plain == "prompt":
        return np.arange(length) < start
    if plain == "response":
        return np.arange(length) >= start
    if isinstance(plain, slice):
        mask[plain] = True
        return mask
    mask[[index for index in plain if -length <= index < length]] = True
    return mask


def positions_text(positions: object) -> str:
    """'all', 'each', 'response', '-1', '2:5', '0, 3': for labels."""
    plain = checked(positions)
    if plain is None:
        return "all"
    if isinstance(plain, str):
        return plain
    if isinstance(plain, slice):
        bounds = [plain.start, plain.stop, plain.step]
        bounds = bounds if plain.step is not None else bounds[:2]
        return ":".join("" if bound is None else str(bound) for bound in bounds)
    return ", ".join(map(str, plain))
