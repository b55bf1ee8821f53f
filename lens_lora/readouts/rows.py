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

__all__ = ["Bound", "Columns", "LogProbs", "Reading", "one_row_each", "token_log_probs"]

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
class Columns:
    """A readout of a few logits: Σ_k sign_k · logit of the row's k-th token.

    It needs no other logits: u_y is a signed sum of a few rows of W_U.
    """

    ids: Int[Tensor, "row token"]
    signs: tuple[float, ...]

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row"]:
        """g of each row from all its logits."""
        return self.of(logits.gather(-1, self.ids.to(logits.device)))

    def of(self, few: Float[Tensor, "row token"]) -> Float[Tensor, "row"]:
        """g of each row from the logits of its `ids` only.

        Args:
            few: in the order of `ids`.
        """
        return sum((few[:, k] * sign for k, sign in enumerate(self.signs)), few.new_zeros(()))

    def repeat(self, times: int) -> Columns:
        """The readout of every row several times: r0 r0 … r1 r1 …

        Args:
            times: how often.
        """
        return Columns(self.ids.repeat_interleave(times, 0), self.signs)

    def only(self, rows: Int[Tensor, "some"]) -> Columns:
        """The readout of these rows.

        Args:
            rows: their indices, increasing.
        """
        return Columns(self.ids[rows.to(self.ids.device)], self.signs)


def token_log_probs(
    logits: Float[Tensor, "pick vocab"], tokens: Int[Tensor, "pick"]
) -> Float[Tensor, "pick"]:
    """log p of one token each, in nats.

    Args:
        logits: of each distribution.
        tokens: the ids.
    """
    return logits.gather(1, tokens.to(logits.device)[:, None])[:, 0] - logits.logsumexp(-1)


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Σ weight · log p(token) in nats, over a prompt's picks; a pick is one token at one slot.

    Attributes:
        rows: each pick's row.
        tokens: each pick's token id.
        weights: each pick's weight, +1 or −1 in a margin.
        owner: the index of each pick's prompt.
        batch: the number of prompts.
        slots: each pick's slot in its row; None for rows that are read at their last token only.
    """

    rows: Int[Tensor, "pick"]
    tokens: Int[Tensor, "pick"]
    weights: Float[Tensor, "pick"]
    owner: Int[Tensor, "pick"]
    batch: int
    slots: Int[Tensor, "pick"] | None = None

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, "batch"]:
        """g of each prompt from the logits of its rows."""
        return self.of(self.log_probs(logits[self.places(logits.device)]))

    def places(self, device: torch.device) -> tuple[Int[Tensor, "pick"], ...]:
        """Where each pick is read, as indices of [row, vocab] or [row, slot, vocab].

        Args:
            device: of what is indexed.
        """
        where = (self.rows,) if self.slots is None else (self.rows, self.slots)
        return tuple(index.to(device) for index in where)

    def log_probs(self, logits: Float[Tensor, "pick vocab"]) -> Float[Tensor, "pick"]:
        """log p of each pick's token.

        Args:
            logits: at each pick's place.
        """
        return token_log_probs(logits, self.tokens)

    def of(self, log_probs: Float[Tensor, "pick"]) -> Float[Tensor, "batch"]:
        """g of each prompt.

        Args:
            log_probs: of each pick's token.
        """
        owner, weights = self.owner.to(log_probs.device), self.weights.to(log_probs)
        return log_probs.new_zeros(self.batch).index_add(0, owner, log_probs * weights)

    @property
    def is_one_response(self) -> bool:
        """Whether each prompt has one response, none of whose tokens is left out."""
        return self.slots is not None and bool((self.weights > 0).all())

    def by_token(self, log_probs: Float[Tensor, "pick"]) -> Float[Tensor, "batch token"]:
        """Each token's term of g, zero beyond a response's own tokens; of one response a prompt.

        Args:
            log_probs: of each pick's token.
        """
        slots = torch.zeros_like(self.rows) if self.slots is None else self.slots
        where = self.owner.to(log_probs.device), slots.to(log_probs.device)
        terms = log_probs.new_zeros(self.batch, int(slots.max()) + 1)
        return terms.index_put(where, log_probs * self.weights.to(log_probs))

    def repeat(self, times: int) -> LogProbs:
        """The readout of every row several times: r0 r0 … r1 r1 …

        Args:
            times: how often.
        """
        copy = torch.arange(times, device=self.rows.device)
        return LogProbs(
            rows=(self.rows[:, None] * times + copy).flatten(),
            tokens=self.tokens.repeat_interleave(times),
            weights=self.weights.repeat_interleave(times),
            owner=(self.owner[:, None] * times + copy).flatten(),
            batch=self.batch * times,
            slots=None if self.slots is None else self.slots.repeat_interleave(times),
        )

    def only(self, rows: Int[Tensor, "some"]) -> LogProbs:
        """The readout of these rows, with rows and prompts counted from 0 again.

        Args:
            rows: their indices, increasing; of a prompt's other rows nothing is read.
        """
        rows = rows.to(self.rows)
        mine = torch.isin(self.rows, rows)
        prompts, owner = self.owner[mine].unique(return_inverse=True)
        return LogProbs(
            rows=torch.searchsorted(rows, self.rows[mine]),
            tokens=self.tokens[mine],
            weights=self.weights[mine],
            owner=owner,
            batch=len(prompts),
            slots=None if self.slots is None else self.slots[mine],
        )


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
