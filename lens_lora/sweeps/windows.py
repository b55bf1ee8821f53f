"""A stream of records → windows: consecutive records of about `WINDOW_TOKENS` tokens in all.

1. Finished spans are passed over, once their records are seen to be the same. A span with bad
   records whose records have changed is run again; any other difference is refused.
2. Of n processes each takes every n-th block of records.

One window, or the records of one span, is all that is held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lens_lora.errors import PromptError
from lens_lora.lens import LoraLens
from lens_lora.sweeps.batches import tokenised, with_text
from lens_lora.sweeps.processes import Processes
from lens_lora.sweeps.records import Record, SweepError
from lens_lora.sweeps.spans import Source, Span, digest_of

__all__ = ["Text", "Windows", "span_of"]

WINDOW_TOKENS = 4096
BLOCK = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A record of the stream.

    Attributes:
        number: its place, from 0.
        record: as it was read, perhaps with its error.
        ids: its tokens; none of a bad record.
    """

    number: int
    record: Record
    ids: tuple[int, ...] = ()


def span_of(texts: Sequence[Text], tokens: int, errors: int) -> Span:
    """The span of a window.

    Args:
        texts: of the window.
        tokens, errors: how many are in its rows.
    """
    digest = digest_of(text.record for text in texts)
    return Span(texts[0].number, texts[-1].number, digest, tokens, errors)


class Windows:
    """The windows that this process runs, one after another.

    Args:
        lens: tokenises.
        records: the stream.
        done: finished spans.
        processes: this one among how many.

    Attributes:
        seen: how many records have come by.
        resumed: how many of them are finished.
        stale: sources whose records have changed, and are run again.
    """

    def __init__(
        self,
        lens: LoraLens,
        records: Iterable[Record],
        done: Sequence[Source],
        processes: Processes,
    ) -> None:
        self._lens, self._records, self._processes = lens, records, processes
        self._done: Mapping[int, Source] = {source.span.first: source for source in done}
        self._most = max((source.span.last + 1 for source in done), default=0)
        self.seen: int = 0
        self.resumed: int = 0
        self.stale: list[Source] = []

    def __iter__(self) -> Iterator[list[Text]]:
        window: list[Text] = []
        for number, record in self._unfinished():
            if window and (number != window[-1].number + 1 or self._is_full(window)):
                yield window
                window = []
            if self._is_mine(number):
                window.append(self._text(number, record))
        if window:
            yield window

    def _is_full(self, window: Sequence[Text]) -> bool:
        return sum(max(len(text.ids), 1) for text in window) >= WINDOW_TOKENS

    def _is_mine(self, number: int) -> bool:
        return number // BLOCK % self._processes.count == self._processes.index

    def _text(self, number: int, record: Record) -> Text:
        if record.error is not None or record.prompt is None:
            return Text(number, record)
        try:
            return Text(number, record, tuple(tokenised(self._lens, record).tokens[0].tolist()))
        except PromptError as error:
            return Text(number, record.bad(error))

    def _unfinished(self) -> Iterator[tuple[int, Record]]:
        """The records that no span holds, with their numbers."""
        held: list[Record] = []
        source: Source | None = None
        for number, plain in enumerate(self._records):
            record = with_text(self._lens, plain)
            self.seen = number + 1
            source = self._done.get(number) if source is None else source
            if source is None:
                yield number, record
                continue
            held.append(record)
            if number == source.span.last:
                if self._is_finished(source, held):
                    self.resumed += len(held)
                else:
                    self.stale.append(source)
                    yield from enumerate(held, start=source.span.first)
                held, source = [], None
        if self.seen < self._most:
            raise SweepError(
                f"the results hold {self._most} records, and there are {self.seen}. Give another "
                "out, or start over with resume=False (--no-resume)."
            )

    def _is_finished(self, source: Source, records: Sequence[Record]) -> bool:
        span = source.span
        if digest_of(records) == span.digest:
            return True
        if span.errors:
            return False
        raise SweepError(
            f"{source.path} holds records {span.first} to {span.last} (from 0) with other ids or "
            f"prompts than {records[0].where} to {records[-1].where}. Give another out, or start "
            "over with resume=False (--no-resume)."
        )
