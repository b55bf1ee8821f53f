"""Intruder dimensions (arXiv 2410.21228): directions that the base's weight does not have.

With W = UΣVᵀ and W + ΔW = U'Σ'V'ᵀ, the leading directions u'_j whose largest |cosine| with any of
W's own u_i is small. The base does not write there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from lens_lora.arguments import number, whole
from lens_lora.compat import in_float64
from lens_lora.core import (
    LoraLens,
    OfSites,
    Update,
    alone,
    chosen_sites,
    long_table,
    site_labels,
)
from lens_lora.core.model.sites import one_site
from lens_lora.core.results import drawing
from lens_lora.errors import ArgumentError, SiteError


@final
class Intruders(OfSites):
    """The leading singular directions of W + ΔW, and how near W's own come to each.

    Attributes:
        sigma: [site, direction], singular values of W + ΔW, the largest first; NaN beyond the
            weight's size, and so below.
        cosine: the largest |cosine| of each with a left singular direction of W.
        nearest: the index of that one; −1 beyond the weight's size.
        overlap: [site, direction, direction of W], |cosine| of the leading directions of both.
        threshold: below it a direction is an intruder.
        sites, meta: see `OfSites`; those with a weight of its own.
    """

    sigma: Float[Tensor, "site direction"]
    cosine: Float[Tensor, "site direction"]
    nearest: Int[Tensor, "site direction"]
    overlap: Float[Tensor, "site direction direction"]
    threshold: float

    @property
    def counts(self) -> Int[Tensor, " site"]:
        """How many of each site's leading directions are intruders."""
        return (self.cosine < self.threshold).sum(1)

    def to_frame(self) -> pd.DataFrame:
        """One row per site and direction."""
        numbers, ranks = {"sigma": self.sigma, "cosine": self.cosine}, range(self.sigma.shape[1])
        table = long_table(numbers, site_labels(self.sites), {"direction": ranks})
        nearest = self.nearest.flatten().tolist()
        table = table.assign(nearest=nearest, intruder=table["cosine"] < self.threshold)
        return table.drop(columns="module").dropna(subset=["sigma"]).reset_index(drop=True)

    def overlaps(self, site: str) -> pd.DataFrame:
        """|cosine| of one site's leading directions of W + ΔW (rows) and of W (columns).

        Args:
            site: its name.
        """
        index = one_site([s.name for s in self.sites], site)
        return pd.DataFrame(self.overlap[index].cpu().double().numpy())

    def plot(self, site: str | None = None) -> drawing.Figure:
        """How many intruders each site has, layer × kind; or the overlaps of one site.

        Args:
            site: its name.

        Raises:
            SiteError: no such site.
        """
        index = None if site is None else one_site([s.name for s in self.sites], site)
        return drawing.figure(self, index)


@alone
def intruders(
    lens: LoraLens,
    k: int = 10,
    threshold: float = 0.5,
    *,
    sites: str | Sequence[str] | None = None,
    progress: bool = True,
) -> Intruders:
    """The leading singular directions of W + ΔW that are none of W's own (arXiv 2410.21228).

    In the Hugging Face basis, of the left singular directions, which a module writes along. No
    forward pass; two dense SVDs a site in float64. Norms and experts are left out.

    Args:
        lens: the adapter over the model.
        k: how many leading directions of each site.
        threshold: a direction whose largest |cosine| with W's is below it is an intruder.
        sites: names or globs; only these. Without it, all.
        progress: show a bar.

    Raises:
        ArgumentError: a k below 1, or a threshold outside (0, 1].
        SiteError: a name that matches no site, or no site with a weight.
        ModelStateError: a processed or quantised model without `hf_model`.
    """
    k, threshold = whole("k", k, 1), number("threshold", threshold)
    if not 0 < threshold <= 1:
        raise ArgumentError(f"threshold={threshold}: expected a cosine above 0, at most 1.")
    chosen = [
        (lens.sites[i], lens.plan.updates[i].site, update)
        for i in chosen_sites(lens.sites, sites)
        if isinstance(update := lens.plan.updates[i].update, Update) and not update.experts
    ]
    if not chosen:
        raise SiteError("norms and experts alone were chosen, and no weight of a module.")
    host, bar = lens.plan.host, tqdm(chosen, desc="intruders", leave=False, disable=not progress)
    weights = ((host.base_weight(site, "the SVD of W + ΔW"), update) for _, site, update in bar)
    rows = [_compared(W, update, k) for W, update in weights]
    sigma, cosine, nearest, overlap = map(torch.stack, zip(*rows, strict=True))
    return Intruders(
        sigma=sigma,
        cosine=cosine,
        nearest=nearest,
        overlap=overlap,
        threshold=threshold,
        sites=tuple(site for site, *_ in chosen),
        meta=lens.describe(),
    )


def _compared(
    weight: Float[Tensor, "out in"], update: Update, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """σ, largest cosine, its index, and overlaps of the first k directions of W + ΔW."""
    W = in_float64(weight)
    A, B = (in_float64(factor).to(W) for factor in (update.A, update.B))
    base, _, _ = torch.linalg.svd(W, full_matrices=False)
    tuned, sizes, _ = torch.linalg.svd(W + update.scale * B @ A, full_matrices=False)
    cosines = (base.T @ tuned[:, :k]).abs().clamp(max=1.0).cpu()
    (largest, nearest), beyond = cosines.max(0), (0, k - cosines.shape[1])
    sigma, cosine = (pad(x, beyond, value=torch.nan) for x in (sizes[:k].cpu(), largest))
    overlap = pad(cosines[:k].T, 2 * beyond, value=torch.nan)
    return sigma, cosine, pad(nearest, beyond, value=-1), overlap
