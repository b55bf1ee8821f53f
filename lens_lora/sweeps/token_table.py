"""A window of texts → a table: one row per token, one column per site with `rank` numbers.

Texts of similar length are run together, right padded, which changes no number; a batch with a
number that is not finite is run again text by text, and only that record fails. A bad record has
one row, without a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from lens_lora.engine.activations import site_activations
from lens_lora.errors import NumericsError
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.sweeps.spans import Span
from lens_lora.sweeps.windows import Text, span_of

__all__ = ["window_table"]


@dataclasses.dataclass(eq=False)
class _Rows:
    """The numbers of a window while its batches are run.

    Attributes:
        values: [site, row, rank].
        sinks: [row].
        starts: the first row of each text.
        errors: of texts, by their index.
    """

    values: NDArray[np.floating]
    sinks: NDArray[np.bool_]
    starts: list[int]
    errors: dict[int, str]


@alone
def window_table(
    lens: LoraLens, texts: Sequence[Text], ranks: Sequence[int], batch_size: int
) -> tuple[pa.Table, Span]:
    """The rows of a window, and its span. One forward pass per batch.

    Args:
        lens: in the gauge that is asked for.
        texts: the window.
        ranks: of each site.
        batch_size: how many texts are run together.
    """
    lens.plan.check_state()
    counts = [max(len(text.ids), 1) for text in texts]
    starts = [0, *np.cumsum(counts).tolist()]
    dtype = torch.empty(0, dtype=lens.gate_dtype).numpy().dtype
    values = np.full((len(ranks), starts[-1], max(ranks)), np.nan, dtype)
    rows = _Rows(values, np.zeros(starts[-1], bool), starts, {})
    order = sorted((i for i, t in enumerate(texts) if t.ids), key=lambda i: -len(texts[i].ids))
    for begin in range(0, len(order), batch_size):
        _run(lens, texts, order[begin : begin + batch_size], ranks, rows)
    errors = {i: t.record.error for i, t in enumerate(texts) if t.record.error} | rows.errors
    span = span_of(texts, sum(len(t.ids) for t in texts), len(errors))
    return _table(lens, texts, ranks, rows, errors), span


def _run(
    lens: LoraLens, texts: Sequence[Text], some: Sequence[int], ranks: Sequence[int], rows: _Rows
) -> None:
    """One batch into its rows."""
    ids = [torch.tensor(texts[i].ids, device=lens.device) for i in some]
    lengths = torch.tensor([len(row) for row in ids], device=lens.device)
    prompts = Prompts(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), lengths)
    try:
        seen = site_activations(lens, prompts, lens.gates(1.0), range(len(ranks)), ranks)
    except NumericsError as error:
        if len(some) > 1:
            for i in some:
                _run(lens, texts, [i], ranks, rows)
        else:
            rows.errors[some[0]] = texts[some[0]].record.bad(error).error or str(error)
        return
    values, sinks = seen.values.cpu().numpy(), seen.sinks.cpu().numpy()
    for row, i in enumerate(some):
        count = len(texts[i].ids)
        own = slice(rows.starts[i], rows.starts[i] + count)
        rows.values[:, own], rows.sinks[own] = values[row, :, :count], sinks[row, :count]


def _table(
    lens: LoraLens,
    texts: Sequence[Text],
    ranks: Sequence[int],
    rows: _Rows,
    errors: dict[int, str],
) -> pa.Table:
    good = [i for i in range(len(texts)) if i not in errors]
    known = sorted({token for i in good for token in texts[i].ids})
    words = dict(zip(known, lens.decode(known), strict=True))
    # A bad record keeps its first row alone, which holds no number.
    each = [(t, i, p) for i, t in enumerate(texts) for p in range(1 if i in errors else len(t.ids))]
    kept = np.array([rows.starts[i] + p for _, i, p in each])
    columns: dict[str, pa.Array] = {
        "record": pa.array([t.number for t, _, _ in each], pa.int64()),
        "id": pa.array([str(t.record.id) for t, _, _ in each], pa.string()),
        "position": pa.array([None if i in errors else p for _, i, p in each], pa.int32()),
        "token": pa.array(
            [None if i in errors else words[t.ids[p]] for t, i, p in each], pa.string()
        ),
        "sink": pa.array(rows.sinks[kept]),
        "error": pa.array([errors.get(i) for _, i, _ in each], pa.string()),
    }
    for slot, (site, rank) in enumerate(zip(lens.sites, ranks, strict=True)):
        flat = np.ascontiguousarray(rows.values[slot, kept, :rank]).ravel()
        columns[site.name] = pa.FixedSizeListArray.from_arrays(pa.array(flat), rank)
    return pa.table(columns)
