"""The files of a sweep, in parts so that a kill loses at most one, and whether they may be resumed.

1. Each finished batch is a Parquet file of its own in `results.parts/`, complete or not there. Its
   name holds the hash of its bytes, so a part that was cut or changed is known before it is read:
   it is named and set aside, and its prompts run again.
2. At the end the parts are merged into the results, in the order of the records, and removed.
   What the rows are is up to the two kinds of sweep, `batches.RowStore` and `stream.TokenStore`.
3. In each file stands what its numbers depend on besides the records (`fingerprint.py`), which is
   compared on a resume.
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
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lens_lora.errors import SweepError, is_of_the_system, setting, warn
from lens_lora.runs.fingerprint import Fingerprint, differences, short_hash
from lens_lora.runs.processes import Processes, only_writer, told

# --- Files


_ABOUT = b"lens_lora.sweep"
_SHOWN = 10  # bad records or damaged parts in a warning
_PART_NAME = re.compile(r"\d+-([0-9a-f]{32})\.parquet")  # when it was written, and its hash


class Store:
    """The files of one sweep.

    Attributes:
        path: the result.
        folder: the parts lie in it until they are merged.
        results: every file that is written at the end.
        fingerprint: what its numbers depend on besides the records, as JSON holds it.
        damaged: the parts that could not be read, and why.
    """

    def __init__(self, out: str | Path, fingerprint: Fingerprint) -> None:
        self.path: Path = Path(out)
        if self.path.suffix != ".parquet":
            place = setting("out", str(out))
            raise SweepError(f"{place}: expected a name that ends in .parquet.")
        if self.path.is_dir():
            raise SweepError(f"{setting('out', str(out))} is a folder; name a file in it.")
        self.folder: Path = self.path.with_suffix(".parts")
        self.results: tuple[Path, ...] = (self.path,)
        self.damaged: dict[Path, str] = {}
        self.fingerprint: Fingerprint = json.loads(_as_json(fingerprint))

    @contextlib.contextmanager
    def writing(self, processes: Processes) -> Generator[None]:
        """Within the block no other sweep writes here, and every process runs this one."""
        with only_writer(self.path) if processes.is_main else contextlib.nullcontext():
            differ = differences(processes.gather(self.fingerprint)[0], self.fingerprint)
            if differ:
                raise SweepError(
                    f"process {processes.index + 1} of {processes.count} runs another sweep than "
                    f"process 1: {'; '.join(differ)}. Give each of them the same model, adapter "
                    "and readout."
                )
            yield
            processes.wait()  # the main process lets no other sweep write before all have read

    def require_same_sweep(self) -> None:
        """Check that what is there agrees with the fields of `fingerprint`. Changes nothing."""
        abouts = {path: about_of(path) for path in self.results if path.exists()}
        whole = ((path, _read_part(path)) for path in self._part_paths())
        first = ((path, _about_in(t.schema)) for path, t in whole if not isinstance(t, str))
        abouts |= itertools.islice(first, 1)
        for path, about in abouts.items():
            known = {key: about.get(key) for key in self.fingerprint}
            self._require_same(known, path)

    def parts(self) -> Iterator[tuple[Path, pa.Table]]:
        """(file, rows) of every part in the order of writing; `damaged` lists the others."""
        for path in self._part_paths():
            table = _read_part(path)
            if isinstance(table, str):
                self.damaged[path] = table
            else:
                self._require_same(_about_in(table.schema), self.folder)
                yield path, table

    def require_result(self, path: Path) -> bool:
        """Whether a result is there; if it is, it belongs to this sweep."""
        if path.exists():
            self._require_same(about_of(path), path)
        return path.exists()

    def require_version(self) -> None:
        """Check that this sweep may go on with what is there, which is known to be its own."""
        own_code = self.fingerprint["own_code"]
        version = self.fingerprint["version"]
        is_there = self._part_paths() or any(path.exists() for path in self.results)
        if is_there and own_code and version is None:
            raise SweepError(
                f"{self.path} was computed with code of your own, {', '.join(own_code)}, and "
                "without a version, so nothing tells whether that code has changed.",
                remedy="Start over with resume=False; with version='…' as well, that run can be "
                "resumed.",
                in_shell="Start over with --no-resume.",
            )

    def begin(self, *, anew: bool) -> None:
        """Make the folder of parts, without the damaged ones."""
        with told(self.path):
            if anew:
                for path in self.results:
                    path.unlink(missing_ok=True)
                if self.folder.exists():
                    shutil.rmtree(self.folder)
        with told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.damaged:
                if path.exists():
                    path.rename(path.with_name(f"{path.name}.damaged"))

    def write(
        self,
        tables: Iterable[pa.Table],
        notes: Mapping[bytes, bytes],
        path: Path | None = None,
        **how: Any,
    ) -> None:
        """Write tables as a result, or as one part, whole or not at all.

        Each is a group of rows, and one is in memory at a time. They are written under a temporary
        name, which is changed once the file is complete and on the disk.
        """
        unfinished = self.folder / f".{uuid.uuid4().hex}"
        rest = iter(tables)
        first = next(rest)
        schema = first.schema.with_metadata({_ABOUT: _as_json(self.fingerprint), **notes})
        try:
            with told(path or self.folder):
                with pq.ParquetWriter(unfinished, schema, **how) as writer:
                    for table in itertools.chain([first], rest):
                        writer.write_table(table, row_group_size=max(len(table), 1))
                with unfinished.open("rb") as file:
                    os.fsync(file.fileno())
                    name = f"{time.time_ns()}-{short_hash(file.read())}.parquet"
                part = path or self.folder / name
                os.replace(unfinished, part)
                _keep_name(part.parent)
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the parts once all is in the results, as far as that can be done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def warn(self, n_bad: int, n_records: int, bad: Iterable[tuple[Any, Any]], level: int) -> None:
        """Name the first bad records, (id, error), and damaged parts; `level` as in `warnings`."""
        errors = [f"{identity!r}: {error}" for identity, error in itertools.islice(bad, _SHOWN)]
        damages = [f"{path}: {reason}" for path, reason in self.damaged.items()]
        missing = f"{n_bad} of {n_records} records have no numbers (column 'error'):"
        again = f"{len(damages)} files of finished records could not be read, and are run again:"
        for fact, count, lines in ((missing, n_bad, errors), (again, len(damages), damages)):
            if count:
                more = [f"… and {count - _SHOWN} more"] if count > _SHOWN else []
                text = "\n  ".join([f"{self.path}: {fact}", *lines[:_SHOWN], *more])
                warn(text, stacklevel=level + 1)

    def lacking(self, records: str) -> SweepError:
        """The error of parts that another machine wrote elsewhere."""
        return SweepError(
            f"{self.folder} lacks {records}: several machines must write to one shared folder. Run "
            "it again to resume."
        )

    def _part_paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    def _require_same(self, about: Fingerprint, path: Path) -> None:
        differ = differences(about, self.fingerprint)
        if differ:
            raise other_sweep(f"{path} holds another sweep: {'; '.join(differ)}")


def other_sweep(fact: str) -> SweepError:
    """The error of results that belong to another sweep than the one that is asked for."""
    return SweepError(
        f"{fact}.",
        remedy="Give another out, or start over with resume=False.",
        in_shell="Give another --out, or start over with --no-resume.",
    )


class Unchanged:
    """A result's file, to be read while its notes are those that the result's labels are of."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._notes = pq.read_schema(path).metadata

    @property
    def path(self) -> Path:
        """Where it lies, unless another file is in its place."""
        if pq.read_schema(self._path).metadata != self._notes:
            raise SweepError(
                f"{self._path} was replaced after this result was made, by another sweep or one of "
                "more records. Use what that one returned, or run this one with another out."
            )
        return self._path


def about_of(path: Path) -> Fingerprint:
    """The fingerprint in a result file."""
    try:
        return _about_in(pq.read_schema(path))
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


def _as_json(about: Fingerprint) -> bytes:
    return json.dumps(about, ensure_ascii=True, sort_keys=True).encode()


def _about_in(schema: pa.Schema) -> Fingerprint:
    return json.loads((schema.metadata or {})[_ABOUT])


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
        _about_in(table.schema)
        return table
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        return f"{'cannot be read' if is_of_the_system(error) else 'damaged'} ({error})"


def _keep_name(folder: Path) -> None:
    """Wait until the folder's own entries are on the disk, where its file system can say so."""
    with contextlib.suppress(OSError):  # Windows opens no folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
