"""The files of a run: a killed run loses at most one part, and is resumed only if nothing changed.

1. Each finished batch is a Parquet file of its own in `results.parts/`, which is there completely
   or not at all. Its name contains the hash of its bytes, so a part that was cut or changed is
   noticed before it is read. Such a part is reported and set aside, and its records run again.
2. At the end the parts are merged into the results, in the order of the records, and removed.
   Subclasses, such as `sweeps.rows.RowStore`, decide what the rows are.
3. The metadata of each file hold the fingerprint of its run (`fingerprint.py`), which is compared
   with the present one on a resume.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lens_lora.errors import SweepError, is_of_the_system, setting, warn
from lens_lora.runs.fingerprint import Fingerprint, differences, short_hash
from lens_lora.runs.processes import (
    Processes,
    only_writer,
    require_one_process,
    write_errors_of,
)

# The key of a file's metadata that holds the fingerprint.
_FINGERPRINT_KEY = b"lens_lora.sweep"
# A warning lists at most this many bad records or damaged parts.
_LISTED = 10
# The name of a part: the time at which it was written, in nanoseconds, and the hash of its bytes.
_PART_NAME = re.compile(r"\d+-([0-9a-f]{32})\.parquet")


class Store:
    """The files of one run.

    Attributes:
        path: the file of the result.
        folder: the folder of the parts until they are merged; a shard has a folder of its own.
        results: every file that is written at the end; none for a shard.
        fingerprint: everything except the records that affects a number, as JSON holds it.
        damaged: the parts that could not be read, with the reason.
    """

    def __init__(
        self, out: str | Path, fingerprint: Fingerprint, folder: Path | None = None
    ) -> None:
        """Name the files.

        Args:
            out: the file of the result.
            fingerprint: everything except the records that affects a number.
            folder: the folder of a shard, where nobody else writes; None for a whole run.
        """
        self.path: Path = Path(out)
        if self.path.suffix != ".parquet":
            place = setting("out", str(out))
            raise SweepError(f"{place}: expected a name that ends in .parquet.")
        if self.path.is_dir():
            raise SweepError(f"{setting('out', str(out))} is a folder; name a file in it.")
        self.is_shard: bool = folder is not None
        self.folder: Path = folder or self.path.with_suffix(".parts")
        self.results: tuple[Path, ...] = () if self.is_shard else (self.path,)
        self.damaged: dict[Path, str] = {}
        self.fingerprint: Fingerprint = json.loads(_as_json(fingerprint))

    @contextlib.contextmanager
    def writing(self, processes: Processes) -> Generator[None]:
        """Within the block, no other run writes here, and every process runs this one.

        A shard takes no lock, because it has a folder of its own.
        """
        if self.is_shard:
            require_one_process(processes)
            yield
            return
        lock = only_writer(self.path) if processes.is_main else contextlib.nullcontext()
        with lock:
            of_first, *_ = processes.gather(self.fingerprint)
            differing = differences(of_first, self.fingerprint)
            if differing:
                raise SweepError(
                    f"process {processes.index + 1} of {processes.count} runs another sweep than "
                    f"process 1: {'; '.join(differing)}. Give each of them the same model, adapter "
                    "and readout."
                )
            yield
            # The main process holds its lock until all processes have read the results.
            processes.wait()

    # --- What is there already

    def require_same_sweep(self) -> None:
        """Refuse files of another run, as far as the fields of `fingerprint` tell.

        Nothing is changed.

        Raises:
            SweepError: a file is of another run; the error names it and each field that differs.
        """
        fingerprints = {path: fingerprint_of(path) for path in self.results if path.exists()}
        for path in self._part_paths():
            table = _read_part(path)
            if not isinstance(table, str):
                fingerprints[path] = _fingerprint_in(table.schema)
                break  # All parts in a folder are of one run.
        for path, fingerprint in fingerprints.items():
            known = {field: fingerprint.get(field) for field in self.fingerprint}
            self._require_same(known, path)

    def require_version(self) -> None:
        """Refuse to resume a run that uses code of the caller's own without a version.

        Raises:
            SweepError: there are files of this run, and such code took part in their numbers.
        """
        own_code = self.fingerprint["own_code"]
        if not own_code or self.fingerprint["version"] is not None:
            return
        if self._part_paths() or any(path.exists() for path in self.results):
            raise SweepError(
                f"{self.path} was computed with code of your own, {', '.join(own_code)}, and "
                "without a version, so nothing tells whether that code has changed.",
                remedy="Start over with resume=False; with version='…' as well, that run can be "
                "resumed.",
                in_shell="Start over with --no-resume.",
            )

    def parts(self) -> Iterator[tuple[Path, pa.Table]]:
        """The file and the rows of each part, in the order of writing.

        Parts that cannot be read are added to `damaged`.

        Raises:
            SweepError: a part is of another run.
        """
        for path in self._part_paths():
            table = _read_part(path)
            if isinstance(table, str):
                self.damaged[path] = table
                continue
            self._require_same(_fingerprint_in(table.schema), self.folder)
            yield path, table

    def require_result(self, path: Path) -> bool:
        """Whether the file of this result exists.

        Raises:
            SweepError: it exists and is of another run.
        """
        if not path.exists():
            return False
        self._require_same(fingerprint_of(path), path)
        return True

    def _part_paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    def _require_same(self, there: Fingerprint, path: Path) -> None:
        differing = differences(there, self.fingerprint)
        if differing:
            raise other_sweep(f"{path} holds another sweep: {'; '.join(differing)}")

    # --- What is written

    def begin(self, *, anew: bool) -> None:
        """Make the folder of parts, and set damaged ones aside.

        Args:
            anew: whether to remove existing results and parts first.
        """
        with write_errors_of(self.path):
            if anew:
                for path in self.results:
                    path.unlink(missing_ok=True)
                if self.folder.exists():
                    shutil.rmtree(self.folder)
        with write_errors_of(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.damaged:
                if path.exists():
                    path.rename(path.with_name(f"{path.name}.damaged"))

    def write(
        self,
        tables: Iterable[pa.Table],
        notes: Mapping[bytes, bytes],
        path: Path | None = None,
        **options: Any,
    ) -> None:
        """Write tables as a part, or as a result, completely or not at all.

        The file has a temporary name until it is complete and on the disk.

        Args:
            tables: groups of rows, only one of which is in memory at a time; at least one.
            notes: further metadata of the file.
            path: the file of the result; None for a part.
            options: keyword arguments of `pyarrow.parquet.ParquetWriter`.
        """
        unfinished = self.folder / f".{uuid.uuid4().hex}"
        try:
            with write_errors_of(path or self.folder):
                self._write_tables(unfinished, tables, notes, options)
                content_hash = _flush(unfinished)
                part = self.folder / f"{time.time_ns()}-{content_hash}.parquet"
                finished = path or part
                os.replace(unfinished, finished)
                _flush_names(finished.parent)
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _write_tables(
        self,
        path: Path,
        tables: Iterable[pa.Table],
        notes: Mapping[bytes, bytes],
        options: Mapping[str, Any],
    ) -> None:
        others = iter(tables)
        first = next(others)
        metadata = {_FINGERPRINT_KEY: _as_json(self.fingerprint), **notes}
        with pq.ParquetWriter(path, first.schema.with_metadata(metadata), **options) as writer:
            for table in itertools.chain([first], others):
                writer.write_table(table, row_group_size=max(len(table), 1))

    def remove(self) -> None:
        """Remove the parts once all rows are in the results; errors are ignored."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- What is reported

    def warn_of_bad_records(
        self, bad: Iterable[tuple[Any, Any]], n_bad: int, n_records: int
    ) -> None:
        """Warn of records without numbers, and name the first of them.

        Args:
            bad: (id, error) of each of these records.
            n_bad: the number of these records.
            n_records: the number of all records.
        """
        if n_bad:
            first = itertools.islice(bad, _LISTED)
            listed = [f"{identity!r}: {error}" for identity, error in first]
            fact = f"{n_bad} of {n_records} records have no numbers (column 'error'):"
            warn(self._list(fact, listed, n_bad))

    def warn_of_damaged_parts(self) -> None:
        """Warn of parts that could not be read, and name the first of them."""
        count = len(self.damaged)
        if count:
            damages = [f"{path}: {reason}" for path, reason in self.damaged.items()]
            fact = f"{count} files of finished records could not be read, and are run again:"
            warn(self._list(fact, damages[:_LISTED], count))

    def _list(self, fact: str, listed: Sequence[str], count: int) -> str:
        more = [f"… and {count - _LISTED} more"] if count > _LISTED else []
        return "\n  ".join([f"{self.path}: {fact}", *listed, *more])

    def lacking(self, records: str) -> SweepError:
        """The error for records whose parts another machine wrote into another folder."""
        return SweepError(
            f"{self.folder} lacks {records}: several machines must write to one shared folder. Run "
            "it again to resume."
        )


def other_sweep(fact: str) -> SweepError:
    """The error for results that belong to another sweep."""
    return SweepError(
        f"{fact}.",
        remedy="Give another out, or start over with resume=False.",
        in_shell="Give another --out, or start over with --no-resume.",
    )


class Unchanged:
    """The file of a result, which is read only as long as nobody has replaced it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._metadata = pq.read_schema(path).metadata

    @property
    def path(self) -> Path:
        """The path of the file.

        Raises:
            SweepError: another file is in its place.
        """
        if pq.read_schema(self._path).metadata != self._metadata:
            raise SweepError(
                f"{self._path} was replaced after this result was made, by another sweep or one of "
                "more records. Use what that one returned, or run this one with another out."
            )
        return self._path


def fingerprint_of(path: Path) -> Fingerprint:
    """The fingerprint of the run that wrote this result.

    Raises:
        SweepError: the file cannot be read, or was not written by a run.
    """
    try:
        return _fingerprint_in(pq.read_schema(path))
    except KeyError as error:
        raise SweepError(
            f"{path} exists and is not the result of a sweep",
            remedy="give another out, or overwrite it with resume=False.",
            in_shell="give another --out, or overwrite it with --no-resume.",
        ) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        if is_of_the_system(error):
            raise SweepError(f"{path}: cannot be read ({error}).") from error
        raise SweepError(
            f"{path}: not a Parquet file, or a damaged one ({error}). Restore it from a copy, "
            "delete it, or give another out."
        ) from error


def _as_json(fingerprint: Fingerprint) -> bytes:
    return json.dumps(fingerprint, ensure_ascii=True, sort_keys=True).encode()


def _fingerprint_in(schema: pa.Schema) -> Fingerprint:
    return json.loads((schema.metadata or {})[_FINGERPRINT_KEY])


def _read_part(path: Path) -> pa.Table | str:
    """The rows of a part, or what is wrong with it."""
    name = _PART_NAME.fullmatch(path.name)
    if name is None:
        return "not a part that a sweep wrote"
    try:
        content = path.read_bytes()
        if short_hash(content) != name[1]:
            return "damaged, its contents do not match the hash in its name"
        table = pq.read_table(pa.BufferReader(content))
        _fingerprint_in(table.schema)
        return table
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        fault = "cannot be read" if is_of_the_system(error) else "damaged"
        return f"{fault} ({error})"


def _flush(path: Path) -> str:
    """Wait until a file's bytes are on the disk, and return their hash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return short_hash(file.read())


def _flush_names(folder: Path) -> None:
    """Wait until a folder's entries are on the disk, if the file system can tell."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder.
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
