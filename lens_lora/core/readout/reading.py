"""A readout over some prompts: the rows that are run, and g of each prompt from their logits.

A row is a sequence that is read at its last token, or at several: the slots of a response. For most
readouts a prompt is one row, itself; with a response it is one row with that response, and in a
margin of two responses two rows.

The function that is read is one of four:

    a user's own        any function of all the logits
    Columns             a signed sum of a few logits
    Picks               a weighted sum over picks
    AtPoint             a number inside the model, read from an activation and not from the logits

A pick is one distribution: that at one slot of a row, or at the row's last token. Its logits are
needed only while its term is computed, so those of a long response are never held together.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.core.readout.prompts import Prompts

# The readout as a function of the logits where they are read.
OfLogits = Callable[[Float[Tensor, "row *slot vocab"]], Float[Tensor, " batch"]]


@runtime_checkable
class _ByRow(Protocol):
    """A reading that knows the row of each of its numbers, so rows can be copied or left out."""

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, " batch"]: ...

    def repeat(self, times: int) -> OfLogits:
        """The reading of every row `times` times: r0 r0 … r1 r1 …"""
        ...

    def only(self, rows: Int[Tensor, " some"]) -> OfLogits:
        """The reading of these rows, in increasing order, with prompts counted from 0 again."""
        ...


@runtime_checkable
class _Holding(Protocol):
    """A reading that compares with logits that it holds, as a KL does with those of the base."""

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, " batch"]: ...

    @property
    def held_bytes(self) -> int:
        """The memory of all logits that are held."""
        ...

    def turned(self, logits: Float[Tensor, "row *slot vocab"]) -> OfLogits:
        """The same comparison with the other side held: these logits, of the adapted model."""
        ...


@dataclasses.dataclass(frozen=True)
class Reading:
    """A readout over some prompts: the rows that are run, and what is read from them.

    Attributes:
        rows: the sequences of tokens that are run.
        read: maps the logits at each row's last token, [row, vocab], or at its slots,
            [row, slot, vocab], to g of each prompt, [batch].
        owner: the index of each row's prompt; rows of one prompt stand together.
    """

    rows: Prompts
    read: OfLogits
    owner: Int[Tensor, " row"]

    @classmethod
    def one_row_each(cls, prompts: Prompts, read: OfLogits) -> Reading:
        """The reading of a readout for which each prompt is its own row.

        Args:
            prompts: the rows.
            read: g of each row.
        """
        return cls(prompts, read, torch.arange(prompts.batch, device="cpu"))

    @property
    def batch(self) -> int:
        """The number of prompts."""
        return int(self.owner[-1]) + 1

    @property
    def reads_logits(self) -> bool:
        """Whether g is read from the logits, and not inside the model."""
        return not isinstance(self.read, AtPoint)

    @property
    def unmoved(self) -> frozenset[str]:
        """The names of sites that cannot move g, so that no gradient reaches them."""
        return self.read.unmoved if isinstance(self.read, AtPoint) else frozenset()

    @property
    def held_bytes(self) -> int:
        """The memory of the logits that the reading holds; 0 where it holds none."""
        return self.read.held_bytes if isinstance(self.read, _Holding) else 0

    @property
    def holds_base(self) -> bool:
        """Whether it compares with the base's logits, whose rounding then moves g everywhere."""
        return isinstance(self.read, _Holding)

    def redrawn(self, logits: Float[Tensor, "row *slot vocab"]) -> Reading:
        """Read g(1) as a function of the base's logits, for the noise that is in these.

        Args:
            logits: those of the adapted model, where the reading reads them.
        """
        if not isinstance(self.read, _Holding):
            raise TypeError("only a reading that holds the base's logits has noise from them")
        return dataclasses.replace(self, read=self.read.turned(logits))

    def by_prompt(self, rows: Float[Tensor, " row *rest"]) -> Float[Tensor, " batch *rest"]:
        """The sum over the rows of each prompt."""
        if len(rows) == self.batch:
            return rows
        summed = rows.new_zeros(self.batch, *rows.shape[1:])
        return summed.index_add(0, self.owner.to(rows.device), rows)

    def repeat(self, times: int) -> Reading:
        """Every prompt several times, p0 p0 … p1 p1 …, each copy read on its own.

        A user's function may rely on the order of the prompts, so it gets one copy of all prompts
        at a time.
        """
        copied_rows = self.rows.repeat(times)
        owner = _copies(self.owner, times)
        if isinstance(self.read, _ByRow):
            return Reading(copied_rows, self.read.repeat(times), owner)

        def read(rows: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, " batch"]:
            copies = rows.unflatten(0, (-1, times))
            return torch.stack([self.read(copies[:, j]) for j in range(times)], 1).flatten()

        return Reading(copied_rows, read, owner)

    def groups(self, tokens: int) -> list[Reading]:
        """The prompts in groups of limited size; a group has at least one prompt.

        With a user's function there is one group: it may rely on the order of the prompts.
        """
        if not isinstance(self.read, _ByRow):
            return [self]
        if bool((self.owner.diff() < 0).any()):
            raise RuntimeError("the rows of a prompt do not stand together: group before copying")
        rows_of_each = torch.bincount(self.owner)
        ends = rows_of_each.cumsum(0).tolist()
        tokens_of_largest = int(rows_of_each.max()) * self.rows.tokens.shape[1]
        prompts_at_once = max(1, tokens // tokens_of_largest)
        edges = sorted({0, *ends[prompts_at_once - 1 :: prompts_at_once], ends[-1]})
        return [
            self._only(torch.arange(first, end, device="cpu"))
            for first, end in itertools.pairwise(edges)
        ]

    def only(self, prompts: Int[Tensor, " some"]) -> Reading:
        """The reading of some prompts. A user's function may rely on their order, and keeps all."""
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
        """The reading of a single row in so many copies, which the forward pass itself adds."""
        read = self.read.repeat(rows) if isinstance(self.read, _ByRow) else self.read
        return Reading(self.rows, read, torch.arange(rows, device="cpu"))

    def _only(self, rows: Int[Tensor, " some"]) -> Reading:
        read = self.read.only(rows) if isinstance(self.read, _ByRow) else self.read
        _, owner = self.owner[rows].unique(return_inverse=True)
        return Reading(self.rows.chosen(rows.tolist()), read, owner)

    def tokens_of(self, rows: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
        """Each prompt's tokens, merged from its rows; 'a|b' where rows have different tokens."""
        rows_of: list[list[Sequence[str]]] = [[] for _ in range(self.batch)]
        for prompt, row in zip(self.owner.tolist(), rows, strict=True):
            rows_of[prompt].append(row)
        merged: list[tuple[str, ...]] = []
        for rows_of_prompt in rows_of:
            by_position: list[str] = []
            for position in range(max(len(row) for row in rows_of_prompt)):
                tokens = [row[position] for row in rows_of_prompt if position < len(row)]
                by_position.append("|".join(dict.fromkeys(tokens)))
            merged.append(tuple(by_position))
        return tuple(merged)


def _copies(index: Int[Tensor, " n"], times: int) -> Int[Tensor, " copy"]:
    """Where the copies of i are, once everything is repeated: i · times … i · times + times − 1."""
    return (index[:, None] * times + torch.arange(times, device=index.device)).flatten()


@dataclasses.dataclass(frozen=True, eq=False)
class AtPoint:
    """A reading inside the model: of each row the mean of a number over some of its tokens.

    The pass ends where the activation is known. Sites that write later do not move it.

    Attributes:
        name: the hook point whose activation h is read.
        value: the number of each token, [row, pos, d] → [row, pos]; differentiable.
        counted: which tokens of each row the mean is over.
        unmoved: the names of sites on which h does not depend, though their modules run before it:
            their slopes are zero, and no gradient reaches them.
    """

    name: str
    value: Callable[[Float[Tensor, "row pos d"]], Float[Tensor, "row pos"]]
    counted: Bool[Tensor, "row pos"]
    unmoved: frozenset[str] = frozenset()

    def __call__(self, activation: Float[Tensor, "row pos *d"]) -> Float[Tensor, " row"]:
        """Read g of each row from the activation at the point."""
        by_token = self.value(activation.flatten(2))
        counted = self.counted[:, : by_token.shape[1]].to(by_token.device)
        return by_token.where(counted, 0.0).sum(1) / counted.sum(1)

    def repeat(self, times: int) -> AtPoint:
        """The reading of every row several times: r0 r0 … r1 r1 …"""
        return dataclasses.replace(self, counted=self.counted.repeat_interleave(times, 0))

    def only(self, rows: Int[Tensor, " some"]) -> AtPoint:
        """The reading of these rows."""
        return dataclasses.replace(self, counted=self.counted[rows.to(self.counted.device)])


@dataclasses.dataclass(frozen=True)
class Columns:
    """A readout of a few logits: Σ_k sign_k · logit of the row's k-th token.

    It needs no other logits: u_y is a signed sum of a few rows of W_U.
    """

    ids: Int[Tensor, "row token"]
    signs: tuple[float, ...]

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        """Read g of each row from all its logits."""
        return self.of(logits.gather(-1, self.ids.to(logits.device)))

    def of(self, few: Float[Tensor, "row token"]) -> Float[Tensor, " row"]:
        """Read g of each row from the logits of its `ids` only.

        Args:
            few: those logits.
        """
        total = few.new_zeros(())
        for k, sign in enumerate(self.signs):
            total = total + few[:, k] * sign
        return total

    def repeat(self, times: int) -> Columns:
        """The readout of every row several times: r0 r0 … r1 r1 …"""
        return Columns(self.ids.repeat_interleave(times, 0), self.signs)

    def only(self, rows: Int[Tensor, " some"]) -> Columns:
        """The readout of these rows."""
        return Columns(self.ids[rows.to(self.ids.device)], self.signs)


_Picks = TypeVar("_Picks", bound="Picks")
_Logits = Float[Tensor, "some vocab"]
_Terms = Float[Tensor, " some"]
_Some = Int[Tensor, " some"]
Places = tuple[Int[Tensor, " pick"], ...]
# How many picks' logits are held together in a graph; twice as many without one.
PICKS = 128


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Picks(abc.ABC):
    """A readout that is a weighted sum over picks.

    Attributes:
        rows: each pick's row.
        slots: each pick's slot in its row; None for rows that are read at their last token only.
        owner: the index of each pick's prompt.
        weights: the factor of each pick's term.
        batch: the number of prompts.
    """

    by_pick: ClassVar[tuple[str, ...]] = ("rows", "slots", "owner", "weights")
    rows: Int[Tensor, " pick"]
    slots: Int[Tensor, " pick"] | None = None
    owner: Int[Tensor, " pick"]
    weights: Float[Tensor, " pick"]
    batch: int

    @abc.abstractmethod
    def terms(self, logits: _Logits, picks: _Some) -> _Terms:
        """The terms of these picks from their logits, in the readout's units, not yet weighted."""

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, " batch"]:
        """Read g of each prompt from the logits of its rows."""
        return self.of(self.terms_in(logits))

    def terms_in(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, " pick"]:
        """Every pick's term."""
        places = self.places(logits.device)
        terms: list[Tensor] = []
        for picks in torch.arange(len(self.rows), device="cpu").split(PICKS):
            terms.append(self.terms(logits[at_some(places, picks)], picks))
        return torch.cat(terms)

    def places(self, device: torch.device, rows: Int[Tensor, " pick"] | None = None) -> Places:
        """Where each pick is read, as indices of [row, …], or of [row, slot, …] with slots.

        Args:
            device: of the indices.
            rows: of each pick, in place of its own row.
        """
        rows_of_picks = self.rows if rows is None else rows
        indices = (rows_of_picks,) if self.slots is None else (rows_of_picks, self.slots)
        return tuple(index.to(device) for index in indices)

    def of(self, terms: Float[Tensor, " pick"]) -> Float[Tensor, " batch"]:
        """Sum the weighted terms of each prompt: its g."""
        weighted = terms * self.weights.to(terms)
        return terms.new_zeros(self.batch).index_add(0, self.owner.to(terms.device), weighted)

    def repeat(self: _Picks, times: int) -> _Picks:
        """The readout of every row several times: r0 r0 … r1 r1 …"""
        copied = self._chosen(torch.arange(len(self.rows), device="cpu").repeat_interleave(times))
        return dataclasses.replace(
            copied,
            rows=_copies(self.rows, times),
            owner=_copies(self.owner, times),
            batch=self.batch * times,
        )

    def only(self: _Picks, rows: Int[Tensor, " some"]) -> _Picks:
        """The readout of these rows, with rows and prompts counted from 0 again."""
        chosen_rows = rows.to(self.rows)
        kept = self._chosen(torch.isin(self.rows, chosen_rows).nonzero()[:, 0])
        prompts, owner = kept.owner.unique(return_inverse=True)
        return dataclasses.replace(
            kept,
            rows=torch.searchsorted(chosen_rows, kept.rows),
            owner=owner,
            batch=len(prompts),
        )

    def _chosen(self: _Picks, picks: Int[Tensor, " some"]) -> _Picks:
        chosen: dict[str, Tensor] = {}
        for name in self.by_pick:
            values = getattr(self, name)
            if values is not None:
                chosen[name] = values[picks]
        return dataclasses.replace(self, **chosen)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LogProbs(Picks):
    """Σ weight · log p(token) in nats, over a prompt's picks; a pick is one token at one slot.

    The weight is 1 / T in the mean over T tokens, and negative for the second answer of a margin.

    Attributes:
        tokens: each pick's token id.
    """

    by_pick: ClassVar[tuple[str, ...]] = (*Picks.by_pick, "tokens")
    tokens: Int[Tensor, " pick"]

    def terms(self, logits: _Logits, picks: _Some) -> _Terms:
        """The log-probability of the token of each of these picks, in nats."""
        tokens = self.tokens[picks.to(self.tokens.device)].to(logits.device)
        return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)

    @property
    def is_one_response(self) -> bool:
        """Whether each prompt has one response, none of whose tokens is left out."""
        return self.slots is not None and bool((self.weights > 0).all())

    def by_token(self, terms: Float[Tensor, " pick"]) -> Float[Tensor, "batch token"]:
        """Each token's term of g, zero beyond a response's own tokens; of one response a prompt."""
        slots = torch.zeros_like(self.rows) if self.slots is None else self.slots
        places = (self.owner.to(terms.device), slots.to(terms.device))
        by_token = terms.new_zeros(self.batch, int(slots.max()) + 1)
        return by_token.index_put(places, terms * self.weights.to(terms))


def at_some(places: Places, picks: _Some) -> tuple[_Some, ...]:
    """The places of these picks, among those of all."""
    return tuple(index[picks.to(index.device)] for index in places)
