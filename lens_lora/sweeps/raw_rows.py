"""Read the rows of a JSONL or CSV file, a data frame or any iterable, before they become records.

1. A row that cannot be read is kept as an error in its place, and the other rows are read as usual.
2. A mistake in the whole file, such as a missing column, is raised.

pandas is not imported: a data frame is recognised by its attributes.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from lens_lora.errors import SweepError

# The texts of a record that are its two answers.
ANSWERS = ("doc", "pre")
# The columns that are read; whatever else a table holds is left alone.
READ = ("id", "prompt", "messages", *ANSWERS, "response")


@runtime_checkable
class Frame(Protocol):
    """The part of pandas.DataFrame that is used here."""

    @property
    def columns(self) -> Any:
        """The columns' names."""
        ...

    def to_dict(self, orient: Literal["records"]) -> list[Any]:
        """One mapping per row."""
        ...


class RawRow(NamedTuple):
    """A row as it was read.

    Attributes:
        where: 'line 3' in a file, 'row 2' in anything else.
        content: a mapping, a string, a conversation or a record; of a row that cannot be read, the
            error that says why.
    """

    where: str
    content: Any


def raw_rows(
    records: str | Path | Iterable[Any] | Frame, needed: Sequence[str]
) -> Iterator[RawRow]:
    """Read the rows of records one after another, each with where it stands.

    Args:
        records: a .jsonl or .csv file, a data frame, or an iterable.
        needed: the columns that a table must have.

    Raises:
        SweepError: a file that cannot be read, a table that lacks a column, or one mapping alone.
    """
    if isinstance(records, str | Path):
        yield from _rows_of_file(Path(records), needed)
        return
    if isinstance(records, Mapping):
        raise SweepError(
            f"records are one mapping with the keys {', '.join(map(str, records))}; give a list of "
            "mappings, one per prompt (of a DatasetDict, one of its splits)."
        )
    rows = _rows_of_frame(records) if isinstance(records, Frame) else records
    for number, row in enumerate(rows):
        yield RawRow(f"row {number}", row)


def _rows_of_file(path: Path, needed: Sequence[str]) -> Iterator[RawRow]:
    """Read the rows of a file, whose name says its format."""
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".csv"):
        raise SweepError(f"{path}: expected a file that ends in .jsonl or .csv.")
    if not path.is_file():
        raise SweepError(f"{path}: there is no such file of records.")
    with path.open("rb") as file:
        if is_utf16(file.read(len(codecs.BOM_UTF16))):
            raise SweepError(f"{path} is UTF-16; save it as UTF-8.")
    return _jsonl(path) if kind == ".jsonl" else _csv(path, needed)


def _rows_of_frame(frame: Frame) -> list[dict[Any, Any]]:
    """Read the rows of a data frame, without spaces around the names of its columns."""
    _require_no_repeats("the data frame", [_stripped(name) for name in frame.columns])
    rows: list[dict[Any, Any]] = []
    for row in frame.to_dict("records"):
        rows.append({_stripped(name): value for name, value in row.items()})
    return rows


def is_utf16(start: bytes) -> bool:
    """Whether a file that begins with these bytes is UTF-16.

    Such a file begins with a byte order mark, or has zeros between the letters of ASCII.
    """
    has_mark = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return has_mark or b"\0" in start


def _stripped(name: Any) -> Any:
    return name.strip() if isinstance(name, str) else name


def _require_no_repeats(table: object, columns: Sequence[Any]) -> None:
    """Refuse a table that has a needed column twice, as only the last one would be read."""
    for name in READ:
        if columns.count(name) > 1:
            raise SweepError(f"{table} has the column {name} twice; rename or remove one of them.")


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object, and refuse a key that it has twice: only the last would be kept."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {name!r} is there twice")
        fields[name] = value
    return fields


def _jsonl(path: Path) -> Iterator[RawRow]:
    """Read the lines of a JSONL file; blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            # The first line may begin with a byte order mark.
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            yield RawRow(f"line {number}", _parsed(line.strip(), encoding))


def _parsed(line: bytes, encoding: str) -> Any:
    """Read the content of a line of JSON, or return the error with which it cannot be read."""
    try:
        return json.loads(line.decode(encoding), object_pairs_hook=_json_object)
    except json.JSONDecodeError as error:
        return ValueError(f"{error.msg} at column {error.colno}")
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return error


def _csv(path: Path, needed: Sequence[str]) -> Iterator[RawRow]:
    """Read the rows of a CSV file, each with the line on which it ends.

    Bytes that are not UTF-8 become surrogates.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        try:
            columns = [name.strip() for name in reader.fieldnames or ()]
        except csv.Error as error:
            raise SweepError(f"{path}: its first line is not one of a CSV ({error}).") from error
        reader.fieldnames = columns
        _require_no_repeats(path, columns)
        _require_columns(path, columns, needed)
        while True:
            row: Any
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row = error
            yield RawRow(f"line {reader.line_num}", row)


def _require_columns(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse a CSV file that lacks a column."""
    lacking = [name for name in needed if name not in columns]
    if lacking:
        raise SweepError(
            f"{path} has the columns {escaped(', '.join(columns)) or 'none'} and lacks "
            f"{', '.join(lacking)}; its first line must name them."
        )


def escaped(text: str) -> str:
    """Escape what is not Unicode text, so that UTF-8 can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()
