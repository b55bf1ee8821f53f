"""Positions of a text, which are written in the same way wherever `positions` is an argument.

    None          every token; analyses that average or intervene leave sinks out, and say so
    "each"        every token, one by one
    "prompt"      the tokens before the response
    "response"    the tokens of the response
    3, −1         an index; negative ones count from the end
    slice(1, 4)   a slice
    [0, 2]        indices

A text's first token is a sink: whatever it says, its ‖h‖ is up to hundreds of times that of other
tokens, and later tokens attend to it. It would dominate a mean over tokens, and an intervention
there changes the model everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from lens_lora.arguments import is_whole, one_entry, whole, word
from lens_lora.errors import ArgumentError

Named = Literal["each", "prompt", "response"]
Positions = Named | int | slice | Sequence[int] | None
_EXPECTED = "None, 'each', 'prompt', 'response', an index, a slice, or indices"


@dataclasses.dataclass(frozen=True)
class ChosenPositions:
    """The tokens of each text that a caller's `positions` stand for.

        >>> chosen = ChosenPositions.of([0, -1])
        >>> chosen.mask(length=4, start=4).tolist()
        [True, False, False, True]
        >>> str(chosen)
        '0, -1'

    Attributes:
        which: a name, a slice, or one or several indices; None for every token.
    """

    which: Named | slice | tuple[int, ...] | None

    @classmethod
    def of(cls, positions: object) -> ChosenPositions:
        """Check what a caller passes.

        Args:
            positions: see the head of this file.

        Raises:
            ArgumentError: something that stands for no positions.
        """
        plain = one_entry(positions)
        if plain is None or isinstance(plain, slice):
            return cls(plain)
        if isinstance(plain, str):
            word("positions", plain, ("each", "prompt", "response"))
            return cls(cast(Named, plain))
        several = plain if isinstance(plain, Iterable) else [plain]
        indices = [one_entry(index) for index in several]
        if not indices or not all(is_whole(index) for index in indices):
            raise ArgumentError(f"positions={positions!r}: expected {_EXPECTED}.")
        return cls(tuple(whole("positions", index) for index in indices))

    def mask(self, length: int, start: int) -> NDArray[np.bool_]:
        """The mask of the tokens that are meant, [token]; indices beyond the text are ignored.

        Args:
            length: the number of tokens of the text.
            start: where its response begins; its length if it has none.
        """
        if self.which is None or self.which == "each":
            return np.ones(length, bool)
        places = np.arange(length)
        if self.which == "prompt":
            return places < start
        if self.which == "response":
            return places >= start
        mask = np.zeros(length, bool)
        if isinstance(self.which, slice):
            mask[self.which] = True
        else:
            within = [index for index in self.which if -length <= index < length]
            mask[within] = True
        return mask

    def __str__(self) -> str:
        """A label, such as 'all', 'each', 'response', '-1', '2:5' or '0, 3'."""
        if self.which is None:
            return "all"
        if isinstance(self.which, str):
            return self.which
        if isinstance(self.which, slice):
            bounds = [self.which.start, self.which.stop]
            if self.which.step is not None:
                bounds.append(self.which.step)
            written = ["" if bound is None else str(bound) for bound in bounds]
            return ":".join(written)
        return ", ".join(map(str, self.which))
