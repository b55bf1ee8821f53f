"""Compute first order of each readout of a bank from what was recorded.

Only the modules before its point can move a readout inside the model (`HeldReadout.behind` lists
the others), so the readouts of one bank may have different sites. Readouts that the same modules
move share a `RecordedBase`, which contracts an adapter with all of them at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lens_lora.banks.base_half import RecordedBase, SlopesOfAdapter
from lens_lora.banks.held import HeldBank, HeldReadout, slopes_by_readout
from lens_lora.banks.record import Half
from lens_lora.core import Adapter, LoraLens

# A lens with the sites of the slopes, and ∂g/∂ε_l of one readout at them. Each readout of a bank
# may have sites of its own.
SlopesOfReadout = tuple[LoraLens, Float[Tensor, "batch _"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Reach:
    """The readouts of a bank that the same modules move.

    Attributes:
        base: what was recorded for these readouts, to be contracted with an adapter.
        numbers: the number of each among the readouts of the bank.
        readouts: the readouts themselves.
    """

    base: RecordedBase
    numbers: tuple[int, ...]
    readouts: tuple[HeldReadout, ...]

    def by_number(self, slopes: SlopesOfAdapter) -> dict[int, SlopesOfReadout]:
        """Return the slopes of each of these readouts under its number in the bank.

        Raises:
            NumericsError: a derivative is not finite; the message names the site.
        """
        lens, by_half = slopes
        by_readout = slopes_by_readout(self.readouts, lens, by_half)
        numbered = zip(self.numbers, by_readout, strict=True)
        return {number: (lens, values) for number, values in numbered}


class RecordedReadouts:
    """All readouts of a bank.

    Attributes:
        reaches: the readouts, grouped by the modules that can move them.
    """

    def __init__(self, lens: LoraLens, held: HeldBank) -> None:
        by_behind: dict[tuple[str, ...], list[int]] = {}
        for number, readout in enumerate(held.readouts):
            by_behind.setdefault(readout.behind, []).append(number)

        self.reaches: list[Reach] = []
        for behind, numbers in by_behind.items():
            readouts = tuple(held.readouts[number] for number in numbers)
            halves: list[Half] = []
            for readout in readouts:
                halves += readout.halves
            base = RecordedBase(lens, halves, held.stacks, behind)
            self.reaches.append(Reach(base, tuple(numbers), readouts))

    def slopes_of_plain(
        self, adapters: Sequence[Adapter]
    ) -> list[tuple[Reach, dict[int, SlopesOfAdapter]]]:
        """Compute the slopes of the adapters of plain factors, under each adapter's `id`.

        There is one table for each group of readouts. See `RecordedBase.slopes_of_plain`.
        """
        return [(reach, reach.base.slopes_of_plain(adapters)) for reach in self.reaches]
