"""The file of a sweep of activations: a row per token, read one site's column at a time.

A row holds `record` (from 0), `id`, `position`, `token`, `prefix`, `sink`, `error`, and `rank`
numbers for each site. A bad record has one row, without a token. Where texts begin alike, their
tokens have the same `prefix` (`core/readout/beginnings.py`) and the same numbers, so examples and
means count each of them once.

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
from lens_lora.core import ChosenPositions, Positions, Site, Sites, drawing, first_of_each
from lens_lora.errors import SweepError
from lens_lora.runs.store import Unchanged, fingerprint_of
from lens_lora.show.text import context_of
from lens_lora.stream.examples import (
    Sign,
    require_ranks,
    require_sign,
    require_some,
    spread_of,
    strongest,
)

# Where the sites, and the spans of the groups of rows, stand in the file's metadata.
SITES = b"lens_lora.sites"
SPANS = b"lens_lora.spans"


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of finished records.

    Attributes:
        first, last: the numbers of its first and last record, from 0.
        digest: the hash of the records' ids and prompts.
        tokens: how many tokens they have in all.
        errors: how many of the records are bad.
    """

    first: int
    last: int
    digest: str
    tokens: int
    errors: int


def spans_in(schema: pa.Schema, path: Path) -> list[Span]:
    """The spans of a file's groups of rows.

    Raises:
        SweepError: a file without spans.
    """
    spans = (schema.metadata or {}).get(SPANS)
    if spans is None:
        raise SweepError(
            f"{path} holds no activations by token; a sweep of activations writes such a file."
        )
    return [Span(*fields) for fields in json.loads(spans)]


def spans_of(path: Path) -> list[Span]:
    """The spans of a result, each of which is one group of its rows.

    Raises:
        SweepError: a file without spans, or whose rows do not match them.
    """
    with pq.ParquetFile(path) as file:
        spans = spans_in(file.schema_arrow, path)
        groups = range(file.metadata.num_row_groups)
        rows = [file.metadata.row_group(group).num_rows for group in groups]
    fits = len(rows) == len(spans)
    for count, span in zip(rows, spans, strict=False):
        # A text without numbers has one row, however many tokens.
        if not span.errors and count != span.tokens:
            fits = False
    if not fits:
        raise _changed(path, f"{sum(rows)} rows in {len(rows)} groups for {len(spans)} spans")
    return spans


def _changed(path: Path, fact: str) -> SweepError:
    return SweepError(
        f"{path} was changed after the sweep: {fact}.",
        remedy="Restore it from a copy, or start over with resume=False.",
        in_shell="Restore it from a copy, or start over with --no-resume.",
    )


# The columns of a table of examples.
_EXAMPLE = ["rank", "record", "id", "position", "token", "value", "context"]


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
        SweepError: there is no such file, or it does not hold activations.
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Path = Path(path)
        if not self.path.is_file():
            raise SweepError(f"{self.path}: there is no such file of activations.")
        fingerprint = fingerprint_of(self.path)
        schema = pq.read_schema(self.path)
        spans = spans_of(self.path)
        self._file = Unchanged(self.path)

        fields_of_sites = json.loads(schema.metadata[SITES])
        self.sites: tuple[Site, ...] = tuple(Site(**fields) for fields in fields_of_sites)
        self.ranks: tuple[int, ...] = tuple(site.rank for site in self.sites)
        self._require_columns(schema)

        (options,) = fingerprint["options"].values()
        self.gauge: str = options["gauge"]
        self.texts: int = sum(span.last - span.first + 1 for span in spans)
        self.tokens: int = sum(span.tokens for span in spans)
        self.errors: int = sum(span.errors for span in spans)
        labels = ("model", "model_class", "dtype", "adapter")
        self.meta: dict[str, str] = {name: fingerprint[name] for name in labels}
        self.meta["strings"] = fingerprint.get("strings") or ""

    def _require_columns(self, schema: pa.Schema) -> None:
        """Refuse a file whose columns do not hold as many numbers as their sites have ranks."""
        widths = {name: getattr(schema.field(name).type, "list_size", 0) for name in schema.names}
        for site in self.sites:
            width = widths.get(site.name, "no")
            if width != site.rank:
                raise _changed(self.path, f"{site.name} has {width} numbers, and rank {site.rank}")

    @property
    def done(self) -> int:
        """How many texts have numbers."""
        return self.texts - self.errors

    @property
    def repeated(self) -> int:
        """How many tokens an earlier text has too, after the same tokens; sinks are left out.

        Such a token counts once. To find them, 17 bytes per token are read from the file.
        """
        table = self._table_of_tokens()
        chosen = self._chosen(table, None, sinks=False)
        return int(chosen.sum() - self._once(table, chosen).sum())

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
            k: how many tokens for each direction.
            rank: one direction; without it, each of the site's.
            sign: 1 for the largest values above zero, −1 for those below.
            context: the number of tokens shown on either side of each, which is in ⟦ ⟧.
            sinks: count sinks too.

        Raises:
            SiteError: no site has this name, or several match.
            ArgumentError: no such rank or sign exists, or k or context is below 0.
        """
        k = whole("k", k, 0)
        context = whole("context", context, 0)
        towards = require_sign(sign)
        index = Sites(self.sites).one(site)
        ranks = require_ranks(rank, self.ranks[index])
        texts = pq.read_table(self._file.path, columns=["record", "id", "token"]).combine_chunks()
        counted = self._counted(None, sinks)
        values = np.where(counted[:, None], self._numbers(self.sites[index].name), np.nan)
        examples: list[dict[str, Any]] = []
        for r in ranks:
            for row in strongest(values[:, r], towards, k):
                example = _example(texts, int(row), context)
                examples.append({"rank": r, "value": float(values[row, r]), **example})
        return pd.DataFrame(examples, columns=_EXAMPLE)

    def mean(
        self, positions: Positions = None, *, sinks: bool = False
    ) -> Float[Tensor, "site rank"]:
        """The mean of u over tokens of all texts, without sinks; NaN beyond a site's own rank.

        Where several texts begin alike, a token with the same tokens before it counts once.

        Args:
            positions: None for all tokens; or an index, a slice or indices into each text, where
                negative ones count from its end.
            sinks: count sinks too.

        Raises:
            ArgumentError: positions at which there is no token.
        """
        mean = np.full((len(self.sites), max(self.ranks)), np.nan)
        once = require_some(positions, self._counted(positions, sinks))
        for slot, site in enumerate(self.sites):
            mean[slot, : site.rank] = self._numbers(site.name)[once].mean(0, dtype=float)
        return torch.from_numpy(mean)

    def spread(self, site: str | None = None) -> pd.DataFrame:
        """How each direction's values are spread over the tokens of all texts.

        The table is that of `Activations.spread`. One site's numbers are read at a time.

        Args:
            site: a name or glob: every rank of these. Without it, the first rank of each site.

        Raises:
            SiteError: no site has this name.
            ArgumentError: no token that is not a sink.
        """
        once = require_some(None, self._counted(None, sinks=False))
        rows: list[dict[str, Any]] = []
        for index in Sites(self.sites).chosen(site or "*"):
            name = self.sites[index].name
            values = self._numbers(name)[once]
            shown = 1 if site is None else self.ranks[index]
            for rank in range(shown):
                rows.append({"site": name, "rank": rank, **spread_of(values[:, rank])})
        return pd.DataFrame(rows)

    def plot(self, site: str | None = None) -> drawing.Figure:
        """A box for each direction: how its values are spread over the tokens of all texts.

        Of more than 40 directions those of largest |u| are shown, and the title says so.

        Args:
            site: a name or glob: every rank of these. Without it, the first rank of each site.

        Raises:
            SiteError: no site has this name.
            ArgumentError: no token that is not a sink.
        """
        return drawing.figure(self, site)

    def bad(self) -> pd.DataFrame:
        """The records without numbers: record, id, error."""
        has_error = [("error", "!=", "")]
        columns = ["record", "id", "error"]
        return pd.read_parquet(self._file.path, columns=columns, filters=has_error)

    def _counted(self, positions: Positions, sinks: bool) -> NDArray[np.bool_]:
        """[row]: the tokens at these positions, without those that an earlier text has too."""
        table = self._table_of_tokens()
        return self._once(table, self._chosen(table, positions, sinks))

    def _table_of_tokens(self) -> pa.Table:
        return pq.read_table(self._file.path, columns=["record", "prefix", "sink"])

    @staticmethod
    def _chosen(table: pa.Table, positions: Positions, sinks: bool) -> NDArray[np.bool_]:
        """[row]: the tokens at these positions of their texts; sinks only if wanted."""
        _, lengths = np.unique(table["record"].to_numpy(), return_counts=True)
        which = ChosenPositions.of(positions)
        by_text = [which.mask(length, length) for length in lengths.tolist()]
        is_token = table["prefix"].is_valid().to_numpy()
        is_sink = table["sink"].to_numpy()
        return np.concatenate(by_text) & is_token & (sinks | ~is_sink)

    @staticmethod
    def _once(table: pa.Table, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[row]: the first of the chosen tokens that have the same prefix."""
        return first_of_each(table["prefix"].fill_null(0).to_numpy(), chosen)

    def _numbers(self, site: str) -> NDArray[np.floating]:
        """[row, rank] of one site."""
        column = pq.read_table(self._file.path, columns=[site])[site].combine_chunks()
        return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)

    def __repr__(self) -> str:
        texts = f"{self.texts} texts ({self.errors} with errors)"
        tokens = (
            f"{self.tokens} tokens ({self.repeated} after the same tokens as earlier, which count "
            "once)"
        )
        sites = f"{len(self.sites)} sites of rank {max(self.ranks)}"
        if self.meta["strings"]:
            sites += f", texts {self.meta['strings']}"
        return (
            f"ActivationsFile in gauge {self.gauge!r}: {texts}, {tokens} × {sites}\n  {self.path}"
        )


def _example(texts: pa.Table, row: int, width: int) -> dict[str, Any]:
    """The token of a row, where it stands, and `width` tokens on either side of it."""
    records = texts["record"].to_numpy()
    record = records[row]
    first = int(np.searchsorted(records, record, "left"))
    end = int(np.searchsorted(records, record, "right"))
    text = [token or "" for token in texts["token"].slice(first, end - first).to_pylist()]
    position = row - first
    return {
        "record": int(record),
        "id": texts["id"][row].as_py(),
        "position": position,
        "token": text[position],
        "context": context_of(text, position, width),
    }
