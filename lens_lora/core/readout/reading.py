"""A readout of some prompts: which rows are run, and how g of each prompt is read from logits.

A row is a sequence of tokens. It is read at its last token, or at several tokens, its slots. Most
readouts run each prompt as one row. With a response, a row is a prompt and its response, with one
slot for each token of the response; a margin of two responses has two such rows for each prompt.
`owner` has the prompt of each row.

`Reading.read` takes the logits of the rows to g. There are four kinds of it:

    Columns             a signed sum of a few logits, such as a margin of two tokens
    Picks               a weighted sum of one term for each distribution that is read
    AtPoint             a number inside the model, read from an activation and not from the logits
    any other callable  a user's own function of all logits

A pick is one place at which a distribution is read: a slot of a row, or the row's last token. Its
logits are needed only while its term is computed, so a long response never holds all of its logits.
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

# From the logits where they are read to g of each prompt.
OfLogits = Callable[[Float[Tensor, "row *slot vocab"]], Float[Tensor, " batch"]]


@runtime_checkable
class _ByRow(Protocol):
    """A function that knows which row each of its numbers is of: rows can be copied or left out."""

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, " batch"]: ...

    def repeat(self, times: int) -> OfLogits:
        """The same function of rows that are each repeated: r0 r0 … r1 r1 …"""
        ...

    def of_rows(self, rows: Int[Tensor, " some"]) -> OfLogits:
        """The same function of some rows, in increasing order; prompts are numbered from 0 anew."""
        ...


@runtime_checkable
class _Holding(Protocol):
    """A function that compares with logits that it holds, as a KL does with those of the base."""

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, " batch"]: ...

    @property
    def held_bytes(self) -> int:
        """The bytes of all logits that are held."""
        ...

    def with_sides_exchanged(self, logits: Float[Tensor, "row *slot vocab"]) -> OfLogits:
        """The same comparison, which holds these logits of the adapted model and reads the base's.

        Args:
            logits: the logits of the adapted model.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Reading:
    """A readout of some prompts: the rows that are run, and what is read from them.

    Attributes:
        rows: the sequences of tokens that are run.
        read: maps the logits at each row's last token, [row, vocab], or at its slots,
            [row, slot, vocab], to g of each prompt, [batch].
        owner: the index of each row's prompt; the rows of a prompt follow one another.
    """

    rows: Prompts
    read: OfLogits
    owner: Int[Tensor, " row"]

    @classmethod
    def one_row_each(cls, prompts: Prompts, read: OfLogits) -> Reading:
        """The reading of a readout that runs each prompt as one row.

        Args:
            prompts: the rows.
            read: maps their logits to g of each row.
        """
        return cls(prompts, read, torch.arange(prompts.batch, device="cpu"))

    @property
    def batch(self) -> int:
        """The number of prompts."""
        return int(self.owner[-1]) + 1

    @property
    def reads_logits(self) -> bool:
        """Whether g is read from the logits, rather than inside the model."""
        return not isinstance(self.read, AtPoint)

    @property
    def unmoved(self) -> frozenset[str]:
        """The names of sites that cannot move g, so that no gradient reaches them."""
        return self.read.unmoved if isinstance(self.read, AtPoint) else frozenset()

    @property
    def held_bytes(self) -> int:
        """The bytes of the logits that the reading holds, if it holds any."""
        return self.read.held_bytes if isinstance(self.read, _Holding) else 0

    @property
    def holds_base(self) -> bool:
        """Whether g compares with the base's logits, whose rounding then moves g at every ε."""
        return isinstance(self.read, _Holding)

    def redrawn(self, logits: Float[Tensor, "row *slot vocab"]) -> Reading:
        """Read g(1) as a function of the base's logits, to measure the noise that comes from these.

        Args:
            logits: the logits of the adapted model, where the reading reads them.
        """
        if not isinstance(self.read, _Holding):
            raise TypeError("only a reading that holds the base's logits has noise from them")
        return dataclasses.replace(self, read=self.read.with_sides_exchanged(logits))

    def by_prompt(self, rows: Float[Tensor, " row *rest"]) -> Float[Tensor, " batch *rest"]:
        """Sum the numbers of each prompt's rows."""
        if len(rows) == self.batch:
            return rows
        summed = rows.new_zeros(self.batch, *rows.shape[1:])
        return summed.index_add(0, self.owner.to(rows.device), rows)

    def repeat(self, times: int) -> Reading:
        """The same readout of prompts that are each repeated: p0 p0 … p1 p1 …

        A user's function may rely on the order of the prompts, so it is called with one copy of all
        prompts at a time.
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
        """Divide the prompts into groups of at most so many tokens, and of at least one prompt.

        A user's function may rely on the order of the prompts, so it has a single group.
        """
        if not isinstance(self.read, _ByRow):
            return [self]
        if bool((self.owner.diff() < 0).any()):
            raise RuntimeError("the rows of a prompt do not stand together: group before copying")
        rows_of_each = torch.bincount(self.owner)
        tokens_of_largest = int(rows_of_each.max()) * self.rows.tokens.shape[1]
        prompts_at_once = max(1, tokens // tokens_of_largest)
        # The row after the last one of each prompt.
        ends = rows_of_each.cumsum(0).tolist()
        ends_of_groups = ends[prompts_at_once - 1 :: prompts_at_once]
        if ends_of_groups[-1:] != ends[-1:]:
            ends_of_groups.append(ends[-1])
        groups: list[Reading] = []
        for first, end in itertools.pairwise([0, *ends_of_groups]):
            groups.append(self._of_rows(torch.arange(first, end, device="cpu")))
        return groups

    def only(self, prompts: Int[Tensor, " some"]) -> Reading:
        """The reading of some prompts; a user's function gets all of them, as it may need all."""
        if not isinstance(self.read, _ByRow):
            return self
        is_of_these = torch.isin(self.owner, prompts.to(self.owner))
        return self._of_rows(is_of_these.nonzero()[:, 0])

    def each_row(self) -> list[Reading] | None:
        """The reading of each row by itself; g of a prompt is the sum over its rows.

        None for a user's function, which may rely on the order of the prompts.
        """
        if not isinstance(self.read, _ByRow):
            return None
        rows = torch.arange(len(self.owner), device="cpu")
        return [self._of_rows(row) for row in rows.split(1)]

    def grown(self, rows: int) -> Reading:
        """The reading of a single row, of which the forward pass itself makes so many copies."""
        read = self.read.repeat(rows) if isinstance(self.read, _ByRow) else self.read
        return Reading(self.rows, read, torch.arange(rows, device="cpu"))

    def _of_rows(self, rows: Int[Tensor, " some"]) -> Reading:
        """The reading of some rows, in increasing order; prompts are numbered from 0 anew."""
        read = self.read.of_rows(rows) if isinstance(self.read, _ByRow) else self.read
        _, owner = self.owner[rows].unique(return_inverse=True)
        return Reading(self.rows.chosen(rows.tolist()), read, owner)

    def tokens_of(self, rows: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
        """Merge the tokens of each prompt's rows; 'a|b' where they have different tokens."""
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
    """The indices of the copies of i after repeating: i · times … (i + 1) · times − 1."""
    first_copy = index[:, None] * times
    return (first_copy + torch.arange(times, device=index.device)).flatten()


@dataclasses.dataclass(frozen=True, eq=False)
class AtPoint:
    """A number inside the model: for each row, the mean of a number over some of its tokens.

    The pass ends as soon as the activation is known. Sites that write later do not move it.

    Attributes:
        name: the hook point whose activation h is read.
        value: the number of each token, [row, pos, d] → [row, pos]; differentiable.
        counted: the tokens of each row over which the mean is taken.
        unmoved: the names of sites on which h does not depend although their modules run before it.
            Their slopes are zero, and no gradient reaches them.
    """

    name: str
    value: Callable[[Float[Tensor, "row pos d"]], Float[Tensor, "row pos"]]
    counted: Bool[Tensor, "row pos"]
    unmoved: frozenset[str] = frozenset()

    def __call__(self, activation: Float[Tensor, "row pos *d"]) -> Float[Tensor, " row"]:
        """Compute g of each row from the activation at the hook point."""
        by_token = self.value(activation.flatten(2))
        counted = self.counted[:, : by_token.shape[1]].to(by_token.device)
        return by_token.where(counted, 0.0).sum(1) / counted.sum(1)

    def repeat(self, times: int) -> AtPoint:
        """The same number of rows that are each repeated: r0 r0 … r1 r1 …"""
        return dataclasses.replace(self, counted=self.counted.repeat_interleave(times, 0))

    def of_rows(self, rows: Int[Tensor, " some"]) -> AtPoint:
        """The same number of some rows."""
        return dataclasses.replace(self, counted=self.counted[rows.to(self.counted.device)])


@dataclasses.dataclass(frozen=True)
class Columns:
    """A signed sum of a few logits of each row: g = Σ_k sign_k · logit(id_k).

    It needs no other logits: u_y is a signed sum of a few rows of W_U.

    Attributes:
        ids: the token ids of each row whose logits are summed.
        signs: the sign of each of them.
    """

    ids: Int[Tensor, "row token"]
    signs: tuple[float, ...]

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        """Compute g of each row from all its logits."""
        few_logits = logits.gather(-1, self.ids.to(logits.device))
        return self.signed_sum(few_logits)

    def signed_sum(self, few_logits: Float[Tensor, "row token"]) -> Float[Tensor, " row"]:
        """Compute g of each row from the logits of its `ids` alone.

        Args:
            few_logits: the logits of these tokens.
        """
        total = few_logits.new_zeros(())
        for k, sign in enumerate(self.signs):
            total = total + few_logits[:, k] * sign
        return total

    def repeat(self, times: int) -> Columns:
        """The same sum for rows that are each repeated: r0 r0 … r1 r1 …"""
        return Columns(self.ids.repeat_interleave(times, 0), self.signs)

    def of_rows(self, rows: Int[Tensor, " some"]) -> Columns:
        """The same sum for some rows."""
        return Columns(self.ids[rows.to(self.ids.device)], self.signs)


_Picks = TypeVar("_Picks", bound="Picks")
# The place of each pick in the logits: its row, and its slot if rows have slots.
Places = tuple[Int[Tensor, " pick"], ...]
# The number of picks whose logits are held at a time while autograd records a graph. The forward
# pass holds twice as many where no graph is recorded (`core/function/forward.py`).
PICKS = 128


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Picks(abc.ABC):
    """A weighted sum of terms: g = Σ_pick weight · term(logits of the pick).

    Attributes:
        rows: the row of each pick.
        slots: the slot of each pick in its row; None if rows are read at their last token only.
        owner: the index of each pick's prompt.
        weights: the weight of each pick's term.
        batch: the number of prompts.
    """

    by_pick: ClassVar[tuple[str, ...]] = ("rows", "slots", "owner", "weights")
    rows: Int[Tensor, " pick"]
    slots: Int[Tensor, " pick"] | None = None
    owner: Int[Tensor, " pick"]
    weights: Float[Tensor, " pick"]
    batch: int

    @abc.abstractmethod
    def terms(
        self, logits: Float[Tensor, "some vocab"], picks: Int[Tensor, " some"]
    ) -> Float[Tensor, " some"]:
        """Compute the terms of some picks from their logits, in the readout's units, unweighted."""

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, " batch"]:
        """Compute g of each prompt from the logits of its rows."""
        return self.weighted_sum(self.terms_in(logits))

    def terms_in(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, " pick"]:
        """Compute the term of every pick, of a few picks at a time."""
        places = self.places(logits.device)
        terms: list[Tensor] = []
        for picks in torch.arange(len(self.rows), device="cpu").split(PICKS):
            terms.append(self.terms(logits[at_some(places, picks)], picks))
        return torch.cat(terms)

    def places(self, device: torch.device, rows: Int[Tensor, " pick"] | None = None) -> Places:
        """The place of each pick, as indices into [row, …], or into [row, slot, …] with slots.

        Args:
            device: the device of the indices.
            rows: a row for each pick, in place of its own.
        """
        rows_of_picks = self.rows if rows is None else rows
        indices = (rows_of_picks,) if self.slots is None else (rows_of_picks, self.slots)
        return tuple(index.to(device) for index in indices)

    def weighted_sum(self, terms: Float[Tensor, " pick"]) -> Float[Tensor, " batch"]:
        """Sum the weighted terms of each prompt, which gives g."""
        weighted = terms * self.weights.to(terms)
        return terms.new_zeros(self.batch).index_add(0, self.owner.to(terms.device), weighted)

    def repeat(self: _Picks, times: int) -> _Picks:
        """The same sum for rows that are each repeated: r0 r0 … r1 r1 …"""
        picks = torch.arange(len(self.rows), device="cpu")
        copied = self._chosen(picks.repeat_interleave(times))
        return dataclasses.replace(
            copied,
            rows=_copies(self.rows, times),
            owner=_copies(self.owner, times),
            batch=self.batch * times,
        )

    def of_rows(self: _Picks, rows: Int[Tensor, " some"]) -> _Picks:
        """The same sum for some rows, with rows and prompts numbered from 0 anew."""
        chosen_rows = rows.to(self.rows)
        is_in_these = torch.isin(self.rows, chosen_rows)
        picks = self._chosen(is_in_these.nonzero()[:, 0])
        prompts, owner = picks.owner.unique(return_inverse=True)
        return dataclasses.replace(
            picks,
            rows=torch.searchsorted(chosen_rows, picks.rows),
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
    """The sum g = Σ_pick weight · log p(token) in nats; a pick is one token of a response.

    The weight is 1 / T for a mean over T tokens, and negative for the second answer of a margin.

    Attributes:
        tokens: the token id of each pick.
    """

    by_pick: ClassVar[tuple[str, ...]] = (*Picks.by_pick, "tokens")
    tokens: Int[Tensor, " pick"]

    def terms(
        self, logits: Float[Tensor, "some vocab"], picks: Int[Tensor, " some"]
    ) -> Float[Tensor, " some"]:
        """Compute the log-probability of each pick's token, in nats."""
        tokens = self.tokens[picks.to(self.tokens.device)].to(logits.device)
        return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)

    @property
    def is_one_response(self) -> bool:
        """Whether each prompt has one response, and all of its tokens are read."""
        return self.slots is not None and bool((self.weights > 0).all())

    def by_token(self, terms: Float[Tensor, " pick"]) -> Float[Tensor, "batch token"]:
        """The weighted term of each token, zero beyond the end of a shorter response.

        Each prompt must have one response (`is_one_response`).
        """
        slots = torch.zeros_like(self.rows) if self.slots is None else self.slots
        places = (self.owner.to(terms.device), slots.to(terms.device))
        by_token = terms.new_zeros(self.batch, int(slots.max()) + 1)
        return by_token.index_put(places, terms * self.weights.to(terms))


def at_some(places: Places, picks: Int[Tensor, " some"]) -> tuple[Int[Tensor, " some"], ...]:
    """Choose the places of some picks from those of all."""
    return tuple(index[picks.to(index.device)] for index in places)
