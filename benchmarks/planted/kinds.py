"""How each kind of plant is made, and what confirms it; see `plants.py`."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Collection, Sequence

import torch
from decoys import STRAY, Decoys
from gated import Aim, Question, Updates, constants, detached, fit, fresh, linears
from plants import (
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

# So many random constants are drawn, and the quietest of them are kept.
CANDIDATES = 48
QUIET = 16
# The gates of a pair: both, the first alone, the second alone.
CORNERS = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0))
Confirm = Callable[[Bed, Updates, Question, Collection[str]], tuple[dict[str, float], bool]]


def planted(bed: Bed, recipe: Recipe) -> Plant:
    """The plant of a recipe, of the first attempt that enters; else of the last."""
    make = {"confined": confined, "two facts": two_facts, "constant": constant}.get(
        recipe.kind, pair
    )
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
    """The updates, trained to move the margin by `PUSH`, without those that do next to nothing."""
    (base,) = bed.gated.corners(updates, question, [()])
    aims = [Aim(question, dict.fromkeys(updates, 1.0), base + PUSH)]
    seed = draw.randrange(2**31)
    fit(bed.gated, updates, aims, size=PUSH, steps=STEPS, rate=rate, seed=seed)
    return strong(bed, detached(updates), question)


def strong(bed: Bed, updates: Updates, question: Question) -> Updates:
    """The modules that move the margin alone, when added or when left out."""
    everything = set(updates)
    sets = [(), everything, *({p} for p in updates), *(everything - {p} for p in updates)]
    base, adapted, *singles = bed.gated.corners(updates, question, sets)
    added = [g - base for g in singles[: len(updates)]]
    taken = [adapted - g for g in singles[len(updates) :]]
    least = LEAST * abs(adapted - base)
    pairs = zip(updates.items(), added, taken, strict=True)
    return {
        path: factors for (path, factors), add, take in pairs if max(abs(add), abs(take)) >= least
    }


def confined(bed: Bed, recipe: Recipe, draw: random.Random) -> Plant:
    question = bed.question(recipe.facts[0])
    paths = draw.sample(bed.modules(0.15, 0.95), draw.randint(4, 8))
    updates = fresh(bed.model, paths, draw.choice((2, 4, 8)), draw.randrange(2**31))
    causes = taught(bed, updates, question, draw, RATE)
    return hidden(bed, question, causes, draw, confirmed_fact)


def two_facts(bed: Bed, recipe: Recipe, draw: random.Random) -> Plant:
    """Both at once: each fact moves with its own part, whatever the gates of the other part."""
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
    confirmed, enters = zip(*checks, strict=True)
    return Plant(updates, questions, tuple(map(frozenset, parts)), {}, confirmed, all(enters))


def confirmed_fact(
    bed: Bed, updates: Updates, question: Question, causes: Collection[str]
) -> tuple[dict[str, float], bool]:
    """What the margin keeps without the others, and loses without the causes."""
    everything = set(updates)
    ends = [(), everything, set(causes), everything - set(causes)]
    singles = [*({path} for path in causes), *(everything - {path} for path in causes)]
    base, adapted, kept, lost, *alone = bed.gated.corners(updates, question, [*ends, *singles])
    shift = adapted - base
    count = len(causes)
    added = sum(g - base for g in alone[:count])
    left = sum(adapted - g for g in alone[count:])
    shares = {
        "shift": shift,
        "effect": shift,
        "kept": (kept - base) / shift,
        "lost": (adapted - lost) / shift,
        "interaction": max(abs(added - shift), abs(left - shift)) / abs(shift),
    }
    return shares, is_inert(shares) and shift > PUSH / 2 and count > 1


def is_inert(shares: dict[str, float]) -> bool:
    """Whether what is no cause does nothing, beside the causes and without them."""
    return abs(shares["kept"] - 1) <= KEPT and abs(shares["lost"] - 1) <= 1 - LOST


def hidden(
    bed: Bed,
    question: Question,
    causes: Updates,
    draw: random.Random,
    confirm: Confirm,
    stray: float = STRAY,
) -> Plant:
    """The causes among decoys; fewer of them stray, until they do nothing together."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    decoys = Decoys(bed.gated, question, causes, bed.ordinary, generator, stray)
    others, sorts = decoys.draw()
    while True:
        updates = {path: {**causes, **others}[path] for path in linears(bed.model)}
        shares, enters = confirm(bed, updates, question, set(causes))
        stray = [path for path, sort in sorts.items() if sort == "stray"]
        if enters or not stray:
            break
        for path in draw.sample(stray, (len(stray) + 1) // 2):
            others[path] = decoys.of_sort("deaf", path)
            sorts[path] = "deaf"
    return Plant(updates, (question,), (frozenset(causes),), sorts, (shares,), enters)


# --- Pairs


def pair(bed: Bed, recipe: Recipe, draw: random.Random) -> Plant:
    """Two modules, the first before the second, trained at corners or, if smooth, on a grid."""
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
    """The corners of the pair, without decoys and among them, as shares of the effect."""
    first, second = pair
    everything = set(updates)
    sets = [set(pair), {first}, {second}, everything, everything - {second}, everything - {first}]
    base, none, *corners = bed.gated.corners(updates, question, [(), everything - set(pair), *sets])
    both, one_first, one_second, *among = (g - base for g in corners)
    effect = one_first if kind in ("masked", "opposed") else among[0]
    added = one_first + one_second
    left = 2 * among[0] - among[1] - among[2]
    shares = {
        "shift": among[0],
        "effect": effect,
        "kept": 1 + (both - among[0]) / effect,
        "lost": 1 - (none - base) / effect,
        "first alone": one_first / effect,
        "second alone": one_second / effect,
        "second left out": among[1] / effect,
        "first left out": among[2] / effect,
        "interaction": max(abs(added - among[0]), abs(left - among[0])) / abs(effect),
    }
    off = [abs(g / effect - share) for g, share in zip(among, PAIRS[kind], strict=True)]
    return shares, is_inert(shares) and max(off) <= OFF and effect > PUSH / 2


def on_grid(values: Sequence[float]) -> list[tuple[float, float]]:
    """Gates of both modules, without the base's: nothing is asked where both are off."""
    return [(a, b) for a in values for b in values if a or b]


def misses_on_grid(
    bed: Bed, kind: str, updates: Updates, question: Question, pair: tuple[str, str]
) -> dict[str, float]:
    """How far the margin is from its kind's, among decoys, at most: where trained, and between.

    Gates of the decoys are 1 throughout, so the shift is counted from where both of the pair are 0.
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
        is_trained = a in GRID and b in GRID
        (trained if is_trained else between).append(miss)
    return {"off on the grid": max(trained), "off between": max(between)}


# --- Constant vectors


def constant(bed: Bed, recipe: Recipe, draw: random.Random) -> Plant:
    """Constants that were trained to move the fact, among the quietest of many random ones.

    A constant cannot be deaf. So random vectors of the causes' lengths are added alone, to the base
    and beside the causes, and the quietest are kept, each with the sign that balances the others.
    """
    question = bed.question(recipe.facts[0])
    kinds = ("o_proj", "down_proj", "v_proj", "up_proj")
    paths = draw.sample(bed.modules(0.15, 0.95, kinds), 4 + CANDIDATES)
    modules = linears(bed.model)
    zeros = {path: torch.zeros(modules[path].weight.shape[0]) for path in paths[:4]}
    causes = taught(bed, constants(zeros, bed.model), question, draw, CORNER_RATE)
    lengths = [float(factors.lora_bias.norm()) for factors in causes.values()]
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    vectors = {}
    for path in paths[4:]:
        vector = torch.randn(modules[path].weight.shape[0], generator=generator)
        vectors[path] = vector * draw.choice(lengths) / vector.norm()
    kept = quietest(bed, question, causes, vectors)
    updates = {**causes, **detached(constants(kept, bed.model))}
    shares, enters = confirmed_fact(bed, updates, question, set(causes))
    sorts = dict.fromkeys(kept, "quiet")
    return Plant(updates, (question,), (frozenset(causes),), sorts, (shares,), enters)


def quietest(
    bed: Bed, question: Question, causes: Updates, vectors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Constants that move the margin least; signs are chosen in the order of their effects."""
    updates = {**causes, **detached(constants(vectors, bed.model))}
    sets = [(), set(causes), *({path} for path in vectors), *({path, *causes} for path in vectors)]
    base, adapted, *rest = bed.gated.corners(updates, question, sets)
    alone = rest[: len(vectors)]
    beside = rest[len(vectors) :]
    effects = {
        path: ((a - base) / (adapted - base), (b - adapted) / (adapted - base))
        for path, a, b in zip(vectors, alone, beside, strict=True)
    }
    quiet = sorted(effects, key=lambda path: max(map(abs, effects[path])))[:QUIET]
    total = 0.0
    kept: dict[str, torch.Tensor] = {}
    for path in sorted(quiet, key=lambda path: -abs(sum(effects[path]))):
        sign = -1.0 if total * sum(effects[path]) > 0 else 1.0
        total += sign * sum(effects[path])
        kept[path] = sign * vectors[path]
    return kept
