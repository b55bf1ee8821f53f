"""Make a plant of each kind, and confirm it by interventions; `plants.py` says what kinds are."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Collection, Sequence

import torch

from benchmarks.planted.decoys import STRAY, Decoys
from benchmarks.planted.gated import (
    Aim,
    Question,
    Updates,
    constants,
    detached,
    fit,
    fresh,
    linears,
)
from benchmarks.planted.plants import (
    ANY,
    ATTEMPTS,
    BETWEEN,
    CORNER_RATE,
    CORNER_STEPS,
    GRID,
    GRID_STEPS,
    KEPT,
    LEAST,
    LOST,
    LOUD,
    OFF,
    PAIRS,
    PUSH,
    RATE,
    SMOOTH,
    STEPS,
    Bed,
    Plant,
    Recipe,
    share_of_pair,
)

# So many constants are trained to be the causes.
CONSTANT_CAUSES = 4
# So many random constants are drawn beside them, and so many of these are kept: the quietest.
CANDIDATES = 48
KEPT_CANDIDATES = 16
# The gates of a pair: both, the first alone, the second alone.
CORNERS = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0))
Confirm = Callable[[Bed, Updates, Question, Collection[str]], tuple[dict[str, float], bool]]


def planted(bed: Bed, recipe: Recipe) -> Plant:
    """The plant of the first attempt that enters, or else of the last attempt."""
    makers = {"confined": confined, "two facts": two_facts, "constant": constant}
    make = makers.get(recipe.kind, pair)
    for attempt in range(ATTEMPTS):
        draw = random.Random(f"{recipe.kind} {recipe.seed} {attempt}")
        plant = make(bed, recipe, draw)
        if plant.enters:
            break
    return dataclasses.replace(plant, attempts=attempt + 1)


# --- Facts


def taught(
    bed: Bed, updates: Updates, question: Question, draw: random.Random, rate: float
) -> Updates:
    """Train the updates to move the margin by `PUSH`, and drop those that do next to nothing."""
    (base,) = bed.gated.corners(updates, question, [()])
    aims = [Aim(question, dict.fromkeys(updates, 1.0), base + PUSH)]
    seed = draw.randrange(2**31)
    fit(bed.gated, updates, aims, size=PUSH, steps=STEPS, rate=rate, seed=seed)
    return strong(bed, detached(updates), question)


def strong(bed: Bed, updates: Updates, question: Question) -> Updates:
    """The updates that move the margin when they are added alone, or left out alone."""
    everything = set(updates)
    alone = [{path} for path in updates]
    without = [everything - {path} for path in updates]
    base, adapted, *singles = bed.gated.corners(
        updates, question, [(), everything, *alone, *without]
    )
    added = [g - base for g in singles[: len(updates)]]
    taken = [adapted - g for g in singles[len(updates) :]]
    least = LEAST * abs(adapted - base)
    kept = {}
    for path, effect_added, effect_taken in zip(updates, added, taken, strict=True):
        if max(abs(effect_added), abs(effect_taken)) >= least:
            kept[path] = updates[path]
    return kept


def confined(bed: Bed, recipe: Recipe, draw: random.Random) -> Plant:
    """A few modules are trained to move a fact, and hidden among decoys."""
    question = bed.question(recipe.facts[0])
    paths = draw.sample(bed.modules(0.15, 0.95), draw.randint(4, 8))
    updates = fresh(bed.model, paths, draw.choice((2, 4, 8)), draw.randrange(2**31))
    causes = taught(bed, updates, question, draw, RATE)
    return hidden(bed, question, causes, draw, confirmed_fact)


def two_facts(bed: Bed, recipe: Recipe, draw: random.Random) -> Plant:
    """Ten modules are trained so that each half moves its own fact, whatever the other does."""
    questions = tuple(map(bed.question, recipe.facts))
    paths = draw.sample(bed.modules(0.15, 0.95), 10)
    halves = (paths[:5], paths[5:])
    aims: list[Aim] = []
    for question, part, other in zip(questions, halves, halves[::-1], strict=True):
        (base,) = bed.gated.corners({}, question, [()])
        for gate, other_gate in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (1.0, ANY), (0.0, ANY)):
            gates = {**dict.fromkeys(part, gate), **dict.fromkeys(other, other_gate)}
            aims.append(Aim(question, gates, base + PUSH * gate))
    updates = fresh(bed.model, paths, draw.choice((2, 4, 8)), draw.randrange(2**31))
    seed = draw.randrange(2**31)
    fit(bed.gated, updates, aims, size=PUSH, steps=STEPS, rate=CORNER_RATE, seed=seed)
    trained = detached(updates)
    parts: list[Updates] = []
    for question, part in zip(questions, halves, strict=True):
        parts.append(strong(bed, {path: trained[path] for path in part}, question))
    causes = {**parts[0], **parts[1]}
    confirmed: list[dict[str, float]] = []
    enters: list[bool] = []
    for question, part in zip(questions, parts, strict=True):
        shares, does_enter = confirmed_fact(bed, causes, question, set(part))
        confirmed.append(shares)
        enters.append(does_enter)
    sets = tuple(frozenset(part) for part in parts)
    return Plant(
        updates=causes,
        questions=questions,
        causes=sets,
        sorts={},
        confirmed=tuple(confirmed),
        enters=all(enters),
    )


def confirmed_fact(
    bed: Bed, updates: Updates, question: Question, causes: Collection[str]
) -> tuple[dict[str, float], bool]:
    """What the margin keeps without the other modules, and what it loses without the causes.

    Returns:
        numbers as shares of the shift, and whether the plant enters.
    """
    everything = set(updates)
    ends = [(), everything, set(causes), everything - set(causes)]
    alone = [{path} for path in causes]
    without = [everything - {path} for path in causes]
    values = bed.gated.corners(updates, question, [*ends, *alone, *without])
    base, adapted, kept, lost, *singles = values
    shift = adapted - base
    count = len(causes)
    added = sum(g - base for g in singles[:count])
    left = sum(adapted - g for g in singles[count:])
    shares = {
        "shift": shift,
        "effect": shift,
        "kept": (kept - base) / shift,
        "lost": (adapted - lost) / shift,
        "interaction": max(abs(added - shift), abs(left - shift)) / abs(shift),
    }
    return shares, is_inert(shares) and shift > PUSH / 2 and count > 1


def is_inert(shares: dict[str, float]) -> bool:
    """Whether the modules that are no causes do nothing, beside the causes and without them."""
    return abs(shares["kept"] - 1) <= KEPT and abs(shares["lost"] - 1) <= 1 - LOST


def hidden(
    bed: Bed,
    question: Question,
    causes: Updates,
    draw: random.Random,
    confirm: Confirm,
    stray: float = STRAY,
) -> Plant:
    """Put the causes among decoys; halve the stray ones until all decoys together do nothing.

    Args:
        bed: the model.
        question: what is asked.
        causes: the trained updates.
        draw: of everything that is random.
        confirm: whether the plant enters, and what interventions say.
        stray: the share of stray ones among the decoys that are no query or key.
    """
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    decoys = Decoys(bed.gated, question, causes, bed.ordinary, generator, stray)
    others, sorts = decoys.draw()
    while True:
        every = {**causes, **others}
        updates = {path: every[path] for path in linears(bed.model)}
        shares, enters = confirm(bed, updates, question, set(causes))
        strays = [path for path, sort in sorts.items() if sort == "stray"]
        if enters or not strays:
            break
        for path in draw.sample(strays, (len(strays) + 1) // 2):
            others[path] = decoys.of_sort("deaf", path)
            sorts[path] = "deaf"
    return Plant(
        updates=updates,
        questions=(question,),
        causes=(frozenset(causes),),
        sorts=sorts,
        confirmed=(shares,),
        enters=enters,
    )


# --- Pairs


def pair(bed: Bed, recipe: Recipe, draw: random.Random) -> Plant:
    """Two modules are trained at the corners of their gates, or on a grid if the kind is smooth.

    The first module lies before the second.
    """
    question = bed.question(recipe.facts[0])
    first, second = paths_of_pair(bed, recipe.kind, draw)
    updates = fresh(bed.model, (first, second), 8, draw.randrange(2**31))
    (base,) = bed.gated.corners(updates, question, [()])
    is_smooth = recipe.kind in SMOOTH
    is_loud = recipe.kind == "loud conjunction"
    points = on_grid(GRID) if is_smooth else CORNERS
    aims = [
        Aim(question, {first: a, second: b}, base + PUSH * share_of_pair(recipe.kind, a, b))
        for a, b in points
    ]
    seed = draw.randrange(2**31)
    steps = GRID_STEPS if is_smooth else CORNER_STEPS
    fit(bed.gated, updates, aims, size=PUSH, steps=steps, rate=CORNER_RATE, seed=seed)

    def confirm(
        bed: Bed, updates: Updates, question: Question, causes: Collection[str]
    ) -> tuple[dict[str, float], bool]:
        """Confirm the corners, and of a smooth kind the grid."""
        shares, enters = confirmed_pair(bed, recipe.kind, updates, question, (first, second))
        if not is_smooth:
            return shares, enters
        misses = misses_on_grid(bed, recipe.kind, updates, question, (first, second))
        if is_loud:
            enters = shares["effect"] > PUSH / 2
        return {**shares, **misses}, enters and misses["off on the grid"] <= OFF

    stray = LOUD if is_loud else STRAY
    plant = hidden(bed, question, detached(updates), draw, confirm, stray)
    return dataclasses.replace(plant, pair=(first, second))


def paths_of_pair(bed: Bed, kind: str, draw: random.Random) -> tuple[str, str]:
    """Draw a writer and a later reader for a conjunction, else two writers."""
    firsts = ("down_proj", "o_proj")
    seconds = ("down_proj", "o_proj", "up_proj")
    if kind == "gated":
        firsts = ("down_proj",)
        seconds = ("q_proj",)
    if kind in ("smooth conjunction", "loud conjunction"):
        seconds = ("q_proj", "up_proj")
    early = bed.modules(0.2, 0.5, firsts)
    late = bed.modules(0.6, 0.85, seconds)
    return draw.choice(early), draw.choice(late)


def confirmed_pair(
    bed: Bed, kind: str, updates: Updates, question: Question, pair: tuple[str, str]
) -> tuple[dict[str, float], bool]:
    """The corners of the pair, without decoys and among them.

    Returns:
        numbers as shares of the effect, and whether the plant enters.
    """
    first, second = pair
    everything = set(updates)
    sets = [
        (),
        everything - {first, second},
        {first, second},
        {first},
        {second},
        everything,
        everything - {second},
        everything - {first},
    ]
    base, *values = bed.gated.corners(updates, question, sets)
    shifts = [value - base for value in values]
    neither, both, first_alone, second_alone, shift, without_second, without_first = shifts
    effect = first_alone if kind in ("masked", "opposed") else shift
    added = first_alone + second_alone
    left = 2 * shift - without_second - without_first
    shares = {
        "shift": shift,
        "effect": effect,
        "kept": 1 + (both - shift) / effect,
        "lost": 1 - neither / effect,
        "first alone": first_alone / effect,
        "second alone": second_alone / effect,
        "second left out": without_second / effect,
        "first left out": without_first / effect,
        "interaction": max(abs(added - shift), abs(left - shift)) / abs(effect),
    }
    among_decoys = (shift, without_second, without_first)
    promised = zip(among_decoys, PAIRS[kind], strict=True)
    off = [abs(value / effect - share) for value, share in promised]
    return shares, is_inert(shares) and max(off) <= OFF and effect > PUSH / 2


def on_grid(values: Sequence[float]) -> list[tuple[float, float]]:
    """All pairs of gates of the two modules, without (0, 0), where nothing is asked."""
    return [(a, b) for a, b in itertools.product(values, values) if a or b]


def misses_on_grid(
    bed: Bed, kind: str, updates: Updates, question: Question, pair: tuple[str, str]
) -> dict[str, float]:
    """The largest errors of the margin on the grid, where it was trained and between.

    An error is the distance from what the kind promises, as a share of the effect. The gates of all
    decoys are 1, so the shift is counted from where both gates of the pair are 0.
    """
    first, second = pair
    points = [(0.0, 0.0), *on_grid(BETWEEN)]
    gates = torch.ones(len(points), len(updates))
    columns = list(updates)
    gates[:, columns.index(first)] = torch.tensor([a for a, _ in points])
    gates[:, columns.index(second)] = torch.tensor([b for _, b in points])
    none, *values = bed.gated.at_gates(updates, question, gates)
    effect = values[-1] - none
    trained = [0.0]
    between = [0.0]
    for (a, b), value in zip(points[1:], values, strict=True):
        miss = abs((value - none) / effect - share_of_pair(kind, a, b))
        if a in GRID and b in GRID:
            trained.append(miss)
        else:
            between.append(miss)
    return {"off on the grid": max(trained), "off between": max(between)}


# --- Constant vectors


def constant(bed: Bed, recipe: Recipe, draw: random.Random) -> Plant:
    """Constants are trained to move a fact, and stand among the quietest of many random ones.

    A constant has no input that it could be deaf to. So each of many random vectors, as long as the
    causes, is added to the base and beside the causes. The quietest are kept, each with the sign
    that balances the others.
    """
    question = bed.question(recipe.facts[0])
    kinds = ("o_proj", "down_proj", "v_proj", "up_proj")
    paths = draw.sample(bed.modules(0.15, 0.95, kinds), CONSTANT_CAUSES + CANDIDATES)
    paths_of_causes = paths[:CONSTANT_CAUSES]
    paths_of_candidates = paths[CONSTANT_CAUSES:]
    modules = linears(bed.model)
    zeros = {path: torch.zeros(modules[path].weight.shape[0]) for path in paths_of_causes}
    causes = taught(bed, constants(zeros, bed.model), question, draw, CORNER_RATE)
    lengths = [float(factors.lora_bias.norm()) for factors in causes.values()]
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    vectors = {}
    for path in paths_of_candidates:
        vector = torch.randn(modules[path].weight.shape[0], generator=generator)
        vectors[path] = vector * draw.choice(lengths) / vector.norm()
    kept = quietest(bed, question, causes, vectors)
    updates = {**causes, **detached(constants(kept, bed.model))}
    shares, enters = confirmed_fact(bed, updates, question, set(causes))
    sorts = dict.fromkeys(kept, "quiet")
    return Plant(
        updates=updates,
        questions=(question,),
        causes=(frozenset(causes),),
        sorts=sorts,
        confirmed=(shares,),
        enters=enters,
    )


def quietest(
    bed: Bed, question: Question, causes: Updates, vectors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The constants that move the margin least, each with the sign that balances those before it.

    Signs are chosen in the order of the constants' effects, the largest first.
    """
    updates = {**causes, **detached(constants(vectors, bed.model))}
    alone = [{path} for path in vectors]
    beside = [{path, *causes} for path in vectors]
    sets = [(), set(causes), *alone, *beside]
    base, adapted, *rest = bed.gated.corners(updates, question, sets)
    shift = adapted - base
    values_alone = rest[: len(vectors)]
    values_beside = rest[len(vectors) :]
    loudness: dict[str, float] = {}
    effects: dict[str, float] = {}
    for path, on_base, on_causes in zip(vectors, values_alone, values_beside, strict=True):
        to_base = (on_base - base) / shift
        to_causes = (on_causes - adapted) / shift
        loudness[path] = max(abs(to_base), abs(to_causes))
        effects[path] = to_base + to_causes
    quiet = sorted(loudness, key=lambda path: loudness[path])[:KEPT_CANDIDATES]
    total = 0.0
    kept: dict[str, torch.Tensor] = {}
    for path in sorted(quiet, key=lambda path: -abs(effects[path])):
        sign = -1.0 if total * effects[path] > 0 else 1.0
        total += sign * effects[path]
        kept[path] = sign * vectors[path]
    return kept
