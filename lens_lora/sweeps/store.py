"""Where a sweep keeps finished batches, so that a kill loses at most one batch.

1. Each batch is a file of its own in `results.parts/` (parts.py), complete or not there.
2. At the end the parts are merged, in the order of the records, into `results.parquet` (one row per
   prompt and site) and `results.prompts.parquet` (one row per prompt), and removed.
3. Both results carry a hash of all rows. Until the second one has it, the parts hold every row,
   also those of earlier results; and rows that no longer have that hash are not taken.
4. What the numbers were computed with (`Fingerprint`) stands in each file and is compared on a
   resume.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lens_lora.hooked.sites import Site
from lens_lora.sweeps.batches import Row
from lens_lora.sweeps.files import told, write_whole
from lens_lora.sweeps.fingerprint import Fingerprint, differences
from lens_lora.sweeps.parts import METADATA, Damage, Part, Parts, as_json
from lens_lora.sweeps.records import Record, SweepError
from lens_lora.sweeps.resume import Content, content, finished
from lens_lora.sweeps.tables import prompts_table, rows_of_results, sites_table

__all__ = ["Store", "about_of", "paths", "require_same", "require_same_sweep"]

_MARK = b"lens_lora.mark"
_PROMPTS_AT_ONCE = 256


class Store:
    """The files of one sweep.

    Args:
        out: the results' path, ending in .parquet.
        fingerprint: what the numbers depend on besides the records.
        sites: of the lens, in its order.
        analyses: names from `ANALYSES`.

    Attributes:
        sites_path: one row per prompt and site.
        prompts_path: one row per prompt.
        fingerprint: as it is read from a file.
        parts: the finished batches, until they are merged.
        damaged: the parts that `done` could not read.
    """

    sites_path: Path
    prompts_path: Path
    fingerprint: Fingerprint
    parts: Parts
    damaged: tuple[Damage, ...]

    def __init__(
        self,
        out: str | Path,
        fingerprint: Fingerprint,
        sites: Sequence[Site],
        analyses: Sequence[str],
    ) -> None:
        self.sites_path, self.prompts_path, folder = paths(out)
        self.parts, self.damaged = Parts(folder), ()
        self.fingerprint: Fingerprint = json.loads(as_json(fingerprint))
        self._sites, self._analyses = sites, analyses

    def done(self, records: Sequence[Record]) -> Mapping[Content, Row]:
        """What earlier runs finished without an error, by prompt and answers. Changes nothing.

        Args:
            records: of this run.

        Raises:
            SweepError: the files are not a sweep's, are damaged, or are those of a different sweep
                or of other records.
        """
        parts, damaged = self.parts.read()
        self.damaged = tuple(damaged)
        for part in parts:
            require_same(part.about, self.fingerprint, self.parts.folder)
        rows = [row for part in parts for row in part.rows(self._analyses)]
        good = [row for row in [*self._finished(), *rows] if row.error is None]
        return finished(records, good, self.prompts_path)

    def begin(self, *, anew: bool) -> None:
        """Make the folder of parts, without the damaged ones.

        Args:
            anew: remove what earlier runs have finished.

        Raises:
            SweepError: the folder cannot be made, or an old file cannot be removed.
        """
        if anew:
            with told(self.sites_path):
                self.sites_path.unlink(missing_ok=True)
                self.prompts_path.unlink(missing_ok=True)
                self.parts.clear()
        self.parts.make()
        self.parts.set_aside(self.damaged)

    def add(self, rows: Sequence[Row]) -> None:
        """Write a part with all of these rows; if that is interrupted, none of them is kept.

        Args:
            rows: of one batch.

        Raises:
            SweepError: it cannot be written.
        """
        self.parts.add(rows, self._analyses, self.fingerprint)

    def merge(self, records: Sequence[Record], before: Mapping[Content, Row]) -> list[Row]:
        """Write both result files, in the order of the records, and remove the parts.

        Args:
            records: all of them, bad ones included.
            before: what `done` gave.

        Returns:
            One row per record.

        Raises:
            SweepError: a record has no part, or a file cannot be written.
        """
        if before and self.sites_path.exists():
            self.add(list(before.values()))
        here = self.fingerprint
        parts = [part for part in self.parts.read()[0] if not differences(part.about, here)]
        found = [row for part in parts for row in part.rows(self._analyses)]
        known = {content(row): row for row in found if row.error is not None}
        known |= {content(row): row for row in found if row.error is None}
        lost = [r for r in records if r.error is None and content(r) not in known]
        if lost:
            raise SweepError(
                f"{self.parts.folder} lacks {len(lost)} of {len(records)} records, "
                f"{lost[0].where} among them: several machines must write to one shared folder. "
                "Run it again to resume."
            )
        rows = [Row.failed(r) if r.error is not None else known[content(r)] for r in records]
        self._write(rows, [record.id for record in records])
        self.parts.remove()
        return rows

    def prompts(self) -> list[dict[str, Any]]:
        """The rows of the merged table, one per prompt."""
        return _read(self.prompts_path).to_pylist()

    def _finished(self) -> list[Row]:
        """Rows of the two results; none if one was deleted, or not yet written."""
        for path in (self.prompts_path, self.sites_path):
            if path.exists():
                require_same(about_of(path), self.fingerprint, path)
        if not (self.prompts_path.exists() and self.sites_path.exists()):
            return []
        prompts, sites = _read(self.prompts_path), _read(self.sites_path)
        mark = _mark_of(prompts)
        if mark != _mark_of(sites):
            return []
        try:
            rows = rows_of_results(prompts, sites, len(self._sites), self._analyses)
        except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise _damaged(
                self.prompts_path, f"and {self.sites_path} do not fit: {error}"
            ) from error
        if mark != _hash(rows, self._analyses):
            raise _damaged(self.prompts_path, f"or {self.sites_path}: their rows were changed")
        return rows

    def _write(self, rows: Sequence[Row], ids: Sequence[int | str]) -> None:
        mark = _hash([row for row in rows if row.error is None], self._analyses)
        about = {METADATA: as_json(self.fingerprint), _MARK: mark}
        step, is_whole = _PROMPTS_AT_ONCE, all(isinstance(identity, int) for identity in ids)
        ids = ids if is_whole else [str(identity) for identity in ids]
        by_site = (
            sites_table(rows[i : i + step], ids[i : i + step], self._sites, self._analyses)
            for i in range(0, len(rows), step)
        )
        by_prompt = iter([prompts_table(rows, ids, self._analyses)])
        for path, tables in {self.sites_path: by_site, self.prompts_path: by_prompt}.items():
            write = functools.partial(_write_tables, tables=tables, about=about)
            write_whole(path, write, self.parts.folder)


def require_same_sweep(out: str | Path, known: Fingerprint) -> None:
    """Check that results at `out`, if there are any, belong to this sweep.

    Changes nothing.

    Args:
        out: the results' path, ending in .parquet.
        known: part of a fingerprint; only its keys are compared.

    Raises:
        SweepError: the path has another ending, the files are not a sweep's, or those of a
            different sweep.
    """
    sites, prompts, folder = paths(out)
    known = json.loads(as_json(known))
    there = {path: about_of(path) for path in (prompts, sites) if path.exists()}
    first = next((part for part in Parts(folder).each() if isinstance(part, Part)), None)
    there |= {} if first is None else {first.path: first.about}
    for path, about in there.items():
        require_same({key: about.get(key) for key in known}, known, path)


def paths(out: str | Path) -> tuple[Path, Path, Path]:
    """The rows per site, the rows per prompt, and the folder of parts.

    Args:
        out: the results' path, ending in .parquet.

    Raises:
        SweepError: the path does not end in .parquet, or is a folder.
    """
    sites = Path(out)
    if sites.suffix != ".parquet":
        raise SweepError(f"out={str(out)!r}: expected a name that ends in .parquet.")
    if sites.is_dir():
        raise SweepError(f"out={str(out)!r} is a folder; name a file in it.")
    return sites, sites.with_suffix(".prompts.parquet"), sites.with_suffix(".parts")


def require_same(there: Fingerprint, here: Fingerprint, path: Path) -> None:
    """Check that a file belongs to this sweep.

    Args:
        there: of the file.
        here: of this sweep.
        path: of the file, for the message.

    Raises:
        SweepError: naming what differs.
    """
    differ = differences(there, here)
    if differ:
        raise SweepError(
            f"{path} holds another sweep: {'; '.join(differ)}. Give another out, or start over "
            "with resume=False (--no-resume)."
        )


def _write_tables(path: Path, tables: Iterator[pa.Table], about: Mapping[bytes, bytes]) -> None:
    first = next(tables)
    schema = first.schema.with_metadata(dict(about))
    with pq.ParquetWriter(path, schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)


def _read(path: Path) -> pa.Table:
    """The file alone: folders named 'a=b' add no columns.

    Raises:
        SweepError: it is damaged.
    """
    try:
        return pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from error


def _damaged(path: Path, fact: str) -> SweepError:
    return SweepError(
        f"{path}: damaged, {fact}. Restore it from a copy, or delete it and run the same sweep "
        "again."
    )


def about_of(path: Path) -> Fingerprint:
    """The fingerprint in a result file.

    Args:
        path: of the file.

    Raises:
        SweepError: not a Parquet file, or not a sweep's.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        about = json.loads(metadata[METADATA]) if METADATA in metadata else None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SweepError(
            f"{path}: not a Parquet file, or a damaged one ({error}). Restore it from a copy, "
            "delete it, or give another out."
        ) from error
    if about is None:
        raise SweepError(
            f"{path} exists and is not the result of a sweep; give another out, or overwrite it "
            "with resume=False (--no-resume)."
        )
    return about


def _mark_of(table: pa.Table) -> bytes | None:
    return (table.schema.metadata or {}).get(_MARK)


def _hash(rows: Sequence[Row], analyses: Sequence[str]) -> bytes:
    """Of everything that the rows of a sweep hold but their ids."""
    found = hashlib.sha256()
    for row in rows:
        fields = dataclasses.asdict(dataclasses.replace(row, id="", values={}))
        found.update(repr(fields).encode())
        for name in analyses:
            found.update(np.ascontiguousarray(row.values[name], np.float64).tobytes())
    return found.hexdigest().encode()
