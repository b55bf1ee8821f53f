"""The cosine of vectors at hook points with directions, or with the outputs of sites there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lens_lora.core import LoraLens
from lens_lora.errors import ArgumentError
from lens_lora.formats.directions import Directions, directions_of, is_residual
from lens_lora.stream.stream_writers import stream_writers

# What to do about a norm between a site and the stream.
_BY_SHIFT = "Compare with activation_shift(…, scale={site: 1.0}).mean(), the site's own"


def cosine_table(vectors: Mapping[str, Float[Tensor, " _d"]], source: Any) -> pd.DataFrame:
    """The cosine of the vector at each hook point with each direction, as a table.

    Args:
        vectors: the vector at each hook point.
        source: directions in any form that `directions_of` takes, or a lens, for the directions
            that its sites write at each hook point.

    Raises:
        ArgumentError: directions of another width or space, or none at any point.
        ModelStateError: the source is a lens, and a norm changes what a site writes to the stream.
    """
    rows: list[dict[str, Any]] = []
    for name, vector in vectors.items():
        if isinstance(source, LoraLens):
            given = _written(source, name)
        else:
            given = directions_of(source, name)
        if given is None:
            continue
        directions = given.at(name, len(vector))
        cosines = functional.cosine_similarity(directions.rows.to(vector), vector[None], eps=0.0)
        for (label, index), cosine in zip(directions.labels, cosines.tolist(), strict=True):
            rows.append({"point": name, "direction": label, "index": index, "cosine": cosine})
    if not rows:
        raise ArgumentError(
            f"no site of the lens writes at {list(vectors)}",
            remedy="name a site's output (lens.sites: write) or a point of the residual stream.",
        )
    return pd.DataFrame(rows)


def _written(lens: LoraLens, name: str) -> Directions | None:
    """The columns of B of the sites that write at a hook point; None if no site does."""
    writers = stream_writers(lens, _BY_SHIFT) if is_residual(name) else []
    columns: dict[str, Tensor] = {}
    for index, site in enumerate(lens.sites):
        if index in writers or site.write == name:
            columns[site.name] = lens.plan.in_svd_gauge.maps[index].sB.T
    return directions_of(columns) if columns else None
