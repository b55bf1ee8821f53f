"""Shards: one run divided into several independent jobs, and how their files are joined.

1. Shard i of n takes every n-th batch of the whole run, and writes its parts into a folder of its
   own, `results.shards/i-of-n/`. Nobody else writes there, so it needs no lock and no launcher.
2. A plan is written beside the parts. It is the same for all shards of a run, and lists the records
   in order with the shard of each. Batches do not depend on what is finished, so a shard that was
   killed goes on with the same batches that a single process would run.
3. `gather` reads the folders of all n shards, refuses shards that do not belong together or are not
   finished, and writes the file that one process would have written. It loads no model.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lens_lora import registered
from lens_lora.errors import ArgumentError, SweepError, setting
from lens_lora.runs.fingerprint import differences
from lens_lora.runs.store import Store, fingerprint_of

# The plan of a shard, beside its parts, whose names end in .parquet.
PLAN = "plan"
# The key of a plan's metadata that holds the kind of its run.
KIND = b"lens_lora.kind"
_FOLDER = re.compile(r"(\d+)-of-(\d+)")


@dataclasses.dataclass(frozen=True, order=True)
class Shard:
    """One of several jobs that a run is divided into.

    Attributes:
        index: the number of this job, from 1.
        count: the number of all jobs.
    """

    index: int
    count: int

    @classmethod
    def of(cls, given: object) -> Shard | None:
        """The shard that a caller asks for; None for a run that is not divided.

        Args:
            given: (i, n) with i from 1 to n, or None.

        Raises:
            ArgumentError: anything else.
        """
        if given is None:
            return None
        numbers: Sequence[Any] = list(given) if isinstance(given, tuple | list) else []
        is_pair = len(numbers) == 2 and all(type(number) is int for number in numbers)
        if not is_pair or not 1 <= numbers[0] <= numbers[1]:
            raise ArgumentError(
                f"{setting('shard', given)}: expected (i, n), shard i of n, counted from 1."
            )
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.index} of {self.count}"

    def takes(self, number: int) -> bool:
        """Whether the batch with this number, from 0, is one of this shard's."""
        return number % self.count == self.index - 1

    def folder_in(self, shards: Path) -> Path:
        """The folder of its parts.

        Args:
            shards: the folder of all shards.
        """
        return shards / f"{self.index}-of-{self.count}"


def folder_of_shards(out: Path) -> Path:
    """The folder that holds the folders of all shards: 'results.shards' of 'results.parquet'."""
    return out.with_suffix(".shards")


def keep_plan(store: Store, plan: pa.Table, notes: dict[bytes, bytes]) -> None:
    """Write the plan of a shard, or check that its parts were written with the same plan.

    Args:
        store: the shard's own store.
        plan: the records of the whole run, with the shard of each.
        notes: further metadata of the plan.

    Raises:
        SweepError: the folder holds parts of another plan.
    """
    path = store.folder / PLAN
    if path.exists():
        there = _read_plan(path)
        is_same = there.equals(plan) and _notes_in(there, notes) == notes
        if not is_same:
            raise SweepError(
                f"{store.folder} was begun with other records or another batch size.",
                remedy="Give it those, another out, or start over with resume=False.",
                in_shell="Give it those, another --out, or start over with --no-resume.",
            )
        return
    store.write([plan], notes, path)


def _notes_in(plan: pa.Table, notes: dict[bytes, bytes]) -> dict[bytes, bytes | None]:
    metadata = plan.schema.metadata or {}
    return {name: metadata.get(name) for name in notes}


@dataclasses.dataclass(frozen=True)
class PlannedShard:
    """A shard that was begun, and its plan.

    Attributes:
        shard: the number of the shard.
        folder: the folder of its parts.
        plan: the records of the whole run, with the shard of each.
    """

    shard: Shard
    folder: Path
    plan: pa.Table


def _folders_by_shard(shards: Path) -> dict[Shard, Path]:
    """The folder of each shard within the folder of all."""
    by_shard: dict[Shard, Path] = {}
    for folder in sorted(shards.glob("*-of-*")):
        name = _FOLDER.fullmatch(folder.name)
        if name is not None:
            by_shard[Shard(int(name[1]), int(name[2]))] = folder
    return by_shard


def planned_shards(out: Path) -> list[PlannedShard]:
    """All shards of one run, in their order.

    Args:
        out: the result that they belong to.

    Raises:
        SweepError: no shards, a missing one, one whose plan cannot be read, or shards that do not
            belong together.
    """
    shards = folder_of_shards(out)
    by_shard = _folders_by_shard(shards)
    if not by_shard:
        raise SweepError(
            f"{shards} holds no shards.",
            remedy=f"Run each with shard=(i, n) and out={str(out)!r} first.",
            in_shell=f"Run each with --shard i/n --out {out} first.",
        )
    counts = sorted({shard.count for shard in by_shard})
    if len(counts) > 1:
        ways = " and ".join(str(count) for count in counts)
        raise SweepError(
            f"{shards} holds shards of {ways}: one run is divided in one way. Remove the folders "
            "of the others."
        )
    (count,) = counts
    every = [Shard(index, count) for index in range(1, count + 1)]
    begun = {shard for shard, folder in by_shard.items() if (folder / PLAN).exists()}
    missing = [shard for shard in every if shard not in begun]
    if missing:
        raise unfinished(missing, out, "not begun")
    planned: list[PlannedShard] = []
    for shard in every:
        folder = by_shard[shard]
        planned.append(PlannedShard(shard, folder, _read_plan(folder / PLAN)))
    for other in planned[1:]:
        _require_same_plan(planned[0], other)
    return planned


def _read_plan(path: Path) -> pa.Table:
    """The table of a plan.

    Raises:
        SweepError: the file is damaged, or is no plan.
    """
    fingerprint_of(path)
    try:
        plan = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SweepError(f"{path}: a damaged plan of a shard ({error}).") from error
    if KIND not in plan.schema.metadata:
        raise SweepError(f"{path}: not the plan of a shard.")
    return plan


def _require_same_plan(first: PlannedShard, other: PlannedShard) -> None:
    differing = differences(
        fingerprint_of(first.folder / PLAN), fingerprint_of(other.folder / PLAN)
    )
    if not differing and not other.plan.equals(first.plan, check_metadata=True):
        differing = ["their records or batch sizes differ"]
    if differing:
        raise SweepError(
            f"shards {first.shard} and {other.shard} are of different runs: "
            f"{'; '.join(differing)}. Run one of them again, with the call of the others."
        )


def unfinished(shards: list[Shard], out: Path, fact: str) -> SweepError:
    """The error for shards that have to be run, or finished, before they can be gathered.

    Args:
        shards: the numbers of the shards.
        out: the result.
        fact: what is wrong with them.
    """
    names = ", ".join(str(shard) for shard in shards)
    return SweepError(
        f"shard {names} of {out} is {fact}.",
        remedy=f"Run it again, with shard=({shards[0].index}, {shards[0].count}).",
        in_shell=f"Run it again, with --shard {shards[0].index}/{shards[0].count}.",
    )


def gather(out: str | Path) -> Any:
    """Join the shards of a sweep, or of a scan, into the file that one process would have written.

    No model is loaded. The folder of the shards is left, and can be removed afterwards.

    Args:
        out: the .parquet file that each shard was given as `out`.

    Returns:
        A `SweepResult` for a sweep; for a scan the table that `Bank.scan` returns.

    Raises:
        SweepError: there are no shards; one is missing, is not finished, or was written by another
            run; or a file cannot be read or written.
    """
    path = Path(out)
    planned = planned_shards(path)
    kind = planned[0].plan.schema.metadata[KIND].decode()
    module, _, name = registered.GATHERED[kind].partition(":")
    joined = getattr(importlib.import_module(module), name)
    return joined(path, planned)
