"""A sweep of activations: any number of texts, into a Parquet file with a row per token.

1. Records are read, tokenised and run window by window: consecutive records of about
   `WINDOW_TOKENS` tokens in all. With n processes, each takes every n-th block of records.
2. Each window is a part (`runs/store.py`), written before the next begins, with its span of records
   in its metadata. Finished spans are passed over once a hash of ids and prompts shows that their
   records are the same. A span with bad records whose records have changed is run again; any other
   difference is refused.
3. At the end the parts are written into the result in the order of the records, one group of rows
   each (`activations_file.py`). The result holds the spans of its groups, so it can be resumed and
   extended as the parts can.

Whatever the number of texts, only one window, or the records of one span, is in memory.
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
from lens_lora.errors import NumericsError, PromptError
from lens_lora.runs.fingerprint import Fingerprint, fingerprint
from lens_lora.runs.processes import Processes, launched, require_whole_model, write_errors_of
from lens_lora.runs.store import Store, other_sweep
from lens_lora.stream.site_activations import activation_ranks, site_activations
from lens_lora.sweeps.activations_file import (
    SITES,
    SPANS,
    ActivationsFile,
    Span,
    spans_in,
    spans_of,
)
from lens_lora.sweeps.analyses import BY_TOKEN, options_of
from lens_lora.sweeps.batches import tokenised, with_text
from lens_lora.sweeps.records import Record, RecordsLike, each_record

# --- The sweep


# A window ends with the text that brings it to this number of tokens.
WINDOW_TOKENS = 4096
# How many consecutive records make a block, which one process runs.
BLOCK = 64


def token_sweep(
    lens: LoraLens,
    records: RecordsLike,
    name: str,
    *,
    out: str | Path,
    batch_size: int,
    resume: bool,
    version: str | None,
    progress: bool,
) -> ActivationsFile:
    """Run an analysis by token over the records: see `sweep`.

    Args:
        name: the analysis, one of `BY_TOKEN`.
        lens, records, out, batch_size, resume, version, progress: as for `sweep`.
    """
    gauge = BY_TOKEN[name].options["gauge"]
    ranks = activation_ranks(lens, range(len(lens.sites)), gauge)
    processes = launched()
    require_whole_model(processes, is_over_ranks=lens.plan.is_over_ranks)
    depends_on = fingerprint(lens, options_of([name]), None, version)
    store = TokenStore(out, depends_on, lens.sites, ranks)
    shown = progress and processes.is_main
    with store.writing(processes):
        done: list[SpanInFile] = []
        if resume:
            done = store.sources()
            store.require_version()
        processes.by_main(lambda: store.begin(anew=not resume))
        windows = Windows(lens, _with_bar(records, processes, shown), done, processes)
        lens_in_gauge = lens.in_gauge(gauge)
        for window in windows:
            store.drop(windows.stale)
            table, span = window_table(lens_in_gauge, window, ranks, batch_size)
            store.add(table, span)
        processes.by_main(lambda: store.merge(windows.seen))
        file = ActivationsFile(store.path)
    if processes.is_main:
        if file.errors:
            bad = file.bad()[["id", "error"]].itertuples(index=False)
            store.warn_of_bad_records(bad, file.errors, file.texts)
        store.warn_of_damaged_parts()
    return file


def _with_bar(records: RecordsLike, processes: Processes, shown: bool) -> Iterator[Record]:
    """The records, counted by a bar where one is shown."""
    total: int | None = None
    if isinstance(records, Sized) and not isinstance(records, str):
        total = len(records)
    yield from tqdm(
        each_record(records, with_answers=False),
        desc=f"sweep{processes.share}",
        total=total,
        leave=total is not None,
        unit=" text",
        disable=not shown,
    )


# --- Windows: which records are run


@dataclasses.dataclass(frozen=True)
class SpanInFile:
    """A finished span, and where its rows are.

    Attributes:
        span: the records that the rows are of.
        path: the file that holds the rows.
        group: the number of their group of rows in that file.
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
        number: its place in the stream, from 0.
        record: the record that was read, perhaps with its error.
        ids: its tokens; a bad record has none.
    """

    number: int
    record: Record
    ids: tuple[int, ...] = ()


@dataclasses.dataclass(eq=False)
class Windows:
    """The windows that this process runs, one after another.

    Attributes:
        lens: the adapter over the model.
        records: all records, read as they are needed.
        done: the finished spans.
        processes: this process among the others.
        seen: how many records have come by.
        stale: finished spans whose records have changed and are run again.
    """

    lens: LoraLens
    records: Iterable[Record]
    done: Sequence[SpanInFile]
    processes: Processes
    seen: int = 0
    stale: list[SpanInFile] = dataclasses.field(default_factory=list[SpanInFile])

    def __iter__(self) -> Iterator[list[Text]]:
        window: list[Text] = []
        for number, record in self._unfinished():
            if window:
                follows = number == window[-1].number + 1
                is_full = sum(max(len(text.ids), 1) for text in window) >= WINDOW_TOKENS
                if is_full or not follows:
                    yield window
                    window = []
            block = number // BLOCK
            if block % self.processes.count == self.processes.index:
                window.append(self._text(number, record))
        if window:
            yield window

    def _text(self, number: int, record: Record) -> Text:
        """The record, tokenised; a bad one has no tokens."""
        if record.error is not None:
            return Text(number, record)
        try:
            tokens = tokenised(self.lens, record).tokens[0]
        except PromptError as error:
            return Text(number, record.bad(error))
        return Text(number, record, tuple(tokens.tolist()))

    def _unfinished(self) -> Iterator[tuple[int, Record]]:
        """The records that no finished span holds, with their numbers.

        Raises:
            SweepError: the records of a finished span have changed, or are missing.
        """
        source_at = {source.span.first: source for source in self.done}
        records = (with_text(self.lens, record) for record in self.records)
        for record in records:
            number = self.seen
            self.seen += 1
            source = source_at.get(number)
            if source is None:
                yield number, record
                continue
            rest = itertools.islice(records, source.span.last - number)
            of_span = [record, *rest]
            self.seen = number + len(of_span)
            if self._must_rerun(source, of_span):
                self.stale.append(source)
                yield from enumerate(of_span, start=number)
        n_done = max((source.span.last + 1 for source in self.done), default=0)
        if self.seen < n_done:
            raise other_sweep(f"the results hold {n_done} records, and there are {self.seen}")

    def _must_rerun(self, source: SpanInFile, records: Sequence[Record]) -> bool:
        """Whether a span's records, some of them bad, have changed since it was run."""
        span = source.span
        is_cut_short = len(records) < span.last - span.first + 1
        if is_cut_short or digest_of(records) == span.digest:
            return False
        if not span.errors:
            raise other_sweep(
                f"{source.path} holds records {span.first} to {span.last} (from 0) with other "
                f"ids or prompts than {records[0].where} to {records[-1].where}"
            )
        return True


# --- A window of texts → a table: one row per token, one column per site with `rank` numbers


class _Numbers(NamedTuple):
    """The numbers of a text's tokens.

    Attributes:
        u: [site, token, rank], the rank activations.
        sinks: [token], whether each token is a sink.
    """

    u: NDArray[np.floating]
    sinks: NDArray[np.bool_]


# The numbers of a text, or what is wrong with it.
_Outcome = _Numbers | str


@alone
def window_table(
    lens: LoraLens, texts: Sequence[Text], ranks: Sequence[int], batch_size: int
) -> tuple[pa.Table, Span]:
    """The rows of a window, and its span. One forward pass per batch.

    Args:
        lens: the adapter over the model, in the gauge whose coordinates are written.
        texts: the texts of the window.
        ranks: how many coordinates each site has.
        batch_size: how many texts are run together.
    """
    lens.check_state()
    outcomes: dict[int, _Outcome] = {}
    for i, text in enumerate(texts):
        if text.record.error:
            outcomes[i] = text.record.error
    readable = [i for i, text in enumerate(texts) if text.ids]
    longest_first = sorted(readable, key=lambda i: len(texts[i].ids), reverse=True)
    for begin in range(0, len(longest_first), batch_size):
        outcomes |= _run(lens, texts, longest_first[begin : begin + batch_size], ranks)
    span = Span(
        first=texts[0].number,
        last=texts[-1].number,
        digest=digest_of(text.record for text in texts),
        tokens=sum(len(text.ids) for text in texts),
        errors=sum(isinstance(outcome, str) for outcome in outcomes.values()),
    )
    return _table(lens, texts, ranks, outcomes), span


def _run(
    lens: LoraLens, texts: Sequence[Text], batch: Sequence[int], ranks: Sequence[int]
) -> dict[int, _Outcome]:
    """The outcomes of one batch of texts, by index; where it fails, they are run one by one."""
    ids = [torch.tensor(texts[i].ids, device=lens.device) for i in batch]
    lengths = torch.tensor([len(row) for row in ids], device=lens.device)
    prompts = Prompts(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), lengths)
    try:
        seen = site_activations(lens.function(prompts), lens.gates(1.0), range(len(ranks)), ranks)
    except NumericsError as error:
        if len(batch) == 1:
            return {batch[0]: texts[batch[0]].record.bad(error).error or str(error)}
        one_by_one: dict[int, _Outcome] = {}
        for i in batch:
            one_by_one |= _run(lens, texts, [i], ranks)
        return one_by_one
    u = seen.values.cpu().numpy()
    sinks = seen.sinks.cpu().numpy()
    outcomes: dict[int, _Outcome] = {}
    for row, i in enumerate(batch):
        count = len(texts[i].ids)
        outcomes[i] = _Numbers(u[row, :, :count], sinks[row, :count])
    return outcomes


class _TokenRow(NamedTuple):
    """A row of the table of tokens. A bad text has one row, without a token."""

    text: Text
    position: int | None
    token: int | None
    prefix: int | None
    error: str | None


def _table(
    lens: LoraLens, texts: Sequence[Text], ranks: Sequence[int], outcomes: Mapping[int, _Outcome]
) -> pa.Table:
    """The table with one row per token.

    A bad text has one row without a token, whose numbers are NaN.
    """
    dtype = torch.empty(0, dtype=lens.gate_dtype).numpy().dtype
    u_of_no_token = np.full((len(ranks), 1, max(ranks)), np.nan, dtype)
    of_no_token = _Numbers(u_of_no_token, np.zeros(1, bool))
    numbers: list[_Numbers] = []
    rows: list[_TokenRow] = []
    for i, text in enumerate(texts):
        outcome = outcomes[i]
        if isinstance(outcome, str):
            rows.append(_TokenRow(text, None, None, None, outcome))
            numbers.append(of_no_token)
            continue
        numbers.append(outcome)
        prefixes = marks_of(text.ids)
        for position, token in enumerate(text.ids):
            rows.append(_TokenRow(text, position, token, prefixes[position], None))
    words = _words(lens, rows)
    columns: dict[str, pa.Array] = {
        "record": pa.array([row.text.number for row in rows], pa.int64()),
        "id": pa.array([str(row.text.record.id) for row in rows], pa.string()),
        "position": pa.array([row.position for row in rows], pa.int32()),
        "token": pa.array([words[row.token] for row in rows], pa.string()),
        "prefix": pa.array([row.prefix for row in rows], pa.int64()),
        "sink": pa.array(np.concatenate([of_text.sinks for of_text in numbers])),
        "error": pa.array([row.error for row in rows], pa.string()),
    }
    u = np.concatenate([of_text.u for of_text in numbers], axis=1)
    for slot, (site, rank) in enumerate(zip(lens.sites, ranks, strict=True)):
        flat = np.ascontiguousarray(u[slot, :, :rank]).ravel()
        columns[site.name] = pa.FixedSizeListArray.from_arrays(pa.array(flat), rank)
    return pa.table(columns)


def _words(lens: LoraLens, rows: Sequence[_TokenRow]) -> dict[int | None, str | None]:
    """The text of each token that occurs, by its id; None for a row without a token."""
    distinct = sorted({row.token for row in rows if row.token is not None})
    words: dict[int | None, str | None] = {None: None}
    words.update(zip(distinct, lens.decode(distinct), strict=True))
    return words


# --- The files


# How Parquet writes them. Activations repeat nothing, so a dictionary or statistics of their
# numbers would be lost work.
_PARQUET: Mapping[str, Any] = {
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
        columns: list[dict[str, Any]] = []
        for site, rank in zip(sites, ranks, strict=True):
            columns.append({**dataclasses.asdict(site), "rank": rank})
        self._sites = json.dumps(columns).encode()

    def add(self, table: pa.Table, span: Span) -> None:
        """Write a window, whole or not at all."""
        self.write([table], self._notes([span]), **_PARQUET)

    def drop(self, stale: Sequence[SpanInFile]) -> None:
        """Remove parts whose records have changed."""
        for source in stale:
            if source.path != self.path:
                with write_errors_of(source.path):
                    source.path.unlink(missing_ok=True)

    def merge(self, records: int) -> None:
        """Write the result, part by part, and remove the parts.

        Args:
            records: how many there are.

        Raises:
            SweepError: a part is missing.
        """
        sources = self.sources()
        expected = 0
        for source in sources:
            if source.span.first != expected:
                break
            expected = source.span.last + 1
        if expected != records:
            raise self.lacking(f"record {expected} (from 0) of {records}")
        if any(source.path != self.path for source in sources):
            spans = [source.span for source in sources]
            self.write(map(_rows_of, sources), self._notes(spans), self.path, **_PARQUET)
        self.remove()

    def sources(self) -> list[SpanInFile]:
        """The finished spans, with where their rows are, in the order of the records.

        A part takes the place of what the result holds of the same records.
        """
        parts = [SpanInFile(spans_in(table.schema, path)[0], path) for path, table in self.parts()]
        rest: list[SpanInFile] = []
        if self.require_result(self.path):
            for group, span in enumerate(spans_of(self.path)):
                if not any(_overlap(span, part.span) for part in parts):
                    rest.append(SpanInFile(span, self.path, group))
        return sorted([*parts, *rest], key=lambda source: source.span.first)

    def _notes(self, spans: Sequence[Span]) -> dict[bytes, bytes]:
        fields = json.dumps([dataclasses.astuple(span) for span in spans])
        return {SITES: self._sites, SPANS: fields.encode()}


def _overlap(one: Span, other: Span) -> bool:
    return one.first <= other.last and other.first <= one.last


def _rows_of(source: SpanInFile) -> pa.Table:
    with pq.ParquetFile(source.path) as file:
        return file.read_row_group(source.group)
