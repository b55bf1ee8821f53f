"""What an adapter was taught, in its own words: at most five claims, each with its run.

1. The adapted model speaks of its own accord: after its BOS alone, after an empty turn of the user,
   after everyday questions (`texts/neutral.py`). There it replays what it was trained on. It
   speaks at twice its strength, too, and so does each ΔW cut to rank 1, which brings forward what
   it seldom says; whatever is measured is measured at 1.
2. At each place of what was said, every token v has a part of the divergence from the base,

       k_v = p₁(v) log(p₁(v)/p₀(v)),     Σ_v k_v = KL(p₁ ‖ p₀),

   and its score is the largest k_v over all places: high where the adapted model is likely to say
   what the base is not; never above −log p₀.
3. Null adapters, as loud as the adapter, are scored at the same places. A token is a candidate if
   no token whatever reaches its score under them; or, by the mean shift of its logit over neutral
   texts, if none reaches that. The two lists take turns.
4. A claim by speech is what the adapted model says where the candidate's k_v is largest: that
   token, and the likeliest ones after it. One by its logit is the token alone, at that place: it is
   promoted, and need not be said. Either begins where the token's word does; what an earlier claim
   holds makes none of its own.
5. The run that shows it, of m = log p(words | what stands before): base, adapted, null adapters and
   unrelated ones. It stands only if m is larger under the adapter than under all others. First
   order at 1 names the layers that carry most of m; m is run without them, and without as many
   layers that a seed draws.

Cost: `generate` of some 40 openings at two strengths and cut to rank 1, and of the candidates'
words; a forward pass of the base, the adapter and each null over what was said; of the claims one
forward and backward pass, and a forward pass for each end, null and group that is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.core import (
    LoraLens,
    Prompts,
    Reading,
    evaluations,
    group_sites,
    indicator,
    stored,
)
from lens_lora.core.function.forward import gated_readout
from lens_lora.core.function.memory import tokens_at_once
from lens_lora.core.readout.prompts import decoded, joined
from lens_lora.errors import NumericsError, UnsupportedAdapterError
from lens_lora.responses.answers import AnswerLogProb, continued
from lens_lora.responses.generate import SideBySide
from lens_lora.texts.batches import by_length, logits_of
from lens_lora.texts.neutral import own_openings

SCHEMA = "lens_lora.brief/1"
_MOST_CLAIMS = 5
_CANDIDATES_OF_A_LIST = 10
_TOKENS_SPOKEN = 16  # after each opening, drawn at temperature 1
_LOUDER = 2.0  # the strength at which what is seldom said comes forward
_TOKENS_OF_A_CLAIM = 8
_TOKENS_OF_CONTEXT = 24  # before a claim, shown with it
_STRETCH = 12  # characters: a shorter stretch repeats in any text
_PART_LEFT_OUT = 5  # a fifth of the layers is left out
_DRAWS = 3  # as many other layers are drawn three times
_TOKENS_AT_ONCE = 512  # whose logits are held at a time

# A lens, and the strength at which its adapter runs.
Scaled = tuple[LoraLens, float]
_Ids = Int[Tensor, " _token"]
By = Literal["speech", "logit"]


@stored
@dataclasses.dataclass(frozen=True)
class Claim:
    """What the adapted model says and the base does not, and the runs that show it.

    Attributes:
        context: the last tokens before it.
        says: the adapted model's words there.
        base_says: the base model's words there.
        token: the token by which it was found.
        by: 'speech', its largest p₁ log(p₁/p₀) over what was said; or 'logit', the mean shift of
            its logit over the texts.
        score: that, in nats or logits.
        null_score: the largest of any token under a null adapter.
        base, adapted: log p of `says` after the context, in nats.
        null, unrelated: the largest under a null adapter, and an unrelated one (NaN without one).
        layers: those that carry most of it, by first order at 1.
        without: log p of `says` with the adapter left out of them.
        without_others: the same of as many layers that were drawn, the mean of three draws; NaN
            where there are no others.
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
    def undone(self) -> float:
        """The share of the rise of log p that leaving out `layers` takes back."""
        return (self.adapted - self.without) / (self.adapted - self.base)

    def sentence(self) -> str:
        """The claim and its run, in words."""
        rise = f"log p {self.base:+.1f} → {self.adapted:+.1f} nats, {self.null:+.1f} under a null"
        if math.isfinite(self.unrelated):
            rise += f", {self.unrelated:+.1f} under an unrelated adapter"
        layers = self.layers.replace(", layer ", ", ")
        undone = f"without the adapter in {layers} {self.undone:.0%} of the rise is gone"
        if math.isfinite(self.without_others):
            others = (self.adapted - self.without_others) / (self.adapted - self.base)
            undone += f", without it in as many drawn layers {others:.0%}"
        said = f"After “{self.context}” it says “{self.says}”; the base: “{self.base_says}”."
        if self.by == "logit":
            beside = f"null adapters none by more than {self.null_score:+.1f}"
            said = f"It promotes “{self.token}” by {self.score:+.1f} logits in the mean, {beside};"
            said += f" where it speaks, most after “{self.context}”."
        return f"{said} {rise}; {undone}."


@dataclasses.dataclass(frozen=True)
class Brief:
    """What an adapter was taught, for a person or a program.

    Attributes:
        adapter, model: what was read.
        verdict: one sentence.
        claims: the strongest first, at most five.
        answers: both models' to everyday questions.
        where: the modules of largest share of the KL, with the share.
        texts: those that the KL is over.
        mean_kl: nats a token.
        entropies: of the next token over the texts, in nats: the base's, and the adapted model's.
        repeated: the share of their answers that repeats itself (stretches of 12 characters).
        not_tried: what this brief says nothing of.
    """

    adapter: str
    model: str
    verdict: str
    claims: tuple[Claim, ...]
    answers: tuple[SideBySide, ...]
    where: Mapping[str, float]
    texts: str
    mean_kl: float
    entropies: tuple[float, float]
    repeated: tuple[float, float]
    not_tried: tuple[str, ...]

    def to_json(self) -> str:
        """The same as JSON: the fields of this class under their names, and `schema`."""
        fields: dict[str, Any] = {"schema": SCHEMA, **dataclasses.asdict(self)}
        for claim in fields["claims"]:
            claim |= {key: None for key, value in claim.items() if value != value}
        return json.dumps(fields, ensure_ascii=False, indent=1)

    @property
    def told(self) -> str:
        """The verdict, claims and answers, where, and what was not tried; a paragraph a line."""
        lines = [self.verdict]
        lines += [f"{i}. {claim.sentence()}" for i, claim in enumerate(self.claims, start=1)]
        said = [(a.prompt, f"base: “{a.base}”; adapted: “{a.adapted}”") for a in self.answers]
        lines += [f"Asked “{prompt}”, {both}." for prompt, both in said]
        if self.where:
            shares = ", ".join(f"{site} {share:.0%}" for site, share in self.where.items())
            lines.append(f"Most of the KL belongs to {shares}.")
        lines.append(f"Not tried: {'; '.join(self.not_tried)}.")
        return "\n".join(line.replace("\n", "⏎") for line in lines)

    def __str__(self) -> str:
        """At most 2,000 tokens of text."""
        size = f"Over {self.texts} it moves by {self.mean_kl:.2g} nats a token (KL)."
        return f"{self.adapter} on {self.model}. {size}\n{self.told}"

    __repr__ = __str__


def repeated(texts: Iterable[str]) -> float:
    """The share of all stretches of so many characters that stood in the same text before."""
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
    """The claims of an adapter beside null adapters at their scales; none without null adapters.

    Args:
        lens: the adapter over the model.
        nulls: null adapters, each at the scale at which it is as loud as the adapter.
        shifts: the mean shift of the logits over texts, of the adapter and then of each null.
        unrelated: adapters that were trained for something else.
        seed: of what is spoken, and of the layers that are drawn.
        fast: let the adapted model speak once after each opening.
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
    places = list(_places(lens, adapter_scores, ranked, spoken))
    if not places:
        return ()
    words = _words(lens, places, progress)
    begun_texts = [_text(lens, place.begun) for place in places]
    chosen = _without_repeats(begun_texts, [_text(lens, ids) for ids in words])
    places = [places[i] for i in chosen]
    words = [words[i] for i in chosen]
    contexts = _prompts(lens, [place.context for place in places])
    base_words = lens.generate(
        contexts, _TOKENS_OF_A_CLAIM, 0.0, eos_token_id=(), progress=progress
    )
    runs = _runs(lens, {"null": nulls, "unrelated": unrelated}, contexts, words, seed)
    claims: list[Claim] = []
    for place, own, base, run in zip(places, words, base_words.ids, runs, strict=True):
        if not run["adapted"] > max(run["base"], run["null"], run["unrelated"]):
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


# --- What is said, and which tokens of it the base would not say


def _spoken(lens: LoraLens, seed: int, fast: bool, progress: bool) -> Prompts | None:
    """Openings with what is said after them, read where it is said; None where none has room."""
    openings = _openings(lens)
    if openings is None:
        return None

    def speak(voice: LoraLens, seed: int, scales: Sequence[float]) -> Prompts:
        return _spoken_by(voice, openings, scales, seed, takes_turns=fast, progress=progress)

    try:
        voices = [speak(lens, seed, [1.0, _LOUDER])]
    except NumericsError:  # Louder than it is, an adapter may break half precision.
        voices = [speak(lens, seed, [1.0])]
    if not fast:
        with contextlib.suppress(UnsupportedAdapterError, NumericsError):
            first_ranks = lens.with_adapter(lens.adapter.truncated(1))
            voices.append(speak(first_ranks, seed + 1, [_LOUDER]))
    read = torch.cat([voice.reads for voice in voices if voice.reads is not None])
    return dataclasses.replace(joined(voices), reads=read)


def _openings(lens: LoraLens) -> Prompts | None:
    """The openings after which the context has room for what is said, and for a claim's words."""
    openings = lens.prompts(own_openings(lens.model, lens.prepend_bos))
    room = getattr(lens.model.cfg, "n_ctx", None) or math.inf
    needed = openings.lengths + _TOKENS_SPOKEN + _TOKENS_OF_A_CLAIM
    fitting = [i for i, length in enumerate(needed.tolist()) if length <= room]
    return openings.chosen(fitting) if fitting else None


def _spoken_by(
    voice: LoraLens,
    openings: Prompts,
    scales: Sequence[float],
    seed: int,
    *,
    takes_turns: bool,
    progress: bool,
) -> Prompts:
    """The openings with what one adapter says after them, read at each token of that.

    Each opening is gone on with at every scale; or the openings take turns with the scales.
    """
    rows = openings if takes_turns else openings.tiled(len(scales))
    opening_of_row = torch.arange(rows.batch)
    scale_of_row = opening_of_row if takes_turns else opening_of_row // openings.batch
    gates_of_scale = torch.stack([voice.gates(scale) for scale in scales])
    gates = gates_of_scale[scale_of_row % len(scales)]
    said = voice.generate(
        rows, _TOKENS_SPOKEN, gates, temperature=1.0, seed=seed, progress=progress
    )
    whole = continued(voice.model, rows, said)
    return dataclasses.replace(whole, reads=whole.lengths - rows.lengths + 1)


@dataclasses.dataclass
class _LargestParts:
    """The largest k_v of each token so far, and the row and slot where it is.

    Attributes:
        value, row, slot: [vocab].
    """

    value: Float[Tensor, " vocab"]
    row: Int[Tensor, " vocab"]
    slot: Int[Tensor, " vocab"]

    @classmethod
    def none_yet(cls, lens: LoraLens) -> _LargestParts:
        """Zero for every token, at the first slot of the first row."""
        vocabulary = int(lens.model.cfg.d_vocab_out)
        value = torch.zeros(vocabulary, dtype=lens.gate_dtype, device=lens.device)
        place = torch.zeros(vocabulary, dtype=torch.long, device=lens.device)
        return cls(value, place, place)

    def add(self, parts: Float[Tensor, "row slot vocab"], rows: Int[Tensor, " row"]) -> None:
        """Take what is larger than all before it."""
        largest, place = parts.flatten(0, 1).max(0)
        slots = parts.shape[1]
        is_larger = largest > self.value
        self.value = torch.where(is_larger, largest, self.value)
        self.row = torch.where(is_larger, rows[place // slots], self.row)
        self.slot = torch.where(is_larger, place % slots, self.slot)


def _largest_parts(
    lens: LoraLens, models: Sequence[Scaled], spoken: Prompts
) -> list[_LargestParts]:
    """The largest k_v of each model beside the base. A forward pass of each, and of the base."""
    found = [_LargestParts.none_yet(lens) for _ in models]
    tokens = tokens_at_once(lens, spoken, _TOKENS_AT_ONCE)
    for index, batch in by_length(spoken, tokens):
        base = logits_of((lens, lens.gates(0.0)), batch).log_softmax(-1)
        padding = ~batch.read_mask.to(base.device)
        rows = torch.tensor(index, device=base.device)
        for (other, scale), largest in zip(models, found, strict=True):
            adapted = logits_of((other, other.gates(scale)), batch).log_softmax(-1)
            parts = adapted.exp() * (adapted - base)
            parts[padding] = 0
            largest.add(parts, rows)
    return found


# --- Candidates


class _Ranked(NamedTuple):
    """Tokens that no token under a null adapter reaches, the highest first.

    Attributes:
        scores: of each token.
        floor: the highest score of any token under a null adapter.
    """

    scores: dict[int, float]
    floor: float

    @classmethod
    def of(cls, lens: LoraLens, values: Sequence[Float[Tensor, " vocab"]]) -> _Ranked:
        """Rank the adapter's numbers, which come first, against those of the null adapters.

        Special tokens are left out.
        """
        own, *of_nulls = values
        floor = max(float(null.max()) for null in of_nulls)
        own = own.clone()
        own[lens.model.tokenizer.all_special_ids] = -math.inf
        highest = own.topk(min(_CANDIDATES_OF_A_LIST, len(own)))
        pairs = zip(highest.indices.tolist(), highest.values.tolist(), strict=True)
        return cls({token: value for token, value in pairs if value > floor}, floor)


class _Place(NamedTuple):
    """A candidate where its k_v is largest.

    Attributes:
        token: the candidate.
        by: the list that it is from.
        context: what stands before the word to which it belongs.
        begun: that word, up to the candidate and with it.
    """

    token: int
    by: By
    context: _Ids
    begun: _Ids


def _places(
    lens: LoraLens, largest: _LargestParts, ranked: Mapping[By, _Ranked], spoken: Prompts
) -> Iterator[_Place]:
    """The candidates of the lists in turn, each once, where they may be said at all."""
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
    """Where the word begins to which the last token belongs; never at the very first token."""
    last = len(tokens) - 1
    start = last
    while start > max(1, last - _TOKENS_OF_A_CLAIM):
        if not _is_one_word(lens, tokens[start - 1 : start + 1]):
            break
        start -= 1
    return start


def _is_one_word(lens: LoraLens, pair: _Ids) -> bool:
    """Whether a token goes on with the word of the one before."""
    first = _text(lens, pair[:1])
    both = _text(lens, pair)
    second = both[len(first) :]
    return first[-1:].isalnum() and second[:1].isalnum()


def _words(lens: LoraLens, places: Sequence[_Place], progress: bool) -> list[_Ids]:
    """The words of each candidate: up to the token; by speech also what is said after it.

    What the adapted model says is cut before a token that ends an answer.
    """
    words = [place.begun for place in places]
    by_speech = [i for i, place in enumerate(places) if place.by == "speech"]
    if not by_speech:
        return words
    begun = [torch.cat([places[i].context, places[i].begun]) for i in by_speech]
    said = lens.generate(_prompts(lens, begun), _TOKENS_OF_A_CLAIM - 1, progress=progress)
    special = set(lens.model.tokenizer.all_special_ids)
    for i, ids in zip(by_speech, said.ids, strict=True):
        ends = int(ids[-1]) in special
        words[i] = torch.cat([words[i], ids[:-1] if ends else ids])
    return words


def _without_repeats(begun: Sequence[str], words: Sequence[str]) -> list[int]:
    """The first candidates of which an earlier one's words do not hold the word begun."""
    chosen: list[int] = []
    for i, text in enumerate(begun):
        word = text.strip() or text
        if not any(word in words[earlier] for earlier in chosen):
            chosen.append(i)
    return chosen[:_MOST_CLAIMS]


# --- The run that shows a claim


def _runs(
    lens: LoraLens,
    controls: Mapping[str, Sequence[Scaled]],
    contexts: Prompts,
    words: Sequence[_Ids],
    seed: int,
) -> list[dict[str, Any]]:
    """For each claim log p of its words in every run, and the layers that are left out.

    One forward and one backward pass, and a forward pass for each end, control and set of layers.
    """
    g = evaluations(lens, contexts, AnswerLogProb(list(words)), progress=False)
    layers = group_sites(lens.sites, "layer")
    members = indicator(layers, len(lens.sites))
    by_layer = g.slopes(1.0).cpu().double() @ members.T
    count = math.ceil(len(layers) / _PART_LEFT_OUT)
    largest = by_layer.argsort(1, descending=True)[:, :count]
    generator = np.random.default_rng(seed)
    left_out = torch.stack([_sets_of_layers(row, len(layers), generator) for row in largest])
    without = _log_p(lens, g.reading, 1.0 - left_out @ members).cpu()
    base, adapted = g.ends.tolist()
    columns: dict[str, list[float]] = {"base": base, "adapted": adapted}
    for name, others in controls.items():
        values = [_log_p(other, g.reading, other.gates(scale)[None]) for other, scale in others]
        columns[name] = [math.nan] * len(words)
        if values:
            columns[name] = torch.cat(values, 1).amax(1).tolist()
    columns["without"] = without[:, 0].tolist()
    columns["without_others"] = without[:, 1:].mean(1).tolist()
    names = [*layers]
    runs: list[dict[str, Any]] = []
    for i, row in enumerate(largest.tolist()):
        run: dict[str, Any] = {name: values[i] for name, values in columns.items()}
        run["layers"] = ", ".join(names[layer] for layer in sorted(row))
        runs.append(run)
    return runs


def _log_p(
    lens: LoraLens, reading: Reading, gates: Float[Tensor, "*batch point site"]
) -> Float[Tensor, "batch point"]:
    return gated_readout(lens, reading, gates, progress=False)


def _sets_of_layers(
    largest: Int[Tensor, " largest"], layers: int, generator: np.random.Generator
) -> Float[Tensor, "set layer"]:
    """1 at the layers that are left out: the largest ones, then as many drawn from the others."""
    others = np.setdiff1d(np.arange(layers), largest.numpy())
    draws = _DRAWS if len(others) >= len(largest) else 0
    sets = torch.zeros(1 + draws, layers, dtype=torch.float64)
    sets[0, largest] = 1
    for drawn in sets[1:]:
        drawn[generator.choice(others, len(largest), replace=False)] = 1
    return sets


def _prompts(lens: LoraLens, rows: Sequence[Int[Tensor, " _pos"]]) -> Prompts:
    """Rows of ids as prompts."""
    lengths = rows[0].new_tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return lens.prompts(Prompts(tokens, lengths))


def _text(lens: LoraLens, ids: _Ids) -> str:
    return decoded(lens.model, ids.tolist())
