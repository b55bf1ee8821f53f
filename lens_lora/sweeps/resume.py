"""Which records earlier runs have finished: those of the same prompt and answers.

The id is only a record's name. Its numbers depend on prompt, doc, pre and response, so a record
whose id was corrected keeps them, and a finished row that belongs to no record is refused. The
prompt of a conversation is what its template made of it, whose ids are run: a template may write
today's date.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lens_lora.sweeps.batches import Row
from lens_lora.sweeps.records import Record, SweepError

__all__ = ["Content", "content", "finished"]

# (prompt, doc, pre, response, whether the prompt is a conversation)
Content = tuple[str | None, str | None, str | None, str | None, bool]


def content(record: Record | Row) -> Content:
    """What decides the numbers of a record, or of its row.

    Args:
        record: a record or a row.
    """
    return record.prompt, record.doc, record.pre, record.response, record.chat


def finished(records: Sequence[Record], rows: Iterable[Row], path: Path) -> Mapping[Content, Row]:
    """The rows of earlier runs by their content.

    Args:
        records: of this run.
        rows: finished without an error.
        path: of the results, for the message.

    Raises:
        SweepError: a row belongs to no record: its id is missing now, or has another prompt or
            other answers.
    """
    found = {content(row): row for row in rows}
    here = {content(record) for record in records}
    for row in found.values():
        if content(row) not in here:
            raise SweepError(_unknown(row, records, path))
    return found


def _unknown(row: Row, records: Sequence[Record], path: Path) -> str:
    remedy = "Give another out, or start over with resume=False (--no-resume)."
    record = next((record for record in records if str(record.id) == row.id), None)
    if record is None:
        return (
            f"{path} or its parts hold the id {row.id!r} (prompt {row.prompt!r}), but the records "
            f"do not. {remedy}"
        )
    fields = ("prompt", "doc", "pre", "response", "chat")
    field = next(f for f in fields if getattr(row, f) != getattr(record, f))
    return (
        f"the {field} of id {row.id!r} is {getattr(row, field)!r} in {path} or its parts, but "
        f"{getattr(record, field)!r} in the records ({record.where}). {remedy}"
    )
