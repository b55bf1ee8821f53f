"""Activations of many texts as a sweep wrote them: read one group of rows at a time.

The file is plain Parquet: one row per token, with `record` (its number), `id`, `position`, `token`,
`sink` and `error`, and a column per site with a list of `rank` numbers. A text lies in one group of
rows, so examples and their contexts need no more than that group, and of its columns one site's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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
from lens_lora.errors import ArgumentError
from lens_lora.hooked.sites import Site, one_site
from lens_lora.results.examples import (
    Positions,
    Sign,
    chosen_positions,
    context_of,
    require_ranks,
    require_sign,
    strongest,
)
from lens_lora.sweeps.records import SweepError
from lens_lora.sweeps.store import about_of
from lens_lora.sweeps.token_store import SITES, spans_in

__all__ = ["ActivationsFile"]

_COLUMNS = ["rank", "record", "id", "position", "token", "value", "context"]


@final
class ActivationsFile:
    """The activations of many texts in a file; no call holds more than a part of it.

    Args:
        path: of what `ll.sweep(lens, texts, "activations", out=path)` wrote.

    Attributes:
        path: one row per token; pandas, polars and DuckDB read it too.
        sites, ranks: of the columns.
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
        about, schema = about_of(self.path), pq.read_schema(self.path)
        spans = spans_in(schema, self.path)
        held: list[dict[str, Any]] = json.loads(schema.metadata[SITES])
        self.ranks: tuple[int, ...] = tuple(
            schema.field(fields["name"]).type.list_size for fields in held
        )
        self.sites: tuple[Site, ...] = tuple(Site(**fields) for fields in held)
        self.gauge: str = next(iter(about["options"].values()))["gauge"]
        self.texts: int = sum(span.last - span.first + 1 for span in spans)
        self.tokens: int = sum(span.tokens for span in spans)
        self.errors: int = sum(span.errors for span in spans)
        self.meta: dict[str, str] = {
            name: about[name] for name in ("model", "model_class", "dtype", "adapter")
        }

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
        found: dict[int, list[dict[str, Any]]] = {
            r: [] for r in require_ranks(rank, self.ranks[index])
        }
        for group in self._groups([self.sites[index].name], sinks):
            values = _numbers(group.table, self.sites[index].name)
            values = np.where(group.counted[:, None], values, np.nan)
            for r, best in found.items():
                best += [
                    group.example(r, int(at), float(values[at, r]), context)
                    for at in strongest(values[:, r], way, k)
                ]
                best.sort(key=lambda row: -way * row["value"])
                del best[k:]
        return pd.DataFrame([row for best in found.values() for row in best], columns=_COLUMNS)

    def mean(
        self, positions: Positions = None, *, sinks: bool = False
    ) -> Float[Tensor, "site rank"]:
        """The mean of u over tokens of all texts, without sinks; NaN beyond a site's own rank.

        Args:
            positions: None for all tokens, or of each text an index, a slice or indices; negative
                ones count from its end.
            sinks: count sinks too.

        Raises:
            ArgumentError: positions at which there is no token.
        """
        total = np.full((len(self.sites), max(self.ranks)), np.nan)
        for slot, rank in enumerate(self.ranks):
            total[slot, :rank] = 0
        count = 0
        for group in self._groups([site.name for site in self.sites], sinks):
            chosen = group.counted & group.at(positions)
            count += int(chosen.sum())
            for slot, (site, rank) in enumerate(zip(self.sites, self.ranks, strict=True)):
                total[slot, :rank] += _numbers(group.table, site.name)[chosen].sum(0, dtype=float)
        if not count:
            raise ArgumentError(
                f"positions={positions!r}: no token is there that is not a sink; ask for others, "
                "or with sinks=True."
            )
        return torch.from_numpy(total / count)

    def bad(self) -> pd.DataFrame:
        """The records without numbers: record, id, error."""
        return pd.read_parquet(
            self.path, columns=["record", "id", "error"], filters=[("error", "!=", "")]
        )

    def _groups(self, columns: Sequence[str], sinks: bool) -> Iterator[_Group]:
        with pq.ParquetFile(self.path) as file:
            for index in range(file.num_row_groups):
                read = ["record", "id", "position", "token", "sink", *columns]
                yield _Group(file.read_row_group(index, columns=read), sinks)

    def __repr__(self) -> str:
        return (
            f"ActivationsFile in gauge {self.gauge!r}: {self.texts} texts ({self.errors} with "
            f"errors), {self.tokens} tokens × {len(self.sites)} sites of rank "
            f"{max(self.ranks)}\n  {self.path}"
        )


class _Group:
    """One group of rows."""

    def __init__(self, table: pa.Table, sinks: bool) -> None:
        self.table = table
        self.records: NDArray[np.int64] = table["record"].to_numpy()
        has_token = table["token"].is_valid().to_numpy()
        self.counted = has_token if sinks else has_token & ~table["sink"].to_numpy()
        self.tokens: list[str | None] = table["token"].to_pylist()

    def own(self, at: int) -> tuple[int, int]:
        """The rows of the text that a row is of: first, and one after the last."""
        low, high = (np.searchsorted(self.records, self.records[at], s) for s in ("left", "right"))
        return int(low), int(high)

    def example(self, rank: int, at: int, value: float, width: int) -> dict[str, Any]:
        low, high = self.own(at)
        tokens = [token or "" for token in self.tokens[low:high]]
        return {
            "rank": rank,
            "record": int(self.records[at]),
            "id": self.table["id"][at].as_py(),
            "position": at - low,
            "token": tokens[at - low],
            "value": value,
            "context": context_of(tokens, at - low, width),
        }

    def at(self, positions: Positions) -> NDArray[np.bool_]:
        """Which rows are at the positions that are asked for."""
        masks: list[NDArray[np.bool_]] = []
        at = 0
        while at < len(self.records):
            _, high = self.own(at)
            masks.append(chosen_positions(positions, high - at, high - at))
            at = high
        return np.concatenate(masks)


def _numbers(table: pa.Table, site: str) -> NDArray[np.floating]:
    """[row, rank] of one site."""
    column = table[site].combine_chunks()
    rank = column.type.list_size
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, rank)
