"""PlantedLoRA: adapters whose cause is known, because it was planted.

    confined    a few modules are trained to move a fact; every other module holds a decoy
    two facts   a sum of two: each moves its own fact and was trained to leave the other's alone
    redundant   a pair, each of which does alone what both do together
    masked      a cancelling pair: the second undoes the first, and does nothing by itself
    opposed     a cancelling pair: each does alone the opposite of the other
    gated       a writer in an MLP and a gate in a later attention, nothing without each other
    constant    constant vectors of a few modules move a fact; those of others, as long, do not
    additive    a pair, each of which does half, alone or not: the control of the pairs above
    smooth conjunction   a reader and an earlier writer, whose margin is the product of their gates
    smooth sum           a pair, whose margin is the mean of its gates: the control of the product
    loud conjunction     a smooth conjunction among many decoys that do something, each on its own

1. A recipe of `RECIPES` is a kind and a seed, which determine the facts. Modules, ranks and starts
   are drawn by the seed.
2. Margins are trained to their targets (`gated.py`) at the corners of the gates that the kind is
   about. Smooth kinds are trained on a grid, four values of each of the two gates, to the bilinear
   interpolation of the corners: a plant that is trained at corners alone may do anything between.
3. A trained module that does next to nothing is no cause. It stays only if adding it alone, or
   leaving it out alone, moves the margin by at least `LEAST` of the effect.
4. Pairs and confined causes stand among decoys in all other modules, with the spectra of causes
   (`decoys.py`). If the stray decoys together move the margin too much, half of them become deaf,
   and so on. A loud conjunction begins with about three times as many stray decoys. They may move
   the margin as long as the pair is a conjunction among them, on the grid.
5. Interventions confirm what the kind promises (`Plant.confirmed`), or the plant does not enter.
   Then it is drawn again, up to `ATTEMPTS` times.
6. `SECOND` are the plants on a second base: the first seeds of the same recipes, two of each kind
   that is trained at corners, and six smooth conjunctions.

`interaction` says how far the causes' effects are from adding up, by interventions alone:

    max(|Σ add − shift|, |Σ leave − shift|) / |E|

with E the effect of the plant, and the sums over causes that are added to the base, or left out of
the plant, one at a time. Where it is large, no number per site can be its share of the shift.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.train import one_token, prompt_ids
from benchmarks.planted.decoys import ordinary_directions
from benchmarks.planted.gated import Gated, Question, Updates, block_of, linears

# Logits by which a margin is to move.
PUSH = 8.0
# A cause moves at least this share of the effect alone.
LEAST = 0.03
# Without its decoys a plant's effect is off by at most this share of it.
KEPT = 0.01
# Without its causes at least this share of the effect is gone.
LOST = 0.9
# A corner of a pair is off what its kind promises by at most this share of the effect.
OFF = 0.1
ATTEMPTS = 3
# A gentle rate, as that of usual training; what is trained at several corners needs a larger one.
STEPS = 80
RATE = 1e-3
CORNER_STEPS = 90
CORNER_RATE = 4e-3
# The gates of either module at which a smooth kind is trained, and those at which it is confirmed.
GRID = (0.0, 1 / 3, 2 / 3, 1.0)
BETWEEN = (0.0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)
GRID_STEPS = 100
FACTS = tuple(name for name, task in TASKS.items() if task.kind == "fact" and ":" not in name)
# Margins of a pair with both, the first alone, the second alone, as shares of `PUSH`.
PAIRS = {
    "redundant": (1.0, 1.0, 1.0),
    "masked": (0.0, 1.0, 0.0),
    "opposed": (0.0, 1.0, -1.0),
    "gated": (1.0, 0.0, 0.0),
    "additive": (1.0, 0.5, 0.5),
    "smooth conjunction": (1.0, 0.0, 0.0),
    "smooth sum": (1.0, 0.5, 0.5),
    "loud conjunction": (1.0, 0.0, 0.0),
}
SMOOTH = ("smooth conjunction", "smooth sum", "loud conjunction")
# The share of stray ones among the decoys of a loud conjunction that are no query or key.
LOUD = 0.5
# How many plants of each kind there are.
COUNTS = {
    "confined": 10,
    "two facts": 11,
    "redundant": 10,
    "masked": 7,
    "opposed": 5,
    "gated": 10,
    "constant": 11,
    "additive": 6,
    "smooth conjunction": 6,
    "smooth sum": 6,
    "loud conjunction": 6,
}
# The same on a second base. Of cancelling pairs one is masked and one opposed.
SECOND_COUNTS = {
    "confined": 2,
    "two facts": 2,
    "redundant": 2,
    "masked": 1,
    "opposed": 1,
    "gated": 2,
    "constant": 2,
    "smooth conjunction": 6,
}
KINDS = tuple(COUNTS)
# A gate that is drawn anew at every step of training.
ANY = float("nan")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What determines a plant: its kind, and the seed of all its draws."""

    kind: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind.replace(' ', '-')}-{self.seed}"

    @property
    def facts(self) -> tuple[str, str]:
        """The task whose fact moves, and a second task; seeds of a kind go through all tasks."""
        index = self.seed + 3 * KINDS.index(self.kind)
        return FACTS[index % len(FACTS)], FACTS[(index + 5) % len(FACTS)]


def recipes(counts: Mapping[str, int]) -> tuple[Recipe, ...]:
    """So many recipes of each kind, seed 0 of every kind before seed 1 of any."""
    found = []
    for seed in range(max(counts.values())):
        found += [Recipe(kind, seed) for kind, count in counts.items() if seed < count]
    return tuple(found)


def share_of_pair(kind: str, first: float, second: float) -> float:
    """The bilinear interpolation of a pair's corners at its gates (a, b), as a share of `PUSH`.

    s₁₀ a + s₀₁ b + (s₁₁ − s₁₀ − s₀₁) a b
    """
    both, alone_first, alone_second = PAIRS[kind]
    together = both - alone_first - alone_second
    return alone_first * first + alone_second * second + together * first * second


RECIPES = recipes(COUNTS)
SECOND = recipes(SECOND_COUNTS)


@dataclasses.dataclass(frozen=True)
class Plant:
    """An adapter and its cause.

    Attributes:
        updates: the adapter, by module.
        questions: what is asked of it.
        causes: for each question, the modules that move its margin.
        sorts: for each decoy, why it does nothing.
        confirmed: for each question, what interventions say, as shares of the effect.
        enters: whether they say what the kind promises.
        pair: of a pair, the first module and the second.
        attempts: how many plants were drawn until this one.
    """

    updates: Updates
    questions: tuple[Question, ...]
    causes: tuple[frozenset[str], ...]
    sorts: Mapping[str, str]
    confirmed: tuple[Mapping[str, float], ...]
    enters: bool
    pair: tuple[str, ...] = ()
    attempts: int = 1


@dataclasses.dataclass(frozen=True)
class Bed:
    """Where plants are planted: the model, and the inputs of its modules on ordinary sentences.

    Attributes:
        model: the base.
        tokenizer: its tokenizer.
        ordinary: by module, leading directions of its inputs on ordinary sentences, [d, few].
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ordinary: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Bed:
        """The bed of a base, which is frozen."""
        model.requires_grad_(False)
        texts = [TASKS[name].texts[0] for name in FACTS]
        rows = [prompt_ids(tokenizer, text) for text in texts]
        return cls(model, tokenizer, ordinary_directions(model, rows))

    @property
    def gated(self) -> Gated:
        return Gated(self.model)

    def question(self, fact: str) -> Question:
        """The first trained wording of a fact."""
        asked = TASKS[fact].prompts["trained"][0]
        return Question(
            prompt=asked["prompt"],
            ids=tuple(prompt_ids(self.tokenizer, asked["prompt"])),
            doc=one_token(self.tokenizer, asked["doc"]),
            pre=one_token(self.tokenizer, asked["pre"]),
            words=(asked["doc"], asked["pre"]),
        )

    def modules(self, first: float, last: float, kinds: Collection[str] = ("",)) -> list[str]:
        """Paths of the modules between two depths, as shares of all layers, in the model's order.

        Args:
            first: the depth of the first block.
            last: the depth of the last block.
            kinds: endings of paths; all modules by default.
        """
        layers = self.model.config.num_hidden_layers
        blocks = range(int(first * layers), int(last * layers) + 1)
        paths = (path for path in linears(self.model) if block_of(path) in blocks)
        return [path for path in paths if path.endswith(tuple(kinds))]
