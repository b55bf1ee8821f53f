"""Where a sweep keeps finished batches, so that a kill loses at most one batch.

1. Each batch is written to its own file in `results.parts/`, first under a temporary name, so every
   file with a part's name is complete.
2. At the end the parts are merged, in the order of the records, into `results.parquet` (one row per
   prompt and site) and `results.prompts.parquet` (one row per prompt), and removed.
3. What the numbers were computed with (`Fingerprint`) is stored beside them and compared on a
   resume.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lens_lora.hooked.sites import Site
from lens_lora.sweeps.batches import Row
from lens_lora.sweeps.records import Record, SweepError
from lens_lora.sweeps.tables import (
    part_table,
    prompts_table,
    rows_of_part,
    rows_of_results,
    sites_table,
)

__all__ = ["METADATA", "Store", "require_same_sweep"]

Fingerprint = Mapping[str, Any]
METADATA = b"lens_lora.sweep"
_ABOUT = "about.json"
_PROMPTS_AT_ONCE = 256
# A renamed model or adapter is still the same one if its weights are.
_NAMES = {"model": "model_weights", "adapter": "adapter_weights"}


class Store:
    """The files of one sweep.

    Args:
        out: the results' path, ending in .parquet.
        fingerprint: what the numbers depend on besides the records; plain JSON.
        sites: of the lens, in its order.
        analyses: names from `ANALYSES`.

    Attributes:
        sites_path: one row per prompt and site.
        prompts_path: one row per prompt.
        parts: the folder of finished batches, until they are merged.

    Raises:
        SweepError: the path does not end in .parquet, or is a folder.
    """

    sites_path: Path
    prompts_path: Path
    parts: Path

    def __init__(
        self,
        out: str | Path,
        fingerprint: Fingerprint,
        sites: Sequence[Site],
        analyses: Sequence[str],
    ) -> None:
        self.sites_path, self.prompts_path, self.parts = _paths(out)
        self._fingerprint, self._sites, self._analyses = fingerprint, sites, analyses

    def done(self) -> dict[str, Row]:
        """{id: row} of what earlier runs finished without an error. Changes nothing.

        Raises:
            SweepError: the files are not a sweep's, or those of a different sweep.
        """
        rows: dict[str, Row] = {}
        if self.prompts_path.exists() or self.sites_path.exists():
            rows |= {row.id: row for row in self._finished()}
        if self._about.exists():
            _require_same(_about_of_parts(self.parts), self._fingerprint, self.parts)
            rows |= {row.id: row for row in self._from_parts() if row.error is None}
        return rows

    def begin(self, *, anew: bool) -> None:
        """Make the folder of parts.

        Args:
            anew: remove what earlier runs have finished.

        Raises:
            SweepError: the folder cannot be made.
        """
        if anew:
            self.sites_path.unlink(missing_ok=True)
            self.prompts_path.unlink(missing_ok=True)
        if anew or not self._about.exists():
            shutil.rmtree(self.parts, ignore_errors=True)
            try:
                self.parts.mkdir(parents=True)
            except OSError as error:
                raise SweepError(
                    f"{self.parts}: the folder cannot be made ({error.strerror}); give another out."
                ) from error
            text = json.dumps(self._fingerprint, ensure_ascii=False, indent=1)
            self._write(self._about, lambda path: path.write_text(text, "utf-8"))

    def add(self, rows: Sequence[Row]) -> None:
        """Write a part with all of these rows; if that is interrupted, none of them is kept.

        Args:
            rows: of one batch.
        """
        table = part_table(rows, self._analyses)
        path = self.parts / f"{uuid.uuid4().hex}.parquet"
        self._write(path, lambda path: pq.write_table(table, path))

    def merge(self, records: Sequence[Record], before: Mapping[str, Row]) -> list[Row]:
        """Write both result files, in the order of the records, and remove the parts.

        Args:
            records: all of them, bad ones included.
            before: what `done` gave.

        Returns:
            One row per record.

        Raises:
            SweepError: a record has no part.
        """
        failed: dict[str, Row] = {}
        done = dict(before)
        for row in self._from_parts():
            (failed if row.error is not None else done)[row.id] = row
        known = failed | done
        lost = [r for r in records if r.error is None and str(r.id) not in known]
        if lost:
            raise SweepError(
                f"{self.parts} lacks {len(lost)} of {len(records)} records, {lost[0].where} among "
                "them: several machines must write to one shared folder. Run it again to resume."
            )
        rows = [Row.failed(r) if r.error is not None else known[str(r.id)] for r in records]
        ids = [record.id for record in records]
        self._write(self.sites_path, lambda path: self._write_sites(path, rows, ids))
        about = {METADATA: json.dumps(self._fingerprint, ensure_ascii=False).encode()}
        table = prompts_table(rows, ids, self._analyses).replace_schema_metadata(about)
        self._write(self.prompts_path, lambda path: pq.write_table(table, path))
        shutil.rmtree(self.parts)
        return rows

    def prompts(self) -> list[dict[str, Any]]:
        """The rows of the merged table, one per prompt."""
        return _read(self.prompts_path).to_pylist()

    @property
    def _about(self) -> Path:
        return self.parts / _ABOUT

    def _from_parts(self) -> Iterable[Row]:
        for path in sorted(self.parts.glob("*.parquet")):
            yield from rows_of_part(_read(path), self._analyses)

    def _finished(self) -> list[Row]:
        """Rows of the result files; none if one of the two was deleted."""
        for path in (self.prompts_path, self.sites_path):
            if path.exists():
                _require_same(_about_of(path), self._fingerprint, path)
        if not (self.prompts_path.exists() and self.sites_path.exists()):
            return []
        prompts, sites = _read(self.prompts_path), _read(self.sites_path)
        return rows_of_results(prompts, sites, len(self._sites), self._analyses)

    def _write_sites(self, path: Path, rows: Sequence[Row], ids: Sequence[int | str]) -> None:
        step, is_whole = _PROMPTS_AT_ONCE, all(isinstance(identity, int) for identity in ids)
        ids = ids if is_whole else [str(identity) for identity in ids]
        about = {METADATA: json.dumps(self._fingerprint, ensure_ascii=False).encode()}
        tables = (
            sites_table(rows[i : i + step], ids[i : i + step], self._sites, self._analyses)
            for i in range(0, len(rows), step)
        )
        first = next(tables)
        with pq.ParquetWriter(path, first.schema.with_metadata(about)) as writer:
            for table in itertools.chain([first], tables):
                writer.write_table(table)

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write under a temporary name, and rename once the file is complete and on the disk."""
        unfinished = self.parts / f".{uuid.uuid4().hex}"
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)


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
    sites, prompts, parts = _paths(out)
    there = {path: _about_of(path) for path in (prompts, sites) if path.exists()}
    if (parts / _ABOUT).exists():
        there[parts] = _about_of_parts(parts)
    for path, about in there.items():
        _require_same({key: about.get(key) for key in known}, known, path)


def _paths(out: str | Path) -> tuple[Path, Path, Path]:
    """The rows per site, the rows per prompt, and the folder of parts."""
    sites = Path(out)
    if sites.suffix != ".parquet":
        raise SweepError(f"out={str(out)!r}: expected a name that ends in .parquet.")
    if sites.is_dir():
        raise SweepError(f"out={str(out)!r} is a folder; name a file in it.")
    return sites, sites.with_suffix(".prompts.parquet"), sites.with_suffix(".parts")


def _require_same(there: Fingerprint, here: Fingerprint, path: Path) -> None:
    keys = dict.fromkeys([*here, *there])
    differ = {key for key in keys if there.get(key) != here.get(key)}
    differ -= {name for name, weights in _NAMES.items() if weights not in differ}
    if differ:
        facts = "; ".join(
            f"{key} {there.get(key)!r} there, {here.get(key)!r} here"
            for key in keys
            if key in differ
        )
        raise SweepError(
            f"{path} holds another sweep: {facts}. Give another out, or start over with "
            "resume=False (--no-resume)."
        )


def _about_of_parts(parts: Path) -> Fingerprint:
    return json.loads((parts / _ABOUT).read_text("utf-8"))


def _read(path: Path) -> pa.Table:
    """The file alone: folders named 'a=b' add no columns."""
    return pq.ParquetFile(path).read()


def _about_of(path: Path) -> Fingerprint:
    """The fingerprint in a result file.

    Raises:
        SweepError: not a Parquet file, or not a sweep's.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowInvalid as error:
        raise SweepError(f"{path}: not a Parquet file ({error}); give another out.") from error
    if METADATA not in metadata:
        raise SweepError(
            f"{path} exists and is not the result of a sweep; give another out, or overwrite it "
            "with resume=False (--no-resume)."
        )
    return json.loads(metadata[METADATA])
