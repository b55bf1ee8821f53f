"""The records of a sweep and the names of its analyses, read without torch.

1. Each row of a JSONL or CSV file, a data frame, a Dataset or any iterable becomes a `Record`, in
   order, with its own id or the row's number (from 0). A string or a conversation is a prompt, as
   it is everywhere: where no answers are needed, it is a record by itself.
2. A mistake in one row is kept in its record, with its line, and the other rows are read as usual.
3. A mistake in all of them (a missing column, no row at all) is raised. So is a Python object
   that cannot be a record, before anything is run: it is a mistake in the call, not in the data.

pandas is not imported: a data frame is recognised by its attributes.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import json
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from lens_lora.errors import SweepError

# --- Analyses


@dataclasses.dataclass(frozen=True)
class Analysis:
    """An analysis of a sweep, which becomes a column of its table.

    Attributes:
        at: the gate value at which it is taken; NaN along a path.
        alone: whether prompts are run one at a time, because the numbers of each would depend on
            its batch.
        many: whether it takes tens of passes a prompt. Then each prompt is a batch, which is kept
            once it is done, so that a kill loses one prompt's work.
        has_remainder: whether its sum over sites estimates the shift. Then the table also has
            shift − sum.
        options: arguments that it is called with besides lens, prompts and readout.
    """

    at: float = 0.0
    alone: bool = False
    many: bool = False
    has_remainder: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


# One number per prompt and site:
ANALYSES: dict[str, Analysis] = {
    # ∂g/∂ε_l at 0: what adding one site to the base model does, to first order
    "first_order": Analysis(),
    # ∂g/∂ε_l at 1: what removing one site from the adapted model does
    "first_order_at_1": Analysis(at=1.0),
    # ∫₀¹ ∂g/∂ε_l(ε·1) dε: complete, its sum is the shift
    "path": Analysis(
        at=float("nan"), alone=True, many=True, options={"tol": 1e-3, "max_nodes": 65}
    ),
    # g(e_l) − g(0), exact
    "add_one": Analysis(many=True, options={"how": "add_one"}),
    # g(1) − g(1 − e_l), exact
    "leave_one_out": Analysis(at=1.0, many=True, options={"how": "leave_one_out"}),
    # ½(H·1)_l at 0: what curvature and coupling add to first order; for trained adapters at full
    # strength often less accurate than first order alone
    "second_order": Analysis(has_remainder=False),
}
# The analyses that are derivatives at one point.
_SLOPES = {"first_order", "first_order_at_1", "second_order"}

ByToken = Literal["activations", "activations_trained"]
# `rank` numbers per token and site, streamed into a file of their own:
BY_TOKEN: dict[str, Analysis] = {
    # u = ΣVᵀx of sBA = UΣVᵀ
    "activations": Analysis(at=1.0, options={"gauge": "svd"}),
    # u = Ax of the adapter's file
    "activations_trained": Analysis(at=1.0, options={"gauge": "trained"}),
}


def chosen(analyses: str | Iterable[str]) -> tuple[str, ...]:
    """The names of the analyses, each once, in the order given.

    Raises:
        SweepError: an unknown name, no name, or an analysis by token beside another one.
    """
    given = [analyses] if isinstance(analyses, str) else analyses
    names = tuple(dict.fromkeys(given))
    unknown = [name for name in names if name not in ANALYSES | BY_TOKEN]
    if unknown or not names:
        raise SweepError(
            f"analyses {', '.join(map(repr, unknown)) or 'none'}: expected some of "
            f"{', '.join(ANALYSES | BY_TOKEN)}."
        )
    by_token = [name for name in names if name in BY_TOKEN]
    if by_token and len(names) > 1:
        others = [name for name in names if name != by_token[0]]
        raise SweepError(
            f"{by_token[0]!r} is written token by token, into a file of its own; run it alone, and "
            f"{', '.join(map(repr, others))} with another out."
        )
    return names


def require_no_slopes(analyses: Iterable[str], readout: str) -> None:
    """Refuse the derivatives of a KL in a sweep.

    It has none at ε = 0, and a sweep does not hold the base's distributions for those elsewhere.

    Args:
        analyses: the names of the analyses.
        readout: the KL, as the message calls it.

    Raises:
        SweepError: naming an analysis that needs them.
    """
    slopes = sorted(_SLOPES.intersection(analyses))
    if slopes:
        raise SweepError(
            f"{readout} is not read by {slopes[0]!r} in a sweep; use 'path', 'add_one' or "
            "'leave_one_out'."
        )


def options_of(analyses: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """The options of each of these analyses, which decide its numbers."""
    return {name: (ANALYSES | BY_TOKEN)[name].options for name in analyses}


# --- Records


ANSWERS = ("doc", "pre")
# The columns that are read; whatever else a table holds is left alone.
READ = ("id", "prompt", "messages", *ANSWERS, "response")
# The most characters of an error, which may quote the record.
_LONGEST_ERROR = 1000
# Ids from −2**63 to below 2**63 fit into a column of 64 bits.
_LARGEST_ID = 2**63
_NOT_TEXT = (
    "which is not Unicode text (a surrogate pair cut in two, or bytes that were not UTF-8); save "
    "it as UTF-8 again."
)


@dataclasses.dataclass(frozen=True)
class Record:
    """One prompt, and what is read of it.

    Attributes:
        id: the id that the record came with, or the row's number from 0.
        where: 'line 3' in a file, 'row 2' in anything else.
        prompt: the text, read at its last token. For a conversation it is what the chat template
            makes of it, and None until the model is known.
        doc, pre: the two answers; None where one readout is given for all records.
        error: the fault of a bad record, whose other fields may be None; else None.
        messages: a conversation, in place of the prompt's text.
        response: the text said after the prompt, where the readout is of each record's response.
        has_own_id: whether it came with its id.
    """

    id: int | str
    where: str
    prompt: str | None = None
    doc: str | None = None
    pre: str | None = None
    error: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    response: str | None = None
    has_own_id: bool = True

    @property
    def chat(self) -> bool:
        """Whether its prompt is a conversation."""
        return self.messages is not None

    def bad(self, error: object) -> Record:
        """The same record, marked as bad."""
        line = _escaped(" ".join(str(error).split()))
        if len(line) > _LONGEST_ERROR:
            line = f"{line[:_LONGEST_ERROR]} …"
        return dataclasses.replace(self, error=f"{self.where}: {line}")


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


Conversation = Sequence[Mapping[str, Any]]
RecordsLike = str | Path | Iterable[Mapping[str, Any] | Record | str | Conversation] | Frame
_Row = tuple[str, Any]


def read_records(
    records: RecordsLike, *, with_answers: bool = True, with_response: bool = False
) -> list[Record]:
    """Every record in order, bad ones included.

    A record whose id belongs to another one is bad. An id that came with a record takes precedence
    over a row's number that stands in for a missing id.

    Args:
        records: a file, a data frame, or an iterable of records.
        with_answers: whether each record needs `doc` and `pre`.
        with_response: whether each record needs a `response`.

    Raises:
        SweepError: no record, a file that cannot be read, or an object that cannot be a record.
    """
    if isinstance(records, Iterable) and not isinstance(records, str | Mapping | Frame):
        records = list(records)
    read = list(each_record(records, with_answers=with_answers, with_response=with_response))
    owners = _owners(read)
    for number, record in enumerate(read):
        owner = owners.get(str(record.id), record)
        if record.error is None and owner is not record:
            read[number] = record.bad(_taken(record, owner))
    return read


def _owners(records: Sequence[Record]) -> dict[str, Record]:
    """The good record that each id belongs to."""
    owners: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: not record.has_own_id):
        if record.error is None:
            owners.setdefault(str(record.id), record)
    return owners


def _taken(record: Record, owner: Record) -> str:
    """The fault of a record whose id belongs to another one."""
    if record.has_own_id:
        fact = f"its id {record.id!r} is already that of {owner.where}"
    else:
        fact = f"it has no id, and its number {record.id} is the id of {owner.where}"
    return f"{fact}; give each record its own."


def each_record(
    records: RecordsLike, *, with_answers: bool = True, with_response: bool = False
) -> Iterator[Record]:
    """Read the records one after another, without checking that no id occurs twice.

    The objects of a list are checked before the first is read, those of a stream as they come.

    Args:
        records, with_answers, with_response: as for `read_records`.

    Raises:
        SweepError: as `read_records`.
    """
    needed = ["prompt"]
    if with_answers:
        needed += ANSWERS
    if with_response:
        needed.append("response")
    _require_records(records, needed)
    is_empty = True
    for number, (where, row) in enumerate(_rows(records, needed)):
        is_empty = False
        record = row if isinstance(row, Record) else _record(number, where, row, needed)
        yield _storable(record)
    if is_empty:
        name = str(records) if isinstance(records, str | Path) else "the records"
        raise SweepError(f"{name}: no record found; each needs {', '.join(needed)}.")


def _rows(records: RecordsLike, needed: Sequence[str]) -> Iterator[_Row]:
    """Where each row stands, and what it holds."""
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
        yield f"row {number}", row


def _rows_of_file(path: Path, needed: Sequence[str]) -> Iterator[_Row]:
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
    """The rows of a data frame, without spaces around the names of its columns."""
    _require_once("the data frame", [_stripped(name) for name in frame.columns])
    rows: list[dict[Any, Any]] = []
    for row in frame.to_dict("records"):
        rows.append({_stripped(name): value for name, value in row.items()})
    return rows


def is_utf16(start: bytes) -> bool:
    """Whether a file that begins with these bytes is UTF-16.

    It has a byte order mark, or zeros between the letters of ASCII.
    """
    return start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start


def _require_records(records: object, needed: Sequence[str]) -> None:
    """Refuse Python objects that cannot be records.

    Raises:
        SweepError: naming the first of them, and what to give instead.
    """
    if not isinstance(records, str | Path | Frame | Iterable):
        raise SweepError(
            f"records are a {type(records).__name__}",
            remedy=f"give a list of prompts, of mappings with {', '.join(needed)}, or a file of "
            "them.",
        )
    rows = records if isinstance(records, list | tuple) else ()
    for number, row in enumerate(rows):
        _require_row(number, row, needed)


def _require_row(number: int, row: object, needed: Sequence[str]) -> None:
    columns = ", ".join(needed)
    if isinstance(row, Mapping) and _is_message(row) and "prompt" not in row:
        raise SweepError(
            f"row {number} is one message of a conversation, and a record is a whole one",
            remedy='put it into a list, [[{"role": "user", "content": "…"}]], or give '
            '{"messages": […]}.',
        )
    if isinstance(row, Mapping | Record):
        return
    if not isinstance(row, str) and not _is_conversation(row):
        raise SweepError(
            f"row {number} is a {type(row).__name__}, and no record",
            remedy=f"give strings, conversations, or mappings with {columns}.",
        )
    if len(needed) > 1:
        raise SweepError(
            f"row {number} is a prompt alone, and each record needs {', '.join(needed[1:])}",
            remedy=f"give mappings with {columns}, or what is read of every prompt: "
            "readout=ll.LogProb(' Paris').",
        )


def _is_message(row: Any) -> bool:
    return isinstance(row, Mapping) and "role" in row and "content" in row


def _is_conversation(row: object) -> bool:
    return isinstance(row, list | tuple) and bool(row) and all(map(_is_message, row))


def _stripped(name: Any) -> Any:
    return name.strip() if isinstance(name, str) else name


def _require_once(table: object, columns: Sequence[Any]) -> None:
    """Refuse a table that has a needed column twice, as only the last one would be read."""
    for name in READ:
        if columns.count(name) > 1:
            raise SweepError(f"{table} has the column {name} twice; rename or remove one of them.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A key that it has twice is an error: only the last one would be kept."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {name!r} is there twice")
        fields[name] = value
    return fields


def _jsonl(path: Path) -> Iterator[_Row]:
    """The lines of a file, or the error of one that is not JSON. Blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                # The first line may begin with a byte order mark.
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                yield f"line {number}", _parsed(line.strip(), encoding)


def _parsed(line: bytes, encoding: str) -> Any:
    """The content of a line of JSON, or the error with which it cannot be read."""
    try:
        return json.loads(line.decode(encoding), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        return ValueError(f"{error.msg} at column {error.colno}")
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return error


def _csv(path: Path, needed: Sequence[str]) -> Iterator[_Row]:
    """The rows of a file, each with the line on which it ends, or the error of one.

    Bytes that are not UTF-8 become surrogates.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        try:
            columns = [name.strip() for name in reader.fieldnames or ()]
        except csv.Error as error:
            raise SweepError(f"{path}: its first line is not one of a CSV ({error}).") from error
        reader.fieldnames = columns
        _require_once(path, columns)
        lacking = [name for name in needed if name not in columns]
        if lacking:
            raise SweepError(
                f"{path} has the columns {_escaped(', '.join(columns)) or 'none'} and lacks "
                f"{', '.join(lacking)}; its first line must name them."
            )
        while True:
            row: Any
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row = error
            yield f"line {reader.line_num}", row


def _record(number: int, where: str, row: Any, needed: Sequence[str]) -> Record:
    """The record of a row, which may be bad."""
    empty = Record(number, where, has_own_id=False)
    if isinstance(row, csv.Error | ValueError):
        return empty.bad(f"unreadable ({row}).")
    if isinstance(row, str):
        row = {"prompt": row}
    elif _is_conversation(row):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        return empty.bad(f"{row!r} is not a record with the columns {', '.join(needed)}.")
    named = _with_id(empty, row)
    if named.error is not None:
        return named
    if None in row:
        return named.bad("more fields than columns; quote a field that holds commas.")
    if _is_missing(row.get("messages")):
        return _with_texts(named, row, needed)
    conversation = _with_messages(named, row)
    if conversation.error is not None:
        return conversation
    return _with_texts(conversation, row, [name for name in needed if name != "prompt"])


def _with_id(record: Record, row: Mapping[Any, Any]) -> Record:
    """The record with the id of its row, if there is one."""
    identity: Any = row.get("id")
    if _is_missing(identity):
        return record
    fault = _fault_of_id(identity)
    if fault is not None:
        return record.bad(fault)
    own = identity if isinstance(identity, str) else int(identity)
    return dataclasses.replace(record, id=own, has_own_id=True)


def _with_texts(record: Record, row: Mapping[Any, Any], needed: Sequence[str]) -> Record:
    """The record with the texts that are needed of its row."""
    fields = {name: row.get(name) for name in needed}
    texts = {name: text for name, text in fields.items() if isinstance(text, str)}
    filled = dataclasses.replace(record, **texts)
    for name, text in fields.items():
        if _is_missing(text):
            return filled.bad(f"no {name}.")
        if name not in texts:
            return filled.bad(f"its {name} is {text!r}, not a string.")
    if filled.doc is not None and filled.doc == filled.pre:
        return filled.bad(
            f"doc and pre are both {filled.doc!r}, so their margin is zero whatever the model does."
        )
    return filled


def _with_messages(record: Record, row: Mapping[Any, Any]) -> Record:
    """The record with its conversation, which a table may hold as an array."""
    if not _is_missing(row.get("prompt")):
        return record.bad("it has both a prompt and messages; give one of them.")
    messages: Any = row["messages"]
    if hasattr(messages, "tolist"):
        messages = messages.tolist()
    is_list = isinstance(messages, list | tuple) and bool(messages)
    if not is_list or not all(isinstance(message, Mapping) for message in messages):
        return record.bad(
            f"its messages are {messages!r}; expected a list such as "
            "[{'role': 'user', 'content': '…'}]."
        )
    return dataclasses.replace(record, messages=messages)


def _fault_of_id(identity: Any) -> str | None:
    """The fault of an id; None for a good one."""
    if isinstance(identity, str):
        return None if _is_text(identity) else f"its id is {identity!r}, {_NOT_TEXT}"
    if isinstance(identity, bool) or not isinstance(identity, numbers.Integral):
        return f"its id is {identity!r}; expected a string or an integer."
    if not -_LARGEST_ID <= int(identity) < _LARGEST_ID:
        return f"its id {identity} does not fit into 64 bits; give it as a string."
    return None


def _storable(record: Record) -> Record:
    """The record as a file can hold it: what is not Unicode text is escaped, and makes it bad."""
    for name in ("prompt", *ANSWERS, "response"):
        text = getattr(record, name)
        if text is None or _is_text(text):
            continue
        record = dataclasses.replace(record, **{name: _escaped(text)})
        if record.error is None:
            record = record.bad(f"its {name} is {text!r}, {_NOT_TEXT}")
    return record


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: no half of a surrogate pair is in it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _is_missing(value: Any) -> bool:
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or (isinstance(value, str) and value == "")
