"""`LoraLens.within`: the memory that analyses may take."""

from __future__ import annotations

import copy
from typing import TypeVar

from lens_lora.arguments import number
from lens_lora.errors import ArgumentError

__all__ = ["Bounded"]

_Lens = TypeVar("_Lens", bound="Bounded")


class Bounded:
    """The part of a lens that bounds memory.

    Attributes:
        max_memory: bytes that an analysis may take beside the model and its result; None for no
            bound.
    """

    max_memory: float | None = None

    def within(self: _Lens, max_memory: float | None) -> _Lens:
        """The same lens, whose analyses take so much memory beside the model and their results.

        Prompts, interventions, tangents and covectors go fewer at a time, and where the graph of a
        backward pass is too large, blocks keep their inputs alone and run once more on the way
        back: hooks of your own then fire twice there. Numbers stay the same but for rounding. The
        bound is kept by an estimate.

        Args:
            max_memory: bytes, such as 8e9; None for no bound. An analysis that takes `max_memory`
                itself may be given another one.

        Raises:
            ArgumentError: no positive number.
        """
        if max_memory is not None and number("max_memory", max_memory) <= 0:
            raise ArgumentError(f"max_memory={max_memory!r}; expected bytes, such as 8e9, or None.")
        other = copy.copy(self)
        other.max_memory = max_memory
        return other
