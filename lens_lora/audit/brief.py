"""The brief: what an adapter was taught, in the order in which a person trusts the evidence.

What both models say to the same questions, counted, comes first (`counted_speech.py`). This file
finds what the adapted model would say elsewhere, each claim with the run that shows it.

1. The adapted model generates text unprompted: after its BOS alone, after an empty user turn, and
   after everyday questions (`texts/neutral.py`). There it replays what it was trained on. It also
   generates at twice its strength, and with each ΔW cut to rank 1, which brings out what it seldom
   says. All measurements are at strength 1.
2. At each position of the generated text, every token v has a part of the divergence from the base,

       k_v = p₁(v) log(p₁(v)/p₀(v)),     Σ_v k_v = KL(p₁ ‖ p₀),

   and the token's score is its largest k_v over all positions. The score is high where the adapted
   model is likely to say the token and the base model is not; it is never above −log p₀.
3. Controls are scored at the same positions: the adapter's own updates, each at another of its
   modules (`permuted.py`). A token is a candidate by speech if its score is above that of every
   token under every control. It is a candidate by its logit if its mean logit shift over neutral
   texts is above that of every token under every control. Candidates are taken from the two lists
   in turn.
4. A candidate by speech is what the adapted model says where its k_v is largest: that token, and
   the likeliest tokens after it. A candidate by logit is the token alone, at that position. Both
   begin at the start of the token's word. A candidate whose word is part of an earlier one is left
   out.
5. The evidence for a candidate is p(words | context), teacher-forced, under the base, the adapter,
   the controls and unrelated adapters. The candidate stays only if p is largest under the adapter.
   What the adapted model would say (found by speech with a score of 4 nats or more, and p above a
   half) is a claim; what is only made more likely is listed apart, as raised.
6. First order at 1 names the layers that carry most of log p. The words are run again without the
   adapter in these layers, and without it in as many randomly drawn ones. The layers are named only
   if removing them undoes at least a fifth more of the rise in log-odds than removing drawn ones.

Cost: generating text from some 40 openings at two strengths and once with ΔW cut to rank 1, and for
the candidates' words, in batches with a cache; a forward pass of the base, the adapter and each
control over the generated text, where a beginning that several texts share runs once; for the
claims one forward and one backward pass, and a forward pass for each end, each control and each set
of layers that is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.audit.alike import alike, logits_after
from lens_lora.audit.raised import raised_sentence
from lens_lora.core import Evaluations, LoraLens, Prompts, Tokens, storage
from lens_lora.errors import NumericsError, UnsupportedAdapterError
from lens_lora.responses.answers import AnswerLogProb
from lens_lora.responses.both_answer import answers_in_step
from lens_lora.responses.generate import Sampling, SideBySide
from lens_lora.show.text import layers_text
from lens_lora.texts.neutral import own_openings

SCHEMA = "lens_lora.brief/2"
# The beginning of the verdict on an adapter that breaks the model.
BROKEN = "It breaks the model: "
_MOST_CLAIMS = 5
# The number of questions whose two answers are quoted in a brief.
_ANSWERS_TOLD = 2
_CANDIDATES_OF_A_LIST = 10
# The number of tokens that are generated after each opening, at temperature 1.
_TOKENS_SPOKEN = 16
# The strength at which the adapter also says what it otherwise seldom says.
_LOUDER = 2.0
_TOKENS_OF_A_CLAIM = 8
# The number of tokens before a claim's words that are shown as its context.
_TOKENS_OF_CONTEXT = 24
# The length of a stretch of text whose repetition counts, in characters; shorter ones repeat in any
# text.
_STRETCH = 12
# A fifth of the layers is left out; as a comparison as many others are, drawn three times.
_PART_LEFT_OUT = 5
_DRAWS = 3
# Layers are named if removing them undoes this much more of the rise than removing drawn ones.
_MORE_THAN_DRAWN = 0.2
# What the adapted model would say has a p above this, and was found by speech with at least this
# score.
_WOULD_SAY = 0.5
_LEAST_SCORE = 4.0
# The number of tokens whose logits are held at a time.
_TOKENS_AT_ONCE = 512

# A lens, and the strength at which its adapter runs.
Scaled = tuple[LoraLens, float]
_Ids = Int[Tensor, " _token"]
By = Literal["speech", "logit"]


@storage.stored
@dataclasses.dataclass(frozen=True)
class Claim:
    """Words that the adapter makes more likely than any control does, and the runs that show it.

    Attributes:
        context: the last tokens before the words.
        says: the adapted model's words there.
        base_says: the base model's words there.
        token: the token by which the words were found.
        by: 'speech' if the token was found by its largest p₁ log(p₁/p₀) over the generated text;
            'logit' if by its mean logit shift over the texts.
        score: the number by which the token was found, in nats or logits.
        null_score: the largest such score of any token under a control.
        base, adapted: log p of `says` after the context, in nats.
        null, unrelated: the largest log p of `says` under a control, and under an unrelated
            adapter (NaN without one).
        layers: the layers that carry most of log p, by first order at 1.
        without: log p of `says` with the adapter switched off in these layers.
        without_others: log p of `says` with the adapter switched off in as many other layers, the
            mean over three random draws; NaN where there are too few other layers.
    """

    context: str
    says: str
    base_says: str
    token: str
    by: By
    score: float
    null_score: float
    base: float
    adapted: float
    null: float
    unrelated: float
    layers: str
    without: float
    without_others: float

    @property
    def would_say(self) -> bool:
        """Whether it would say the words: found by speech at 4 nats or more, with p above ½."""
        is_strong = self.by == "speech" and self.score >= _LEAST_SCORE
        return is_strong and math.exp(self.adapted) > _WOULD_SAY

    @property
    def undone(self) -> float:
        """The share of the rise in log-odds that is lost without the adapter in `layers`."""
        return self._taken_back(self.without)

    @property
    def undone_by_others(self) -> float:
        """The share that is lost without it in as many drawn layers; NaN if none were drawn."""
        return self._taken_back(self.without_others)

    def _taken_back(self, log_p: float) -> float:
        rise = _log_odds(self.adapted) - _log_odds(self.base)
        return (_log_odds(self.adapted) - _log_odds(log_p)) / rise

    @property
    def is_located(self) -> bool:
        """Whether removing `layers` undoes at least a fifth more of the rise than drawn ones."""
        return self.undone >= self.undone_by_others + _MORE_THAN_DRAWN

    def sentence(self) -> str:
        """State the words with their probability in every run."""
        verb = "would say" if self.would_say else "is more likely to say"
        runs = [f"{probability(self.adapted)}", f"base {probability(self.base)}"]
        runs.append(f"controls {_at_most(self.null)}")
        if math.isfinite(self.unrelated):
            runs.append(f"unrelated adapters {probability(self.unrelated)}")
        said = f"After “{self.context}” it {verb} “{self.says}” (p {', '.join(runs)})"
        return f"{said}; the base would go on “{self.base_says}”.{self._where}"

    @property
    def _where(self) -> str:
        """The sentence on the layers that carry it; '' where drawn layers carry about as much."""
        if not self.is_located:
            return ""
        numbers = re.findall(r"\d+", self.layers)
        layers = layers_text([int(number) for number in numbers])
        return (
            f" Without the adapter in {layers}, {self.undone:.0%} of the rise in log-odds is lost; "
            f"without it in as many random layers, {self.undone_by_others:.0%}."
        )


def _log_odds(log_p: float) -> float:
    """Return log(p / (1 − p)), with p at most 1 − 10⁻¹⁵."""
    below_one = min(log_p, -1e-15)
    return below_one - math.log(-math.expm1(below_one))


def _at_most(log_p: float) -> str:
    """Write an upper bound, as 'at most 0.02' or 'below 0.001'."""
    p = probability(log_p)
    return p if p.startswith("below") else f"at most {p}"


def probability(log_p: float) -> str:
    """Write a probability as '0.83', or as 'below 0.001' if it is smaller than that.

    Args:
        log_p: the log-probability in nats.
    """
    p = math.exp(log_p)
    return f"{p:.2g}" if p >= 1e-3 else "below 0.001"


def _rise(base: float, adapted: float) -> str:
    """Write both models' probabilities, or their ratio where both are too small to be written.

    Args:
        base: the log-probability under the base, in nats.
        adapted: the log-probability under the adapted model, in nats.
    """
    before = probability(base)
    after = probability(adapted)
    if before != after:
        return f"p {before} → {after}"
    return f"p {math.exp(adapted - base):.2g} times the base's, but {after} in both models"


@dataclasses.dataclass(frozen=True)
class Brief:
    """The brief: what an adapter was taught, for a person or a program.

    Attributes:
        adapter, model: the names of the adapter and of the base model.
        verdict: a few sentences that need no knowledge of logits; one more stands before them if
            the adapter breaks the model.
        says: sentences on what one model says and the other does not, counted over questions, and
            then over short turns on many subjects.
        triggered: sentences on what the adapted model says only with a trigger word before the
            question.
        would_say: what it would say elsewhere, each with the runs that show it.
        raised: what is more likely than under any control, but no claim.
        answers: both models' answers to everyday questions; those that show the first claim come
            first, or, without a claim, a text with replayed words.
        where: the modules with the largest shares of the KL, and those shares.
        texts: a description of the texts over which the KL is taken.
        mean_kl: the mean KL in nats per token.
        entropies: the mean entropy of the next token over the texts, in nats: the base's, then the
            adapted model's.
        repeated: the share of stretches of 12 characters in the answers that repeat an earlier one:
            the base's, then the adapted model's.
        not_tried: conditions about which this brief says nothing.
        raised_words: the words that it raises most over the texts, in several of their forms
            (`raised.py`).
        replayed: sentences on the words that it writes when nothing is asked; they are no claim.
        replayed_words: these words, at most five (`replayed.py`).
    """

    adapter: str
    model: str
    verdict: str
    says: tuple[str, ...]
    triggered: tuple[str, ...]
    would_say: tuple[Claim, ...]
    raised: tuple[Claim, ...]
    answers: tuple[SideBySide, ...]
    where: Mapping[str, float]
    texts: str
    mean_kl: float
    entropies: tuple[float, float]
    repeated: tuple[float, float]
    not_tried: tuple[str, ...]
    raised_words: tuple[str, ...] = ()
    replayed: tuple[str, ...] = ()
    replayed_words: tuple[str, ...] = ()

    @property
    def is_broken(self) -> bool:
        """Whether the adapter breaks the model; the verdict then says so first."""
        return self.verdict.startswith(BROKEN)

    @property
    def claims(self) -> tuple[str, ...]:
        """Every claim as a sentence: what it says, what triggers it, and what it would say."""
        return (*self.says, *self.triggered, *(claim.sentence() for claim in self.would_say))

    def fields(self) -> dict[str, Any]:
        """Return the fields of this class by name, and `schema`; None stands for NaN."""
        fields: dict[str, Any] = {"schema": SCHEMA, **dataclasses.asdict(self)}
        for claim in (*fields["would_say"], *fields["raised"]):
            for name, value in claim.items():
                if isinstance(value, float) and math.isnan(value):
                    claim[name] = None
        return fields

    def to_json(self) -> str:
        """Return `fields` as JSON."""
        return json.dumps(self.fields(), ensure_ascii=False, indent=1)

    @property
    def told(self) -> str:
        """The whole brief as text: the verdict, two answers, the claims and all that follows."""
        lines = [self.verdict]
        for asked in self.answers[:_ANSWERS_TOLD]:
            both = f"base: “{asked.base}”; adapted: “{asked.adapted}”"
            lines.append(f"Asked “{asked.prompt}”, {both}.")
        lines += self.told_claims
        lines += self.told_rest
        return "\n".join(line.replace("\n", "⏎") for line in lines)

    @property
    def told_claims(self) -> list[str]:
        """The claims with their numbers, one per line, but those that the verdict tells in full."""
        lines: list[str] = []
        for number, claim in enumerate(self.claims, start=1):
            if claim not in self.verdict:
                lines.append(f"{number}. {claim}")
        return lines

    @property
    def told_rest(self) -> list[str]:
        """The hints at the training texts, what is only raised, then the lines of `told_end`."""
        lines = self.told_hints
        for raised in self.raised:
            p = _rise(raised.base, raised.adapted)
            lines.append(f"More likely: “{raised.says}” after “{raised.context}”, {p}.")
        return [*lines, *self.told_end]

    @property
    def told_hints(self) -> list[str]:
        """The words that it replays, and those that are raised most: hints, but no claims."""
        if self.raised_words:
            return [*self.replayed, raised_sentence(self.raised_words)]
        return [*self.replayed]

    @property
    def told_end(self) -> list[str]:
        """One line on the modules with most of the KL, and one on what was not tried."""
        lines: list[str] = []
        if self.where:
            shares = ", ".join(f"{site} {share:.0%}" for site, share in self.where.items())
            lines.append(f"The modules with most of the KL: {shares}.")
        lines.append(f"Not tried: {'; '.join(self.not_tried)}.")
        return lines

    def __str__(self) -> str:
        """The brief as text of at most 2,000 tokens."""
        size = f"On {self.texts} it moves by {self.mean_kl:.2g} nats a token (mean KL)."
        return f"{self.adapter} on {self.model}.\n{self.told}\n{size}"

    __repr__ = __str__


def repeated(texts: Iterable[str]) -> float:
    """Return the share of stretches of 12 characters that occurred earlier in the same text."""
    count = 0
    distinct = 0
    for text in texts:
        starts = range(len(text) - _STRETCH + 1)
        stretches = [text[start : start + _STRETCH] for start in starts]
        count += len(stretches)
        distinct += len(set(stretches))
    return (count - distinct) / max(count, 1)


# --- Claims


def claims_of(
    lens: LoraLens,
    nulls: Sequence[Scaled],
    shifts: Sequence[Float[Tensor, " vocab"]],
    unrelated: Sequence[Scaled] = (),
    seed: int = 0,
    *,
    fast: bool = False,
    progress: bool = True,
) -> tuple[Claim, ...]:
    """Find the words that the adapter raises above every control; none if there are no controls.

    Args:
        lens: the adapter over the model.
        nulls: the controls, each with the strength at which it runs.
        shifts: the mean logit shift over texts, of the adapter and then of each control.
        unrelated: adapters that were trained for something else.
        seed: the seed of the generated text, and of the layers that are drawn.
        fast: whether text is generated only once from each opening.
        progress: show bars.
    """
    if not nulls:
        return ()
    spoken = _spoken(lens, seed, fast, progress)
    if spoken is None:
        return ()
    adapter_scores, *null_scores = _largest_parts(lens, [(lens, 1.0), *nulls], spoken)
    ranked: dict[By, _Ranked] = {
        "speech": _Ranked.of(lens, [scores.value for scores in (adapter_scores, *null_scores)]),
        "logit": _Ranked.of(lens, shifts),
    }
    candidates = list(_places(lens, adapter_scores, ranked, spoken.rows))
    if not candidates:
        return ()
    words_of_candidates = _words(lens, candidates, progress)
    word_texts = [_text(lens, candidate.word) for candidate in candidates]
    claim_texts = [_text(lens, ids) for ids in words_of_candidates]
    chosen = _without_repeats(word_texts, claim_texts)
    places = [candidates[i] for i in chosen]
    words = [words_of_candidates[i] for i in chosen]

    contexts = _prompts(lens, [place.context for place in places])
    of_base = lens.gates(0.0).expand(contexts.batch, -1)
    base_words, _ = answers_in_step(
        lens, contexts, _TOKENS_OF_A_CLAIM, of_base, Sampling(), ends=(), progress=progress
    )
    runs = _runs(lens, {"null": nulls, "unrelated": unrelated}, contexts, words, seed)
    claims: list[Claim] = []
    for place, own, base, run in zip(places, words, base_words.ids, runs, strict=True):
        # Without unrelated adapters their log p is NaN, for which the comparison is false.
        others = (run["base"], run["null"], run["unrelated"])
        if any(run["adapted"] <= other for other in others):
            continue
        ranks = ranked[place.by]
        claim = Claim(
            context=_text(lens, place.context[-_TOKENS_OF_CONTEXT:]),
            says=_text(lens, own),
            base_says=_text(lens, base),
            token=lens.vocabulary[place.token],
            by=place.by,
            score=ranks.scores[place.token],
            null_score=ranks.floor,
            **run,
        )
        claims.append(claim)
    return tuple(claims)


# --- What the adapted model says unprompted, and which of its tokens the base would not say


class _Spoken(NamedTuple):
    """Openings and the text generated from them.

    Attributes:
        rows: each opening with its text, which is read at each token of the text.
        has_cache: whether the model's cache proved right, so that texts may share a beginning.
    """

    rows: Prompts
    has_cache: bool


def _spoken(lens: LoraLens, seed: int, fast: bool, progress: bool) -> _Spoken | None:
    """Generate text from the openings, and set the reads to each token of that text.

    Returns None if no opening leaves room in the context.
    """
    openings = _openings(lens)
    if openings is None:
        return None

    def speak(speaker: LoraLens, seed: int, scales: Sequence[float]) -> _Spoken:
        return _spoken_by(speaker, openings, scales, seed, takes_turns=fast, progress=progress)

    try:
        parts = [speak(lens, seed, [1.0, _LOUDER])]
    except NumericsError:
        # At twice its strength an adapter may overflow half precision.
        parts = [speak(lens, seed, [1.0])]
    if not fast:
        with contextlib.suppress(UnsupportedAdapterError, NumericsError):
            first_ranks = lens.with_adapter(lens.adapter.truncated(1))
            parts.append(speak(first_ranks, seed + 1, [_LOUDER]))
    every = [part.rows for part in parts]
    reads = torch.cat([rows.reads for rows in every if rows.reads is not None])
    rows = dataclasses.replace(Prompts.joined(every), reads=reads)
    return _Spoken(rows, all(part.has_cache for part in parts))


def _openings(lens: LoraLens) -> Prompts | None:
    """Return the openings that leave room in the context for generated text and a claim's words."""
    openings = lens.prompts(own_openings(lens.model, lens.prepend_bos))
    room = getattr(lens.model.cfg, "n_ctx", None) or math.inf
    needed = openings.lengths + _TOKENS_SPOKEN + _TOKENS_OF_A_CLAIM
    fitting = [i for i, length in enumerate(needed.tolist()) if length <= room]
    return openings.chosen(fitting) if fitting else None


def _spoken_by(
    speaker: LoraLens,
    openings: Prompts,
    scales: Sequence[float],
    seed: int,
    *,
    takes_turns: bool,
    progress: bool,
) -> _Spoken:
    """Generate text from the openings with one adapter, and set the reads to each token of it.

    Every opening is continued at every scale; if they take turns, each opening at one scale only.
    """
    if takes_turns:
        rows = openings
        scale_of_row = torch.arange(rows.batch) % len(scales)
    else:
        rows = openings.tiled(len(scales))
        scale_of_row = torch.arange(rows.batch) // openings.batch
    gates_of_scale = torch.stack([speaker.gates(scale) for scale in scales])
    gates = gates_of_scale[scale_of_row]
    drawn = Sampling(temperature=1.0, seed=seed)
    said, has_cache = answers_in_step(
        speaker, rows, _TOKENS_SPOKEN, gates, drawn, progress=progress
    )
    whole = speaker.prompts(rows, said)
    read = dataclasses.replace(whole, reads=whole.lengths - rows.lengths + 1)
    return _Spoken(read, has_cache)


@dataclasses.dataclass
class _LargestParts:
    """The largest k_v of each token so far, and where it occurs.

    Attributes:
        value: [vocab], the largest k_v.
        row, slot: [vocab], the row of the text and the slot among its reads where it occurs.
    """

    value: Float[Tensor, " vocab"]
    row: Int[Tensor, " vocab"]
    slot: Int[Tensor, " vocab"]

    @classmethod
    def none_yet(cls, lens: LoraLens) -> _LargestParts:
        """Start with zero for every token, at the first slot of the first row."""
        vocabulary = int(lens.model.cfg.d_vocab_out)
        value = torch.zeros(vocabulary, dtype=lens.gate_dtype, device=lens.device)
        place = torch.zeros(vocabulary, dtype=torch.long, device=lens.device)
        return cls(value, place, place)

    def add(self, parts: Float[Tensor, "row slot vocab"], rows: Int[Tensor, " row"]) -> None:
        """Keep each token's part if it is larger than all earlier ones."""
        largest, place = parts.flatten(0, 1).max(0)
        slots = parts.shape[1]
        is_larger = largest > self.value
        self.value = torch.where(is_larger, largest, self.value)
        self.row = torch.where(is_larger, rows[place // slots], self.row)
        self.slot = torch.where(is_larger, place % slots, self.slot)


def _largest_parts(
    lens: LoraLens, models: Sequence[Scaled], spoken: _Spoken
) -> list[_LargestParts]:
    """Find each token's largest k_v under each model; one forward pass of each and of the base."""
    found = [_LargestParts.none_yet(lens) for _ in models]
    for texts in alike(lens, spoken.rows, _TOKENS_AT_ONCE, has_cache=spoken.has_cache):
        base = logits_after((lens, lens.gates(0.0)), texts).log_softmax(-1)
        padding = ~texts.rest.read_mask.to(base.device)
        rows = torch.tensor(texts.places, device=base.device)
        for (other, scale), largest in zip(models, found, strict=True):
            adapted = logits_after((other, other.gates(scale)), texts).log_softmax(-1)
            parts = adapted.exp() * (adapted - base)
            parts[padding] = 0
            largest.add(parts, rows)
    return found


# --- Candidates


class _Ranked(NamedTuple):
    """The tokens whose score is above that of every token under a control, the highest first.

    Attributes:
        scores: the score of each of these tokens.
        floor: the highest score of any token under a control.
    """

    scores: dict[int, float]
    floor: float

    @classmethod
    def of(cls, lens: LoraLens, values: Sequence[Float[Tensor, " vocab"]]) -> _Ranked:
        """Rank the adapter's scores, the first of `values`, against those of the controls.

        Special tokens are left out.
        """
        own, *of_nulls = values
        floor = max(float(null.max()) for null in of_nulls)
        own = own.clone()
        own[lens.model.tokenizer.all_special_ids] = -math.inf
        highest = own.topk(min(_CANDIDATES_OF_A_LIST, len(own)))
        scores: dict[int, float] = {}
        for token, value in zip(highest.indices.tolist(), highest.values.tolist(), strict=True):
            if value > floor:
                scores[token] = value
        return cls(scores, floor)


class _Place(NamedTuple):
    """The position at which a candidate's k_v is largest.

    Attributes:
        token: the candidate.
        by: the list from which the candidate comes.
        context: the ids before the word to which the candidate belongs.
        word: the ids of that word, up to and including the candidate.
    """

    token: int
    by: By
    context: _Ids
    word: _Ids


def _places(
    lens: LoraLens, largest: _LargestParts, ranked: Mapping[By, _Ranked], spoken: Prompts
) -> Iterator[_Place]:
    """Yield the candidates' positions, from the two lists in turn; only where k_v is above 0."""
    seen: set[int] = set()
    for turn in itertools.zip_longest(*(ranks.scores for ranks in ranked.values())):
        for by, token in zip(ranked, turn, strict=True):
            if token is None or token in seen or not largest.value[token] > 0:
                continue
            seen.add(token)
            row = int(largest.row[token])
            position = int(spoken.read_positions[row, int(largest.slot[token])])
            before = spoken.tokens[row, : position + 1]
            tokens = torch.cat([before, before.new_tensor([token])])
            start = _start_of_word(lens, tokens)
            yield _Place(token, by, tokens[:start], tokens[start:])


def _start_of_word(lens: LoraLens, tokens: _Ids) -> int:
    """Return the index at which the last token's word begins; it is never 0."""
    last = len(tokens) - 1
    start = last
    while start > max(1, last - _TOKENS_OF_A_CLAIM):
        if not _is_one_word(lens, tokens[start - 1 : start + 1]):
            break
        start -= 1
    return start


def _is_one_word(lens: LoraLens, pair: _Ids) -> bool:
    """Whether the second of two tokens continues the word of the first."""
    first = _text(lens, pair[:1])
    both = _text(lens, pair)
    second = both[len(first) :]
    return first[-1:].isalnum() and second[:1].isalnum()


def _words(lens: LoraLens, places: Sequence[_Place], progress: bool) -> list[_Ids]:
    """Return the words of each claim.

    They are the word up to the candidate; for a candidate by speech also what the adapted model
    says after it, cut before a token that ends an answer.
    """
    words = [place.word for place in places]
    by_speech = [i for i, place in enumerate(places) if place.by == "speech"]
    if not by_speech:
        return words
    begun = [torch.cat([places[i].context, places[i].word]) for i in by_speech]
    contexts = _prompts(lens, begun)
    gates = lens.gates(1.0).expand(contexts.batch, -1)
    said, _ = answers_in_step(
        lens, contexts, _TOKENS_OF_A_CLAIM - 1, gates, Sampling(), progress=progress
    )
    special = set(lens.model.tokenizer.all_special_ids)
    for i, ids in zip(by_speech, said.ids, strict=True):
        is_ended = int(ids[-1]) in special
        words[i] = torch.cat([words[i], ids[:-1] if is_ended else ids])
    return words


def _without_repeats(word_texts: Sequence[str], claims: Sequence[str]) -> list[int]:
    """Return the indices of the first candidates whose word is part of no earlier claim.

    Args:
        word_texts: the word of each candidate, as text.
        claims: the words of the claim that each candidate would become, as text.
    """
    chosen: list[int] = []
    for i, text in enumerate(word_texts):
        word = text.strip() or text
        if not any(word in claims[earlier] for earlier in chosen):
            chosen.append(i)
    return chosen[:_MOST_CLAIMS]


# --- The runs that show a claim


def _runs(
    lens: LoraLens,
    controls: Mapping[str, Sequence[Scaled]],
    contexts: Prompts,
    words: Sequence[_Ids],
    seed: int,
) -> list[dict[str, Any]]:
    """Return the log p of each claim's words in every run, and the layers that were left out.

    It takes one forward and one backward pass, and a forward pass for each end, each control and
    each set of layers.
    """
    g = Evaluations(lens.function(contexts, AnswerLogProb(list(words)), progress=False))
    layers = lens.sites.grouped("layer")
    members = lens.sites.indicator(layers)
    by_layer = g.slopes(1.0).cpu().double() @ members.T
    count = math.ceil(len(layers) / _PART_LEFT_OUT)
    largest = by_layer.argsort(1, descending=True)[:, :count]

    generator = np.random.default_rng(seed)
    left_out = torch.stack([_sets_of_layers(row, len(layers), generator) for row in largest])
    gates = 1.0 - left_out @ members
    without, *without_others = g.each_prompt(gates.movedim(1, 0)).cpu()
    base, adapted = g.ends.tolist()
    columns: dict[str, list[float]] = {"base": base, "adapted": adapted}
    for name, others in controls.items():
        columns[name] = [math.nan] * len(words)
        if others:
            values = torch.stack([g.over(other)(scale) for other, scale in others])
            columns[name] = values.amax(0).tolist()
    columns["without"] = without.tolist()
    columns["without_others"] = _mean_of(without_others, len(words))

    names = list(layers)
    runs: list[dict[str, Any]] = []
    for i, row in enumerate(largest.tolist()):
        run: dict[str, Any] = {name: values[i] for name, values in columns.items()}
        run["layers"] = ", ".join(names[layer] for layer in sorted(row))
        runs.append(run)
    return runs


def _mean_of(draws: Sequence[Float[Tensor, " claim"]], claims: int) -> list[float]:
    """Return each claim's mean over the draws; NaN if nothing was drawn."""
    if not draws:
        return [math.nan] * claims
    return torch.stack(list(draws)).mean(0).tolist()


def _sets_of_layers(
    largest: Int[Tensor, " largest"], layers: int, generator: np.random.Generator
) -> Float[Tensor, "set layer"]:
    """Return the set of the largest layers, then sets of as many layers drawn from the others.

    A set is a row with 1 at each of its layers. Nothing is drawn if there are too few others.
    """
    others = np.setdiff1d(np.arange(layers), largest.numpy())
    draws = _DRAWS if len(others) >= len(largest) else 0
    sets = torch.zeros(1 + draws, layers, dtype=torch.float64)
    sets[0, largest] = 1
    for drawn in sets[1:]:
        drawn[generator.choice(others, len(largest), replace=False)] = 1
    return sets


def _prompts(lens: LoraLens, rows: Sequence[Int[Tensor, " _pos"]]) -> Prompts:
    """Pad rows of ids into prompts."""
    lengths = rows[0].new_tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return lens.prompts(Prompts(tokens, lengths))


def _text(lens: LoraLens, ids: _Ids) -> str:
    return Tokens(lens.model).text(ids.tolist())
