"""Where a stream of tokens keeps finished windows, and how they become one file.

1. Each window is a part of its own in `results.parts/` (parts.py), with its span in its metadata.
2. At the end the parts are written into `results.parquet`, one group of rows each, in the order of
   the records; one part is in memory at a time.
3. The file's metadata holds the spans of its groups, so that it can be resumed and extended as the
   parts can.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lens_lora.hooked.sites import Site
from lens_lora.sweeps.files import told, write_whole
from lens_lora.sweeps.fingerprint import Fingerprint
from lens_lora.sweeps.parts import METADATA, Damage, Part, Parts, as_json
from lens_lora.sweeps.records import SweepError
from lens_lora.sweeps.spans import Source, Span, without_overlap
from lens_lora.sweeps.store import about_of, paths, require_same

__all__ = ["PLAIN", "SITES", "SPANS", "TokenStore", "spans_in"]

SITES, SPANS = b"lens_lora.sites", b"lens_lora.spans"
PLAIN = ("record", "id", "position", "token", "sink", "error")
# Numbers of activations repeat nothing, so a dictionary or statistics of them would be lost work.
_WRITE: Mapping[str, Any] = {
    "use_dictionary": ["id", "token", "error"],
    "write_statistics": ["record"],
    "compression": "snappy",
}


class TokenStore:
    """The file of one stream, and its parts.

    Args:
        out: the result's path, ending in .parquet.
        fingerprint: what the numbers depend on besides the records.
        sites: of the columns.
        ranks: of each site.

    Attributes:
        path: one row per token.
        fingerprint: as it is read from a file.
        damaged: the parts that could not be read.
    """

    def __init__(
        self,
        out: str | Path,
        fingerprint: Fingerprint,
        sites: Sequence[Site],
        ranks: Sequence[int],
    ) -> None:
        path, _, folder = paths(out)
        self.path: Path = path
        self.parts: Parts = Parts(folder)
        self.damaged: list[Damage] = []
        self.fingerprint: Fingerprint = json.loads(as_json(fingerprint))
        held = [{**dataclasses.asdict(s), "rank": r} for s, r in zip(sites, ranks, strict=True)]
        self._about = {METADATA: as_json(fingerprint), SITES: json.dumps(held).encode()}

    def sources(self) -> list[Source]:
        """Every finished span once, in order. Changes nothing.

        Raises:
            SweepError: the files are not a sweep's, are damaged, or are of a different sweep.
        """
        return without_overlap(self._of_parts(), self._of_result())

    def begin(self, *, anew: bool) -> None:
        """Make the folder of parts, without the damaged ones.

        Args:
            anew: remove what earlier runs have finished.

        Raises:
            SweepError: the folder cannot be made, or an old file cannot be removed.
        """
        if anew:
            with told(self.path):
                self.path.unlink(missing_ok=True)
                self.parts.clear()
        self.parts.make()
        self.parts.set_aside([damage for damage in self.damaged if damage.path.exists()])

    def add(self, table: pa.Table, span: Span) -> None:
        """Write a window, whole or not at all.

        Args:
            table: its rows.
            span: its records.

        Raises:
            SweepError: it cannot be written.
        """
        self.parts.put(table, self._metadata([span]), **_WRITE)

    def drop(self, stale: Sequence[Source]) -> None:
        """Remove parts whose records have changed.

        Args:
            stale: those sources; of the result's own nothing is removed.

        Raises:
            SweepError: one cannot be removed.
        """
        for source in stale:
            if source.path != self.path:
                with told(source.path):
                    source.path.unlink(missing_ok=True)

    def merge(self, records: int) -> None:
        """Write the result, part by part, and remove the parts.

        Args:
            records: how many there are.

        Raises:
            SweepError: a record has no part, or the file cannot be written.
        """
        sources, expected = self.sources(), 0
        for source in sources:
            if source.span.first != expected:
                break
            expected = source.span.last + 1
        if expected != records:
            raise SweepError(
                f"{self.parts.folder} lacks record {expected} (from 0) of {records}: several "
                "machines must write to one shared folder. Run it again to resume."
            )
        if any(source.path != self.path for source in sources):
            write = functools.partial(self._write, sources=sources)
            write_whole(self.path, write, self.parts.folder)
        self.parts.remove()

    def _of_parts(self) -> list[Source]:
        found: list[Source] = []
        for part in self.parts.each():
            if isinstance(part, Part):
                require_same(part.about, self.fingerprint, self.parts.folder)
                found.append(Source(spans_in(part.table.schema, part.path)[0], part.path))
            else:
                self.damaged.append(part)
        return found

    def _of_result(self) -> list[Source]:
        if not self.path.exists():
            return []
        require_same(about_of(self.path), self.fingerprint, self.path)
        spans = spans_in(pq.read_schema(self.path), self.path)
        return [Source(span, self.path, group) for group, span in enumerate(spans)]

    def _metadata(self, spans: Sequence[Span]) -> dict[bytes, bytes]:
        return {**self._about, SPANS: json.dumps([dataclasses.astuple(s) for s in spans]).encode()}

    def _write(self, path: Path, sources: Sequence[Source]) -> None:
        tables = _tables(sources)
        first = next(tables)
        schema = first.schema.with_metadata(self._metadata([source.span for source in sources]))
        with pq.ParquetWriter(path, schema, **_WRITE) as writer:
            writer.write_table(first, row_group_size=len(first))
            del first
            for table in tables:
                writer.write_table(table, row_group_size=len(table))


def _tables(sources: Sequence[Source]) -> Iterator[pa.Table]:
    for source in sources:
        with pq.ParquetFile(source.path) as file:
            yield file.read_row_group(source.group)


def spans_in(schema: pa.Schema, path: Path) -> list[Span]:
    """The spans of a file's groups of rows.

    Args:
        schema: of the file.
        path: its name, for the message.

    Raises:
        SweepError: it is not of a stream of tokens.
    """
    held = (schema.metadata or {}).get(SPANS)
    if held is None:
        raise SweepError(f"{path} holds no activations by token; they are a sweep's of their own.")
    return [Span(*fields) for fields in json.loads(held)]
