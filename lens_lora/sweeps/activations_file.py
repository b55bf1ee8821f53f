"""The file of a sweep of activations: a row per token, read one site's column at a time.

A row holds `record` (from 0), `id`, `position`, `token`, `prefix`, `sink`, `error`, and `rank`
numbers for each site. A bad record has one row, without a token. Tokens with the same tokens
before them have the same `prefix` (`core/readout/beginnings.py`), and the same numbers: examples
and means count one of them.

The columns `record`, `prefix` and `sink` are read before a site's.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from lens_lora.arguments import whole
from lens_lora.core import (
    Positions,
    Site,
    chosen_sites,
    context_of,
    drawing,
    first_of_each,
    one_site,
)
from lens_lora.core.readout.positions import chosen_positions
from lens_lora.errors import SweepError
from lens_lora.hidden.examples import (
    Sign,
    require_ranks,
    require_sign,
    require_some,
    spread_of,
    strongest,
)
from lens_lora.runs.store import Unchanged, fingerprint_of

SITES, SPANS = b"lens_lora.sites", b"lens_lora.spans"


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of finished records.

    Attributes:
        first, last: their numbers, from 0.
        digest: the hash of their ids and prompts.
        tokens: how many they have in all.
        errors: how many of them are bad.
    """

    first: int
    last: int
    digest: str
    tokens: int
    errors: int


def spans_in(schema: pa.Schema, path: Path) -> list[Span]:
    """The spans of a file's groups of rows."""
    spans = (schema.metadata or {}).get(SPANS)
    if spans is None:
        raise SweepError(f"{path} holds no activations by token; they are a sweep's of their own.")
    return [Span(*fields) for fields in json.loads(spans)]


def spans_of(path: Path) -> list[Span]:
    """The spans of a result, each of which is one group of its rows."""
    with pq.ParquetFile(path) as file:
        spans, about = spans_in(file.schema_arrow, path), file.metadata
        rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
    # A text without numbers has one row, however many tokens.
    known = [(n, span.tokens) for n, span in zip(rows, spans, strict=False) if not span.errors]
    if len(rows) != len(spans) or any(n != total for n, total in known):
        raise _changed(path, f"{sum(rows)} rows in {len(rows)} groups for {len(spans)} spans")
    return spans


def _changed(path: Path, fact: str) -> SweepError:
    return SweepError(
        f"{path} was changed after the sweep: {fact}.",
        remedy="Restore it from a copy, or start over with resume=False.",
        in_shell="Restore it from a copy, or start over with --no-resume.",
    )


_COLUMNS = ["rank", "record", "id", "position", "token", "value", "context"]


@final
class ActivationsFile:
    """The activations of many texts in a file; no call holds more than a part of it.

    Args:
        path: the file that `ll.sweep(lens, texts, "activations", out=path)` wrote.

    Attributes:
        path: one row per token; pandas, polars and DuckDB read it too.
        sites, ranks: the site of each column, and its rank.
        gauge: 'svd' or 'trained'.
        texts, tokens: how many it holds, texts with an error included.
        errors: how many texts have no numbers.
        meta: model, adapter, dtype and versions.

    Raises:
        SweepError: no such file, or not one of activations.
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Path = Path(path)
        if not self.path.is_file():
            raise SweepError(f"{self.path}: there is no such file of activations.")
        about, schema = fingerprint_of(self.path), pq.read_schema(self.path)
        self._file, spans = Unchanged(self.path), spans_of(self.path)
        self.sites: tuple[Site, ...] = tuple(Site(**s) for s in json.loads(schema.metadata[SITES]))
        self.ranks: tuple[int, ...] = tuple(site.rank for site in self.sites)
        held = {name: getattr(schema.field(name).type, "list_size", 0) for name in schema.names}
        for site in self.sites:
            if held.get(site.name) != site.rank:
                fact = f"{site.name} has {held.get(site.name, 'no')} numbers, and rank {site.rank}"
                raise _changed(self.path, fact)
        self.gauge: str = next(iter(about["options"].values()))["gauge"]
        self.texts: int = sum(span.last - span.first + 1 for span in spans)
        self.tokens: int = sum(span.tokens for span in spans)
        self.errors: int = sum(span.errors for span in spans)
        labels = ("model", "model_class", "dtype", "adapter")
        self.meta: dict[str, str] = {name: about[name] for name in labels}
        self.meta["strings"] = about.get("strings") or ""

    @property
    def done(self) -> int:
        """How many texts have numbers."""
        return self.texts - self.errors

    @property
    def repeated(self) -> int:
        """How many tokens beside sinks an earlier text has after the same ones; they count once.

        Reads 17 bytes a token of the file.
        """
        return self._counted(None, sinks=False)[1]

    def top(
        self,
        site: str,
        k: int = 10,
        *,
        rank: int | None = None,
        sign: Sign = 1,
        context: int = 4,
        sinks: bool = False,
    ) -> pd.DataFrame:
        """The k tokens at which each direction of a site is largest, with what stands around them.

        Where several texts begin alike, a token with the same tokens before it counts once.

        Args:
            site: its name, or a glob that matches it alone.
            k: how many of each direction.
            rank: one direction; without it, each of the site's.
            sign: 1 for the largest values above zero, −1 for those below.
            context: how many tokens are shown on either side of each, which stands in ⟦ ⟧.
            sinks: count sinks too.

        Raises:
            SiteError: no such site, or several.
            ArgumentError: no such rank, another sign, or a k or context below 0.
        """
        k, context, way = whole("k", k, 0), whole("context", context, 0), require_sign(sign)
        index = one_site([s.name for s in self.sites], site)
        name, ranks = self.sites[index].name, require_ranks(rank, self.ranks[index])
        texts = pq.read_table(self._file.path, columns=["record", "id", "token"]).combine_chunks()
        values = np.where(self._counted(None, sinks)[0][:, None], self._numbers(name), np.nan)
        rows = [
            _example(texts, r, int(row), float(values[row, r]), context)
            for r in ranks
            for row in strongest(values[:, r], way, k)
        ]
        return pd.DataFrame(rows, columns=_COLUMNS)

    def mean(
        self, positions: Positions = None, *, sinks: bool = False
    ) -> Float[Tensor, "site rank"]:
        """The mean of u over tokens of all texts, without sinks; NaN beyond a site's own rank.

        Where several texts begin alike, a token with the same tokens before it counts once.

        Args:
            positions: None for all tokens, or of each text an index, a slice or indices; negative
                ones count from its end.
            sinks: count sinks too.

        Raises:
            ArgumentError: positions at which there is no token.
        """
        mean = np.full((len(self.sites), max(self.ranks)), np.nan)
        once = require_some(positions, self._counted(positions, sinks)[0])
        for slot, site in enumerate(self.sites):
            mean[slot, : site.rank] = self._numbers(site.name)[once].mean(0, dtype=float)
        return torch.from_numpy(mean)

    def spread(self, site: str | None = None) -> pd.DataFrame:
        """How each direction's values are spread over the tokens of all texts.

        As `Activations.spread`. Reads one site's numbers at a time.

        Args:
            site: a name or glob: every rank of these. Without it, the first rank of each site.

        Raises:
            SiteError: no such site.
            ArgumentError: no token that is not a sink.
        """
        once = require_some(None, self._counted(None, sinks=False)[0])
        names = [s.name for s in self.sites]
        rows = []
        for index in chosen_sites(self.sites, site or "*"):
            values = self._numbers(names[index])[once]
            for r in range(1 if site is None else self.ranks[index]):
                rows.append({"site": names[index], "rank": r} | spread_of(values[:, r]))
        return pd.DataFrame(rows)

    def plot(self, site: str | None = None) -> drawing.Figure:
        """How each direction is spread over the tokens of all texts, as `spread` has it.

        Of more than 40 directions those of largest |u| are shown, and the title says so.

        Args:
            site: a name or glob: every rank of these. Without it, the first rank of each site.

        Raises:
            SiteError: no such site.
            ArgumentError: no token that is not a sink.
        """
        return drawing.figure(self, site)

    def bad(self) -> pd.DataFrame:
        """The records without numbers: record, id, error."""
        columns, bad = ["record", "id", "error"], [("error", "!=", "")]
        return pd.read_parquet(self._file.path, columns=columns, filters=bad)

    def _counted(self, positions: Positions, sinks: bool) -> tuple[NDArray[np.bool_], int]:
        """[row]: the tokens at these positions, repeats left out; and how many those are."""
        table = pq.read_table(self._file.path, columns=["record", "prefix", "sink"])
        lengths = np.unique(table["record"].to_numpy(), return_counts=True)[1].tolist()
        chosen = np.concatenate([chosen_positions(positions, n, n) for n in lengths])
        chosen &= table["prefix"].is_valid().to_numpy() & (sinks | ~table["sink"].to_numpy())
        once = first_of_each(table["prefix"].fill_null(0).to_numpy(), chosen)
        return once, int(chosen.sum() - once.sum())

    def _numbers(self, site: str) -> NDArray[np.floating]:
        """[row, rank] of one site."""
        column = pq.read_table(self._file.path, columns=[site])[site].combine_chunks()
        return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)

    def __repr__(self) -> str:
        strings = self.meta["strings"]
        return (
            f"ActivationsFile in gauge {self.gauge!r}: {self.texts} texts ({self.errors} with "
            f"errors), {self.tokens} tokens ({self.repeated} after the same tokens as earlier, "
            f"which count once) × {len(self.sites)} sites of rank "
            f"{max(self.ranks)}{f', texts {strings}' if strings else ''}\n  {self.path}"
        )


def _example(texts: pa.Table, rank: int, row: int, value: float, width: int) -> tuple[Any, ...]:
    records = texts["record"].to_numpy()
    low, high = (int(np.searchsorted(records, records[row], side)) for side in ("left", "right"))
    text = [token or "" for token in texts["token"].slice(low, high - low).to_pylist()]
    place = int(records[row]), texts["id"][row].as_py(), row - low, text[row - low]
    return (rank, *place, value, context_of(text, row - low, width))
