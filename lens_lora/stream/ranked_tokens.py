"""Tokens of the vocabulary, ranked by one number for each."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from torch import Tensor

from lens_lora.arguments import whole


def ranked_tokens(
    values: Tensor, strings: Sequence[str], k: int, column: str, *, largest: bool = True
) -> pd.DataFrame:
    """A table of the k tokens with the largest (or smallest) values: rank, token, id and value.

    Args:
        values: the value of each token, [vocab].
        strings: the tokens by id.
        k: the number of tokens.
        column: the name of the values.
        largest: False for the smallest values.

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
