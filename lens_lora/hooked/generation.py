"""What a gated model says, token by token, exactly as its passes over whole sequences choose it.

1. Draft with a key-value cache. Rows go in step and without padding: first as many tokens as the
   shortest row has, then one token a pass, a longer row's own next token while it has one.
2. Confirm: one pass without a cache over a row and its draft chooses a token at each place. The row
   keeps the draft as far as both agree, and one token more, which that pass chose.
3. Go on from there until every row has ended. Where draft and confirmation part within a few tokens
   the cache is wrong for this model, or for hooks that count positions, and is not used again.

So a cache makes it quick and decides nothing. Cost: a pass over the prompt, a pass over one token
for each new one, and a pass over the whole; without a cache, a pass over the whole for each token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora import arguments
from lens_lora.errors import NumericsError, SiteError
from lens_lora.hooked.misuse import first_non_finite
from lens_lora.hooked.plan import Plan
from lens_lora.hooked.unembedded import unembedded_only
from lens_lora.readouts.prompts import Prompts, PromptsLike
from lens_lora.readouts.sampling import Sampling

__all__ = ["GatedModel", "Row", "Speaker", "end_tokens"]

_TOKENS_AT_ONCE = 8192  # of the rows that share a cache
_LONGEST_DRAFT = 256
_TRUSTED_AFTER = 8  # tokens of a draft that were right


@runtime_checkable
class GatedModel(Protocol):
    """What is needed of a lens."""

    model: Any
    _hf_model: Any

    @property
    def plan(self) -> Plan:
        """What the sites add, and the host."""
        ...

    def prompts(self, prompts: PromptsLike) -> Prompts:
        """As tokens."""
        ...

    def gates(self, scale: Any = 1.0) -> Float[Tensor, "*batch site"]:
        """ε."""
        ...

    def applied(self, scale: Any = 1.0) -> AbstractContextManager[Any]:
        """The adapted model, within a block."""
        ...

    def run(self, prompts: Prompts) -> Float[Tensor, "batch pos d_vocab"]:
        """One forward pass."""
        ...


@dataclasses.dataclass
class Row:
    """A prompt and what was said after it so far.

    Attributes:
        index: of the prompt.
        tokens: of both.
        said: how many of them were said.
        ended: whether the last one ends the response.
    """

    index: int
    tokens: list[int]
    said: int = 0
    ended: bool = False

    def take(self, tokens: Sequence[int], ends: Collection[int]) -> None:
        """What is said next, up to the token that ends the response.

        Args:
            tokens: in order.
            ends: tokens that end a response.
        """
        for token in tokens:
            self.tokens.append(token)
            self.said += 1
            if token in ends:
                self.ended = True
                return


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model at given gates, and how it chooses.

    Attributes:
        lens: the adapter over the model.
        gates: of all prompts, or of each.
        sampling: how a token is chosen.
        noise: of each prompt and place.
        ends: tokens that end a response.
    """

    lens: GatedModel
    gates: Float[Tensor, "*batch site"]
    sampling: Sampling
    noise: Float[Tensor, "prompt token"]
    ends: Collection[int]

    @property
    def most(self) -> int:
        """The most tokens that are said after a prompt."""
        return self.noise.shape[1]

    def say(self, prompts: Prompts, *, progress: bool) -> list[Row]:
        """What is said after each prompt.

        Args:
            prompts: of which each has its own gates, where gates have a batch.
            progress: show a bar.

        Raises:
            SiteError: gates for another number of prompts.
            NumericsError: non-finite logits.
        """
        if self.gates.ndim > 1 and len(self.gates) != prompts.batch:
            raise SiteError(f"gates of {len(self.gates)} prompts, and there are {prompts.batch}.")
        rows = [Row(i, prompts.row(i).tokens[0].tolist()) for i in range(prompts.batch)]
        total = len(rows) * self.most
        with (
            torch.no_grad(),
            tqdm(total=total, desc="generate", leave=False, disable=not progress) as bar,
        ):
            for some in self._together(rows):
                self._say(some, bar)
        return rows

    def _together(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Rows of similar length, whose cache is not too large."""
        some: list[Row] = []
        for row in sorted(rows, key=lambda row: len(row.tokens)):
            if some and (len(some) + 1) * (len(row.tokens) + self.most) > _TOKENS_AT_ONCE:
                yield some
                some = []
            some.append(row)
        yield some

    def _say(self, rows: Sequence[Row], bar: tqdm) -> None:
        is_trusted = True
        while goes_on := [row for row in rows if not self._is_done(row)]:
            drafts = self._drafts(goes_on) if is_trusted else [[] for _ in goes_on]
            for row, draft in zip(goes_on, drafts, strict=True):
                before = row.said
                agreed = self._confirmed(row, draft)
                is_trusted &= agreed >= min(len(draft), _TRUSTED_AFTER)
                bar.update(row.said - before)

    def _is_done(self, row: Row) -> bool:
        return row.ended or row.said == self.most

    def _drafts(self, rows: Sequence[Row]) -> list[list[int]]:
        """With a cache, all but the last token that each row may still say."""
        drafts: list[list[int]] = [[] for _ in rows]
        room = [min(self.most - row.said - 1, _LONGEST_DRAFT) for row in rows]
        width = min(len(row.tokens) for row in rows)
        fed, cache = [row.tokens[:width] for row in rows], None
        host = self.lens.plan.host
        with self._gated(rows), unembedded_only(self.lens.model, lambda last: last[:, -1:]):
            while any(map(self._goes_on, drafts, room)):
                logits, cache = host.run_cached(self._tensor(fed), cache)
                chosen = self._chosen(logits[:, -1], rows, drafts).tolist()
                for i, row in enumerate(rows):
                    is_behind = len(row.tokens) + len(drafts[i]) > width
                    if not is_behind and self._goes_on(drafts[i], room[i]):
                        drafts[i].append(chosen[i])
                fed = [[_at(row, draft, width)] for row, draft in zip(rows, drafts, strict=True)]
                width += 1
        return drafts

    def _goes_on(self, draft: list[int], room: int) -> bool:
        return len(draft) < room and (not draft or draft[-1] not in self.ends)

    def _chosen(
        self, logits: Float[Tensor, "row vocab"], rows: Sequence[Row], drafts: list[list[int]]
    ) -> Tensor:
        at = [min(r.said + len(d), self.most - 1) for r, d in zip(rows, drafts, strict=True)]
        noise = self.noise[[row.index for row in rows], at]
        return self.sampling.choose(logits, noise)

    def _confirmed(self, row: Row, draft: list[int]) -> int:
        """How many tokens of the draft are right; the row takes them and one more."""
        places, tokens = len(draft) + 1, self._tensor([row.tokens + draft])
        length, reads = tokens.new_tensor([tokens.shape[1]]), tokens.new_tensor([places])
        prompts = Prompts(tokens, length, reads)
        run = functools.partial(self.lens.run, prompts)
        with self._gated([row]), unembedded_only(self.lens.model, prompts.at_slots):
            logits = run()[0]
            if not torch.isfinite(logits).all():
                raise NumericsError(first_non_finite(self.lens.model, run))
        noise = self.noise[row.index, row.said : row.said + places]
        own = self.sampling.choose(logits, noise).tolist()
        pairs = enumerate(zip(draft, own, strict=False))
        agreed = next((t for t, (drafted, token) in pairs if drafted != token), len(draft))
        row.take(own[: agreed + 1], self.ends)
        return agreed

    def _gated(self, rows: Sequence[Row]) -> AbstractContextManager[Any]:
        own = self.gates if self.gates.ndim == 1 else self.gates[[row.index for row in rows]]
        return self.lens.applied(own)

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.lens.device)


def _at(row: Row, draft: list[int], place: int) -> int:
    """The token of a row or of its draft; after its end, any token."""
    beyond = place - len(row.tokens)
    if beyond < 0:
        return row.tokens[place]
    return draft[beyond] if beyond < len(draft) else 0


def end_tokens(model: Any, hf_model: Any, given: int | Sequence[int] | None) -> frozenset[int]:
    """The tokens that end a response.

    Args:
        model: the hooked model.
        hf_model: its unprocessed base, or None.
        given: an id, several, or none at all; None for the first of these that is known: the
            base's generation_config, its config, the tokenizer's own.

    Raises:
        ArgumentError: what is no id.
    """
    if given is None:
        base = getattr(model, "original_model", None) if hf_model is None else hf_model
        known = (getattr(base, name, None) for name in ("generation_config", "config"))
        holders = (*known, getattr(model, "tokenizer", None))
        ends = (getattr(holder, "eos_token_id", None) for holder in holders)
        given = next((end for end in ends if end is not None), ())
    if isinstance(given, str) or not isinstance(given, Sequence):
        given = [arguments.whole("eos_token_id", given, 0)]
    return frozenset(arguments.whole("eos_token_id", token, 0) for token in given)
