"""A sweep as several jobs: what a shard's plan holds, and how the shards become one result."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import pyarrow as pa

from lens_lora.core import Site
from lens_lora.errors import many
from lens_lora.runs.processes import Processes
from lens_lora.runs.shards import KIND, PlannedShard, Shard, unfinished
from lens_lora.runs.store import fingerprint_of
from lens_lora.sweeps.batches import Job
from lens_lora.sweeps.records import Record
from lens_lora.sweeps.result import AskedReadout, SweepResult, result_of
from lens_lora.sweeps.rows import CONTENT, FIELDS, Content, RowStore, content

# The key, in a plan's metadata, of what the results hold besides their rows.
_ABOUT = b"lens_lora.about"


@final
@dataclasses.dataclass(frozen=True)
class SweepShard:
    """One finished shard of a sweep. `ll.gather(out)` makes the result, once all are finished.

    Attributes:
        out: the result that all shards make together.
        shard: (i, n), shard i of n, counted from 1.
        prompts: how many prompts this shard has finished.
        resumed: how many of them earlier runs had finished.
        errors: (id, what is wrong, with its line) of each bad record of the whole sweep.
    """

    out: Path
    shard: tuple[int, int]
    prompts: int
    resumed: int
    errors: tuple[tuple[int | str, str], ...]

    def __repr__(self) -> str:
        index, count = self.shard
        before = f" ({self.resumed} before this run)" if self.resumed else ""
        return (
            f"SweepShard: {index} of {count} of {self.out}, {many(self.prompts, 'prompt')}{before}"
        )


# --- The plan


def plan_of(records: Sequence[Record], batches: Sequence[Sequence[Job]], shards: int) -> pa.Table:
    """All records in order, and the shard of each; a bad record has none.

    Args:
        records: all records, with what is wrong with each.
        batches: the batches of the whole sweep.
        shards: how many shards there are.
    """
    shard_of: dict[Content, int] = {}
    for number, batch in enumerate(batches):
        # The shard that `takes` this batch.
        index = number % shards + 1
        for job in batch:
            shard_of[content(job.record)] = index
    columns: dict[str, pa.Array] = {
        "id": pa.array([str(record.id) for record in records], pa.string()),
        "is_number": pa.array([isinstance(record.id, int) for record in records], pa.bool_()),
    }
    for name in (*CONTENT, "error"):
        values = [getattr(record, name) for record in records]
        columns[name] = pa.array(values, FIELDS[name])
    shard_of_each: list[int | None] = []
    for record in records:
        shard_of_each.append(None if record.error else shard_of[content(record)])
    columns["shard"] = pa.array(shard_of_each, pa.int64())
    return pa.table(columns)


def notes_of(
    sites: Sequence[Site],
    analyses: Sequence[str],
    meta: Mapping[str, str],
    asked: AskedReadout,
    batch_size: int,
) -> dict[bytes, bytes]:
    """The part of a plan that is not its records.

    Args:
        sites: the sites of the lens.
        analyses: the analyses that are run.
        meta: model, adapter, dtype and versions.
        asked: the sweep's readout.
        batch_size: the size by which the records were divided into batches.
    """
    about = {
        "sites": [dataclasses.asdict(site) for site in sites],
        "analyses": list(analyses),
        "meta": dict(meta),
        "label": asked.label,
        "units": asked.units,
        "batch_size": batch_size,
    }
    return {KIND: b"sweep", _ABOUT: json.dumps(about, sort_keys=True).encode()}


# --- What joins the shards


def gathered(out: Path, planned: Sequence[PlannedShard]) -> SweepResult:
    """Write both results from the parts of all shards.

    Args:
        out: the result.
        planned: all shards, with the same plan.

    Raises:
        SweepError: a shard that is not finished.
    """
    plan = planned[0].plan
    about: dict[str, Any] = json.loads((plan.schema.metadata or {})[_ABOUT])
    sites = tuple(Site(**fields) for fields in about["sites"])
    fingerprint = fingerprint_of(planned[0].folder / "plan")
    analyses: tuple[str, ...] = tuple(about["analyses"])
    entries = plan.to_pylist()
    finished: dict[Content, dict[str, Any]] = {}
    store = RowStore(out, fingerprint, sites, analyses)
    for shard in planned:
        store_of_shard = RowStore(out, fingerprint, sites, analyses, shard.folder)
        finished |= _finished_rows(store_of_shard)
        store.damaged |= store_of_shard.damaged
    _require_finished(entries, finished, len(planned), out)
    rows = [_row_of(entry, finished) for entry in entries]
    ids = [_id_of(entry) for entry in entries]

    with store.writing(Processes()):
        store.begin(anew=False)
        store.write_results(rows, ids)
        store.remove()
        asked = AskedReadout(about["label"], about["units"])
        result = result_of(store, sites, about["meta"], analyses, 0, asked)
    store.warn_of_bad_records(result.errors, len(result.errors), len(rows))
    return result


def _finished_rows(store: RowStore) -> dict[Content, dict[str, Any]]:
    """The rows of a shard by their `content`; one with numbers replaces one with an error."""
    rows: dict[Content, dict[str, Any]] = {}
    with_numbers_last = sorted(store.finished_rows(), key=lambda row: row["error"] is None)
    for row in with_numbers_last:
        rows[content(row)] = row
    return rows


def _require_finished(
    entries: Sequence[dict[str, Any]],
    finished: Mapping[Content, dict[str, Any]],
    count: int,
    out: Path,
) -> None:
    """Refuse to join the shards if one of them lacks a row.

    Args:
        entries: the plan's records.
        finished: the rows of all shards.
        count: how many shards there are.
        out: the result.
    """
    lacking: Counter[int] = Counter()
    for entry in entries:
        if entry["shard"] is not None and content(entry) not in finished:
            lacking[entry["shard"]] += 1
    if lacking:
        shards = [Shard(index, count) for index in sorted(lacking)]
        fact = f"not finished: {many(lacking.total(), 'prompt')} without numbers"
        raise unfinished(shards, out, fact)


def _row_of(entry: dict[str, Any], finished: Mapping[Content, dict[str, Any]]) -> dict[str, Any]:
    """The row of a record: what its shard found, or the error for which no shard runs it."""
    if entry["shard"] is None:
        return {name: entry[name] for name in ("id", *CONTENT, "error")}
    return finished[content(entry)]


def _id_of(entry: Mapping[str, Any]) -> int | str:
    """The id of a record, which the plan keeps as text."""
    return int(entry["id"]) if entry["is_number"] else entry["id"]
