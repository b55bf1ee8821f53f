"""Tokens of the vocabulary ranked by one number each."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from torch import Tensor

from lens_lora.arguments import whole


def ranked_tokens(
    values: Tensor, strings: Sequence[str], k: int, column: str, *, largest: bool = True
) -> pd.DataFrame:
    """The k tokens of largest (or least) value: rank from 1, token, id, value.

    Args:
        values: [vocab].
        strings: the tokens by id.
        k: how many.
        column: the name of the values.
        largest: False for the least.

    Raises:
        ArgumentError: a k that is no whole number, or below 0.
    """
    count = whole("k", k, 0)
    order = values.argsort(descending=largest, stable=True)[:count].tolist()
    return pd.DataFrame(
        {
            "rank": range(1, len(order) + 1),
            "token": [strings[i] for i in order],
            "id": order,
            column: values[order].tolist(),
        }
    )
