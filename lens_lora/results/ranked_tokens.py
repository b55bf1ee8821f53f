"""Tokens of the vocabulary, ranked by one number each."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import whole

__all__ = ["rank_of", "ranked_tokens"]


def ranked_tokens(
    values: Float[Tensor, "vocab"],
    strings: Sequence[str],
    k: int,
    column: str,
    *,
    largest: bool = True,
) -> pd.DataFrame:
    """The k tokens of largest (or least) value: rank from 1, token, id, value.

    Args:
        values: of every token.
        strings: of every token.
        k: how many.
        column: what the values are called.
        largest: False for the least.

    Raises:
        ArgumentError: a k that is no whole number, or below 0.
    """
    order = values.argsort(descending=largest, stable=True)[: whole("k", k, 0)].tolist()
    columns = {
        "rank": list(range(1, len(order) + 1)),
        "token": [strings[i] for i in order],
        "id": order,
        column: values[order].tolist(),
    }
    return pd.DataFrame(columns)


def rank_of(values: Float[Tensor, "vocab"], token: int) -> int:
    """The rank of a token, 1 for the largest value; ties count against it.

    Args:
        values: of every token.
        token: its id.
    """
    return int((values >= values[token]).sum())
