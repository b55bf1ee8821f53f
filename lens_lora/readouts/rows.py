"""A readout over some prompts: the rows that are run, and g of each prompt from their logits.

A row is a sequence read at its last token. Most readouts read one row a prompt, the prompt itself;
an answer of several tokens reads one row for each of its tokens.
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

__all__ = ["Bound", "Columns", "LogProbs", "Reading", "one_row_each"]

Bound = Callable[[Float[Tensor, "row vocab"]], Float[Tensor, "batch"]]


@runtime_checkable
class _ByRow(Protocol):
    """Knows which row each of its numbers is of, so that rows may be copied or left out."""

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "batch"]: ...

    def repeat(self, times: int) -> Bound:
        """The same of every row `times` times, r0 r0 … r1 r1 …."""
        ...

    def only(self, first: int, end: int) -> Bound:
        """The same of these rows alone, which are all the rows of some prompts."""
        ...


@dataclasses.dataclass(frozen=True)
class Columns:
    """A readout of a few logits: Σ_k sign_k · logit of the row's k-th token.

    It can be had without the rest of the vocabulary: u_y is a few rows of W_U.
    """

    ids: Int[Tensor, "row token"]
    signs: tuple[float, ...]

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row"]:
        return self.of(logits.gather(-1, self.ids.to(logits.device)))

    def of(self, few: Float[Tensor, "row token"]) -> Float[Tensor, "row"]:
        """g from the logits of `ids` alone."""
        return sum((few[:, k] * sign for k, sign in enumerate(self.signs)), few.new_zeros(()))

    def repeat(self, times: int) -> Columns:
        return Columns(self.ids.repeat_interleave(times, 0), self.signs)

    def only(self, first: int, end: int) -> Columns:
        return Columns(self.ids[first:end], self.signs)


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Σ weight · log p(token), over a prompt's picks: tokens at its rows.

    Attributes:
        rows, tokens, weights: of the picks.
        owner: each pick's prompt, out of so many as `batch`.
    """

    rows: Int[Tensor, "pick"]
    tokens: Int[Tensor, "pick"]
    weights: Float[Tensor, "pick"]
    owner: Int[Tensor, "pick"]
    batch: int

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "batch"]:
        to = logits.device
        rows = self.rows.to(to)
        logp = logits[rows, self.tokens.to(to)] - logits.logsumexp(-1)[rows]
        summed = logits.new_zeros(self.batch)
        return summed.index_add(0, self.owner.to(to), logp * self.weights.to(logp))

    def repeat(self, times: int) -> LogProbs:
        copy = torch.arange(times, device=self.rows.device)
        return LogProbs(
            rows=(self.rows[:, None] * times + copy).flatten(),
            tokens=self.tokens.repeat_interleave(times),
            weights=self.weights.repeat_interleave(times),
            owner=(self.owner[:, None] * times + copy).flatten(),
            batch=self.batch * times,
        )

    def only(self, first: int, end: int) -> LogProbs:
        mine = (self.rows >= first) & (self.rows < end)
        owner = self.owner[mine] - self.owner[mine].min()
        return LogProbs(
            rows=self.rows[mine] - first,
            tokens=self.tokens[mine],
            weights=self.weights[mine],
            owner=owner,
            batch=int(owner.max()) + 1,
        )


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is run, and what is read from it.

    Attributes:
        prompts: the rows.
        read: their logits at the last token, [row, vocab], → g of each prompt, [batch].
        owner: [row], the prompt that a row belongs to; rows of one prompt lie together.
    """

    prompts: Prompts
    read: Bound
    owner: Int[Tensor, "row"]

    @property
    def batch(self) -> int:
        """The number of prompts."""
        return int(self.owner[-1]) + 1

    def by_prompt(self, rows: Float[Tensor, "row *rest"]) -> Float[Tensor, "batch *rest"]:
        """Summed over the rows of each prompt."""
        if len(rows) == self.batch:
            return rows
        summed = rows.new_zeros(self.batch, *rows.shape[1:])
        return summed.index_add(0, self.owner.to(rows.device), rows)

    def repeat(self, times: int) -> Reading:
        """Every prompt `times` times, p0 p0 … p1 p1 …, each copy read on its own.

        A function of a user's may mean each prompt's row by its place, so it gets one copy of the
        prompts at a time.
        """
        prompts, owner = self.prompts.repeat(times), self._copied_owner(times)
        if isinstance(self.read, _ByRow):
            return Reading(prompts, self.read.repeat(times), owner)

        def read(rows: Float[Tensor, "row vocab"]) -> Float[Tensor, "batch"]:
            copies = rows.unflatten(0, (-1, times))
            return torch.stack([self.read(copies[:, j]) for j in range(times)], 1).flatten()

        return Reading(prompts, read, owner)

    def groups(self, tokens: int) -> list[Reading]:
        """Its prompts in groups that run at most so many tokens, or one prompt each.

        A user's function keeps all of them together, as it may mean each prompt's row by its place.
        """
        if not isinstance(self.read, _ByRow):
            return [self]
        ends = torch.bincount(self.owner).cumsum(0).tolist()
        most = max(end - start for start, end in zip([0, *ends], ends, strict=False))
        step = max(1, tokens // (most * self.prompts.tokens.shape[1]))
        edges = [0, *ends[step - 1 :: step]]
        edges += [] if edges[-1] == ends[-1] else [ends[-1]]
        return [self._only(*pair) for pair in itertools.pairwise(edges)]

    def _only(self, first: int, end: int) -> Reading:
        read = self.read.only(first, end) if isinstance(self.read, _ByRow) else self.read
        owner = self.owner[first:end]
        return Reading(self.prompts.rows(first, end), read, owner - owner[0])

    def _copied_owner(self, times: int) -> Int[Tensor, "row"]:
        copy = torch.arange(times, device=self.owner.device)
        return (self.owner[:, None] * times + copy).flatten()

    def tokens_of(self, rows: list[list[str]]) -> tuple[tuple[str, ...], ...]:
        """Each prompt's tokens out of its rows'; 'a|b' where its rows continue differently."""
        merged: list[list[dict[str, None]]] = [[] for _ in range(self.batch)]
        for owner, row in zip(self.owner.tolist(), rows, strict=True):
            mine = merged[owner]
            mine += [{} for _ in range(len(row) - len(mine))]
            for place, token in zip(mine, row, strict=False):
                place[token] = None
        return tuple(tuple("|".join(place) for place in mine) for mine in merged)


def one_row_each(prompts: Prompts, read: Bound) -> Reading:
    """The reading of a readout of the last token: each prompt is its own row."""
    return Reading(prompts, read, torch.arange(prompts.batch))
