"""Texts, of any number, through `activations`, into a Parquet file with a row per token.

1. Records are read, tokenised and run window by window: consecutive records of about
   `WINDOW_TOKENS` tokens in all. Of n processes each takes every n-th block of records.
2. Each window is a part (`store.py`), written before the next begins, with its span of records in
   its metadata. Finished spans are passed over once a hash of ids and prompts shows that their
   records are the same. A span with bad records whose records have changed is run again; any other
   difference is refused.
3. At the end the parts are written into the result in the order of the records, one group of rows
   each. It holds the spans of its groups, so it can be resumed and extended as the parts can. One
   window, or the records of one span, is all that is held, whatever the number of texts.
4. A row holds `record` (from 0), `id`, `position`, `token`, `prefix`, `sink`, `error`, and `rank`
   numbers for each site. A bad record has one row, without a token. Tokens with the same tokens
   before them have the same `prefix` (`core/readout/beginnings.py`), and the same numbers:
   examples and means count one of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lens_lora.core import (
    LoraLens,
    Prompts,
    Site,
    alone,
    marks_of,
)
from lens_lora.core.function.activations import in_gauge
from lens_lora.errors import NumericsError, PromptError
from lens_lora.hidden.site_activations import activation_ranks, site_activations
from lens_lora.runs.fingerprint import Fingerprint, fingerprint
from lens_lora.runs.processes import Processes, launched, write_errors_of
from lens_lora.runs.store import Store, other_sweep
from lens_lora.sweeps.activations_file import (
    SITES,
    SPANS,
    ActivationsFile,
    Span,
    spans_in,
    spans_of,
)
from lens_lora.sweeps.batches import tokenised, with_text
from lens_lora.sweeps.records import BY_TOKEN, Record, RecordsLike, each_record, options_of

# --- The sweep


WINDOW_TOKENS = 4096
BLOCK = 64  # records in a row that one process takes


def token_sweep(
    lens: LoraLens,
    records: RecordsLike,
    name: str,
    out: str | Path,
    batch_size: int,
    resume: bool,
    version: str | None,
    progress: bool,
) -> ActivationsFile:
    """`sweep` of an analysis by token."""
    gauge = BY_TOKEN[name].options["gauge"]
    ranks = activation_ranks(lens, range(len(lens.sites)), gauge)
    processes = launched()
    store = TokenStore(out, fingerprint(lens, options_of([name]), None, version), lens.sites, ranks)
    shown = progress and processes.is_main
    with store.writing(processes):
        done = store.sources() if resume else []
        if resume:
            store.require_version()
        processes.by_main(lambda: store.begin(anew=not resume))
        windows = Windows(lens, _counted(records, processes, shown), done, processes)
        turned = in_gauge(lens, gauge)
        for window in windows:
            store.drop(windows.stale)
            store.add(*window_table(turned, window, ranks, batch_size))
        processes.by_main(lambda: store.merge(windows.seen))
        file = ActivationsFile(store.path)
    if processes.is_main:
        bad = file.bad()[["id", "error"]] if file.errors else pd.DataFrame()
        rows = bad.itertuples(index=False)
        store.warn_of_bad_records(rows, file.errors, file.texts, level=3)
        store.warn_of_damaged_parts(level=3)
    return file


def _counted(records: RecordsLike, processes: Processes, shown: bool) -> Iterator[Record]:
    """The records, with a bar that counts them; of several processes, the first one's."""
    total = len(records) if isinstance(records, Sized) and not isinstance(records, str) else None
    plain, title = each_record(records, with_answers=False), f"sweep{processes.share}"
    yield from tqdm(plain, title, total, leave=total is not None, unit="text", disable=not shown)


# --- Windows: which records are run


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the rows of a span lie.

    Attributes:
        span: the records.
        path: the file.
        group: the number of the group of its rows in that file.
    """

    span: Span
    path: Path
    group: int = 0


def digest_of(records: Iterable[Record]) -> str:
    """The hash of ids and prompts, which tells conversations from texts."""
    hashed = hashlib.sha256()
    for record in records:
        fields = (str(record.id), record.prompt, record.chat)
        hashed.update(repr(fields).encode("utf-8", "surrogatepass"))
    return hashed.hexdigest()[:32]


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A record of the stream.

    Attributes:
        number: its place, from 0.
        record: the record that was read, perhaps with its error.
        ids: its tokens; none of a bad record.
    """

    number: int
    record: Record
    ids: tuple[int, ...] = ()


@dataclasses.dataclass(eq=False)
class Windows:
    """The windows that this process runs, one after another.

    Attributes:
        seen: how many records have come by.
        stale: sources whose records have changed, and are run again.
    """

    lens: LoraLens
    records: Iterable[Record]
    done: Sequence[Source]
    processes: Processes
    seen: int = 0
    stale: list[Source] = dataclasses.field(default_factory=list[Source])

    def __iter__(self) -> Iterator[list[Text]]:
        window: list[Text] = []
        for number, record in self._unfinished():
            is_full = sum(max(len(text.ids), 1) for text in window) >= WINDOW_TOKENS
            if window and (is_full or number != window[-1].number + 1):
                yield window
                window = []
            if number // BLOCK % self.processes.count == self.processes.index:
                window.append(self._text(number, record))
        if window:
            yield window

    def _text(self, number: int, record: Record) -> Text:
        if record.error is not None:
            return Text(number, record)
        try:
            return Text(number, record, tuple(tokenised(self.lens, record).tokens[0].tolist()))
        except PromptError as error:
            return Text(number, record.bad(error))

    def _unfinished(self) -> Iterator[tuple[int, Record]]:
        """The records that no span holds, with their numbers."""
        done = {source.span.first: source for source in self.done}
        numbered = enumerate(with_text(self.lens, plain) for plain in self.records)
        for number, record in numbered:
            self.seen = number + 1
            source = done.get(number)
            if source is None:
                yield number, record
                continue
            span = source.span
            rest = itertools.islice(numbered, span.last - number)
            held = [record, *(record for _, record in rest)]
            self.seen = number + len(held)
            if self.seen <= span.last or digest_of(held) == span.digest:
                continue
            if not span.errors:
                raise other_sweep(
                    f"{source.path} holds records {span.first} to {span.last} (from 0) with other "
                    f"ids or prompts than {held[0].where} to {held[-1].where}"
                )
            self.stale.append(source)
            yield from enumerate(held, start=number)
        n_done = max((source.span.last + 1 for source in self.done), default=0)
        if self.seen < n_done:
            raise other_sweep(f"the results hold {n_done} records, and there are {self.seen}")


# --- A window of texts → a table: one row per token, one column per site with `rank` numbers


# Of a text its u [site, token, rank] and which of its tokens are sinks, or what is wrong with it.
Outcome = tuple[NDArray[np.floating], NDArray[np.bool_]] | str


@alone
def window_table(
    lens: LoraLens, texts: Sequence[Text], ranks: Sequence[int], batch_size: int
) -> tuple[pa.Table, Span]:
    """The rows of a window, and its span. One forward pass per batch."""
    lens.check_state()
    by_text: dict[int, Outcome] = {}
    for i, text in enumerate(texts):
        if text.record.error:
            by_text[i] = text.record.error
    readable = [i for i, text in enumerate(texts) if text.ids]
    order = sorted(readable, key=lambda i: -len(texts[i].ids))
    for begin in range(0, len(order), batch_size):
        by_text |= _run(lens, texts, order[begin : begin + batch_size], ranks)
    digest = digest_of(text.record for text in texts)
    tokens = sum(len(text.ids) for text in texts)
    errors = sum(isinstance(outcome, str) for outcome in by_text.values())
    span = Span(texts[0].number, texts[-1].number, digest, tokens, errors)
    return _table(lens, texts, ranks, by_text), span


def _run(
    lens: LoraLens, texts: Sequence[Text], batch: Sequence[int], ranks: Sequence[int]
) -> dict[int, Outcome]:
    """The outcomes of the texts of one batch, which are given by their index."""
    ids = [torch.tensor(texts[i].ids, device=lens.device) for i in batch]
    lengths = torch.tensor([len(row) for row in ids], device=lens.device)
    prompts = Prompts(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), lengths)
    try:
        seen = site_activations(lens, prompts, lens.gates(1.0), range(len(ranks)), ranks)
    except NumericsError as error:
        if len(batch) == 1:
            return {batch[0]: texts[batch[0]].record.bad(error).error or str(error)}
        return {i: _run(lens, texts, [i], ranks)[i] for i in batch}
    values = seen.values.cpu().numpy()
    sinks = seen.sinks.cpu().numpy()
    outcomes: dict[int, Outcome] = {}
    for row, i in enumerate(batch):
        count = len(texts[i].ids)
        outcomes[i] = (values[row, :, :count], sinks[row, :count])
    return outcomes


class _TokenRow(NamedTuple):
    """A row of the table of tokens; a bad text has one, without a token."""

    text: Text
    position: int | None
    token: int | None
    prefix: int | None
    error: str | None


def _table(
    lens: LoraLens, texts: Sequence[Text], ranks: Sequence[int], outcomes: Mapping[int, Outcome]
) -> pa.Table:
    """One row per token; of a bad text one without a token, whose numbers are NaN."""
    dtype = torch.empty(0, dtype=lens.gate_dtype).numpy().dtype
    no_numbers = np.full((len(ranks), 1, max(ranks)), np.nan, dtype)
    no_sink = np.zeros(1, bool)
    numbers: list[NDArray[np.floating]] = []
    sinks: list[NDArray[np.bool_]] = []
    rows: list[_TokenRow] = []
    for i, text in enumerate(texts):
        outcome = outcomes[i]
        if isinstance(outcome, str):
            rows.append(_TokenRow(text, None, None, None, outcome))
            numbers.append(no_numbers)
            sinks.append(no_sink)
            continue
        for position, (token, prefix) in enumerate(zip(text.ids, marks_of(text.ids), strict=True)):
            rows.append(_TokenRow(text, position, token, prefix, None))
        values_of_text, sinks_of_text = outcome
        numbers.append(values_of_text)
        sinks.append(sinks_of_text)
    distinct = sorted({row.token for row in rows if row.token is not None})
    words: dict[int | None, str | None] = dict(zip(distinct, lens.decode(distinct), strict=True))
    words[None] = None
    columns: dict[str, pa.Array] = {
        "record": pa.array([row.text.number for row in rows], pa.int64()),
        "id": pa.array([str(row.text.record.id) for row in rows], pa.string()),
        "position": pa.array([row.position for row in rows], pa.int32()),
        "token": pa.array([words[row.token] for row in rows], pa.string()),
        "prefix": pa.array([row.prefix for row in rows], pa.int64()),
        "sink": pa.array(np.concatenate(sinks)),
        "error": pa.array([row.error for row in rows], pa.string()),
    }
    values = np.concatenate(numbers, axis=1)
    for slot, (site, rank) in enumerate(zip(lens.sites, ranks, strict=True)):
        flat = np.ascontiguousarray(values[slot, :, :rank]).ravel()
        columns[site.name] = pa.FixedSizeListArray.from_arrays(pa.array(flat), rank)
    return pa.table(columns)


# --- The files


# Numbers of activations repeat nothing, so a dictionary or statistics of them would be lost work.
_HOW: Mapping[str, Any] = {
    "use_dictionary": ["id", "token", "error"],
    "write_statistics": ["record"],
    "compression": "snappy",
}


class TokenStore(Store):
    """The file of one stream, and its parts."""

    def __init__(
        self, out: str | Path, fingerprint: Fingerprint, sites: Sequence[Site], ranks: Sequence[int]
    ) -> None:
        super().__init__(out, fingerprint)
        columns = [{**dataclasses.asdict(s), "rank": r} for s, r in zip(sites, ranks, strict=True)]
        self._sites = json.dumps(columns).encode()

    def add(self, table: pa.Table, span: Span) -> None:
        """Write a window, whole or not at all."""
        self.write([table], self._notes([span]), **_HOW)

    def drop(self, stale: Sequence[Source]) -> None:
        """Remove parts whose records have changed."""
        for source in stale:
            if source.path != self.path:
                with write_errors_of(source.path):
                    source.path.unlink(missing_ok=True)

    def merge(self, records: int) -> None:
        """Write the result, part by part, and remove the parts."""
        sources, expected = self.sources(), 0
        for source in sources:
            if source.span.first != expected:
                break
            expected = source.span.last + 1
        if expected != records:
            raise self.lacking(f"record {expected} (from 0) of {records}")
        if any(source.path != self.path for source in sources):
            spans = [source.span for source in sources]
            self.write(map(_rows_of, sources), self._notes(spans), self.path, **_HOW)
        self.remove()

    def sources(self) -> list[Source]:
        """Where each finished span lies, in order; a part goes before what it replaces."""
        parts = [Source(spans_in(table.schema, path)[0], path) for path, table in self.parts()]
        taken = [(source.span.first, source.span.last) for source in parts]
        rest: list[Source] = []
        if self.require_result(self.path):
            for group, span in enumerate(spans_of(self.path)):
                if all(span.last < first or last < span.first for first, last in taken):
                    rest.append(Source(span, self.path, group))
        return sorted([*parts, *rest], key=lambda source: source.span.first)

    def _notes(self, spans: Sequence[Span]) -> dict[bytes, bytes]:
        rows = json.dumps([dataclasses.astuple(span) for span in spans])
        return {SITES: self._sites, SPANS: rows.encode()}


def _rows_of(source: Source) -> pa.Table:
    with pq.ParquetFile(source.path) as file:
        return file.read_row_group(source.group)
