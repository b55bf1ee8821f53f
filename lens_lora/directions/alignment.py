"""How much of each weight change lies along a direction, from weights alone.

A site that writes to the residual stream has ‖vᵀΔW‖ / ‖ΔW‖ of its change along a direction v of
length 1, one that reads it ‖ΔW v‖ / ‖ΔW‖. The norm in between counts by its γ, its denominator
held, so that raw and processed models agree:

    read    ΔW diag(γ)      write, where a norm stands behind the site    diag(γ) ΔW

LayerNorm takes the mean of v off, so v and ΔW are centred first. The squares over an orthonormal
basis sum to 1: of a random v the root mean square is 1/√d, whatever ΔW is. The spread is not, so
the 99 % quantile is of random directions for each site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import whole
from lens_lora.compat import in_float64
from lens_lora.core import (
    LoraLens,
    OfSites,
    alone,
    long_table,
    site_labels,
)
from lens_lora.core.model.basis import NormMap
from lens_lora.core.model.sites import WRITER_KINDS
from lens_lora.core.results import drawing
from lens_lora.errors import ArgumentError, ModelStateError, SiteError
from lens_lora.formats.directions import STREAM, directions_of

_DRAWS = 2000
QUANTILE = 0.99


@final
class Alignment(OfSites):
    """‖vᵀΔW‖/‖ΔW‖ of sites that write to the residual stream, ‖ΔW v‖/‖ΔW‖ of those that read it.

    Attributes:
        values: [site, direction], between 0 and 1; NaN where ΔW is zero.
        sides: each site's, 'write' or 'read'.
        directions: their names.
        expected: the root mean square over random directions, 1/√d.
        quantile: [site], the 99 % quantile over random directions.
        sites, meta: see `OfSites`; those with a weight that writes to the stream, or reads it.
    """

    values: Float[Tensor, "site direction"]
    sides: Annotated[tuple[str, ...], "site"]
    directions: Annotated[tuple[str, ...], "direction"]
    expected: float
    quantile: Float[Tensor, " site"]

    def to_frame(self) -> pd.DataFrame:
        """One row per site and direction: value, and random directions' 1/√d and quantile."""
        labels = {**site_labels(self.sites), "side": self.sides, "quantile": self.quantile.tolist()}
        table = long_table({"value": self.values}, labels, {"direction": self.directions})
        return table.assign(expected=self.expected)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k pairs of site and direction furthest beyond random directions.

        Args:
            k: how many.

        Raises:
            ArgumentError: a k that is no whole number, or below 0.
        """
        table, k = self.to_frame().drop(columns="module"), whole("k", k, 0)
        order = (table["value"] / table["quantile"]).sort_values(ascending=False).index[:k]
        return table.loc[order].reset_index(drop=True)

    def plot(self, direction: str | None = None) -> drawing.Figure:
        """Layer × kind of module, of one direction.

        Args:
            direction: its name; without it, the first.

        Raises:
            ArgumentError: no such direction.
        """
        return drawing.figure(self, direction_index(self.directions, direction))


def direction_index(names: Sequence[str], name: str | None) -> int:
    """The index of a direction; without a name of the first."""
    if name is not None and name not in names:
        raise ArgumentError(f"direction={name!r}; these are {list(names)[:6]}.")
    return 0 if name is None else names.index(name)


@alone
def alignment(lens: LoraLens, directions: Any) -> Alignment:
    """How much of each weight change writes, or reads, along directions of the residual stream.

    From weights alone: no forward pass. Norms, and changes of bias, are left out.

    Args:
        lens: the adapter over the model.
        directions: [d], [direction, d], {label: either}, a Contrast of one hook point, or a sparse
            autoencoder of the residual stream, alone or as (autoencoder, indices); of any length.

    Returns:
        Alignment with values [site, direction]; a value above `quantile` is one that 1 % of random
        directions have, so of many sites some have it by chance.

    Raises:
        ArgumentError: directions of another width or space, a direction of zeros or NaN.
        ModelStateError: a model without an entry in `families.py`, of which it is not known which
            norm a module reads.
        SiteError: no site with a weight.
    """
    host = lens.plan.host
    if host.family.is_probed:
        raise ModelStateError(
            f"{host.family.architectures[0]} as a TransformerBridge is read from the model and has "
            "no entry in lens_lora/families.py, so it is not known which norm stands between its "
            "modules and the residual stream; use ll.results.feature_shift, which runs the model."
        )
    d, centred = int(lens.model.cfg.d_model), host.family.norm == "LN"
    source = directions_of(directions)
    rows = source.at(STREAM, d).unit(centred=centred)
    chosen = [i for i, delta in enumerate(lens.maps) if not isinstance(delta, NormMap)]
    if not chosen:
        raise SiteError("the adapter changes norms alone, and no weight.")
    drawn = torch.randn(_DRAWS, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = directions_of(drawn).unit(centred=centred)
    every = torch.cat([rows, drawn])
    shares = torch.stack([_shares(lens, index, every, centred=centred) for index in chosen])
    values, by_chance = shares.split([len(rows), _DRAWS], 1)
    sites = tuple(lens.sites[i] for i in chosen)
    return Alignment(
        values=values.to(lens.gate_dtype),
        sides=tuple("write" if site.kind in WRITER_KINDS else "read" for site in sites),
        directions=source.names,
        expected=(d - centred) ** -0.5,
        quantile=by_chance.quantile(QUANTILE, 1).to(lens.gate_dtype),
        sites=sites,
        meta=lens.describe(),
    )


def _shares(
    lens: LoraLens, index: int, rows: Float[Tensor, "direction d"], *, centred: bool
) -> Float[Tensor, " direction"]:
    """‖vᵀ X Yᵀ‖ / ‖X Yᵀ‖ of a site's ΔW, X with γ on the side of the residual stream."""
    host, site, delta = lens.plan.host, lens.sites[index], lens.maps[index]
    writes = site.kind in WRITER_KINDS
    near, far = (delta.B, delta.A.T) if writes else (delta.A.T, delta.B)
    near, far = (in_float64(factor).cpu() for factor in (near, far))
    kind = host.family.norm_behind(site.kind) if writes else _norm_read(lens, index)
    if kind is not None:
        affine = host.norm_parameters(site.layer, kind)
        if affine is None:
            raise ModelStateError(f"{site.name}: the model has no norm {kind} that this site uses.")
        near = near - near.mean(0) if centred and writes else near
        near = in_float64(affine[0]).cpu()[:, None] * near
    near = near - near.mean(0) if centred else near
    along, gram = rows @ near, far.T @ far
    squares = ((along @ gram) * along).sum(1)
    return (squares / ((near.T @ near) * gram).sum()).clamp(min=0).sqrt()


def _norm_read(lens: LoraLens, index: int) -> str | None:
    """The kind of norm whose γ a site's map does not hold yet."""
    host, site = lens.plan.host, lens.sites[index]
    if lens.maps[index].A_behind_gamma is not None or host.is_folded(site.layer, site.kind):
        return None
    place = host.family.place(host.family.norm_path(site.layer, site.kind) or "")
    return None if place is None else place.kinds[0]
