"""The tables of results: their rows and columns, and which entries are the largest."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from lens_lora.arguments import is_whole, whole
from lens_lora.core.adapter.peft_read import PREFIX
from lens_lora.errors import ArgumentError, SiteError

# --- Which entries are the largest.


def largest(values: Tensor, k: int) -> list[int]:
    """Flat indices of the k entries of largest magnitude, the largest first; NaN is left out.

    Raises:
        ArgumentError: a k that is no whole number, or below 0.
    """
    if isinstance(k, str):
        raise ArgumentError(
            f"k={k!r}: expected a whole number, of entries",
            remedy='result.sum("layer") adds an attribution up by layer, result.to_frame().groupby'
            f'("layer") any table with layers, and result[{k!r}] has the rows of this name.',
        )
    count = whole("k", k, 0)
    sizes = values.flatten().abs().nan_to_num(-1.0)
    order = sizes.argsort(descending=True, stable=True)[:count]
    return order[sizes[order] >= 0].tolist()


# --- Columns of tables.


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, each {column: entry}."""
    return cast("list[dict[str, Any]]", frame.to_dict("records"))


# The columns whose labels are names of dotted parts, such as blocks.3.mlp.down.
_NAMES_OF_PLACES = ("site", "module", "group", "writer", "reader", "name")
# How one says the number of a layer: 'layer 3', as results by layer call it, or 'layer_3'.
_LAYER = re.compile(r"layer[ _]?(\d+)", re.IGNORECASE)


def is_part(label: str, key: str) -> bool:
    """Whether a key is a glob that a dotted name fits, or successive parts of the name.

    Args:
        label: the name, such as 'model.layers.3.self_attn.q_proj'.
        key: a key such as 'q_proj', 'self_attn', 'layers.3' or 'model.layers.3.*'.
    """
    return fnmatch.fnmatchcase(label, key) or f".{key}." in f".{label}."


def part_of_table(frame: pd.DataFrame, key: object) -> Any:
    """A row, a column, or the rows that have a label.

    Args:
        frame: the table.
        key: the number of a row, or a slice; a column's name; a label; or of a dotted name its
            last parts, or a glob.

    Raises:
        IndexError: no such row.
        SiteError: neither a column nor a label.
        ArgumentError: anything else.
    """
    if isinstance(key, slice):
        return rows_of(cast(pd.DataFrame, frame[key]))
    if is_whole(key):
        if not -len(frame) <= key < len(frame):
            raise IndexError(f"row {key}: the table has rows 0 to {len(frame) - 1}.")
        return rows_of(frame)[key]
    if not isinstance(key, str):
        raise ArgumentError(
            f"a result is indexed by the number of a row, a column or a label, not by {key!r}."
        )
    if key in frame:
        return frame[key]
    for rows_named in (_rows_of_label, _rows_of_part, _rows_of_layer):
        rows = rows_named(frame, key)
        if len(rows):
            return rows
    raise _no_such_label(frame, key)


def _rows_of_label(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """The rows that have a label in the first column that knows it; none if no column does.

    A module's path may begin as PEFT's own names do: 'base_model.model.model.layers.3.…'.
    """
    path = key.removeprefix(PREFIX)
    for name in frame:
        column = frame[name]
        has_label = (column == key) | (column == path)
        if has_label.any():
            return _rows_where(frame, has_label)
    return frame.iloc[:0]


def _rows_of_part(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """The rows of places that a glob fits, or of whose name the key is a part; perhaps none."""

    def fits_key(label: object) -> bool:
        return isinstance(label, str) and is_part(label, key)

    for name in _NAMES_OF_PLACES:
        if name in frame:
            fits = frame[name].map(fits_key)
            if fits.any():
                return _rows_where(frame, fits)
    return frame.iloc[:0]


def _no_such_label(frame: pd.DataFrame, key: str) -> SiteError:
    """The error for a key that is neither a column nor a label, with the nearest of either."""
    names: set[str] = set()
    for column in frame:
        names.update(label for label in frame[column] if isinstance(label, str))
    nearest = difflib.get_close_matches(key, [*names, *map(str, frame)])
    known = f"columns: {', '.join(frame)}"
    if nearest:
        known = f"the nearest are {', '.join(nearest)}"
    return SiteError(f"{key!r} is neither a column nor a label of this result; {known}.")


def _rows_of_layer(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """The rows of the layer that a key such as 'layer 3' names; none where it names no layer."""
    layer = _LAYER.fullmatch(key)
    if layer is None or "layer" not in frame:
        return frame.iloc[:0]
    return _rows_where(frame, frame["layer"] == int(layer[1]))


def _rows_where(frame: pd.DataFrame, mask: Any) -> pd.DataFrame:
    """The rows at which a mask is true, numbered from 0 anew."""
    return cast(pd.DataFrame, frame[mask]).reset_index(drop=True)


def long_table(
    numbers: Mapping[str, Float[Tensor, "*axis"]], *axes: Mapping[str, Iterable[object]]
) -> pd.DataFrame:
    """A table with a row for each entry of arrays of one shape.

    Args:
        numbers: the arrays, by the name of their column.
        axes: the labels of each axis, by the name of their column.
    """
    frame, *others = [pd.DataFrame(axis) for axis in axes]
    for other in others:
        frame = frame.merge(other, how="cross")
    return frame.assign(**flat(numbers))


def tokens_at(
    rows: Sequence[Sequence[str]], prompts: Iterable[Any], positions: Iterable[Any]
) -> list[str]:
    """The token of each pair of prompt and position.

    Args:
        rows: each prompt's tokens.
        prompts: an index for each pair.
        positions: the position of the token within its prompt.
    """
    return [
        rows[int(prompt)][int(position)]
        for prompt, position in zip(prompts, positions, strict=True)
    ]


def flat(numbers: Mapping[str, Float[Tensor, "*rows"]]) -> dict[str, NDArray[np.float64]]:
    """The numbers as columns of a table with a row for each entry, in the order of the axes."""
    return {name: x.detach().cpu().double().flatten().numpy() for name, x in numbers.items()}
