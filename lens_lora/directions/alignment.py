"""How much of each weight change lies along a direction, computed from the weights alone.

Let v be a direction of length 1 in the residual stream. The share of a site's ΔW along v is

    ‖vᵀ diag(γ) ΔW‖ / ‖diag(γ) ΔW‖    if the site writes to the stream,
    ‖ΔW diag(γ) v‖ / ‖ΔW diag(γ)‖     if it reads the stream,

where γ is the scale of the norm between the site and the stream, and 1 if there is none.
The norm's denominator is held fixed, so a raw and a processed model give the same share. LayerNorm
subtracts the mean of its input, so v and ΔW are centred first where the model has LayerNorm.

With ΔW = B A, both norms come from small matrices, as ‖vᵀ B A‖² = (vᵀB)(A Aᵀ)(vᵀB)ᵀ.

The squared shares over an orthonormal basis sum to 1, so the root mean square over random
directions is 1/√d for every ΔW. How far single directions spread around it depends on ΔW, so each
site has its own 99 % quantile, over 2,000 random directions.
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
from lens_lora.core import LoraLens, OfSites, Sites, alone, drawing, tables
from lens_lora.errors import ArgumentError, ModelStateError, SiteError
from lens_lora.formats.directions import STREAM, directions_of

# The number of random directions; twenty of them are above the quantile.
_DRAWS = 2000
QUANTILE = 0.99


@final
class Alignment(OfSites):
    """How much of each site's ΔW lies along each direction.

    The share is ‖vᵀΔW‖/‖ΔW‖ if the site writes to the residual stream, and ‖ΔW v‖/‖ΔW‖ if it reads
    the stream.

    Attributes:
        values: [site, direction], the shares, between 0 and 1; NaN if ΔW is zero.
        sides: 'write' or 'read' for each site.
        directions: the names of the directions.
        expected: the root mean square over random directions, 1/√d.
        quantile: [site], the 99 % quantile over random directions.
        sites, meta: see `OfSites`; only sites whose update changes a weight are listed.
    """

    values: Float[Tensor, "site direction"]
    sides: Annotated[tuple[str, ...], "site"]
    directions: Annotated[tuple[str, ...], "direction"]
    expected: float
    quantile: Float[Tensor, " site"]

    def to_frame(self) -> pd.DataFrame:
        """One row per site and direction, with the share and what random directions have."""
        by_site = Sites(self.sites).columns()
        by_site["side"] = list(self.sides)
        by_site["quantile"] = self.quantile.tolist()
        table = tables.long_table({"value": self.values}, by_site, {"direction": self.directions})
        return table.assign(expected=self.expected)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k pairs of site and direction furthest beyond random directions.

        Args:
            k: the number of pairs.

        Raises:
            ArgumentError: k is not a whole number, or is below 0.
        """
        count = whole("k", k, 0)
        table = self.to_frame()
        beyond_chance = table["value"] / table["quantile"]
        order = beyond_chance.sort_values(ascending=False).index[:count]
        return table.loc[order].reset_index(drop=True)

    def plot(self, direction: str | None = None) -> drawing.Figure:
        """The shares along one direction, by layer and kind of module.

        Args:
            direction: its name; None for the first one.

        Raises:
            ArgumentError: no direction has this name.
        """
        return drawing.figure(self, direction_index(self.directions, direction))


def direction_index(names: Sequence[str], name: str | None) -> int:
    """The index of the direction with this name; 0, the first one, if the name is None.

    Raises:
        ArgumentError: no direction has this name.
    """
    if name is None:
        return 0
    if name not in names:
        raise ArgumentError(f"direction={name!r}; these are {list(names)[:6]}.")
    return names.index(name)


@alone
def weight_alignment(lens: LoraLens, directions: Any) -> Alignment:
    """How much of each weight change writes, or reads, along directions of the residual stream.

    Only the weights are needed, and no forward pass. Changes of norms and of biases are left out.

    Args:
        lens: the adapter over the model.
        directions: [d], [direction, d], {label: either}, a Contrast of one hook point, or a sparse
            autoencoder of the residual stream, alone or as (autoencoder, indices); of any length.

    Returns:
        Alignment with values [site, direction]. Only 1 % of random directions have a value above
        `quantile`, but among many sites some have one by chance.

    Raises:
        ArgumentError: a direction has another width or space, is zero, or holds NaN.
        ModelStateError: the model has no entry in `families.py`, so it is not known which norm a
            module reads; the model or the adapter was changed after the lens was made.
        SiteError: no site has a weight.
    """
    lens.check_state()
    _require_known_norms(lens)
    d_model = int(lens.model.cfg.d_model)
    centred = lens.host.family.norm == "LN"
    source = directions_of(directions)
    chosen_directions = source.at(STREAM, d_model).unit(centred=centred)
    n_directions = len(chosen_directions)
    chosen = [i for i, pair in enumerate(lens.updates) if pair.norm is None]
    if not chosen:
        raise SiteError("the adapter changes only norms, and no weight.")
    random = _random_directions(d_model, centred=centred)
    both = torch.cat([chosen_directions, random])
    shares = torch.stack([_shares(lens, index, both, centred=centred) for index in chosen])
    sites = tuple(lens.sites[index] for index in chosen)
    by_chance = shares[:, n_directions:].quantile(QUANTILE, 1)
    sides = ["write" if site.writes_to_stream else "read" for site in sites]
    # The space of centred directions has one dimension fewer.
    dimensions = d_model - 1 if centred else d_model
    return Alignment(
        values=shares[:, :n_directions].to(lens.gate_dtype),
        sides=tuple(sides),
        directions=source.names,
        expected=dimensions**-0.5,
        quantile=by_chance.to(lens.gate_dtype),
        sites=sites,
        meta=lens.describe(),
    )


def _require_known_norms(lens: LoraLens) -> None:
    """Refuse a model that was recognised by probing, because its norms are not known by name."""
    family = lens.host.family
    if family.is_probed:
        raise ModelStateError(
            f"{family.architectures[0]} as a TransformerBridge is read from the model and has "
            "no entry in lens_lora/families.py, so it is not known which norm stands between its "
            "modules and the residual stream; use ll.feature_shift, which runs the model."
        )


def _random_directions(d_model: int, *, centred: bool) -> Float[Tensor, "draw d"]:
    """Directions of length 1, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_DRAWS, d_model, generator=generator, dtype=torch.float64)
    return directions_of(drawn).unit(centred=centred)


def _shares(
    lens: LoraLens, index: int, directions: Float[Tensor, "direction d"], *, centred: bool
) -> Float[Tensor, " direction"]:
    """The share ‖vᵀ N Fᵀ‖ / ‖N Fᵀ‖ of one site along each direction v.

    N [d, rank] is the factor of ΔW on the side of the residual stream, times γ; F is the other one.
    """
    writes = lens.sites[index].writes_to_stream
    A = in_float64(lens.maps[index].A).cpu()
    B = in_float64(lens.maps[index].sB).cpu()
    F = A.T if writes else B
    near = B if writes else A.T
    gamma = _gamma_between(lens, index)
    if gamma is not None:
        if centred and writes:
            # A norm behind the site centres what the site writes, before γ.
            near = near - near.mean(0)
        near = gamma[:, None] * near
    N = near - near.mean(0) if centred else near
    along = directions @ N
    gram = F.T @ F
    # ‖vᵀ N Fᵀ‖² = (vᵀN)(FᵀF)(vᵀN)ᵀ, and ‖N Fᵀ‖² = tr(NᵀN FᵀF).
    squares_along = ((along @ gram) * along).sum(1)
    square_in_all = ((N.T @ N) * gram).sum()
    return (squares_along / square_in_all).clamp(min=0).sqrt()


def _gamma_between(lens: LoraLens, index: int) -> Float[Tensor, " d"] | None:
    """The scale γ of the norm between a site and the residual stream; None without such a norm."""
    host = lens.host
    site = lens.sites[index]
    norm = _norm_between(lens, index)
    if norm is None:
        return None
    affine = host.norm_parameters(site.layer, norm)
    if affine is None:
        raise ModelStateError(f"{site.name}: the model has no norm {norm} that this site uses.")
    gamma, _ = affine
    return in_float64(gamma).cpu()


def _norm_between(lens: LoraLens, index: int) -> str | None:
    """The kind of the norm after a site that writes to the stream, or before one that reads it.

    None if there is no norm, or if the site's map includes its γ already.
    """
    host = lens.host
    site = lens.sites[index]
    if site.writes_to_stream:
        return host.family.norm_behind(site.kind)
    has_gamma = lens.maps[index].A_behind_gamma is not None
    if has_gamma or host.is_folded(site.layer, site.kind):
        return None
    path = host.family.norm_path(site.layer, site.kind)
    if path is None:
        return None
    place = host.family.place(path)
    return None if place is None else place.kinds[0]
