"""Tabulate first order of many adapters from a bank.

1. The next few adapters are read: at most `AT_ONCE`, and fewer if they are large. An adapter that
   names another base than the bank's, or that cannot be read, becomes a row that says so.
2. Adapters of plain factors are contracted together (`RecordedBase.slopes_of_plain`).
3. With a file at `out`, the rows of every few adapters are written as soon as they are done. A scan
   that is started again recognises an adapter by its name and a hash of its factors, and computes
   only the rows that are missing.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.banks.base_half import LARGE, SlopesOfAdapter, bytes_of
from lens_lora.banks.held import HeldReadout
from lens_lora.banks.readouts import Reach, RecordedReadouts, SlopesOfReadout
from lens_lora.core import Adapter, Site, Sites, load_adapter
from lens_lora.errors import AdapterError, ArgumentError, LensLoraError, warn
from lens_lora.formats.folders import (
    adapter_folder,
    files_in,
    folders_in,
    require_path,
    stated_base,
)
from lens_lora.formats.hub import Place
from lens_lora.hosts.given_base import note_of_names
from lens_lora.runs.fingerprint import digest
from lens_lora.runs.processes import Processes, launched
from lens_lora.runs.shards import KIND, PLAN, PlannedShard, Shard, keep_plan, unfinished
from lens_lora.runs.store import Store, fingerprint_of

Adapters = str | Path | Iterable[str | Path | Adapter]
GroupName = Literal["site", "layer", "kind"]
# An adapter's name in the table, and the adapter or its place.
NamedSource = tuple[str, Place | Adapter]

# How many adapters are contracted and written together, and so the most that a kill loses.
AT_ONCE = 8

_TEXT = pa.string()
_NUMBER = pa.float64()
_INTEGER = pa.int64()


class _Row(NamedTuple):
    """A row of the table. That of an adapter that cannot be used has only a name and an error.

    Attributes:
        adapter: the adapter's name.
        readout: the label of the readout.
        prompt: the index of the prompt.
        group: the name of the site, layer or kind, by which the table names this column.
        value: first order of the group.
        total: first order of all sites.
        error: what is wrong with the adapter.
        weights: the hash of its factors, by which a resumed scan recognises it.
    """

    adapter: str
    readout: str | None = None
    prompt: int | None = None
    group: str | None = None
    value: float | None = None
    total: float | None = None
    error: str | None = None
    weights: str | None = None


# The types of these columns.
_TYPES = [_TEXT, _TEXT, _INTEGER, _TEXT, _NUMBER, _NUMBER, _TEXT, _TEXT]
# The column `rank`, which is added to the table of all adapters, stands after `total`.
_RANK_AT = _Row._fields.index("total") + 1


class Loaded(NamedTuple):
    """An adapter that was read.

    Attributes:
        weights: the hash of its factors; None if nothing is written.
        adapter: the adapter.
    """

    weights: str | None
    adapter: Adapter


# The slopes of adapters that were contracted together, for each group of readouts.
SlopesTogether = Sequence[tuple[Reach, Mapping[int, SlopesOfAdapter]]]
# What became of one adapter: its rows if they are known already, the adapter, or what is wrong.
Outcome = pa.Table | Loaded | Exception


class BasesOfScan:
    """The base of a scan, by the bank's names for it, or else the first that an adapter names."""

    def __init__(self, names: Sequence[str], *, takes_any: bool) -> None:
        self._names = list(names)
        self._takes_any = takes_any
        self._warned_of: set[str] = set()

    def require(self, adapter: str, named: str | None) -> None:
        """Refuse an adapter of another base, or warn once per base if all are taken.

        Args:
            adapter: the adapter's name in the table.
            named: the base that the adapter names.

        Raises:
            AdapterError: the adapter names another base.
        """
        if named is None:
            return
        if not self._names:
            self._names.append(named)
        note = note_of_names(named, self._names)
        if not note:
            return
        if not self._takes_any:
            raise AdapterError(
                note,
                remedy="Make a bank of that model; or, if it is this one under another name, pass "
                "any_base=True.",
                in_shell="Scan the adapters of each base apart, or name the base of all with "
                "--model.",
            )
        if named not in self._warned_of:
            self._warned_of.add(named)
            warn(f"{adapter}: {note}")


class Scan:
    """Computes the rows of many adapters, a few adapters at a time.

    Args:
        recorded: what was recorded for each readout, to be contracted with adapters.
        readouts: the readouts of the bank.
        group: the groups over which values are summed.
        bases: the base that an adapter may name.
    """

    def __init__(
        self,
        recorded: RecordedReadouts,
        readouts: Sequence[HeldReadout],
        group: GroupName,
        bases: BasesOfScan,
    ) -> None:
        self._recorded = recorded
        self._readouts = readouts
        self._group: GroupName = group
        self._bases = bases

    def in_memory(self, sources: Iterable[NamedSource], *, progress: bool) -> pd.DataFrame:
        """Return the table of all adapters.

        Args:
            sources: the adapters.
            progress: whether a bar is shown.

        Raises:
            ArgumentError: there is no adapter at all.
        """
        tables: list[pa.Table] = []
        with tqdm(sources, "scan", unit=" adapter", disable=not progress) as shown:
            for few in self.tables(iter(shown)):
                tables += few
        return ranked(tables).drop_columns("weights").to_pandas()

    def written_to(
        self, store: Store, sources: Iterable[NamedSource], *, resume: bool, progress: bool
    ) -> pd.DataFrame:
        """Write the table of all adapters part by part, each process its share, and return it.

        Args:
            store: where the table is written.
            sources: the adapters, the same in every process.
            resume: whether to go on with what is there; False starts over.
            progress: whether a bar is shown.

        Raises:
            ArgumentError: there is no adapter at all.
            SweepError: another scan is there, or nothing can be written.
        """
        processes = launched()
        with store.writing(processes):
            known = tables_in(store) if resume else {}
            processes.by_main(lambda: store.begin(anew=not resume))
            share = itertools.islice(sources, processes.index, None, processes.count)
            is_silent = not (progress and processes.is_main)
            with tqdm(share, "scan", unit=" adapter", disable=is_silent) as shown:
                finished = self._parts(store, iter(shown), known)
            every_key = list(itertools.chain.from_iterable(processes.gather(finished)))
            processes.by_main(lambda: merge(store, every_key))
        return pd.read_parquet(store.path).drop(columns="weights")

    def shard_written_to(
        self,
        store: Store,
        shard: Shard,
        sources: Sequence[NamedSource],
        *,
        resume: bool,
        progress: bool,
    ) -> pd.DataFrame:
        """Write the table of one shard's adapters part by part into its folder, and return it.

        A shard takes every n-th group of eight adapters, so that the same adapters are contracted
        together as in a single process.

        Args:
            store: the store of the shard.
            shard: the number of the shard.
            sources: all adapters.
            resume: whether to go on with what is there; False starts over.
            progress: whether a bar is shown.

        Raises:
            ArgumentError: there is no adapter at all.
            SweepError: another scan is there, or nothing can be written.
        """
        if not sources:
            raise _no_adapter()
        with store.writing(launched()):
            known = tables_in(store) if resume else {}
            store.begin(anew=not resume)
            names = pa.table({"adapter": pa.array([name for name, _ in sources], _TEXT)})
            keep_plan(store, names, {KIND: b"scan"})
            mine = [number for number in range(len(sources)) if shard.takes(number // AT_ONCE)]
            finished: list[str] = []
            share = tqdm(mine, "scan", unit=" adapter", disable=not progress)
            with share as shown:
                few_at_a_time = iter(shown)
                while numbers := list(itertools.islice(few_at_a_time, AT_ONCE)):
                    few = [sources[number] for number in numbers]
                    finished += self._parts(store, iter(few), known)
            keep_finished(store, mine, finished)
            tables = tables_in(store)
        rows = [tables[key] for key in dict.fromkeys(finished)]
        if not rows:
            return pd.DataFrame()
        return ranked(rows).drop_columns("weights").to_pandas()

    def _parts(
        self, store: Store, sources: Iterator[NamedSource], known: Mapping[str, pa.Table]
    ) -> list[str]:
        """Write the rows that are not known yet, and return the key of each adapter.

        An adapter that is named twice has its key twice, and is written once.
        """
        finished: list[str] = []
        for few in self.tables(sources, known):
            keys = [key_of(table) for table in few]
            by_key = dict(zip(keys, few, strict=True))
            new = [table for key, table in by_key.items() if table is not known.get(key)]
            if new:
                store.write(new, {})
            finished += keys
        return finished

    def tables(
        self, adapters: Iterator[NamedSource], known: Mapping[str, pa.Table] | None = None
    ) -> Iterator[list[pa.Table]]:
        """Yield the rows of each adapter, for a few adapters at a time.

        Args:
            adapters: the adapters that are read next.
            known: rows that need not be computed, under `key_of`; None if nothing is written.
        """
        while outcomes := list(self._next_few(adapters, known)):
            loaded = [outcome for _, outcome in outcomes if isinstance(outcome, Loaded)]
            slopes = self._recorded.slopes_of_plain([each.adapter for each in loaded])
            yield [self._table(name, outcome, slopes) for name, outcome in outcomes]
            # These adapters are released before the next ones are read.
            outcomes.clear()
            loaded.clear()

    def _next_few(
        self, adapters: Iterator[NamedSource], known: Mapping[str, pa.Table] | None
    ) -> Iterator[tuple[str, Outcome]]:
        """Read the next adapters, until there are `AT_ONCE` or they are large together."""
        size = 0
        for name, source in itertools.islice(adapters, AT_ONCE):
            try:
                outcome = self._read(name, source, known)
            except (LensLoraError, OSError) as error:
                yield name, error
                continue
            yield name, outcome
            if isinstance(outcome, Loaded):
                size += bytes_of(outcome.adapter)
            if size > LARGE:
                return

    def _read(
        self, name: str, source: Place | Adapter, known: Mapping[str, pa.Table] | None
    ) -> pa.Table | Loaded:
        """Read an adapter, or return its rows if they are known."""
        if isinstance(source, Adapter):
            place = source
            base_model = source.base_model
        else:
            place = adapter_folder(*source)
            base_model = stated_base(place)
        self._bases.require(name, base_model)

        weights = None
        if known is not None:
            weights = _hash_of(place)
            key = _key(name, weights)
            if key in known:
                return known[key]
        adapter = load_adapter(place)
        return Loaded(weights, adapter)

    def _table(self, name: str, outcome: Outcome, slopes: SlopesTogether) -> pa.Table:
        """Make the rows of one adapter, or a single row if the adapter cannot be used."""
        if isinstance(outcome, pa.Table):
            return outcome
        if isinstance(outcome, Exception):
            return self._table_of([_error_row(name, outcome)])
        try:
            rows = self._rows(name, outcome, slopes)
        except (LensLoraError, OSError) as error:
            rows = [_error_row(name, error)]
        return self._table_of(rows)

    def _rows(self, name: str, loaded: Loaded, slopes: SlopesTogether) -> list[_Row]:
        """Make one row per readout, prompt and group."""
        rows: list[_Row] = []
        by_readout = _slopes_of(loaded.adapter, slopes)
        for readout, (lens, values) in zip(self._readouts, by_readout, strict=True):
            groups, members = _grouping(lens.sites, self._group)
            label = readout.labels["readout"]
            sums = (values.cpu().double() @ members).tolist()
            for prompt, by_group in enumerate(sums):
                total = sum(by_group)
                for group, value in zip(groups, by_group, strict=True):
                    row = _Row(name, label, prompt, group, value, total, weights=loaded.weights)
                    rows.append(row)
        return rows

    def _table_of(self, rows: Sequence[_Row]) -> pa.Table:
        names: list[str] = []
        for field in _Row._fields:
            # The groups stand in a column that says what they are, such as "layer".
            names.append(self._group if field == "group" else field)
        columns: list[pa.Array] = []
        for column, kind in zip(zip(*rows, strict=True), _TYPES, strict=True):
            columns.append(pa.array(column, kind))
        return pa.table(columns, names)


def _slopes_of(adapter: Adapter, together: SlopesTogether) -> list[SlopesOfReadout]:
    """Return the slopes of one adapter for each readout, in the order of the bank.

    Slopes that are not among `together` are computed here.

    Raises:
        LensLoraError: the adapter does not fit the model, or what was recorded of the model.
    """
    by_number: dict[int, SlopesOfReadout] = {}
    for reach, by_id in together:
        of_adapter = by_id.get(id(adapter))
        if of_adapter is None:
            of_adapter = reach.base.slopes(adapter)
        by_number |= reach.by_number(of_adapter)
    return [by_number[number] for number in sorted(by_number)]


def _error_row(name: str, error: Exception) -> _Row:
    return _Row(name, error=f"{type(error).__name__}: {error}")


@functools.lru_cache(maxsize=4)
def _grouping(
    sites: tuple[Site, ...], group: GroupName
) -> tuple[list[str], Float[Tensor, "site group"]]:
    """Return the groups' names, and the indicator matrix of sites in groups."""
    groups = Sites(sites).grouped(group)
    return list(groups), Sites(sites).indicator(groups).T


# --- Which adapters


def named_sources(
    adapters: Adapters, revision: str | None, subfolder: str | None
) -> Iterable[NamedSource]:
    """Return each adapter's name in the table, with the adapter or its place.

    Args:
        adapters: a folder or hub id with adapters at any depth; or several of these and `Adapter`s.
        revision: the branch, tag or commit of every hub repository.
        subfolder: the folder within each folder or repository.
    """
    if isinstance(adapters, str | Path):
        folders = folders_in(adapters, revision, subfolder)
        return [(name, Place(folder)) for name, folder in folders.items()]
    return (_named_source(adapter, revision, subfolder) for adapter in adapters)


def _named_source(
    adapter: str | Path | Adapter, revision: str | None, subfolder: str | None
) -> NamedSource:
    if isinstance(adapter, Adapter):
        return adapter.name, adapter
    require_path(adapter)
    name = f"{adapter}/{subfolder}" if subfolder else str(adapter)
    if Path(adapter).exists():
        # A folder on disk has no revisions.
        revision = None
    return name, Place(adapter, revision, subfolder)


def first_base(sources: Iterable[NamedSource]) -> list[str]:
    """Return the first base that an adapter of a folder names, or [] if none names one.

    It is the same in every process of a launcher.

    Args:
        sources: the result of `named_sources`. Sources that come one by one are not looked at,
            because they cannot be read a second time.
    """
    if not isinstance(sources, list):
        return []
    for _, source in sources:
        if isinstance(source, Place):
            base = stated_base(Path(source.path))
            if base:
                return [base]
    return []


def _no_adapter() -> ArgumentError:
    return ArgumentError("no adapter was given.")


def _hash_of(adapter: Adapter | Path) -> str:
    if isinstance(adapter, Adapter):
        return digest(adapter.modules)
    content = b"".join(file.read_bytes() for file in files_in(adapter))
    return hashlib.sha256(content).hexdigest()


# --- The table


def key_of(table: pa.Table) -> str:
    """Return the key of an adapter's rows in a resumed scan: its name and a hash of its factors."""
    return _keys(table)[0]


def _keys(table: pa.Table) -> list[str]:
    names = table["adapter"].to_pylist()
    weights = table["weights"].to_pylist()
    return [_key(name, mark) for name, mark in zip(names, weights, strict=True)]


def _key(name: str, weights: str | None) -> str:
    return f"{name}#{weights}"


def tables_in(store: Store) -> dict[str, pa.Table]:
    """Read the rows of each written adapter under its `key_of`, the last ones if it has several."""
    tables = [table for _, table in store.parts()]
    if not store.is_shard and store.require_result(store.path):
        tables.insert(0, pq.read_table(store.path).drop_columns("rank"))

    by_key: dict[str, pa.Table] = {}
    for table in tables:
        keys = _keys(table)
        starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
        ends = [*starts[1:], len(keys)]
        for start, end in zip(starts, ends, strict=True):
            by_key[keys[start]] = table.slice(start, end - start)
    return by_key


def merge(store: Store, keys: Sequence[str]) -> None:
    """Write the rows of these adapters, in this order, as the result."""
    tables = tables_in(store)
    in_order = [tables[key] for key in dict.fromkeys(keys)]
    store.write([ranked(in_order)], {}, store.path)
    store.remove()


# --- Shards


# The file with the keys of a shard's adapters, which is written once the shard is done.
_FINISHED = "finished"


def keep_finished(store: Store, numbers: Sequence[int], keys: Sequence[str]) -> None:
    """Note that a shard is done.

    Args:
        store: the store of the shard.
        numbers: the indices of its adapters among all adapters, in order.
        keys: the keys of these adapters, from `key_of`.
    """
    columns = {"number": pa.array(numbers, _INTEGER), "key": pa.array(keys, _TEXT)}
    store.write([pa.table(columns)], {}, store.folder / _FINISHED)


def gathered(out: Path, planned: Sequence[PlannedShard]) -> pd.DataFrame:
    """Write the result from the parts of all shards of a scan.

    Args:
        out: the file of the result.
        planned: all shards, with the same plan.

    Raises:
        SweepError: a shard is not finished.
    """
    fingerprint = fingerprint_of(planned[0].folder / PLAN)
    tables: dict[str, pa.Table] = {}
    key_at: dict[int, str] = {}
    for each in planned:
        of_shard = tables_in(Store(out, fingerprint, each.folder))
        path = each.folder / _FINISHED
        entries = pq.read_table(path).to_pylist() if path.exists() else None
        if entries is None or any(entry["key"] not in of_shard for entry in entries):
            raise unfinished([each.shard], out, "not finished")
        tables |= of_shard
        key_at |= {entry["number"]: entry["key"] for entry in entries}
    store = Store(out, fingerprint)
    with store.writing(Processes()):
        store.begin(anew=False)
        keys = [key_at[number] for number in sorted(key_at)]
        # An adapter that is named twice has its rows once, as in the file of one process.
        in_order = [tables[key] for key in dict.fromkeys(keys)]
        store.write([ranked(in_order)], {}, store.path)
        store.remove()
    return pd.read_parquet(store.path).drop(columns="weights")


def ranked(tables: Sequence[pa.Table]) -> pa.Table:
    """Join all rows, and add each adapter's rank by |total| for each readout and prompt.

    Raises:
        ArgumentError: there are no rows at all.
    """
    if not tables:
        raise _no_adapter()
    rows = pa.concat_tables(tables)
    frame = cast(pd.DataFrame, rows.select(["readout", "prompt", "total"]).to_pandas())
    sizes = frame["total"].abs().groupby([frame["readout"], frame["prompt"]])
    ranks = sizes.rank(method="dense", ascending=False)
    return rows.add_column(_RANK_AT, "rank", pa.array(ranks, _INTEGER, from_pandas=True))
