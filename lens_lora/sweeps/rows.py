"""The rows of a sweep, as tables and as files.

Each batch is a part (`runs/store.py`), one row per prompt with its values as lists. At the end
there are two tables, of prompts (with shift, sums and remainders) and of prompts × sites. Both
carry a hash of all rows: until the second one has it, the parts hold every row, also those of
earlier results, and rows that no longer have that hash are not taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lens_lora.core import Site, site_labels
from lens_lora.errors import SweepError, is_of_the_system
from lens_lora.runs.fingerprint import Fingerprint
from lens_lora.runs.store import Store, other_sweep
from lens_lora.sweeps.records import ANALYSES, Record

# --- A row


# What decides the numbers of a record. Its id does not, so a record whose id is corrected keeps its
# row. The prompt of a conversation is what its template made of it: it may write today's date.
CONTENT = ("prompt", "doc", "pre", "response", "chat")
# One value for each of `FIELDS`, and for each analysis its [site], None of a bad record.
Row = dict[str, Any]


def row_of(record: Record, **numbers: Any) -> Row:
    """The row of a record; without numbers that of a bad one."""
    shared = {name: getattr(record, name) for name in (*CONTENT, "error")}
    return {"id": str(record.id), **shared, **numbers}


# --- Rows ↔ tables


_TEXT = pa.string()
_NUMBER = pa.float64()
FIELDS = {
    "id": _TEXT,
    "prompt": _TEXT,
    "chat": pa.bool_(),  # whether the prompt is what a chat template made of messages
    "doc": _TEXT,
    "pre": _TEXT,
    "response": _TEXT,
    "tokens": pa.int64(),  # of the prompt
    "readout": _TEXT,
    "units": _TEXT,
    "base": _NUMBER,  # g(0), exact
    "adapted": _NUMBER,  # g(1), exact
    "shift": _NUMBER,  # g(1) − g(0)
    # Of a margin; not where either end is within three noise floors of zero. Else null.
    "flips": pa.bool_(),
    "error": _TEXT,
}
_PROMPTS_AT_ONCE = 256  # in one group of rows of the table of sites


def _prompts_table(rows: Sequence[Row], analyses: Sequence[str], ids: pa.Array) -> pa.Table:
    """One row per prompt; of each analysis also the sum, and what that leaves of the shift."""
    frame = pd.DataFrame(rows, columns=[*FIELDS, *analyses])
    table = pa.Table.from_pandas(frame[[*FIELDS]], pa.schema(FIELDS), preserve_index=False)
    table = table.set_column(0, "id", ids).drop_columns("error")
    for name in analyses:
        sums = frame[name].map(np.sum, na_action="ignore").astype(float)
        table = table.append_column(f"{name}_sum", pa.array(sums, from_pandas=True))
        if ANALYSES[name].has_remainder:
            left = pa.array(frame["shift"].astype(float) - sums, from_pandas=True)
            table = table.append_column(f"{name}_remainder", left)
    return table.append_column("error", pa.array(frame["error"], _TEXT))


def _sites_table(
    rows: Sequence[Row], analyses: Sequence[str], ids: pa.Array, sites: Sequence[Site]
) -> pa.Table:
    """One row per prompt and site, of the prompts without an error."""
    good = [i for i, row in enumerate(rows) if row["error"] is None]
    by_prompt = pa.array(np.repeat(good, len(sites)).astype(np.int64))
    by_site = pa.array(np.tile(np.arange(len(sites)), len(good)))
    columns: dict[str, pa.Array] = {
        "id": ids.take(by_prompt),
        "prompt": pa.array([row["prompt"] for row in rows], _TEXT).take(by_prompt),
    }
    for name, labels in site_labels(sites).items():
        columns[name] = pa.array(labels).take(by_site)
    for name in analyses:
        values = [rows[i][name] for i in good]
        columns[name] = pa.array(np.concatenate([np.empty(0), *values]), _NUMBER)
    return pa.table(columns)


def _rows_of_results(prompts: pa.Table, sites: pa.Table, analyses: Sequence[str]) -> list[Row]:
    """The prompts without an error, from the two tables that were written together."""
    plain = prompts.select(list(FIELDS)).to_pylist()
    rows = [{**row, "id": str(row["id"])} for row in plain if row["error"] is None]
    if not rows:
        return []
    for name in analyses:
        by_prompt = sites[name].to_numpy().reshape(len(rows), -1)
        for row, values in zip(rows, by_prompt, strict=True):
            row[name] = values
    return rows


def _mark(rows: Iterable[Row], analyses: Sequence[str]) -> bytes:
    """The hash of everything that rows without an error hold but their ids."""
    hashed = hashlib.sha256()
    for row in rows:
        if row["error"] is None:
            hashed.update(repr([row[name] for name in FIELDS if name != "id"]).encode())
            for name in analyses:
                hashed.update(np.ascontiguousarray(row[name], np.float64).tobytes())
    return hashed.hexdigest().encode()


# --- The files


Content = tuple[str | bool | None, ...]
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
    ) -> None:
        super().__init__(out, fingerprint)
        self.prompts_path: Path = self.path.with_suffix(".prompts.parquet")
        self.results: tuple[Path, ...] = (self.path, self.prompts_path)
        self._sites = sites
        self._analyses = analyses
        self._schema = pa.schema(FIELDS | dict.fromkeys(analyses, pa.list_(_NUMBER)))

    def done(self, records: Sequence[Record]) -> Mapping[Content, Row]:
        """What earlier runs finished without an error, by prompt and answers. Changes nothing."""
        rows = [row for row in [*self._in_results(), *self._in_parts()] if row["error"] is None]
        self.require_version()
        contents = set(map(content, records))
        for row in rows:
            if content(row) not in contents:
                raise other_sweep(_unknown(row, records, self.prompts_path))
        return {content(row): row for row in rows}

    def add(self, rows: Sequence[Row]) -> None:
        """Write a part with all of these rows; if that is interrupted, none of them is kept."""
        self.write([pa.Table.from_pylist(list(rows), self._schema)], {})

    def merge(self, records: Sequence[Record], before: Mapping[Content, Row]) -> None:
        """Write both result files, in the order of the records, and remove the parts."""
        if before and self.path.exists():
            self.add(list(before.values()))
        good_last = sorted(self._in_parts(), key=lambda row: row["error"] is None)
        known = {content(row): row for row in good_last}
        lost = [r for r in records if r.error is None and content(r) not in known]
        if lost:
            missing = f"{len(lost)} of {len(records)} records, {lost[0].where} among them"
            raise self.lacking(missing)
        rows = [row_of(r) if r.error is not None else known[content(r)] for r in records]
        self._write(rows, [record.id for record in records])
        self.remove()

    def _in_parts(self) -> list[Row]:
        rows: list[Row] = []
        for _, table in self.parts():
            for row in table.to_pylist():
                values = {name: np.array(row[name]) for name in self._analyses}
                rows.append(row | values)
        return rows

    def _in_results(self) -> list[Row]:
        """Rows of the two results; none if one was deleted, or not yet written."""
        present = [self.require_result(path) for path in self.results]
        if not all(present):
            return []
        sites, prompts = map(read, self.results)
        mark = prompts.schema.metadata.get(_MARK)
        if mark != sites.schema.metadata.get(_MARK):
            return []
        try:
            rows = _rows_of_results(prompts, sites, self._analyses)
        except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.prompts_path, f"and {self.path} do not fit: {error}") from error
        if mark != _mark(rows, self._analyses):
            raise _damaged(self.prompts_path, f"or {self.path}: their rows were changed")
        return rows

    def _write(self, rows: Sequence[Row], ids: Sequence[int | str]) -> None:
        """Ids are integers where all are, else strings."""
        is_whole = all(isinstance(identity, int) for identity in ids)
        column = pa.array(ids, pa.int64()) if is_whole else pa.array(list(map(str, ids)), _TEXT)
        cuts = [slice(i, i + _PROMPTS_AT_ONCE) for i in range(0, len(rows), _PROMPTS_AT_ONCE)]
        tables = (_sites_table(rows[cut], self._analyses, column[cut], self._sites) for cut in cuts)
        notes = {_MARK: _mark(rows, self._analyses)}
        self.write(tables, notes, self.path)
        self.write([_prompts_table(rows, self._analyses, column)], notes, self.prompts_path)


def _unknown(row: Row, records: Sequence[Record], path: Path) -> str:
    """A finished row that belongs to no record, in words."""
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
    """The file alone: folders named 'a=b' add no columns."""
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
