"""What a readout makes of logits: a signed sum of a few of them, or a sum over picks.

A pick is one distribution: that at one slot of a row, or at the row's last token. Their logits are
needed some at a time only, so those of a long response are never held together.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["PICKS", "Columns", "LogProbs", "Picks", "at_some", "of_slots"]

PICKS = 128  # whose logits are held together in a graph; twice as many without one


@runtime_checkable
class Picks(Protocol):
    """A readout that is a sum over picks."""

    @property
    def rows(self) -> Int[Tensor, "pick"]:
        """Each pick's row."""
        ...

    @property
    def weights(self) -> Float[Tensor, "pick"]:
        """With which each pick counts."""
        ...

    def places(self, device: torch.device) -> tuple[Int[Tensor, "pick"], ...]:
        """Where each pick is read, as indices of [row, …] or [row, slot, …].

        Args:
            device: of what is indexed.
        """
        ...

    def terms(
        self, logits: Float[Tensor, "some vocab"], some: Int[Tensor, "some"]
    ) -> Float[Tensor, "some"]:
        """What some picks say, in the readout's units, before they are weighted.

        Args:
            logits: at the places of these picks.
            some: their indices.
        """
        ...

    def of(self, terms: Float[Tensor, "pick"]) -> Float[Tensor, "batch"]:
        """g of each prompt.

        Args:
            terms: of every pick.
        """
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


def at_some(
    places: tuple[Int[Tensor, "pick"], ...], some: Int[Tensor, "some"]
) -> tuple[Int[Tensor, "some"], ...]:
    """The places of some picks.

    Args:
        places: of every pick, as indices.
        some: of the picks.
    """
    return tuple(index[some.to(index.device)] for index in places)


def of_slots(
    rows: Int[Tensor, "pick"], slots: Int[Tensor, "pick"] | None, device: torch.device
) -> tuple[Int[Tensor, "pick"], ...]:
    """Indices of [row, …], or of [row, slot, …] where slots are read.

    Args:
        rows: each pick's.
        slots: each pick's in its row; None for rows that are read at their last token only.
        device: of what is indexed.
    """
    where = (rows,) if slots is None else (rows, slots)
    return tuple(index.to(device) for index in where)


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
        every = torch.arange(len(self.rows), device="cpu")
        return self.of(self.terms(logits[self.places(logits.device)], every))

    def places(self, device: torch.device) -> tuple[Int[Tensor, "pick"], ...]:
        """Where each pick is read, as indices of [row, vocab] or [row, slot, vocab].

        Args:
            device: of what is indexed.
        """
        return of_slots(self.rows, self.slots, device)

    def terms(
        self, logits: Float[Tensor, "some vocab"], some: Int[Tensor, "some"]
    ) -> Float[Tensor, "some"]:
        """log p of the tokens of some picks, in nats.

        Args:
            logits: at the places of these picks.
            some: their indices.
        """
        tokens = self.tokens[some.to(self.tokens.device)].to(logits.device)
        return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)

    def of(self, terms: Float[Tensor, "pick"]) -> Float[Tensor, "batch"]:
        """g of each prompt.

        Args:
            terms: log p of each pick's token.
        """
        owner, weights = self.owner.to(terms.device), self.weights.to(terms)
        return terms.new_zeros(self.batch).index_add(0, owner, terms * weights)

    @property
    def is_one_response(self) -> bool:
        """Whether each prompt has one response, none of whose tokens is left out."""
        return self.slots is not None and bool((self.weights > 0).all())

    def by_token(self, terms: Float[Tensor, "pick"]) -> Float[Tensor, "batch token"]:
        """Each token's term of g, zero beyond a response's own tokens; of one response a prompt.

        Args:
            terms: log p of each pick's token.
        """
        slots = torch.zeros_like(self.rows) if self.slots is None else self.slots
        where = self.owner.to(terms.device), slots.to(terms.device)
        found = terms.new_zeros(self.batch, int(slots.max()) + 1)
        return found.index_put(where, terms * self.weights.to(terms))

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
