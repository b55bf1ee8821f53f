"""Rows that take their next token in the same pass, with one cache.

1. A row is a prompt, asked of one model. Rows are padded on the left, so that all of them take
   their next token in the same pass; the gates of a row say which model it asks.
2. Many prompts begin alike, as those of one chat template do. What several rows begin with is run
   once, and its keys and values are copied; then a pass runs the rest of every row (`_run_alone`).
   A prompt that one model is asked several times is run once.
3. After the prompts each row is copied once for every draw. All copies go on from the same keys
   and values: one with the likeliest tokens, each other one with the noise of its draw, which is
   the same for both models.
4. One of every sixteen rows of similar length is confirmed by a pass without a cache or padding on
   the left. It is drawn at random, so that it may be of either model and of any draw. If more than
   a twentieth of its tokens differ, cache or padding is wrong for this model, or for hooks that
   count positions.

Cost: a pass over each prompt for either model, except for shared beginnings, a pass over one token
of each row for each new token, and a pass over every sixteenth row.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import math
import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora.compat import home_of
from lens_lora.core import LoraLens, Prompts, Rows, Source
from lens_lora.responses.generate import Sampling

# The tokens of all rows that share a cache, which bounds its memory.
_CACHED_TOKENS = 12288
# One of this many rows is confirmed, but at least `least_confirmed` of them.
_CONFIRMED = 16
# A pass that confirms has at most so many answered tokens.
_CONFIRMED_TOKENS = 512
# Rows that have ended are dropped once they are this share of the rows that are run.
_SHARE_ENDED = 1 / 4
# The share of the confirmed tokens that may differ because of rounding.
_SHARE_DIFFERING = 1 / 20


class _LeftPadded(NamedTuple):
    """Rows of tokens, padded on the left, so that all of them end at the same place.

    Attributes:
        tokens: the tokens; 0 at padding.
        mask: 1 where a row has a token, 0 for its padding.
        lengths: how many tokens each row has.
    """

    tokens: Int[Tensor, "row all"]
    mask: Int[Tensor, "row all"]
    lengths: Int[Tensor, " row"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: torch.device) -> _LeftPadded:
        """Pad these rows; the lengths stay on the CPU."""
        lengths = torch.tensor([len(ids) for ids in rows])
        width = int(lengths.max())
        padded: list[list[int]] = []
        for ids in rows:
            padding = [0] * (width - len(ids))
            padded.append([*padding, *ids])
        is_token = torch.arange(width) >= width - lengths[:, None]
        return cls(torch.tensor(padded).to(device), is_token.long().to(device), lengths)


class _Start(NamedTuple):
    """A prompt that a model is asked, or what some prompts begin with.

    Attributes:
        model: the number of the model.
        ids: the tokens.
    """

    model: int
    ids: tuple[int, ...]

    def opening(self, alone: int) -> _Start:
        """The tokens before the last `alone` ones; empty if there are no more than these."""
        return _Start(self.model, self.ids[: max(len(self.ids) - alone, 0)])


class Place(NamedTuple):
    """The place of a row among all of them.

    Attributes:
        draw: which of the samplings answers.
        model: the number of the gates; where both models are asked, 0 for the base, 1 for the
            adapted model.
        prompt: which of the prompts is answered.
    """

    draw: int
    model: int
    prompt: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Batch:
    """Rows that take their next token in the same pass, after the passes so far.

    Attributes:
        mask: 1 where a row has a token, 0 for its padding on the left.
        gates: the gates of each row.
        lengths: how many tokens each row's prompt has.
        cache: the keys and values of all tokens so far.
        logits: the logits after each row's last token.
    """

    mask: Int[Tensor, "row all"]
    gates: Float[Tensor, "row site"]
    lengths: Int[Tensor, " row"]
    cache: Any
    logits: Float[Tensor, "row vocab"]


@dataclasses.dataclass(eq=False)
class RowsInStep(abc.ABC):
    """Rows that answer together: a row is a prompt, asked of a model, with the noise of a draw.

    Attributes:
        lens: the adapter over the model.
        prompts: what is answered.
        max_new_tokens: the largest number of tokens of an answer.
        samplings: how each draw is chosen.
    """

    lens: LoraLens
    prompts: Prompts
    max_new_tokens: int
    samplings: Sequence[Sampling]
    # At least so many rows are confirmed.
    least_confirmed: ClassVar[int]

    def __post_init__(self) -> None:
        batch = self.prompts.batch
        self._ids = [self.prompts.row(i).tokens[0].tolist() for i in range(batch)]
        self._noise = [sampling.noise(batch, self.max_new_tokens) for sampling in self.samplings]
        # Whether a hook of somebody else's is on the model, before the adapter's own are.
        self._is_hooked = self.lens.is_hooked()
        self._ends = self._tokens_that_end()
        self._gates = self._gates_of_models()

    @abc.abstractmethod
    def _tokens_that_end(self) -> Collection[int]:
        """The tokens that end an answer."""

    @abc.abstractmethod
    def _gates_of_models(self) -> Float[Tensor, "model site"]:
        """The gates of each model that rows may ask, by its number."""

    @abc.abstractmethod
    def place_of(self, row: int) -> Place:
        """The draw, model and prompt of a row."""

    @abc.abstractmethod
    def _known_answers(self) -> list[list[int]]:
        """The answer of each row where it is known; [] of a row that is asked."""

    @abc.abstractmethod
    def _rows_asked(self, group: Sequence[int]) -> list[int]:
        """The rows of these prompts that are asked."""

    def answers_with_a_cache(self, *, progress: bool) -> list[list[int]] | None:
        """The ids that each row answers; None where a pass without a cache chooses others."""
        answers = self._known_answers()
        groups = list(self._sharing_a_cache())
        steps = len(groups) * self.max_new_tokens
        bar = tqdm(total=steps, desc="both answer", leave=False, disable=not progress)
        with torch.no_grad(), bar:
            with self._alone_on_the_model():
                for group in groups:
                    if not self._answer(group, answers, bar):
                        return None
            is_right = self._is_confirmed(answers)
        return answers if is_right else None

    @functools.cached_property
    def _only_model(self) -> int | None:
        """The number of the model that all rows ask; None if they ask different ones."""
        rows = self._rows_asked(range(self.prompts.batch))
        models = {self.place_of(row).model for row in rows}
        return models.pop() if len(models) == 1 else None

    def _alone_on_the_model(self) -> AbstractContextManager[Any]:
        """Within the block, the adapter is set for the one model that is asked, if only one is.

        Setting the adapter for each pass would cost a twentieth of a pass over one token.
        """
        if self._only_model is None:
            return contextlib.nullcontext()
        return self.lens.adapted(self._gates[self._only_model])

    def _each_on_its_model(self, gates: Float[Tensor, "row site"]) -> AbstractContextManager[Any]:
        """Within the block each row asks its own model; nothing where one model is on already."""
        if self._only_model is not None:
            return contextlib.nullcontext()
        return self.lens.adapted(gates)

    def _sharing_a_cache(self) -> Iterator[list[int]]:
        """Groups of prompts of similar length, each no larger than a cache has room for."""
        prompts = range(self.prompts.batch)
        lengths = [len(ids) for ids in self._ids]
        longest_row = max(lengths) + self.max_new_tokens
        rows_of_each = math.ceil(len(self._rows_asked(prompts)) / len(prompts))
        at_once = max(1, _CACHED_TOKENS // (rows_of_each * longest_row))
        shortest_first = sorted(prompts, key=lengths.__getitem__)
        for first in range(0, len(shortest_first), at_once):
            yield shortest_first[first : first + at_once]

    def _answer(self, group: list[int], answers: list[list[int]], bar: tqdm) -> bool:
        """Let each model that is asked answer these prompts; false if a logit was not finite.

        Args:
            group: indices of prompts that share a cache.
            answers: the ids that each row has answered so far, which are added to.
            bar: the progress, one for each token.
        """
        rows = self._rows_asked(group)
        batch = self._after_prompts(rows)
        for step in range(self.max_new_tokens):
            # NaN and +∞ would be the largest logit of their row.
            largest = batch.logits.amax(-1)
            if not bool(torch.isfinite(largest).all()):
                return False
            tokens = self._chosen(batch.logits, rows, step)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if not self._has_ended(answers[row]):
                    answers[row].append(token)
            bar.update(1)
            unfinished = [k for k, row in enumerate(rows) if not self._has_ended(answers[row])]
            if not unfinished or step + 1 == self.max_new_tokens:
                return True
            if len(unfinished) <= (1 - _SHARE_ENDED) * len(rows):
                kept = torch.tensor(unfinished)
                batch = self._of_rows(batch, kept)
                tokens = tokens[kept.to(tokens.device)]
                rows = [rows[k] for k in unfinished]
            batch = self._after_tokens(batch, tokens)
        return True

    def _after_prompts(self, rows: Sequence[int]) -> _Batch:
        """Run the prompts of these rows, padded on the left; the same prompt of a model once."""
        starts: dict[_Start, int] = {}
        of_row: list[int] = []
        for row in rows:
            place = self.place_of(row)
            start = _Start(place.model, tuple(self._ids[place.prompt]))
            of_row.append(starts.setdefault(start, len(starts)))
        batch = self._after_starts(list(starts))
        return self._of_rows(batch, torch.tensor(of_row))

    def _after_starts(self, starts: Sequence[_Start]) -> _Batch:
        """Run these prompts, padded on the left, each through its model."""
        rows = _LeftPadded.of([start.ids for start in starts], home_of(self.lens.model))
        gates = self._gates[[start.model for start in starts]]
        alone = self._run_alone(starts)
        cache: Any = None
        if alone < rows.tokens.shape[1]:
            cache = self._after_openings(starts, alone)
        last_tokens = rows.tokens[:, -alone:]
        logits, cache = self._pass(last_tokens, cache, rows.mask, gates, rows.lengths)
        return _Batch(rows.mask, gates, rows.lengths, cache, logits)

    def _run_alone(self, starts: Sequence[_Start]) -> int:
        """How many of each prompt's last tokens are run for itself, where all before is shared.

        The tokens before them are the prompt's opening, which is shared; short prompts have none.
        With o different openings of at most l tokens, n prompts take o l + n w tokens with padding,
        and w is chosen so that this is smallest. If w is the length of the longest prompt, nothing
        is shared. That is the case if a hook of the user's is on the model, which may need to know
        the prompt of each token.
        """
        width = max(len(start.ids) for start in starts)
        if self._is_hooked:
            return width

        def tokens_run(alone: int) -> int:
            openings = {start.opening(alone) for start in starts}
            return len(openings) * (width - alone) + len(starts) * alone

        # Among equals, min returns the first, which shares least.
        return min(range(width, 0, -1), key=tokens_run)

    def _after_openings(self, starts: Sequence[_Start], alone: int) -> Any:
        """The cache of each prompt's opening; each opening is run once through each model.

        Args:
            starts: the prompts, each with its model.
            alone: how many of each prompt's last tokens are no part of its opening.
        """
        openings: dict[_Start, int] = {}
        of_start: list[int] = []
        for start in starts:
            of_start.append(openings.setdefault(start.opening(alone), len(openings)))
        rows = _LeftPadded.of([opening.ids for opening in openings], home_of(self.lens.model))
        gates = self._gates[[opening.model for opening in openings]]
        _, cache = self._pass(rows.tokens, None, rows.mask, gates, rows.lengths)
        opening_of_start = torch.tensor(of_start, device=rows.tokens.device)
        return self.lens.host.rows_of_cache(cache, opening_of_start)

    def _of_rows(self, batch: _Batch, rows: Int[Tensor, " chosen"]) -> _Batch:
        """A batch of these rows, in this order; a row may come several times.

        The cache of the old batch may be changed in place, so that batch is not used again.
        """
        here = rows.to(batch.mask.device)
        return _Batch(
            mask=batch.mask[here],
            gates=batch.gates[rows.to(batch.gates.device)],
            lengths=batch.lengths[rows],
            cache=self.lens.host.rows_of_cache(batch.cache, here),
            logits=batch.logits[here],
        )

    def _after_tokens(self, batch: _Batch, tokens: Int[Tensor, " row"]) -> _Batch:
        """Run one more token of each row."""
        mask = torch.cat([batch.mask, batch.mask.new_ones(len(tokens), 1)], 1)
        column = tokens[:, None].to(mask.device)
        logits, cache = self._pass(column, batch.cache, mask, batch.gates, batch.lengths)
        return dataclasses.replace(batch, mask=mask, cache=cache, logits=logits)

    def _pass(
        self,
        tokens: Int[Tensor, "row new"],
        cache: Any,
        mask: Int[Tensor, "row all"],
        gates: Float[Tensor, "row site"],
        lengths: Int[Tensor, " row"],
    ) -> tuple[Float[Tensor, "row vocab"], Any]:
        """The logits after each row's last token, and the cache with these tokens."""
        with (
            self._each_on_its_model(gates),
            self.lens.unembedding_only(lambda last: last[:, -1:]),
            Rows(lengths, has_response=True).told(self.lens.model),
        ):
            logits, cache = self.lens.host.run_cached(tokens, cache, mask)
        return logits[:, -1], cache

    def _chosen(
        self, logits: Float[Tensor, "row vocab"], rows: Sequence[int], step: int
    ) -> Int[Tensor, " row"]:
        """The next token of each row."""
        chosen = torch.empty(len(rows), dtype=torch.long, device=logits.device)
        places = [self.place_of(row) for row in rows]
        for draw, sampling in enumerate(self.samplings):
            of_draw = [k for k, place in enumerate(places) if place.draw == draw]
            if of_draw:
                prompts = [places[k].prompt for k in of_draw]
                noise = self._noise[draw][prompts, step]
                chosen[of_draw] = sampling.choose(logits[of_draw], noise)
        return chosen

    def _has_ended(self, answer: Sequence[int]) -> bool:
        return bool(answer) and answer[-1] in self._ends

    # --- Confirmed

    def _is_confirmed(self, answers: Sequence[Sequence[int]]) -> bool:
        """Whether passes without a cache choose the same tokens, up to rounding."""
        agreed = 0
        confirmed = 0
        to_confirm = self._to_confirm(len(answers))
        for rows in self._confirmed_together(to_confirm):
            agreed += self._count_agreed(rows, answers)
            confirmed += sum(len(answers[row]) for row in rows)
        share_differing = 1.0 - agreed / confirmed
        return share_differing <= _SHARE_DIFFERING

    def _to_confirm(self, rows: int) -> list[int]:
        """One of every sixteen rows of like length, or of fewer where that were too few rows.

        It is drawn at random: the rows of a prompt follow one another, so that every sixteenth one
        would often be of the same model.
        """

        def length(row: int) -> int:
            return len(self._ids[self.place_of(row).prompt])

        shortest_first = sorted(range(rows), key=length)
        alike = max(1, min(_CONFIRMED, rows // self.least_confirmed))
        generator = random.Random(0)
        chosen: list[int] = []
        for first in range(0, rows, alike):
            chosen.append(generator.choice(shortest_first[first : first + alike]))
        return chosen

    def _confirmed_together(self, rows: list[int]) -> Iterator[list[int]]:
        """The rows in groups, each of which one pass confirms."""
        at_once = max(1, _CONFIRMED_TOKENS // self.max_new_tokens)
        for first in range(0, len(rows), at_once):
            yield rows[first : first + at_once]

    def _count_agreed(self, rows: Sequence[int], answers: Sequence[Sequence[int]]) -> int:
        """The number of tokens of these answers that a pass over the whole row chooses too."""
        places = [self.place_of(row) for row in rows]
        prompts = self._with_answers(rows, answers)
        models = [place.model for place in places]
        with self.lens.adapted(self._gates[models]), self.lens.unembedding_only(prompts.at_slots):
            logits = self.lens.run(prompts)
        agreed = 0
        for logits_of_row, row, place in zip(logits, rows, places, strict=True):
            answer = answers[row]
            # A row that is read at fewer positions than others repeats its last one.
            read = logits_of_row[: len(answer)]
            noise = self._noise[place.draw][place.prompt, : len(answer)]
            chosen = self.samplings[place.draw].choose(read, noise).tolist()
            for token, answered in zip(chosen, answer, strict=True):
                if token == answered:
                    agreed += 1
        return agreed

    def _with_answers(self, rows: Sequence[int], answers: Sequence[Sequence[int]]) -> Prompts:
        """The prompts of these rows with their answers, read where each token was chosen."""
        texts: list[Tensor] = []
        sources: list[Source] = []
        for row in rows:
            asked = self._ids[self.place_of(row).prompt]
            # Nothing is read at the last token of an answer, so it is not run.
            run_of_answer = list(answers[row][:-1])
            texts.append(torch.tensor(asked + run_of_answer))
            sources.append(Source(length=len(asked)))
        lengths = torch.tensor([len(text) for text in texts])
        reads = torch.tensor([len(answers[row]) for row in rows])
        tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        return Prompts(tokens.to(home_of(self.lens.model)), lengths, reads, tuple(sources))
