"""The whole fuzz: so many cases of each target from one seed, and their table of outcomes.

A case is made from its number alone, so each can be run again: `run_one(target, number)`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models

from fuzz import adapters, files, guard, hooks, inputs
from fuzz.guard import RIGHT, Case, Chance, Outcome

Counts = dict[tuple[str, str], collections.Counter[str]]


@dataclasses.dataclass(frozen=True)
class Target:
    """What is mutated.

    Attributes:
        prepare: makes what its cases share, in an empty folder.
        make: a case from that, the case's chance and an empty folder.
        share: of all cases.
        is_lifted: runs in float64 throughout.
    """

    prepare: Callable[[Path], Any]
    make: Callable[[Any, Chance, Path], Case]
    share: int
    is_lifted: bool = True


TARGETS: dict[str, Target] = {
    "adapter folders": Target(adapters.world, adapters.case, 8),
    "result files": Target(files.saved_results, files.results, 2, is_lifted=False),
    "records": Target(files.world, files.records, 1),
    "files of sweeps": Target(files.world, files.sweep_files, 1),
    "prompts": Target(lambda _: inputs.world(), inputs.prompts, 2),
    "tokens of readouts": Target(lambda _: inputs.world(), inputs.readouts, 2),
    "gates": Target(lambda _: inputs.world(), inputs.gates, 2),
    "hooks of users": Target(lambda _: hooks.world(), hooks.case, 2),
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A case that was neither right nor refused."""

    target: str
    number: int
    case: Case
    outcome: Outcome

    def __str__(self) -> str:
        return (
            f"{self.target}, case {self.number}: {self.outcome.kind}\n{self.case.shown}\n"
            f"{self.outcome.detail}"
        )


class Fuzz:
    """The targets with what their cases share, made when it is first needed.

    Args:
        folder: empty; for files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._worlds = {}
        self.counts: Counts = collections.defaultdict(collections.Counter)
        self.faults: list[Fault] = []

    def run_one(self, name: str, number: int) -> Outcome:
        """The case of this number."""
        target = TARGETS[name]
        scratch = self._folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        with models.lifted() if target.is_lifted else contextlib.nullcontext():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if name not in self._worlds:
                    self._worlds[name] = target.prepare(self._folder / name)
                case = target.make(self._worlds[name], Chance(f"{name} {number}"), scratch)
            outcome = guard.run(case)
        self.counts[name, case.mutation][outcome.kind] += 1
        if outcome.is_fault:
            self.faults.append(Fault(name, number, case, outcome))
        return outcome

    def run(self, count: int, first: int = 0, until: float = float("inf")) -> int:
        """So many cases, each target its share; how many were run by the time `until`."""
        for done, (name, number) in enumerate(itertools.islice(cases(first), count)):
            if time.monotonic() > until:
                return done
            self.run_one(name, number)
        return count


def cases(first: int = 0) -> Iterator[tuple[str, int]]:
    """(target, number) without end, the targets in turn by their shares."""
    round_ = [name for name, target in TARGETS.items() for _ in range(target.share)]
    for place in itertools.count(first):
        turn, at = divmod(place, len(round_))
        name = round_[at]
        yield name, turn * TARGETS[name].share + round_[:at].count(name)


def table(counts: Counts) -> str:
    """The outcomes by kind of mutation, as Markdown."""
    lines = ["| target | mutation | cases | right | refused | faults |", "| --- " * 6 + "|"]
    total: collections.Counter[str] = collections.Counter()
    order = {name: place for place, name in enumerate(TARGETS)}
    for target, mutation in sorted(counts, key=lambda key: (order[key[0]], key[1])):
        found = counts[target, mutation]
        total += found
        lines.append(_line(target, mutation, found))
    lines.append(_line("**all**", "", total))
    return "\n".join(lines)


def _line(target: str, mutation: str, found: collections.Counter[str]) -> str:
    faults = found.total() - found[RIGHT] - found["refused"]
    numbers = (found.total(), found[RIGHT], found["refused"], faults)
    return f"| {target} | {mutation} | {' | '.join(f'{n:,}' for n in numbers)} |"
