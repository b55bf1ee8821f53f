"""The records of a sweep: one prompt each, with what is read of it. Read without torch.

1. Each row of a JSONL or CSV file, a data frame, a Dataset or any iterable becomes a `Record`
   (`raw_rows.py` reads the rows), in order, with its own id or the row's number (from 0). A string
   or a conversation is a prompt: where no answers are needed, it is a record by itself.
2. A mistake in one row makes its record a bad one, which says the line and the fault. The other
   rows are read as usual.
3. A mistake in all rows (a missing column, no row at all) is raised. So is a Python object that
   cannot be a record, before anything is run: it is a mistake in the call, not in the data.
"""

from __future__ import annotations

import csv
import dataclasses
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lens_lora.errors import SweepError
from lens_lora.sweeps.raw_rows import ANSWERS, Frame, escaped, raw_rows

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
        """Return the same record, marked as bad.

        Args:
            error: the fault.
        """
        line = escaped(" ".join(str(error).split()))
        if len(line) > _LONGEST_ERROR:
            line = f"{line[:_LONGEST_ERROR]} …"
        return dataclasses.replace(self, error=f"{self.where}: {line}")


Conversation = Sequence[Mapping[str, Any]]
RecordsLike = str | Path | Iterable[Mapping[str, Any] | Record | str | Conversation] | Frame


def read_records(
    records: RecordsLike, *, with_answers: bool = True, with_response: bool = False
) -> list[Record]:
    """Read every record in order, bad ones included.

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
    each = each_record(records, with_answers=with_answers, with_response=with_response)
    all_records = list(each)
    owner_by_id = _owner_by_id(all_records)
    for number, record in enumerate(all_records):
        owner = owner_by_id.get(str(record.id), record)
        if record.error is None and owner is not record:
            all_records[number] = record.bad(_fault_of_taken_id(record, owner))
    return all_records


def _owner_by_id(records: Sequence[Record]) -> dict[str, Record]:
    """Find the good record that each id belongs to; ids that came with records go first."""
    with_own_id = [record for record in records if record.has_own_id]
    with_number = [record for record in records if not record.has_own_id]
    owner_by_id: dict[str, Record] = {}
    for record in [*with_own_id, *with_number]:
        if record.error is None:
            owner_by_id.setdefault(str(record.id), record)
    return owner_by_id


def _fault_of_taken_id(record: Record, owner: Record) -> str:
    """Say which other record the id belongs to."""
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
    for number, row in enumerate(raw_rows(records, needed)):
        is_empty = False
        if isinstance(row.content, Record):
            yield _storable(row.content)
        else:
            yield _storable(_record(number, row.where, row.content, needed))
    if is_empty:
        name = str(records) if isinstance(records, str | Path) else "the records"
        raise SweepError(f"{name}: no record found; each needs {', '.join(needed)}.")


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
    """Refuse one Python object that cannot be a record."""
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


def _record(number: int, where: str, row: Any, needed: Sequence[str]) -> Record:
    """Make the record of a row, which may be a bad one.

    Args:
        number: the row's number from 0.
        where: the row's place, as messages name it.
        row: the row as it was read; an error if it could not be.
        needed: the texts that each record needs.
    """
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
    """Give the record the id of its row, if there is one."""
    identity: Any = row.get("id")
    if _is_missing(identity):
        return record
    fault = _fault_of_id(identity)
    if fault is not None:
        return record.bad(fault)
    own = identity if isinstance(identity, str) else int(identity)
    return dataclasses.replace(record, id=own, has_own_id=True)


def _with_texts(record: Record, row: Mapping[Any, Any], needed: Sequence[str]) -> Record:
    """Fill in the texts that are needed of a record's row."""
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
    """Fill in a record's conversation, which a table may hold as an array."""
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
    """Find the fault of an id; None for a good one."""
    if isinstance(identity, str):
        return None if _is_text(identity) else f"its id is {identity!r}, {_NOT_TEXT}"
    if isinstance(identity, bool) or not isinstance(identity, numbers.Integral):
        return f"its id is {identity!r}; expected a string or an integer."
    if not -_LARGEST_ID <= int(identity) < _LARGEST_ID:
        return f"its id {identity} does not fit into 64 bits; give it as a string."
    return None


def _storable(record: Record) -> Record:
    """Make the record storable in a file: what is not Unicode text is escaped, and makes it bad."""
    for name in ("prompt", *ANSWERS, "response"):
        text = getattr(record, name)
        if text is None or _is_text(text):
            continue
        record = dataclasses.replace(record, **{name: escaped(text)})
        if record.error is None:
            record = record.bad(f"its {name} is {text!r}, {_NOT_TEXT}")
    return record


def _is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8: no half of a surrogate pair is in it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _is_missing(value: Any) -> bool:
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or (isinstance(value, str) and value == "")
