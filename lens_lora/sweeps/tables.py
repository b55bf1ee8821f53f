"""Rows ↔ Arrow tables: a part (one row per prompt, values as lists), and the two result tables.

part      id, prompt, chat, doc, pre, tokens, readout, units, base, adapted, flips, error,
          and per analysis a list of one number per site
prompts   the same, with shift, and per analysis its sum and its remainder, shift − sum
sites     id, prompt, site, module, layer, kind, and per analysis a column
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lens_lora.hooked.sites import Site
from lens_lora.sweeps.analyses import ANALYSES
from lens_lora.sweeps.batches import Row

__all__ = ["part_table", "prompts_table", "rows_of_part", "rows_of_results", "sites_table"]

_TEXT, _NUMBER = pa.string(), pa.float64()
_FIELDS = {
    "id": _TEXT,
    "prompt": _TEXT,
    "chat": pa.bool_(),
    "doc": _TEXT,
    "pre": _TEXT,
    "response": _TEXT,
    "tokens": pa.int64(),
    "readout": _TEXT,
    "units": _TEXT,
    "base": _NUMBER,
    "adapted": _NUMBER,
    "flips": pa.bool_(),
    "error": _TEXT,
}


def part_table(rows: Sequence[Row], analyses: Sequence[str]) -> pa.Table:
    """One row per prompt, with all its values: a part never holds half a prompt.

    Args:
        rows: of one batch.
        analyses: names from `ANALYSES`.
    """
    columns = _columns(rows)
    for name in analyses:
        lists = [row.values[name] if row.error is None else None for row in rows]
        columns[name] = pa.array(lists, pa.list_(_NUMBER))
    return pa.table(columns)


def rows_of_part(table: pa.Table, analyses: Sequence[str]) -> list[Row]:
    """The rows from which `part_table` made the table.

    Args:
        table: a part.
        analyses: names from `ANALYSES`.
    """
    values = {name: table[name].to_pylist() for name in analyses}
    return [
        Row(**fields, values={name: np.array(values[name][i]) for name in analyses})
        for i, fields in enumerate(table.select(list(_FIELDS)).to_pylist())
    ]


def prompts_table(
    rows: Sequence[Row], ids: Sequence[int | str], analyses: Sequence[str]
) -> pa.Table:
    """One row per prompt, under its own id.

    Args:
        rows: in the order of the records.
        ids: one per row, as the records have them.
        analyses: names from `ANALYSES`.
    """
    columns = _columns(rows) | {"id": _ids(ids)}
    error, flips = columns.pop("error"), columns.pop("flips")
    shifts = [_shift(row) for row in rows]
    columns |= {"shift": pa.array(shifts, _NUMBER), "flips": flips}
    for name in analyses:
        sums = [None if row.error is not None else float(row.values[name].sum()) for row in rows]
        left = [
            None if s is None or t is None else s - t for s, t in zip(shifts, sums, strict=True)
        ]
        columns[f"{name}_sum"] = pa.array(sums, _NUMBER)
        if ANALYSES[name].has_remainder:
            columns[f"{name}_remainder"] = pa.array(left, _NUMBER)
    return pa.table(columns | {"error": error})


def sites_table(
    rows: Sequence[Row], ids: Sequence[int | str], sites: Sequence[Site], analyses: Sequence[str]
) -> pa.Table:
    """One row per prompt and site, of the prompts without an error.

    Args:
        rows: in the order of the records.
        ids: one per row, as the records have them.
        sites: of the lens, in its order.
        analyses: names from `ANALYSES`.
    """
    good = [(identity, row) for identity, row in zip(ids, rows, strict=True) if row.error is None]
    by_prompt = np.repeat(np.arange(len(good)), len(sites))
    by_site = np.tile(np.arange(len(sites)), len(good))
    columns: dict[str, pa.Array] = {
        "id": _ids([identity for identity, _ in good], like=ids).take(pa.array(by_prompt)),
        "prompt": pa.array([row.prompt for _, row in good], _TEXT).take(pa.array(by_prompt)),
    }
    for name, field in {
        "site": "name",
        "module": "module",
        "layer": "layer",
        "kind": "kind",
    }.items():
        labels = pa.array([getattr(site, field) for site in sites])
        columns[name] = labels.take(pa.array(by_site))
    for name in analyses:
        values = [row.values[name] for _, row in good]
        columns[name] = pa.array(np.concatenate([np.empty(0), *values]), _NUMBER)
    return pa.table(columns)


def rows_of_results(
    prompts: pa.Table, sites: pa.Table, count: int, analyses: Sequence[str]
) -> list[Row]:
    """The prompts without an error, from the two tables that were written together.

    Args:
        prompts: one row per prompt.
        sites: one row per prompt and site, in the same order.
        count: how many sites there are.
        analyses: names from `ANALYSES`.

    Raises:
        ValueError: the tables are not of the same prompts.
    """
    found: list[dict[str, Any]] = prompts.select(list(_FIELDS)).to_pylist()
    good = [fields for fields in found if fields["error"] is None]
    values = {
        name: sites[name].to_numpy().reshape(len(good), count) if good else () for name in analyses
    }
    rows: list[Row] = []
    for i, fields in enumerate(good):
        mine = {name: column[i] for name, column in values.items()}
        fields |= {"id": str(fields["id"]), "values": mine}
        rows.append(Row(**fields))
    return rows


def _columns(rows: Sequence[Row]) -> dict[str, pa.Array]:
    return {
        name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in _FIELDS.items()
    }


def _ids(ids: Sequence[int | str], like: Sequence[int | str] | None = None) -> pa.Array:
    """Integers where all are, else strings."""
    if all(isinstance(identity, int) for identity in (ids if like is None else like)):
        return pa.array(ids, pa.int64())
    return pa.array([str(identity) for identity in ids], _TEXT)


def _shift(row: Row) -> float | None:
    return None if row.base is None or row.adapted is None else row.adapted - row.base
