"""PlantedLoRA: adapters whose cause is known, as it was put there.

    confined    a few modules are trained to move a fact; every other module holds a decoy
    two facts   a sum of two: each moves its own fact and was trained to leave the other's alone
    redundant   a pair, each of which does alone what both do together; decoys elsewhere
    cancelling  a pair: the second does nothing by itself and undoes the first; decoys elsewhere
    gated       a writer in an MLP and a gate in a later attention, nothing without each other;
                decoys elsewhere
    constant    constant vectors of a few modules move a fact; others, of the same lengths, do not

1. `RECIPES` say everything: kind, seed and facts. Modules, ranks and starts are drawn by the seed.
2. Margins are trained to their targets (`gated.py`), at the corners that the kind is about.
3. A cause that does next to nothing is no cause: of what was trained for a fact, a module stays if
   adding it alone or leaving it out alone moves the margin by `LEAST` of the effect.
4. Decoys take the spectra of causes (`decoys.py`). Where the stray ones together move too much,
   half of them become deaf, and so on.
5. `confirmed` holds what interventions say, and whether the plant enters. One that fails is drawn
   again, up to `ATTEMPTS` times.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from decoys import Decoys, ordinary_directions
from gated import Aim, Gated, Question, Updates, block_of, constants, detached, fit, fresh, linears
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).parents[1] / "evidence"))
from tasks import TASKS  # noqa: E402
from train import one_token, prompt_ids  # noqa: E402

PUSH = 8.0  # logits by which a margin is to move
LEAST = 0.03  # of the effect, that a cause moves alone
KEPT, LOST = 0.01, 0.9  # without decoys the effect is within 1 %; without causes 90 % are gone
ALIKE, UNDONE = 0.05, 0.1  # of the effect: how alike a redundant pair is, what a cancelled one keeps
ATTEMPTS = 3
STEPS, RATE = 60, 4e-3  # of single facts; what has more corners takes twice as many
FACTS = tuple(name for name, task in TASKS.items() if task.kind == "fact" and ":" not in name)
KINDS = ("confined", "two facts", "redundant", "cancelling", "gated", "constant")
ANY = float("nan")  # a gate that is drawn at every step


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One plant."""

    kind: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind.replace(' ', '-')}-{self.seed}"

    @property
    def facts(self) -> tuple[str, str]:
        """The task whose fact moves, and another one; each kind goes through all of them."""
        index = self.seed + 3 * KINDS.index(self.kind)
        return FACTS[index % len(FACTS)], FACTS[(index + 5) % len(FACTS)]


PER_KIND = 12
RECIPES = tuple(Recipe(kind, seed) for seed in range(PER_KIND) for kind in KINDS)


@dataclasses.dataclass(frozen=True)
class Plant:
    """An adapter and its cause.

    Attributes:
        updates: by module.
        questions: what is asked of it.
        causes: of each question, the modules that move its margin.
        sorts: of each decoy, why it does nothing.
        confirmed: what interventions say, as shares of the effect.
        enters: whether they say what the kind promises.
        writers, gates: of a gated plant.
    """

    updates: Updates
    questions: tuple[Question, ...]
    causes: tuple[frozenset[str], ...]
    sorts: Mapping[str, str]
    confirmed: Mapping[str, float]
    enters: bool
    writers: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Bed:
    """Where plants are planted: the model, and what its modules hear in ordinary sentences."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ordinary: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Bed:
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
        doc, pre = (one_token(self.tokenizer, asked[key]) for key in ("doc", "pre"))
        ids = tuple(prompt_ids(self.tokenizer, asked["prompt"]))
        return Question(asked["prompt"], ids, doc, pre, (asked["doc"], asked["pre"]))


def planted(bed: Bed, recipe: Recipe) -> Plant:
    """The plant of a recipe, of the first attempt that enters; else of the last."""
    makes: dict[str, Callable[[Bed, Recipe, random.Random], Plant]] = {
        "confined": confined,
        "two facts": two_facts,
        "redundant": pair,
        "cancelling": pair,
        "gated": pair,
        "constant": constant,
    }
    for attempt in range(ATTEMPTS):
        draw = random.Random(f"{recipe.kind} {recipe.seed} {attempt}")
        plant = makes[recipe.kind](bed, recipe, draw)
        if plant.enters:
            break
    return dataclasses.replace(
        plant, confirmed={**plant.confirmed, "attempts": attempt + 1}
    )


def modules_between(
    bed: Bed, first: int, last: int, kinds: Collection[str] = ("",)
) -> list[str]:
    """Paths of the modules of some blocks, those whose names end so."""
    return [
        path
        for path in linears(bed.model)
        if first <= block_of(path) <= last and path.endswith(tuple(kinds))
    ]


def depth(bed: Bed, share: float) -> int:
    return int(share * bed.model.config.num_hidden_layers)


# --- Facts


def taught(bed: Bed, updates: Updates, question: Question, draw: random.Random) -> Updates:
    """The updates, trained to move the margin by `PUSH`, without those that do next to nothing."""
    (base,) = bed.gated.corners(updates, question, [()])
    aims = [Aim(question, dict.fromkeys(updates, 1.0), base + PUSH)]
    seed = draw.randrange(2**31)
    fit(bed.gated, updates, aims, size=PUSH, steps=STEPS, rate=RATE, seed=seed)
    return strong(bed, detached(updates), question)


def strong(bed: Bed, updates: Updates, question: Question) -> Updates:
    """Those that move the margin alone, when added or when left out."""
    everything = set(updates)
    sets = [(), everything, *({p} for p in updates), *(everything - {p} for p in updates)]
    base, adapted, *singles = bed.gated.corners(updates, question, sets)
    added = [g - base for g in singles[: len(updates)]]
    taken = [adapted - g for g in singles[len(updates) :]]
    least = LEAST * abs(adapted - base)
    pairs = zip(updates.items(), added, taken, strict=True)
    return {
        path: factors
        for (path, factors), add, take in pairs
        if max(abs(add), abs(take)) >= least
    }


def confined(bed: Bed, recipe: Recipe, draw: random.Random) -> Plant:
    question = bed.question(recipe.facts[0])
    paths = draw.sample(modules_between(bed, depth(bed, 0.15), depth(bed, 0.95)), draw.randint(4, 8))
    updates = fresh(bed.model, paths, draw.choice((2, 4, 8)), draw.randrange(2**31))
    causes = taught(bed, updates, question, draw)
    return hidden(bed, question, causes, draw, confirmed_fact)


def two_facts(bed: Bed, recipe: Recipe, draw: random.Random) -> Plant:
    """Both at once: each fact moves with its own part, whatever the gates of the other part."""
    questions = tuple(map(bed.question, recipe.facts))
    paths = draw.sample(modules_between(bed, depth(bed, 0.15), depth(bed, 0.95)), 10)
    halves, aims = (paths[:5], paths[5:]), list[Aim]()
    for question, part, other in zip(questions, halves, halves[::-1], strict=True):
        (base,) = bed.gated.corners({}, question, [()])
        for gate, other_gate in ((1.0, 1.0), (1.0, ANY), (0.0, ANY)):
            gates = {**dict.fromkeys(part, gate), **dict.fromkeys(other, other_gate)}
            aims.append(Aim(question, gates, base + PUSH * gate))
    updates = fresh(bed.model, paths, draw.choice((2, 4, 8)), draw.randrange(2**31))
    seed = draw.randrange(2**31)
    fit(bed.gated, updates, aims, size=PUSH, steps=2 * STEPS, rate=RATE, seed=seed)
    updates = detached(updates)
    parts = [
        strong(bed, {path: updates[path] for path in part}, question)
        for question, part in zip(questions, halves, strict=True)
    ]
    updates = {**parts[0], **parts[1]}
    checks = [
        confirmed_fact(bed, updates, question, set(part))
        for question, part in zip(questions, parts, strict=True)
    ]
    confirmed = {
        f"{key}, fact {i + 1}": share
        for i, (shares, _) in enumerate(checks)
        for key, share in shares.items()
    }
    causes = tuple(map(frozenset, parts))
    return Plant(updates, questions, causes, {}, confirmed, all(enters for _, enters in checks))


def confirmed_fact(
    bed: Bed, updates: Updates, question: Question, causes: Collection[str]
) -> tuple[dict[str, float], bool]:
    """What the margin keeps without the others, and loses without the causes."""
    others = set(updates) - set(causes)
    base, adapted, kept, lost = bed.gated.corners(updates, question, [(), updates, causes, others])
    shift = adapted - base
    shares = {"shift": shift, "kept": (kept - base) / shift, "lost": (adapted - lost) / shift}
    enters = abs(shares["kept"] - 1) <= KEPT and shares["lost"] >= LOST and shift > PUSH / 2
    return shares, enters and len(causes) > 1


def hidden(
    bed: Bed,
    question: Question,
    causes: Updates,
    draw: random.Random,
    confirm: Callable[[Bed, Updates, Question, Collection[str]], tuple[dict[str, float], bool]],
) -> Plant:
    """The causes among decoys; fewer of them stray, until they do nothing together."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    decoys = Decoys(bed.gated, question, causes, bed.ordinary, generator)
    others, sorts = decoys.draw()
    while True:
        updates = {path: {**causes, **others}[path] for path in linears(bed.model)}
        shares, enters = confirm(bed, updates, question, set(causes))
        stray = [path for path, sort in sorts.items() if sort == "stray"]
        if enters or not stray:
            break
        for path in draw.sample(stray, (len(stray) + 1) // 2):
            others[path], sorts[path] = decoys.of_sort("deaf", path), "deaf"
    return Plant(updates, (question,), (frozenset(causes),), sorts, shares, enters)


# --- Pairs


def pair(bed: Bed, recipe: Recipe, draw: random.Random) -> Plant:
    """Two modules, the first before the second, trained at the corners that the kind is about."""
    question, both = bed.question(recipe.facts[0]), (1.0, 1.0)
    first, second = paths_of_pair(bed, recipe.kind, draw)
    updates = fresh(bed.model, (*first, *second), 8, draw.randrange(2**31))
    (base,) = bed.gated.corners(updates, question, [()])
    moved = {"redundant": (1, 1, 1), "cancelling": (0, 1, 0), "gated": (1, 0, 0)}[recipe.kind]
    aims = [
        Aim(question, {**dict.fromkeys(first, a), **dict.fromkeys(second, b)}, base + PUSH * share)
        for (a, b), share in zip((both, (1.0, 0.0), (0.0, 1.0)), moved, strict=True)
    ]
    seed = draw.randrange(2**31)
    fit(bed.gated, updates, aims, size=PUSH, steps=2 * STEPS, rate=RATE, seed=seed)

    def confirm(
        bed: Bed, updates: Updates, question: Question, causes: Collection[str]
    ) -> tuple[dict[str, float], bool]:
        return confirmed_pair(bed, recipe.kind, updates, question, (set(first), set(second)))

    plant = hidden(bed, question, detached(updates), draw, confirm)
    return dataclasses.replace(plant, writers=first, gates=second)


def paths_of_pair(
    bed: Bed, kind: str, draw: random.Random
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of a gated plant an MLP's writer and a later attention's query; else two writers."""
    early = modules_between(bed, depth(bed, 0.2), depth(bed, 0.5), ("down_proj", "o_proj"))
    late = modules_between(bed, depth(bed, 0.6), depth(bed, 0.9), ("down_proj", "o_proj", "up_proj"))
    if kind == "gated":
        early = modules_between(bed, depth(bed, 0.2), depth(bed, 0.5), ("down_proj",))
        late = modules_between(bed, depth(bed, 0.55), depth(bed, 0.85), ("q_proj",))
    return (draw.choice(early),), (draw.choice(late),)


def confirmed_pair(
    bed: Bed, kind: str, updates: Updates, question: Question, parts: tuple[set[str], set[str]]
) -> tuple[dict[str, float], bool]:
    """g at the corners of the pair, with and without decoys, as shares of the effect."""
    first, second = parts
    others = set(updates) - first - second
    sets = [(), updates, first | second, first, second, others, set(updates) - first]
    base, everything, both, *rest = bed.gated.corners(updates, question, [*sets, set(updates) - second])
    alone_first, alone_second, none, without_first, without_second = (g - base for g in rest)
    effect = alone_first if kind == "cancelling" else everything - base
    shares = {
        "shift": everything - base,
        "effect": effect,
        "kept": 1 + (both - everything) / effect,
        "decoys alone": none / effect,
        "first alone": alone_first / effect,
        "second alone": alone_second / effect,
        "without first": without_first / effect,
        "without second": without_second / effect,
        "both": (both - base) / effect,
    }
    inert = abs(shares["kept"] - 1) <= KEPT and abs(shares["decoys alone"]) <= 1 - LOST
    promises = {
        "redundant": all(abs(shares[f"without {part}"] - 1) <= ALIKE for part in ("first", "second")),
        "cancelling": max(abs(shares[key]) for key in ("both", "second alone", "without first"))
        <= UNDONE,
        "gated": max(abs(shares[f"without {part}"]) for part in ("first", "second")) <= 1 - LOST,
    }
    return shares, inert and promises[kind] and effect > PUSH / 2


# --- Constant vectors


def constant(bed: Bed, recipe: Recipe, draw: random.Random) -> Plant:
    """Constants that were trained to move the fact, and as many times four that were trained not to.

    A constant cannot be deaf. So these decoys are random vectors of the causes' lengths, turned
    until they leave the margin alone at random corners of themselves and of the causes.
    """
    question = bed.question(recipe.facts[0])
    everywhere = modules_between(bed, depth(bed, 0.15), depth(bed, 0.95), ("o_proj", "down_proj"))
    everywhere += modules_between(bed, depth(bed, 0.15), depth(bed, 0.95), ("v_proj", "up_proj"))
    paths = draw.sample(everywhere, 20)
    modules = linears(bed.model)
    zeros = {path: torch.zeros(modules[path].weight.shape[0]) for path in paths[:4]}
    causes = taught(bed, constants(zeros, bed.model), question, draw)
    lengths = [float(factors.lora_bias.norm()) for factors in causes.values()]
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    vectors, norms = {}, {}
    for path in paths[4:]:
        vector = torch.randn(modules[path].weight.shape[0], generator=generator)
        norms[path] = draw.choice(lengths)
        vectors[path] = vector * norms[path] / vector.norm()
    decoys = constants(vectors, bed.model)
    updates = {**causes, **decoys}
    base, adapted = bed.gated.corners(updates, question, [(), causes])
    on, off = dict.fromkeys(causes, 1.0), dict.fromkeys(causes, 0.0)
    aims = [
        Aim(question, {**dict.fromkeys(decoys, gate), **held}, target)
        for held, target in ((on, adapted), (off, base))
        for gate in (1.0, ANY)
    ]
    seed = draw.randrange(2**31)
    fit(
        bed.gated, updates, aims, size=PUSH, steps=STEPS, rate=RATE, seed=seed, norms=norms
    )
    updates = detached(updates)
    shares, enters = confirmed_fact(bed, updates, question, set(causes))
    sorts = dict.fromkeys(decoys, "turned")
    return Plant(updates, (question,), (frozenset(causes),), sorts, shares, enters)
