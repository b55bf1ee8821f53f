"""Which records of a stream are finished, without holding the records: runs of them, and a hash.

A span is a run of consecutive records whose tokens lie in one group of rows of one file. Records
are compared with it when the stream comes by, by a hash of their ids and prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from lens_lora.sweeps.records import Record

__all__ = ["Source", "Span", "digest_of", "without_overlap"]


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of finished records.

    Attributes:
        first, last: their numbers, from 0.
        digest: of their ids and prompts.
        tokens: how many they have in all.
        errors: how many of them are bad.
    """

    first: int
    last: int
    digest: str
    tokens: int
    errors: int


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the rows of a span lie.

    Attributes:
        span: the records.
        path: of the file.
        group: of its rows.
    """

    span: Span
    path: Path
    group: int = 0


def digest_of(records: Iterable[Record]) -> str:
    """The hash of ids and prompts, conversations told from texts.

    Args:
        records: of one span, in order.
    """
    found = hashlib.sha256()
    for record in records:
        found.update(
            repr((str(record.id), record.prompt, record.chat)).encode("utf-8", "surrogatepass")
        )
    return found.hexdigest()[:32]


def without_overlap(first: Sequence[Source], rest: Sequence[Source]) -> list[Source]:
    """All of the first, and of the rest those that share no record with them, in order.

    Args:
        first: sources that share no record among themselves.
        rest: others of the kind.
    """
    taken = sorted((source.span.first, source.span.last) for source in first)

    def is_free(span: Span) -> bool:
        return all(span.last < low or high < span.first for low, high in taken)

    kept = [*first, *(source for source in rest if is_free(source.span))]
    return sorted(kept, key=lambda source: source.span.first)
