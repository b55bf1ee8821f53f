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
import functools
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.core import LoraLens, Prompts, group_sites, indicator, stored
from lens_lora.core.function.asked import Asked
from lens_lora.core.function.forward import gated_logits, gated_readout
from lens_lora.core.function.memory import tokens_at_once
from lens_lora.core.readout.prompts import decoded, joined
from lens_lora.errors import NumericsError, UnsupportedAdapterError
from lens_lora.responses.answers import AnswerLogProb, continued
from lens_lora.responses.generate import SideBySide
from lens_lora.texts.batches import by_length
from lens_lora.texts.neutral import own_openings

SCHEMA = "lens_lora.brief/1"
_CLAIMS, _CANDIDATES = 5, 10  # candidates of each list
_SPOKEN = 16  # tokens after each opening, drawn at temperature 1
_LOUDER = 2.0
_WORDS = 8  # tokens of a claim
_CONTEXT = 24  # tokens before it that are shown
_STRETCH = 12  # characters
_PART, _DRAWS = 5, 3  # a fifth of the layers is left out; and how often others are drawn
_TOKENS = 512  # whose logits are held at a time

Scaled = tuple[LoraLens, float]
_Controls = Mapping[str, Sequence[Scaled]]
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
    pieces = [[t[i : i + _STRETCH] for i in range(len(t) - _STRETCH + 1)] for t in texts]
    count, distinct = sum(map(len, pieces)), sum(map(len, map(set, pieces)))
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

    `shifts` are mean shifts of the logits over texts, the adapter's first, then the nulls'.
    """
    spoken = _spoken(lens, seed, fast, progress) if nulls else None
    if spoken is None:
        return ()
    scores = _scores(lens, [(lens, 1.0), *nulls], spoken)
    ranked: dict[By, _Ranked] = {
        "speech": _Ranked.of(lens, [score.value for score in scores]),
        "logit": _Ranked.of(lens, shifts),
    }
    places = list(_places(lens, scores[0], ranked, spoken))
    if not places:
        return ()
    words = _words(lens, places, progress)
    chosen = _distinct([_text(lens, p.begun) for p in places], [_text(lens, w) for w in words])
    contexts = _prompts(lens, [places[i].context for i in chosen])
    words = [words[i] for i in chosen]
    base = lens.generate(contexts, _WORDS, 0.0, eos_token_id=(), progress=progress)
    runs = _runs(lens, {"null": nulls, "unrelated": unrelated}, contexts, words, seed)
    return tuple(
        Claim(
            context=_text(lens, places[i].context[-_CONTEXT:]),
            says=_text(lens, said),
            base_says=_text(lens, base_said),
            token=lens.vocabulary[places[i].token],
            by=places[i].by,
            score=ranked[places[i].by].scores[places[i].token],
            null_score=ranked[places[i].by].floor,
            **run,
        )
        for i, said, base_said, run in zip(chosen, words, base.ids, runs, strict=True)
        if run["adapted"] > max(run["base"], run["null"], run["unrelated"])
    )


def _spoken(lens: LoraLens, seed: int, fast: bool, progress: bool) -> Prompts | None:
    """Openings and what is said after them, read where it is said."""
    openings = lens.prompts(own_openings(lens.model, lens.prepend_bos))
    room, most = getattr(lens.model.cfg, "n_ctx", None) or math.inf, _SPOKEN + _WORDS
    fits = [i for i, length in enumerate(openings.lengths.tolist()) if length + most <= room]
    if not fits:
        return None
    chosen = openings.chosen(fits)

    def spoken(voice: LoraLens, seed: int, *scales: float) -> tuple[Prompts, Tensor]:
        """What is said, and at how many places; fast, the openings take turns with scales."""
        mine = chosen if fast else chosen.tiled(len(scales))
        turns = torch.arange(mine.batch) // (1 if fast else chosen.batch) % len(scales)
        gates = torch.stack([voice.gates(scale) for scale in scales])[turns]
        said = voice.generate(mine, _SPOKEN, gates, temperature=1.0, seed=seed, progress=progress)
        whole = continued(lens.model, mine, said)
        return whole, whole.lengths - mine.lengths + 1

    try:
        rows = [spoken(lens, seed, 1.0, _LOUDER)]
    except NumericsError:  # louder than it is, an adapter may break half precision
        rows = [spoken(lens, seed, 1.0)]
    with contextlib.suppress(UnsupportedAdapterError, NumericsError):
        first = None if fast else lens.with_adapter(lens.adapter.truncated(1))
        rows += [spoken(first, seed + 1, _LOUDER)] if first else []
    every, reads = zip(*rows, strict=True)
    return dataclasses.replace(joined(every), reads=torch.cat(reads))


@dataclasses.dataclass
class _Scores:
    """Of each token the largest k_v, and the row and slot where it is.

    Attributes:
        value, row, slot: [vocab].
    """

    value: Float[Tensor, " vocab"]
    row: Int[Tensor, " vocab"]
    slot: Int[Tensor, " vocab"]

    def add(self, parts: Float[Tensor, "row slot vocab"], rows: Int[Tensor, " row"]) -> None:
        """Take what is larger than all before it."""
        largest, place = parts.flatten(0, 1).max(0)
        is_more = largest > self.value
        self.value = torch.where(is_more, largest, self.value)
        self.row = torch.where(is_more, rows[place // parts.shape[1]], self.row)
        self.slot = torch.where(is_more, place % parts.shape[1], self.slot)


def _scores(lens: LoraLens, models: Sequence[Scaled], spoken: Prompts) -> list[_Scores]:
    """Those of each model beside the base, which runs once."""
    nothing = torch.zeros(int(lens.model.cfg.d_vocab_out), device=lens.device)
    scores = [_Scores(nothing.to(lens.gate_dtype), *[nothing.long()] * 2) for _ in models]
    with torch.no_grad():
        for index, batch in by_length(spoken, tokens_at_once(lens, spoken, _TOKENS)):
            base = gated_logits(lens, batch, lens.gates(0.0)).log_softmax(-1)
            padding, rows = ~batch.read_mask.to(base.device), torch.tensor(index)
            for (other, scale), score in zip(models, scores, strict=True):
                moved = gated_logits(other, batch, other.gates(scale)).log_softmax(-1)
                parts = moved.exp() * (moved - base)
                parts[padding] = 0
                score.add(parts, rows.to(parts.device))
    return scores


class _Ranked(NamedTuple):
    """Tokens that no token under a null adapter reaches, the highest first."""

    scores: dict[int, float]
    floor: float

    @classmethod
    def of(cls, lens: LoraLens, values: Sequence[Float[Tensor, " vocab"]]) -> _Ranked:
        """Of the adapter's numbers, and then each null's; special tokens say nothing."""
        mine, floor = values[0].clone(), max(float(other.max()) for other in values[1:])
        mine[lens.model.tokenizer.all_special_ids] = -math.inf
        best = mine.topk(min(_CANDIDATES, len(mine)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return cls({token: value for token, value in pairs if value > floor}, floor)


class _Place(NamedTuple):
    """A candidate, its list, what stands before its word, and the word up to it."""

    token: int
    by: By
    context: _Ids
    begun: _Ids


def _places(
    lens: LoraLens, scores: _Scores, ranked: Mapping[By, _Ranked], spoken: Prompts
) -> Iterator[_Place]:
    """The lists in turn."""
    seen: set[int] = set()
    for turn in itertools.zip_longest(*(ranks.scores for ranks in ranked.values())):
        for by, token in zip(ranked, turn, strict=True):
            if token is None or token in seen or not scores.value[token] > 0:
                continue
            seen.add(token)
            row = int(scores.row[token])
            end = int(spoken.read_positions[row, int(scores.slot[token])]) + 1
            before, start = spoken.tokens[row, :end], end
            tokens = torch.cat([before, before.new_tensor([token])])
            while start > max(1, end - _WORDS) and _is_one_word(lens, tokens[start - 1 :][:2]):
                start -= 1
            yield _Place(token, by, tokens[:start], tokens[start:])


def _is_one_word(lens: LoraLens, pair: _Ids) -> bool:
    """Whether a token goes on with the word of the one before."""
    first, both = _text(lens, pair[:1]), _text(lens, pair)
    return first[-1:].isalnum() and both[len(first) :][:1].isalnum()


def _prompts(lens: LoraLens, rows: Sequence[Int[Tensor, " _pos"]]) -> Prompts:
    """Rows of ids as prompts."""
    lengths = rows[0].new_tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return lens.prompts(Prompts(tokens, lengths))


def _words(lens: LoraLens, places: Sequence[_Place], progress: bool) -> list[_Ids]:
    """Each candidate; by speech also what the adapted model says after it, up to an end."""
    words = [place.begun for place in places]
    speech = [i for i, place in enumerate(places) if place.by == "speech"]
    if speech:
        begun = [torch.cat([places[i].context, words[i]]) for i in speech]
        said = lens.generate(_prompts(lens, begun), _WORDS - 1, progress=progress)
        ends = set(lens.model.tokenizer.all_special_ids)
        for i, ids in zip(speech, said.ids, strict=True):
            words[i] = torch.cat([words[i], ids[:-1] if int(ids[-1]) in ends else ids])
    return words


def _distinct(begun: Sequence[str], words: Sequence[str]) -> list[int]:
    """The first candidates that no earlier one's words hold."""
    chosen: list[int] = []
    for i, part in enumerate(begun):
        if not any((part.strip() or part) in words[j] for j in chosen):
            chosen.append(i)
    return chosen[:_CLAIMS]


def _runs(
    lens: LoraLens, controls: _Controls, contexts: Prompts, words: Sequence[_Ids], seed: int
) -> list[dict[str, Any]]:
    """Of each claim, log p of its words in every run, and the layers that are left out."""
    asked = Asked(lens, contexts).about(AnswerLogProb(list(words)))
    layers = group_sites(lens.sites, "layer")
    members = indicator(layers, len(lens.sites))
    carried = asked.slopes(1.0).cpu().double() @ members.T
    top = carried.argsort(1, descending=True)[:, : math.ceil(len(layers) / _PART)]
    generator = np.random.default_rng(seed)
    left_out = torch.stack([_points(row, len(layers), generator) for row in top])
    run = functools.partial(gated_readout, reading=asked.reading, progress=False)
    values = run(lens, gates=1.0 - left_out @ members).cpu()
    largest = {
        name: torch.cat([run(o, gates=o.gates(scale)[None]) for o, scale in others], 1).amax(1)
        for name, others in controls.items()
        if others
    }
    base, adapted = asked.ends.tolist()
    columns = {
        **{"base": base, "adapted": adapted, "unrelated": [math.nan] * len(words)},
        **{name: values.tolist() for name, values in largest.items()},
        "layers": [", ".join([*layers][j] for j in sorted(row)) for row in top.tolist()],
        "without": values[:, 0].tolist(),
        "without_others": values[:, 1:].mean(1).tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _points(
    top: Int[Tensor, " top"], groups: int, generator: np.random.Generator
) -> Float[Tensor, "point group"]:
    """1 at the groups that are left out: the top ones, and then as many drawn from the others."""
    others = np.setdiff1d(np.arange(groups), top.numpy())
    points = torch.zeros(1 + _DRAWS * (len(others) >= len(top)), groups, dtype=torch.float64)
    points[0, top] = 1
    for point in points[1:]:
        point[generator.choice(others, len(top), replace=False)] = 1
    return points


def _text(lens: LoraLens, ids: _Ids) -> str:
    return decoded(lens.model, ids.tolist())
