"""The tokens at which directions are removed.

By default each row's first token is left unchanged. It is a sink: its ‖h‖ is hundreds of times that
of other tokens, every later token attends to it, and the means that make a direction leave it out.
Removing a direction there changes the model everywhere, whatever the direction means at the tokens
of interest.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lens_lora.core import ChosenPositions, ForwardPass, Prompts, Rows
from lens_lora.errors import ArgumentError, ModelStateError

# The named positions in words.
_NAMED = {
    "all": "every token",
    "prompt": "the prompt's tokens",
    "response": "the response's tokens",
}


@dataclasses.dataclass(frozen=True)
class Where:
    """The tokens at which directions are removed.

    Attributes:
        named: 'all', 'prompt' or 'response'; '' if there are indices or bounds.
        indices: the indices of tokens within each prompt.
        bounds: start, stop and step of a slice of each prompt.
        sinks: whether each row's first token counts, too.
    """

    named: str
    indices: tuple[int, ...] = ()
    bounds: tuple[int | None, int | None, int | None] | None = None
    sinks: bool = False

    @classmethod
    def of(cls, positions: object, sinks: object) -> Where:
        """The tokens that a caller's arguments mean.

        Args:
            positions: positions in any form that `core/readout/positions.py` reads.
            sinks: whether each row's first token counts, too.

        Raises:
            ArgumentError: the argument means no positions, or only first tokens without sinks.
        """
        if not isinstance(sinks, bool):
            raise ArgumentError(f"sinks={sinks!r}: expected True or False.")
        plain = ChosenPositions.of(positions).which
        if plain is None or plain == "each":
            return cls("all", sinks=sinks)
        if isinstance(plain, str):
            return cls(plain, sinks=sinks)
        if isinstance(plain, slice):
            where = cls("", bounds=(plain.start, plain.stop, plain.step), sinks=sinks)
            is_first = plain in (slice(0, 1), slice(None, 1))
        else:
            where = cls("", indices=plain, sinks=sinks)
            is_first = set(plain) == {0}
        if is_first and not sinks:
            raise ArgumentError(
                f"positions={positions!r} is each text's first token, a sink, which is left "
                "unchanged; pass sinks=True to remove directions there."
            )
        return where

    @property
    def is_everywhere(self) -> bool:
        """Whether directions are removed at every token."""
        return self.named == "all" and self.sinks

    def __str__(self) -> str:
        if self.named:
            tokens = _NAMED[self.named]
        elif self.bounds is not None:
            tokens = f"positions {ChosenPositions.of(slice(*self.bounds))}"
        else:
            tokens = f"positions {ChosenPositions.of(self.indices)}"
        return tokens if self.sinks else f"{tokens} but each text's first"

    def among(self, prompts: Prompts) -> Bool[Tensor, "#row pos"]:
        """The tokens at which directions are removed, in rows that a lens runs.

        Args:
            prompts: the rows.
        """
        run = ForwardPass(nn.Identity(), cached=0, firsts=None, rows=Rows.of(prompts))
        return self.mask(run, prompts.tokens.shape[1])

    def mask(self, run: ForwardPass, width: int) -> Bool[Tensor, "#row pos"]:
        """The tokens at which directions are removed, in each row of a pass.

        Args:
            run: the pass.
            width: the number of tokens of each row in this pass.
        """
        # Positions are counted from each row's own first token.
        at = torch.arange(run.cached, run.cached + width)[None]
        if run.firsts is not None:
            at = at - run.firsts.cpu()[:, None]
        chosen = self._chosen(at, run.rows)
        if self.sinks:
            return chosen
        return chosen & (at != 0)

    def _chosen(self, at: Int[Tensor, "#row pos"], rows: Rows | None) -> Bool[Tensor, "#row pos"]:
        if self.named == "all":
            return torch.ones_like(at, dtype=torch.bool)
        if rows is None and self._needs_ends():
            raise ModelStateError(
                f"directions are removed at {self}, and where the prompts of a pass of your own "
                "end is not known",
                remedy="Use lens.logits or lens.generate, or begin the block with positions that "
                "count from the start, such as slice(1, 5).",
            )
        end = None if rows is None else rows.prompts.cpu()[:, None]
        if self.named == "prompt":
            assert end is not None
            return at < end
        if self.named == "response":
            assert rows is not None and end is not None
            return (at >= end) & rows.has_response
        return self._within(at, end)

    def _needs_ends(self) -> bool:
        """Whether it depends on the prompts' lengths."""
        if self.bounds is not None:
            start, stop, _ = self.bounds
            return stop is None or stop < 0 or (start or 0) < 0
        return bool(self.named) or min(self.indices) < 0

    def _within(
        self, at: Int[Tensor, "#row pos"], end: Int[Tensor, "row 1"] | None
    ) -> Bool[Tensor, "#row pos"]:
        """Whether each position is among the indices, or in the slice, of its prompt."""
        # Without known ends all bounds count from the start, and no prompt is cut off.
        lengths = [int(at.max()) + 1] if end is None else end[:, 0].tolist()
        by_prompt = [self._positions_of(length) for length in lengths]
        count = max(len(at), len(by_prompt))
        if len(by_prompt) == 1:
            by_prompt = by_prompt * count
        is_chosen: list[Tensor] = []
        for row, positions in zip(at.expand(count, -1), by_prompt, strict=True):
            is_chosen.append(torch.isin(row, positions))
        return torch.stack(is_chosen)

    def _positions_of(self, length: int) -> Int[Tensor, " position"]:
        """The chosen positions that a prompt of `length` tokens has."""
        if self.bounds is not None:
            start, stop, step = self.bounds
            positions = set(range(length)[start:stop:step])
        else:
            positions = {i % length for i in self.indices if -length <= i < length}
        return torch.tensor(sorted(positions), dtype=torch.long)
