"""Generation: each token is the one that a pass over the whole sequence chooses.

1. A draft is made with a key-value cache. Rows advance together and without padding: the first pass
   runs as many tokens as the shortest row has, and every further pass runs one token of each row,
   which is a longer row's own next token while it has one. Rows whose prompts are longer by more
   than `max_new_tokens` have a cache of their own.
2. The draft is confirmed: one pass without a cache, over rows and drafts of one length, chooses a
   token at each position. A row keeps its draft as far as both agree, and takes one more token,
   which the pass chose.
3. Both steps are repeated until every row has ended. If draft and confirmation differ within a few
   tokens, the cache is wrong for this model, or for hooks that count positions, and is not used
   again.

So a cache saves time and does not affect the tokens. Cost: a pass over the prompt, a pass over one
token for each new token, and a pass over the whole text. Without a cache it is a pass over the
whole text for each token, which on a CPU takes 2 times (64 tokens) to 3 times (200 tokens) as long.

A draw from the distribution is a function of the logits and of one random number u in [0, 1), which
is fixed for each prompt and position before anything is run: tokens are sorted by probability, and
u points into the cumulative sum. So the same logits and seed give the same tokens, whichever pass
computed the logits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora import arguments
from lens_lora.compat import home_of, in_float64
from lens_lora.core import (
    Generated,
    LoraLens,
    Prompts,
    PromptsLike,
    Rows,
    Scale,
    Source,
    Tokens,
    storage,
)
from lens_lora.core.model import extensions
from lens_lora.errors import ArgumentError, PromptError, SiteError, setting, which_prompt

# The tokens of all rows that share a cache, which bounds its memory.
_CACHED_TOKENS = 8192
# The tokens of a pass that confirms drafts, whose logits are all held.
_CONFIRMED_TOKENS = 256
# The tokens of a draft, all of which may be lost if its confirmation differs.
_DRAFT = 256
# A wrong cache differs from the confirmation within this many tokens of a draft; rounding differs
# later.
_TRUSTED_AFTER = 8
# A draw sorts this many tokens, and the whole vocabulary only if it falls beyond them.
_LIKELIEST = 1024
# What stands after a text that was cut off at the most tokens, rather than ended by the model.
CUT = " …"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Raises:
        ArgumentError: temperature below 0, top_p outside (0, 1], or a seed that is no whole number.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        temperature = arguments.number("temperature", self.temperature)
        top_p = arguments.number("top_p", self.top_p)
        arguments.whole("seed", self.seed, 0)
        if temperature < 0:
            raise ArgumentError(f"temperature={temperature}: expected 0 (greedy) or more.")
        if not 0 < top_p <= 1:
            raise ArgumentError(f"top_p={top_p}: expected a probability above 0, 1 for all tokens.")
        if temperature == 0 and top_p < 1:
            raise ArgumentError(
                f"top_p={top_p} with temperature=0, which takes the likeliest token whatever top_p "
                "is; pass a temperature, such as 1.0."
            )

    def noise(self, prompts: int, tokens: int) -> Float[Tensor, "prompt token"]:
        """The noise u in [0, 1) of each prompt and place."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        return torch.rand(prompts, tokens, generator=generator, dtype=torch.float64, device="cpu")

    def choose(
        self, logits: Float[Tensor, "place vocab"], noise: Float[Tensor, " place"]
    ) -> Int[Tensor, " place"]:
        """The token at each place."""
        if self.temperature == 0:
            return logits.argmax(-1)
        p = (in_float64(logits) / self.temperature).softmax(-1)
        u = noise.to(p)
        likeliest, ids = p.topk(min(_LIKELIEST, p.shape[-1]))
        tokens, is_among_them = self._drawn(likeliest, ids, u)
        rest = (~is_among_them).nonzero()[:, 0]
        if len(rest):
            sorted_p, sorted_ids = p[rest].sort(-1, descending=True)
            tokens[rest], _ = self._drawn(sorted_p, sorted_ids, u[rest])
        return tokens.to(logits.device)

    def _drawn(
        self,
        p: Float[Tensor, "place some"],
        ids: Int[Tensor, "place some"],
        u: Float[Tensor, " place"],
    ) -> tuple[Int[Tensor, " place"], Bool[Tensor, " place"]]:
        """The token at which the cumulative probability passes u, and whether it is among these.

        It is drawn from the nucleus, the fewest likeliest tokens whose probabilities reach top_p.

        Args:
            p: the largest probabilities of each position, in decreasing order.
            ids: the tokens that have these probabilities.
            u: the noise of each position.
        """
        probability_before = p.cumsum(-1) - p
        # Half a unit of rounding is taken off, so that tokens which reach top_p exactly suffice.
        nucleus = self.top_p - torch.finfo(p.dtype).eps / 2
        is_in_nucleus = probability_before < nucleus
        cumulated = torch.where(is_in_nucleus, p, 0.0).cumsum(-1)
        sum_here = cumulated[:, -1]
        has_whole_nucleus = sum_here >= nucleus
        draws_from_all = self.top_p == 1
        # With top_p = 1 the nucleus is the whole vocabulary, whose sum is 1.
        sum_of_nucleus = torch.ones_like(u) if draws_from_all else sum_here
        target = (u * sum_of_nucleus)[:, None].contiguous()
        rank = torch.searchsorted(cumulated, target, right=True)
        is_among_them = has_whole_nucleus
        if draws_from_all:
            is_among_them = has_whole_nucleus | (rank[:, 0] < p.shape[-1])
        last = p.shape[-1] - 1
        token = ids.gather(-1, rank.clamp_max(last))[:, 0]
        return token, is_among_them


@dataclasses.dataclass(eq=False)
class Generation:
    """A model at given gates, what it has generated so far, and how it chooses tokens.

    Attributes:
        lens: the adapter over the model.
        prompts: the prompts that are continued.
        gates: the gates, for all prompts together or for each.
        sampling: how a token is chosen.
        max_new_tokens: the largest number of tokens of a response.
        ends: tokens that end a response.
        texts: the tokens of each prompt and of its response so far.
        prompt_lengths: the number of the prompt's tokens in each text.
    """

    lens: LoraLens
    prompts: Prompts
    gates: Float[Tensor, "*batch site"]
    sampling: Sampling
    max_new_tokens: int
    ends: Collection[int]

    def __post_init__(self) -> None:
        batch = self.prompts.batch
        self.gates = self.gates.detach()
        if self.gates.ndim > 1 and len(self.gates) != batch:
            raise SiteError(f"gates of {len(self.gates)} prompts, and there are {batch}.")
        self.texts: list[list[int]] = []
        for i in range(batch):
            self.texts.append(self.prompts.row(i).tokens[0].tolist())
        self.prompt_lengths: list[int] = [len(text) for text in self.texts]
        self._noise = self.sampling.noise(batch, self.max_new_tokens)

    def response(self, i: int) -> list[int]:
        """The tokens that were generated after this prompt."""
        return self.texts[i][self.prompt_lengths[i] :]

    def has_ended(self, i: int) -> bool:
        """Whether the last token that was generated ends the response."""
        return bool(self.response(i)) and self.texts[i][-1] in self.ends

    def _is_unfinished(self, i: int) -> bool:
        return len(self.response(i)) < self.max_new_tokens and not self.has_ended(i)

    def run(self, *, progress: bool) -> Generated:
        """Generate the response to every prompt."""
        count = len(self.prompt_lengths)
        most = count * self.max_new_tokens
        bar = tqdm(total=most, desc="generate", leave=False, disable=not progress)
        with torch.no_grad(), bar:
            for rows in self._sharing_a_cache():
                self._respond(rows, bar)
        responses = [self.response(i) for i in range(count)]
        tokens = Tokens(self.lens.model)
        return Generated(
            ids=tuple(self.prompts.tokens.new_tensor(ids) for ids in responses),
            texts=tuple(tokens.text(ids, skip_special_tokens=True) for ids in responses),
            prompts=dataclasses.replace(self.prompts, reads=None),
            ended=tuple(self.has_ended(i) for i in range(count)),
        )

    def _sharing_a_cache(self) -> Iterator[list[int]]:
        """Groups of rows with prompts of similar length, as large as a cache has room for."""
        lengths = self.prompt_lengths
        most_rows = max(1, _CACHED_TOKENS // (max(lengths) + self.max_new_tokens))
        shortest_first = sorted(range(len(lengths)), key=lambda i: lengths[i])
        together = shortest_first[:1]
        for i in shortest_first[1:]:
            is_apart = lengths[i] - lengths[together[-1]] > self.max_new_tokens
            if is_apart or len(together) == most_rows:
                yield together
                together = []
            together.append(i)
        yield together

    def _respond(self, rows: list[int], bar: tqdm) -> None:
        """Generate the responses to these prompts, which share a cache."""
        is_trusted = True
        unfinished = [i for i in rows if self._is_unfinished(i)]
        while unfinished:
            drafts: dict[int, list[int]] = {i: [] for i in unfinished}
            if is_trusted:
                for together in self._by_rotary_table(unfinished):
                    drafts |= zip(together, self._drafts(together), strict=True)
            for of_one_length in self._by_length(drafts):
                is_right = self._confirm(of_one_length)
                is_trusted = is_trusted and is_right
            generated_tokens = sum(len(text) for text in self.texts) - sum(self.prompt_lengths)
            bar.update(generated_tokens - bar.n)
            unfinished = [i for i in unfinished if self._is_unfinished(i)]

    def _by_rotary_table(self, rows: list[int]) -> Iterable[list[int]]:
        """Groups of rows whose texts have the same rotary tables, so they can share a cache."""
        together: dict[float, list[int]] = {}
        for i in rows:
            longest = self.lens.rotary.alike_up_to(len(self.texts[i]))
            together.setdefault(longest, []).append(i)
        return together.values()

    def _by_length(self, drafts: dict[int, list[int]]) -> Iterator[dict[int, list[int]]]:
        """Groups of rows of one length with drafts of one length, each confirmed in one pass."""
        by_lengths: dict[tuple[int, int], list[int]] = {}
        for i, draft in drafts.items():
            lengths = len(self.texts[i]), len(draft)
            by_lengths.setdefault(lengths, []).append(i)
        for (_, drafted), rows in sorted(by_lengths.items()):
            rows_at_once = max(1, _CONFIRMED_TOKENS // (drafted + 1))
            for first in range(0, len(rows), rows_at_once):
                together = rows[first : first + rows_at_once]
                yield {i: drafts[i] for i in together}

    def _drafts(self, rows: list[int]) -> list[list[int]]:
        """Draft, with a cache, all tokens that each row may still generate except the last one."""
        prompt_lengths = torch.tensor([self.prompt_lengths[i] for i in rows])
        texts = [list(self.texts[i]) for i in rows]
        limits = [self._end_of_draft(i) for i in rows]
        steps = _Steps(texts, limits)
        cache: Any = None
        with (
            self._gated(rows),
            self.lens.unembedding_only(lambda last: last[:, -1:]),
            self.lens.rotary.as_made(),
        ):
            while steps.are_unfinished():
                with Rows(prompt_lengths, has_response=True).told(self.lens.model):
                    logits, cache = self.lens.host.run_cached(self._tensor(steps.fed), cache)
                due = steps.due()
                due_rows = [rows[k] for k in due]
                places = steps.width - prompt_lengths[due]
                noise = self._noise[due_rows, places]
                chosen = self.sampling.choose(logits[due, -1], noise).tolist()
                steps.take(due, chosen, self.ends)
        drafts: list[list[int]] = []
        for i, text in zip(rows, texts, strict=True):
            begins_at = len(self.texts[i])
            drafts.append(text[begins_at:])
        return drafts

    def _end_of_draft(self, i: int) -> int:
        """The length of a text with a draft that one pass can confirm as a whole.

        The draft leaves out the last token that may be generated, and ends where a longer text
        would have other rotary tables.
        """
        length = len(self.texts[i])
        most = min(self.prompt_lengths[i] + self.max_new_tokens - 1, length + _DRAFT)
        return int(min(most, self.lens.rotary.alike_up_to(length)))

    def _confirm(self, drafts: dict[int, list[int]]) -> bool:
        """Let each row take the part of its draft that one pass confirms, and one more token.

        Args:
            drafts: drafts of rows of one length, by row; all drafts are of one length too.

        Returns:
            Whether the drafts agree far enough for their cache to be trusted.
        """
        logits = self._logits_with_drafts(drafts)
        # A token is chosen at each token of a draft, and one more after it.
        places = logits.shape[1]
        noise_of_rows: list[Tensor] = []
        for i in drafts:
            first = len(self.response(i))
            noise_of_rows.append(self._noise[i, first : first + places])
        noise = torch.cat(noise_of_rows)
        chosen = self.sampling.choose(logits.flatten(0, 1), noise).view(-1, places)
        agreed: list[int] = []
        for (i, draft), tokens_chosen in zip(drafts.items(), chosen.tolist(), strict=True):
            agreed.append(self._take(i, draft, tokens_chosen))
        drafted = places - 1
        return min(agreed) >= min(drafted, _TRUSTED_AFTER)

    def _logits_with_drafts(self, drafts: dict[int, list[int]]) -> Float[Tensor, "row place vocab"]:
        """Run texts with their drafts in one pass, read where each token is chosen.

        Raises:
            NumericsError: a logit is not finite.
        """
        rows = list(drafts)
        tokens = self._tensor([self.texts[i] + draft for i, draft in drafts.items()])
        text_length = len(self.texts[rows[0]])
        places = tokens.shape[1] - text_length + 1
        lengths = tokens.new_full((len(rows),), tokens.shape[1])
        sources = tuple(Source(length=self.prompt_lengths[i]) for i in rows)
        prompts = Prompts(tokens, lengths, torch.full_like(lengths, places), sources)
        run = functools.partial(self.lens.run, prompts)
        with self._gated(rows), self.lens.unembedding_only(prompts.at_slots):
            logits = run()
            if not torch.isfinite(logits).all():
                raise self.lens.not_finite(run)
        return logits

    def _take(self, i: int, draft: list[int], chosen: list[int]) -> int:
        """Take the tokens of a draft up to the first wrong one, and one more token.

        Returns:
            How many tokens of the draft were right.
        """
        agreed = 0
        while agreed < len(draft) and draft[agreed] == chosen[agreed]:
            agreed += 1
        self.texts[i] += draft[:agreed]
        if self._is_unfinished(i):
            self.texts[i].append(chosen[agreed])
        return agreed

    def _gated(self, rows: list[int]) -> AbstractContextManager[Any]:
        gates = self.gates if self.gates.ndim == 1 else self.gates[rows]
        return self.lens.adapted(gates)

    def _tensor(self, rows: list[list[int]]) -> Int[Tensor, "row pos"]:
        return torch.tensor(rows, device=home_of(self.lens.model))


class _Steps:
    """Rows that share a cache and advance together.

    The first pass runs as many tokens as the shortest row has, each further pass one token a row.

    Attributes:
        texts: the tokens of each row, including its draft.
        fed: the tokens of each row that the next pass runs.
        width: the number of tokens of each row in the cache after that pass.
    """

    def __init__(self, texts: list[list[int]], limits: list[int]) -> None:
        self.texts = texts
        # The length of each row at the end of its draft.
        self._limits = limits
        self.width = min(len(text) for text in texts)
        self.fed = [text[: self.width] for text in texts]

    def are_unfinished(self) -> bool:
        """Whether a row has not reached the end of its draft."""
        return any(len(text) < limit for text, limit in zip(self.texts, self._limits, strict=True))

    def due(self) -> list[int]:
        """The rows whose own tokens have all been run, so that this pass chooses a new one."""
        rows: list[int] = []
        for k, (text, limit) in enumerate(zip(self.texts, self._limits, strict=True)):
            if len(text) == self.width and self.width < limit:
                rows.append(k)
        return rows

    def take(self, due: list[int], chosen: list[int], ends: Collection[int]) -> None:
        """Add the chosen tokens, note which rows they end, and prepare the next pass."""
        for k, token in zip(due, chosen, strict=True):
            self.texts[k].append(token)
            if token in ends:
                self._limits[k] = self.width + 1
        self.fed = []
        for text in self.texts:
            if len(text) > self.width:
                self.fed.append([text[self.width]])
            else:
                # A row that has ended is fed an arbitrary token until all rows have ended.
                self.fed.append([0])
        self.width += 1


@storage.stored
@dataclasses.dataclass(frozen=True)
class SideBySide:
    """The answers of both models to a prompt, the likeliest token each time.

    Attributes:
        prompt: the prompt's text, or the last message of a conversation's user.
        base, adapted: the two answers; one that was cut off ends in ' …'.
    """

    prompt: str
    base: str
    adapted: str


def side_by_side(
    lens: LoraLens,
    prompts: Prompts,
    max_new_tokens: int,
    response: object = None,
    *,
    progress: bool,
) -> list[SideBySide | None]:
    """Both models' answers to each prompt; None if the context has no room for them.

    Cost: that of `generate` for both models, in one batch.

    Args:
        lens: the adapter over the model.
        prompts: the prompts.
        max_new_tokens: the largest number of tokens of an answer.
        response: the response that is explained. If it was generated, it is the adapted model's
            answer, and the base's is at most as long.
        progress: whether to show a progress bar.
    """
    adapted = response if isinstance(response, Generated) else None
    if adapted is not None:
        max_new_tokens = max(len(ids) for ids in adapted.ids)
    pairs: list[SideBySide | None] = [None] * prompts.batch
    fitting = with_room(lens, prompts, max_new_tokens)
    if not fitting:
        return pairs

    chosen = prompts.chosen(fitting)
    ends = [0.0, 1.0] if adapted is None else [0.0]
    gates_of_ends = torch.stack([lens.gates(end) for end in ends])
    gates = gates_of_ends.repeat_interleave(len(fitting), 0)
    asked = chosen.tiled(len(ends))
    generated = lens.generate(asked, max_new_tokens, gates, progress=progress)
    answers = whole_or_cut(generated)
    of_base = answers[: len(fitting)]
    of_adapted = answers[len(fitting) :]
    if adapted is not None:
        given = whole_or_cut(adapted)
        of_adapted = [given[i] for i in fitting]

    both = beside_each_other(lens, chosen, of_base, of_adapted)
    for prompt, pair in zip(fitting, both, strict=True):
        pairs[prompt] = pair
    return pairs


def with_room(lens: LoraLens, prompts: Prompts, max_new_tokens: int) -> list[int]:
    """The indices of the prompts after which the context has room for so many tokens.

    Args:
        lens: the adapter over the model.
        prompts: all of them.
        max_new_tokens: the most tokens of an answer, of which the last is not run.
    """
    context = getattr(lens.model.cfg, "n_ctx", None) or math.inf
    longest = context - max_new_tokens + 1
    return [i for i, length in enumerate(prompts.lengths.tolist()) if length <= longest]


def beside_each_other(
    lens: LoraLens, prompts: Prompts, of_base: Sequence[str], of_adapted: Sequence[str]
) -> list[SideBySide]:
    """Each prompt as text, with both models' answers to it.

    Args:
        lens: the adapter over the model.
        prompts: what was answered.
        of_base: the base's answer to each.
        of_adapted: the adapted model's.
    """
    str_tokens = lens.str_tokens(prompts)
    pairs: list[SideBySide] = []
    for place, source in enumerate(prompts.sources):
        text = source.said or source.text or "".join(str_tokens[place])
        pairs.append(SideBySide(text, of_base[place], of_adapted[place]))
    return pairs


@extensions.generated.provide
def generated(
    lens: LoraLens,
    prompts: PromptsLike,
    max_new_tokens: int,
    scale: Scale,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    eos_token_id: int | Sequence[int] | None,
    progress: bool,
) -> Generated:
    """Generate a response to each prompt: see `LoraLens.generate`."""
    max_new_tokens = arguments.whole("max_new_tokens", max_new_tokens, 1)
    sampling = Sampling(temperature, top_p, seed)
    ends = end_tokens(lens.model, lens.hf_model, eos_token_id)
    ready = lens.prompts(prompts)
    require_room(lens, ready, max_new_tokens)
    generation = Generation(lens, ready, lens.gates(scale), sampling, max_new_tokens, ends)
    responses = generation.run(progress=progress)
    return dataclasses.replace(responses, is_single=_is_single(prompts, ready.batch))


def _is_single(prompts: PromptsLike, batch: int) -> bool:
    """Whether a single prompt was passed, and not a list of prompts, not even of one."""
    if batch > 1:
        return False
    is_list = isinstance(prompts, list | tuple)
    return not is_list or isinstance(prompts[0], Mapping)


def whole_or_cut(responses: Generated) -> list[str]:
    """The texts of the responses; one that was cut off ends in ' …'."""
    texts: list[str] = []
    for text, has_ended in zip(responses.texts, responses.ended, strict=True):
        texts.append(text if has_ended else f"{text}{CUT}")
    return texts


def end_tokens(model: Any, hf_model: Any, given: int | Sequence[int] | None) -> frozenset[int]:
    """The tokens that end a response: those passed, or those that the model's own files name."""
    ends: Any = given
    if ends is None:
        ends = _ends_of_files(model, hf_model)
    if isinstance(ends, str) or not isinstance(ends, Sequence):
        ends = [ends]
    return frozenset(arguments.whole("eos_token_id", token, 0) for token in ends)


def _ends_of_files(model: Any, hf_model: Any) -> Any:
    """The ends that the model's generation config names, or its config or tokenizer; else ()."""
    base = getattr(model, "original_model", None) if hf_model is None else hf_model
    for name in ("generation_config", "config"):
        ends = getattr(getattr(base, name, None), "eos_token_id", None)
        if ends is not None:
            return ends
    eos = Tokens(model).special("eos")
    return () if eos is None else eos


def require_room(lens: LoraLens, prompts: Prompts, max_new_tokens: int) -> None:
    """Check that the new tokens fit into the context; the last of them is not run."""
    context = getattr(lens.model.cfg, "n_ctx", None)
    longest = int(prompts.lengths.max())
    if context and longest + max_new_tokens - 1 > context:
        prompt = which_prompt(int(prompts.lengths.argmax()), prompts.batch)
        asked = setting("max_new_tokens", max_new_tokens)
        raise PromptError(
            f"{prompt} has {longest} tokens, and {asked} more do not fit "
            f"into the context of this {type(lens.model).__name__}, {context} (cfg.n_ctx); at most "
            f"{context - longest + 1} do."
        )
