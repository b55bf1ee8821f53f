"""The finished batches of a sweep, each in a file of its own until all are merged.

1. A part's name holds the hash of its bytes, so a part that was cut or changed is known before it
   is read.
2. In each part stands what its numbers were computed with (`Fingerprint`), so no part of another
   sweep is taken for one of this.
3. A damaged part is named and set aside; its prompts run again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lens_lora.sweeps.batches import Row
from lens_lora.sweeps.files import told, write_whole
from lens_lora.sweeps.fingerprint import Fingerprint
from lens_lora.sweeps.tables import part_table, rows_of_part

__all__ = ["METADATA", "Damage", "Part", "Parts", "as_json"]

METADATA = b"lens_lora.sweep"
_NAME = re.compile(r"\d+-([0-9a-f]{32})\.parquet")


@dataclasses.dataclass(frozen=True)
class Part:
    """A finished batch.

    Attributes:
        path: its file.
        table: one row per prompt.
        about: what its numbers were computed with.
    """

    path: Path
    table: pa.Table
    about: Fingerprint

    def rows(self, analyses: Sequence[str]) -> list[Row]:
        """Its rows.

        Args:
            analyses: of the sweep.
        """
        return rows_of_part(self.table, analyses)


@dataclasses.dataclass(frozen=True)
class Damage:
    """A part that cannot be read, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Parts:
    """The folder of finished batches.

    Args:
        folder: 'results.parts'.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> tuple[list[Part], list[Damage]]:
        """Every part in the order in which they were written, and the damaged ones."""
        parts: list[Part] = []
        damaged: list[Damage] = []
        for found in self.each():
            if isinstance(found, Part):
                parts.append(found)
            else:
                damaged.append(found)
        return parts, damaged

    def each(self) -> Iterator[Part | Damage]:
        """Every part in the order in which they were written, one at a time."""
        return map(_read, sorted(self.folder.glob("*.parquet")))

    def add(self, rows: Sequence[Row], analyses: Sequence[str], about: Fingerprint) -> None:
        """Write a part with all of these rows; if that is interrupted, none of them is kept.

        Args:
            rows: of one batch.
            analyses: of the sweep.
            about: what their numbers were computed with.

        Raises:
            SweepError: it cannot be written.
        """
        self.put(part_table(rows, analyses), {METADATA: as_json(about)})

    def put(self, table: pa.Table, about: Mapping[bytes, bytes], **options: Any) -> Path:
        """Write a table as one part, in one group of rows; returns its path.

        Args:
            table: of finished prompts.
            about: metadata, with what the numbers were computed with.
            options: of pyarrow's `write_table`.

        Raises:
            SweepError: it cannot be written.
        """
        table, sink = table.replace_schema_metadata(dict(about)), pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=max(len(table), 1), **options)
        content = sink.getvalue()
        path = self.folder / f"{time.time_ns()}-{_hash(content)}.parquet"
        write_whole(path, lambda unfinished: unfinished.write_bytes(content), self.folder)
        return path

    def make(self) -> None:
        """Make the folder.

        Raises:
            SweepError: it cannot be made.
        """
        with told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def set_aside(self, damaged: Sequence[Damage]) -> None:
        """Give damaged parts a name under which nothing reads them.

        Args:
            damaged: as `read` gave them.

        Raises:
            SweepError: one cannot be renamed.
        """
        for damage in damaged:
            with told(damage.path):
                damage.path.rename(damage.path.with_name(damage.path.name + ".damaged"))

    def clear(self) -> None:
        """Remove the folder and what it holds.

        Raises:
            OSError: it cannot be removed.
        """
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def remove(self) -> None:
        """Remove the folder once all is in the results, as far as that can be done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def as_json(about: Fingerprint) -> bytes:
    """A fingerprint as Parquet metadata holds it.

    Args:
        about: the fingerprint.
    """
    return json.dumps(about, ensure_ascii=True, sort_keys=True).encode()


def _read(path: Path) -> Part | Damage:
    name = _NAME.fullmatch(path.name)
    if name is None:
        return Damage(path, "not a part that a sweep wrote")
    try:
        content = path.read_bytes()
        if _hash(content) != name[1]:
            return Damage(path, "damaged, its contents do not match the hash in its name")
        table = pq.read_table(pa.BufferReader(content))
        return Part(path, table, json.loads((table.schema.metadata or {})[METADATA]))
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        return Damage(path, f"damaged ({error})")


def _hash(content: bytes | pa.Buffer) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
