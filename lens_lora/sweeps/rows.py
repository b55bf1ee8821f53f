"""The rows of a sweep, as tables and as files.

Each batch is a part (`runs/store.py`), one row per prompt with its values as lists. At the end
there are two tables, of prompts (with shift, sums and remainders) and of prompts × sites. Until
both are written, the parts hold every row, those of earlier results included. Both tables carry a
hash of all rows, and tables whose rows no longer match it are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lens_lora.core import Site, Sites
from lens_lora.errors import SweepError, is_of_the_system
from lens_lora.runs.fingerprint import Fingerprint
from lens_lora.runs.store import Store, other_sweep
from lens_lora.sweeps.analyses import ANALYSES
from lens_lora.sweeps.records import Record

# --- A row


# The fields that decide the numbers of a record. Its id does not, so a record whose id is corrected
# keeps its row. The prompt of a conversation is what its template made of it, which may write
# today's date.
CONTENT = ("prompt", "doc", "pre", "response", "chat")
# A value for each of `FIELDS`, and for each analysis an array [site], or None for a bad record.
Row = dict[str, Any]
Content = tuple[str | bool | None, ...]


def row_of(record: Record, **numbers: Any) -> Row:
    """The row of a record. That of a bad one has no numbers."""
    shared = {name: getattr(record, name) for name in (*CONTENT, "error")}
    return {"id": str(record.id), **shared, **numbers}


# --- Rows ↔ tables


_TEXT = pa.string()
_NUMBER = pa.float64()
FIELDS = {
    "id": _TEXT,
    "prompt": _TEXT,
    # Whether the prompt is what a chat template made of messages.
    "chat": pa.bool_(),
    "doc": _TEXT,
    "pre": _TEXT,
    "response": _TEXT,
    # The length of the prompt.
    "tokens": pa.int64(),
    "readout": _TEXT,
    "units": _TEXT,
    # g(0), g(1) and g(1) − g(0), exact.
    "base": _NUMBER,
    "adapted": _NUMBER,
    "shift": _NUMBER,
    # Whether a margin changes sign; an end within three noise floors of zero has no sign. Null for
    # other readouts.
    "flips": pa.bool_(),
    "error": _TEXT,
}
# How many prompts make one group of rows in the table of sites.
_PROMPTS_AT_ONCE = 256


def _prompts_table(rows: Sequence[Row], analyses: Sequence[str], ids: pa.Array) -> pa.Table:
    """The table with one row per prompt.

    Each analysis has a column of its sum over sites and, if that sum estimates the shift, one of
    the remainder.
    """
    frame = pd.DataFrame(rows, columns=[*FIELDS, *analyses])
    table = pa.Table.from_pandas(frame[[*FIELDS]], pa.schema(FIELDS), preserve_index=False)
    table = table.set_column(0, "id", ids).drop_columns("error")
    for name in analyses:
        sums = frame[name].map(np.sum, na_action="ignore").astype(float)
        table = table.append_column(f"{name}_sum", pa.array(sums, from_pandas=True))
        if ANALYSES[name].has_remainder:
            remainder = frame["shift"].astype(float) - sums
            column = pa.array(remainder, from_pandas=True)
            table = table.append_column(f"{name}_remainder", column)
    return table.append_column("error", pa.array(frame["error"], _TEXT))


def _sites_table(
    rows: Sequence[Row], analyses: Sequence[str], ids: pa.Array, sites: Sequence[Site]
) -> pa.Table:
    """The table with one row per prompt and site, without the prompts that have an error."""
    good = [i for i, row in enumerate(rows) if row["error"] is None]
    by_prompt = pa.array(np.repeat(good, len(sites)).astype(np.int64))
    by_site = pa.array(np.tile(np.arange(len(sites)), len(good)))
    columns: dict[str, pa.Array] = {
        "id": ids.take(by_prompt),
        "prompt": pa.array([row["prompt"] for row in rows], _TEXT).take(by_prompt),
    }
    for name, labels in Sites(sites).columns().items():
        columns[name] = pa.array(labels).take(by_site)
    for name in analyses:
        values = [rows[i][name] for i in good]
        columns[name] = pa.array(np.concatenate([np.empty(0), *values]), _NUMBER)
    return pa.table(columns)


def _rows_of_results(prompts: pa.Table, sites: pa.Table, analyses: Sequence[str]) -> list[Row]:
    """The rows without an error, from the two tables that were written together."""
    rows: list[Row] = []
    for row in prompts.select(list(FIELDS)).to_pylist():
        if row["error"] is None:
            rows.append({**row, "id": str(row["id"])})
    if not rows:
        return []
    for name in analyses:
        by_prompt = sites[name].to_numpy().reshape(len(rows), -1)
        for row, values in zip(rows, by_prompt, strict=True):
            row[name] = values
    return rows


def _mark(rows: Iterable[Row], analyses: Sequence[str]) -> bytes:
    """A hash of all rows without an error: of everything that they hold except their ids."""
    hashed = hashlib.sha256()
    for row in rows:
        if row["error"] is not None:
            continue
        fields = [row[name] for name in FIELDS if name != "id"]
        hashed.update(repr(fields).encode())
        for name in analyses:
            hashed.update(np.ascontiguousarray(row[name], np.float64).tobytes())
    return hashed.hexdigest().encode()


# --- The files


# The key of the hash of all rows in the metadata of both results.
_MARK = b"lens_lora.mark"


def content(record: Record | Row) -> Content:
    """The values of `CONTENT`, of a record or of its row."""
    row = row_of(record) if isinstance(record, Record) else record
    return tuple(row[name] for name in CONTENT)


class RowStore(Store):
    """The files of a sweep with a row per prompt.

    Attributes:
        prompts_path: one row per prompt; `path` has one per prompt and site.
    """

    def __init__(
        self,
        out: str | Path,
        fingerprint: Fingerprint,
        sites: Sequence[Site],
        analyses: Sequence[str],
        folder: Path | None = None,
    ) -> None:
        super().__init__(out, fingerprint, folder)
        self.prompts_path: Path = self.path.with_suffix(".prompts.parquet")
        if not self.is_shard:
            self.results: tuple[Path, ...] = (self.path, self.prompts_path)
        self._sites = sites
        self._analyses = analyses
        self._schema = pa.schema(FIELDS | dict.fromkeys(analyses, pa.list_(_NUMBER)))

    def done(self, records: Sequence[Record]) -> Mapping[Content, Row]:
        """The rows that earlier runs finished without an error, by their `content`.

        Changes nothing.

        Raises:
            SweepError: the files are of another sweep or of other records, or are damaged.
        """
        found = self.finished_rows()
        if not self.is_shard:
            found = [*self._in_results(), *found]
        self.require_version()
        contents = {content(record) for record in records}
        finished: dict[Content, Row] = {}
        for row in found:
            if row["error"] is not None:
                continue
            if content(row) not in contents:
                raise other_sweep(_unknown(row, records, self.prompts_path))
            finished[content(row)] = row
        return finished

    def add(self, rows: Sequence[Row]) -> None:
        """Write a part with all of these rows; if that is interrupted, none of them is kept."""
        self.write([pa.Table.from_pylist(list(rows), self._schema)], {})

    def merge(self, records: Sequence[Record], before: Mapping[Content, Row]) -> None:
        """Write both result files, in the order of the records, and remove the parts."""
        if before and self.path.exists():
            # The parts hold every row until both results are written.
            self.add(list(before.values()))
        # Where a record ran several times, a row without an error replaces one with an error.
        good_last = sorted(self.finished_rows(), key=lambda row: row["error"] is None)
        known = {content(row): row for row in good_last}
        rows: list[Row] = []
        lost: list[Record] = []
        for record in records:
            if record.error is not None:
                rows.append(row_of(record))
            elif content(record) in known:
                rows.append(known[content(record)])
            else:
                lost.append(record)
        if lost:
            raise self.lacking(f"{len(lost)} of {len(records)} records, {lost[0].where} among them")
        self.write_results(rows, [record.id for record in records])
        self.remove()

    def finished_rows(self) -> list[Row]:
        """The rows of all parts that can be read, in the order of writing."""
        rows: list[Row] = []
        for _, table in self.parts():
            for row in table.to_pylist():
                values = {name: np.array(row[name]) for name in self._analyses}
                rows.append(row | values)
        return rows

    def _in_results(self) -> list[Row]:
        """The rows of the two results; none if one of them was deleted, or not yet written."""
        has_sites = self.require_result(self.path)
        has_prompts = self.require_result(self.prompts_path)
        if not (has_sites and has_prompts):
            return []
        sites = read(self.path)
        prompts = read(self.prompts_path)
        mark = prompts.schema.metadata.get(_MARK)
        if mark != sites.schema.metadata.get(_MARK):
            return []
        try:
            rows = _rows_of_results(prompts, sites, self._analyses)
        except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.prompts_path, f"rows do not fit {self.path}: {error}") from error
        if mark != _mark(rows, self._analyses):
            raise _damaged(self.prompts_path, f"or {self.path} is: their rows were changed")
        return rows

    def write_results(self, rows: Sequence[Row], ids: Sequence[int | str]) -> None:
        """Write both tables, with one hash of all rows in both files.

        Args:
            rows: one for each record, in their order.
            ids: the ids of the records, a column of integers where all are integers, else of
                strings.
        """
        if all(isinstance(identity, int) for identity in ids):
            id_column = pa.array(ids, pa.int64())
        else:
            id_column = pa.array([str(identity) for identity in ids], _TEXT)
        notes = {_MARK: _mark(rows, self._analyses)}
        self.write(self._site_tables(rows, id_column), notes, self.path)
        self.write([_prompts_table(rows, self._analyses, id_column)], notes, self.prompts_path)

    def _site_tables(self, rows: Sequence[Row], ids: pa.Array) -> Iterator[pa.Table]:
        """The table of prompts and sites, some prompts at a time."""
        for start in range(0, len(rows), _PROMPTS_AT_ONCE):
            some = slice(start, start + _PROMPTS_AT_ONCE)
            yield _sites_table(rows[some], self._analyses, ids[some], self._sites)


def _unknown(row: Row, records: Sequence[Record], path: Path) -> str:
    """The words for a finished row that belongs to no record."""
    record = next((record for record in records if str(record.id) == row["id"]), None)
    if record is None:
        return (
            f"{path} or its parts hold the id {row['id']!r} (prompt {row['prompt']!r}), but the "
            "records do not"
        )
    field = next(name for name in CONTENT if row[name] != row_of(record)[name])
    return (
        f"the {field} of id {row['id']!r} is {row[field]!r} in {path} or its parts, but "
        f"{row_of(record)[field]!r} in the records ({record.where})"
    )


def read(path: Path) -> pa.Table:
    """Read one file; folders named 'a=b' above it add no columns.

    Raises:
        SweepError: a file that cannot be read.
    """
    try:
        return pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        if is_of_the_system(error):
            raise SweepError(f"{path}: cannot be read ({error}).") from error
        raise _damaged(path, f"it cannot be read ({error})") from error


def _damaged(path: Path, fact: str) -> SweepError:
    return SweepError(
        f"{path}: damaged, {fact}. Restore it from a copy, or delete it and run the same sweep "
        "again."
    )
