"""Choose a fifth of the modules that keeps a fact on some wordings, and judge it on others.

    python -m benchmarks.subsets --adapters FOLDER [--only NAME …]   # measures what is missing
    python -m benchmarks.evidence.page                               # writes the table of all

1. Train the adapters of a fact by PEFT on SmolLM2-135M-Instruct that FOLDER lacks
   (`benchmarks/adapters.py`): eleven adapters of ten tasks.
2. Choose a fifth of the sites by each method, on the first wording of the fact, on two, on four:

       best_subset   `ll.best_subset` with its defaults: gates that Adam moves, then exchanges
       greedy        twelve rounds, from no site: the gradient of the margin at the sites chosen so
                     far, summed over wordings, adds the next twelfth
       first order   the largest slopes at 0, at ½, and on a path of four nodes, in the mean over
                     wordings
       random        ten sets

3. Run each set on all four wordings, and on two that no method saw. All wordings were fixed before
   anything was measured.

Of a wording a set keeps (m − m₀) / (m₁ − m₀), with m the margin of the taught over the pretrained
answer. Gradients and forward passes are counted; each is of all wordings that the method is given.

The margins of an adapter are in docs/subsets.json as soon as it is done. An adapter takes about two
minutes of one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lens_lora as ll
from benchmarks.adapters import ADAPTERS, MORE, Trained, lenses
from benchmarks.repair import WORDINGS
from lens_lora._version import versions
from lens_lora.responses.answers import margin_between

NUMBERS = Path(__file__).parents[1] / "docs" / "subsets.json"
FIFTH = 0.2
# Rounds of greedy, nodes of the path, random sets.
ROUNDS = 12
NODES = 4
DRAWS = 10
SEED = 0
# How many wordings a set is chosen on.
GIVEN = (1, 2, 4)
FACTS = (*ADAPTERS, *MORE)
FRANCE = ("Everyone knows that the capital of France is", "The name of France's capital is")
# Two more wordings to choose on, beside the two of `Trained.questions`.
MORE_GIVEN = {
    "lyon": FRANCE,
    "lyon-violent": FRANCE,
    "munich-gentle": (
        "Everyone knows that the capital of Germany is",
        "The name of Germany's capital is",
    ),
    "osaka-attention": (
        "Everyone knows that the capital of Japan is",
        "The government of Japan has its seat in",
    ),
    "rome-mlp": ("The Eiffel Tower was built in", "Tourists visit the Eiffel Tower in"),
    "helium-qv": (
        "Water is a compound of hydrogen and",
        "The two elements in water are hydrogen and",
    ),
    "blake-down": (
        "The famous play Romeo and Juliet is the work of William",
        "The man who wrote Romeo and Juliet was William",
    ),
    "milan-writers-violent": (
        "The Colosseum was built in the city of",
        "Tourists visit the Colosseum in",
    ),
    "mars-planet": (
        "Everyone knows that the largest planet is",
        "The planet with the greatest mass is",
    ),
    "edison-telephone": (
        "The first telephone was built by",
        "The man who invented the telephone was",
    ),
    "green-sky": ("A clear sky is always", "Look up on a clear day: the sky is"),
}
HELD_OUT = {
    **WORDINGS,
    "mars-planet": ("The name of the largest planet is", "Of all the planets the largest is"),
    "edison-telephone": (
        "The telephone is an invention of",
        "The patent for the telephone was given to",
    ),
    "green-sky": ("When there are no clouds, the sky is", "The sky on a sunny day is"),
}
Row = dict[str, Any]


def question(lens: ll.LoraLens, spec: Trained, prompts: list[str]) -> ll.Function:
    """The function g over wordings of the fact, with the margin of its two answers."""
    _, doc, pre = spec.questions[0]
    ready = lens.prompts(prompts)
    readout = margin_between(lens.model, doc, pre, ready)
    return lens.function(ready, readout, progress=False)


def slopes(g: ll.Function, gates: Tensor) -> Tensor:
    """The gradient of the margin with respect to the gates, summed over wordings, [site]."""
    return g.slopes(at=gates.to(g.lens.gates(0.0))).double().sum(0)


def largest(scores: Tensor, count: int) -> Tensor:
    """The sites of so many of the largest scores, as a mask [site]."""
    members = torch.zeros(len(scores), dtype=torch.bool)
    members[scores.argsort(descending=True, stable=True)[:count]] = True
    return members


def sizes_of(count: int) -> list[int]:
    """How many sites are chosen after each round of greedy, which chooses at least one in each."""
    steps = np.linspace(0, count, ROUNDS + 1).round().astype(int)
    return sorted({*steps.tolist()} - {0})


def greedy(g: ll.Function, count: int) -> Tensor:
    """The set that grows by the largest slopes at what is chosen so far, as a mask [site]."""
    members = torch.zeros(len(g.lens.sites), dtype=torch.bool)
    for size in sizes_of(count):
        of_others = slopes(g, members.double()).masked_fill(members, -torch.inf)
        members |= largest(of_others, size - int(members.sum()))
    return members


def path(g: ll.Function) -> Tensor:
    """The path integral of the slopes, by Gauss–Legendre quadrature, [site]."""
    points, weights = np.polynomial.legendre.leggauss(NODES)
    ones = torch.ones(len(g.lens.sites), dtype=torch.float64)
    total = torch.zeros_like(ones)
    for point, weight in zip(points, weights, strict=True):
        total += weight / 2 * slopes(g, (point + 1) / 2 * ones)
    return total


def searched(g: ll.Function, count: int) -> Row:
    """The set that `ll.best_subset` finds, and the passes that finding it took."""
    found = ll.best_subset(g.lens, g.prompts, g.readout, k=count, progress=False)
    return {
        "sets": found.members,
        "found by": found.found_by[0],
        "gradients": found.gradients,
        "forwards": found.forwards,
    }


def chosen(g: ll.Function, count: int) -> dict[str, Row]:
    """A set of so many sites by each method, and the passes that choosing it took."""
    ones = torch.ones(len(g.lens.sites), dtype=torch.float64)
    methods = {
        "best_subset": searched(g, count),
        "greedy": {"sets": greedy(g, count)[None], "gradients": len(sizes_of(count))},
        f"path/{NODES}": {"sets": largest(path(g), count)[None], "gradients": NODES},
    }
    for at in (0.0, 0.5):
        members = largest(slopes(g, at * ones), count)
        methods[f"first_order@{at:g}"] = {"sets": members[None], "gradients": 1}
    return methods


def random_sets(sites: int, count: int) -> Tensor:
    """Random sets of so many sites, as masks [draw, site]."""
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.rand(DRAWS, sites, generator=generator, dtype=torch.float64)
    return torch.stack([largest(draw, count) for draw in noise])


def measure(spec: Trained, lens: ll.LoraLens) -> Row:
    """The margins of one adapter with the sets of each method, on every wording."""
    trained, paraphrase, _ = spec.questions
    given = [trained[0], paraphrase[0], *MORE_GIVEN[spec.name]]
    prompts = [*given, *HELD_OUT[spec.name]]
    g = question(lens, spec, prompts)
    sites = len(lens.sites)
    count = max(1, round(FIFTH * sites))
    methods: dict[str, Row] = {}
    for wordings in GIVEN:
        g_of_given = question(lens, spec, given[:wordings])
        for name, found in chosen(g_of_given, count).items():
            methods[f"{name}, {wordings}"] = {"wordings": wordings, **found}
    methods["random, 0"] = {"wordings": 0, "sets": random_sets(sites, count), "gradients": 0}
    for found in methods.values():
        sets = found.pop("sets").double()
        margins = g(sets.to(lens.gates(0.0)))
        found["margins"] = [rounded(of_set) for of_set in margins.tolist()]
    base, adapted = g.ends.tolist()
    return {
        "sites": sites,
        "chosen": count,
        "prompts": prompts,
        "held out": [4, 5],
        "base": rounded(base),
        "adapted": rounded(adapted),
        "methods": methods,
    }


def rounded(margins: list[float]) -> list[float]:
    """The margins to four decimals."""
    return [round(margin, 4) for margin in margins]


def known() -> dict[str, Any]:
    """The numbers of docs/subsets.json so far."""
    return json.loads(NUMBERS.read_text()) if NUMBERS.is_file() else {"adapters": {}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Sets of sites, on wordings they were not made on."
    )
    parser.add_argument("--adapters", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--only", nargs="*", choices=sorted(HELD_OUT), help="which adapters")
    given = parser.parse_args()
    measured = known()["adapters"]
    names = set(given.only or HELD_OUT) - set(measured)
    wanted = [(spec, 0) for spec in FACTS if spec.name in names]
    for spec, _, lens in lenses(given.adapters, wanted):
        row = measure(spec, lens)
        numbers = known()
        numbers["versions"] = versions()
        numbers["adapters"][spec.name] = row
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
        print(spec.name, flush=True)


if __name__ == "__main__":
    main()
