"""A readout over some prompts: the rows that are run, and g of each prompt from their logits.

A row is a sequence that is read at its last token, or at several: the slots of a response. For most
readouts a prompt is one row, itself; with a response it is one row with that response, and in a
margin of two responses two rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.readouts.prompts import Prompts

__all__ = ["Bound", "Reading", "one_row_each"]

Bound = Callable[[Float[Tensor, "row *slot vocab"]], Float[Tensor, "batch"]]


@runtime_checkable
class _ByRow(Protocol):
    """A reading that knows the row of each of its numbers, so rows can be copied or left out."""

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, "batch"]: ...

    def repeat(self, times: int) -> Bound:
        """The reading of every row `times` times: r0 r0 … r1 r1 …"""
        ...

    def only(self, rows: Int[Tensor, "some"]) -> Bound:
        """The reading of these rows, in increasing order, with prompts counted from 0 again."""
        ...


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is run, and what is read from it.

    Attributes:
        prompts: the rows.
        read: from the logits at each row's last token, [row, vocab], or at its slots,
            [row, slot, vocab], to g of each prompt, [batch].
        owner: the index of each row's prompt; rows of one prompt stand together.
    """

    prompts: Prompts
    read: Bound
    owner: Int[Tensor, "row"]

    @property
    def batch(self) -> int:
        """The number of prompts."""
        return int(self.owner[-1]) + 1

    def by_prompt(self, rows: Float[Tensor, "row *rest"]) -> Float[Tensor, "batch *rest"]:
        """The sum over the rows of each prompt.

        Args:
            rows: any numbers of each row.
        """
        if len(rows) == self.batch:
            return rows
        summed = rows.new_zeros(self.batch, *rows.shape[1:])
        return summed.index_add(0, self.owner.to(rows.device), rows)

    def repeat(self, times: int) -> Reading:
        """Every prompt several times, p0 p0 … p1 p1 …, each copy read on its own.

        A user's function may rely on the order of the prompts, so it gets one copy of all prompts
        at a time.

        Args:
            times: how often.
        """
        prompts, owner = self.prompts.repeat(times), self._copied_owner(times)
        if isinstance(self.read, _ByRow):
            return Reading(prompts, self.read.repeat(times), owner)

        def read(rows: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, "batch"]:
            copies = rows.unflatten(0, (-1, times))
            return torch.stack([self.read(copies[:, j]) for j in range(times)], 1).flatten()

        return Reading(prompts, read, owner)

    def groups(self, tokens: int) -> list[Reading]:
        """The prompts in groups of limited size; a group has at least one prompt.

        With a user's function there is one group: it may rely on the order of the prompts.

        Args:
            tokens: the most that a group of several prompts runs, padding included.
        """
        if not isinstance(self.read, _ByRow):
            return [self]
        if bool((self.owner.diff() < 0).any()):
            raise RuntimeError("the rows of a prompt do not stand together: group before copying")
        ends = torch.bincount(self.owner).cumsum(0).tolist()
        most = max(end - start for start, end in zip([0, *ends], ends, strict=False))
        step = max(1, tokens // (most * self.prompts.tokens.shape[1]))
        edges = sorted({0, *ends[step - 1 :: step], ends[-1]})
        return [self._only(torch.arange(*pair, device="cpu")) for pair in itertools.pairwise(edges)]

    def only(self, prompts: Int[Tensor, "some"]) -> Reading:
        """The reading of some prompts. A user's function may rely on their order, and keeps all.

        Args:
            prompts: their indices, increasing.
        """
        if not isinstance(self.read, _ByRow):
            return self
        return self._only(torch.isin(self.owner, prompts.to(self.owner)).nonzero()[:, 0])

    def each_row(self) -> list[Reading] | None:
        """Each row by itself; g of a prompt is the sum over its rows.

        None for a user's function, which may rely on the order of the prompts.
        """
        if not isinstance(self.read, _ByRow):
            return None
        return [self._only(row) for row in torch.arange(len(self.owner), device="cpu").split(1)]

    def grown(self, rows: int) -> Reading:
        """The reading of a single row in so many copies, which the forward pass itself adds.

        Args:
            rows: at the end of the pass.
        """
        read = self.read.repeat(rows) if isinstance(self.read, _ByRow) else self.read
        return Reading(self.prompts, read, torch.arange(rows, device="cpu"))

    def _only(self, rows: Int[Tensor, "some"]) -> Reading:
        read = self.read.only(rows) if isinstance(self.read, _ByRow) else self.read
        _, owner = self.owner[rows].unique(return_inverse=True)
        return Reading(self.prompts.chosen(rows.tolist()), read, owner)

    def _copied_owner(self, times: int) -> Int[Tensor, "row"]:
        copy = torch.arange(times, device=self.owner.device)
        return (self.owner[:, None] * times + copy).flatten()

    def tokens_of(self, rows: list[list[str]]) -> tuple[tuple[str, ...], ...]:
        """Each prompt's tokens, merged from its rows; 'a|b' where rows have different tokens.

        Args:
            rows: the tokens of each row.
        """
        merged: list[list[dict[str, None]]] = [[] for _ in range(self.batch)]
        for owner, row in zip(self.owner.tolist(), rows, strict=True):
            mine = merged[owner]
            mine += [{} for _ in range(len(row) - len(mine))]
            for place, token in zip(mine, row, strict=False):
                place[token] = None
        return tuple(tuple("|".join(place) for place in mine) for mine in merged)


def one_row_each(prompts: Prompts, read: Bound) -> Reading:
    """The reading of a readout of the last token: each prompt is its own row.

    Args:
        prompts: the rows.
        read: from the logits at their last tokens, [row, vocab], to g, [row].
    """
    return Reading(prompts, read, torch.arange(prompts.batch, device="cpu"))
