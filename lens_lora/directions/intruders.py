"""Intruder dimensions (arXiv 2410.21228) are directions along which the base does not write.

With W = UΣVᵀ and W + ΔW = U'Σ'V'ᵀ, each leading left singular direction u'_j of the tuned weight is
compared with all of W's own. Where the largest |⟨u_i, u'_j⟩| is small, the base does not write
along u'_j, and the direction is an intruder.

Cost: two dense singular value decompositions for each site, in float64 and in Hugging Face's basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

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
    SiteUpdate,
    Update,
    alone,
    chosen_sites,
    drawing,
    long_table,
    one_site,
    site_labels,
)
from lens_lora.errors import ArgumentError, SiteError


@final
class Intruders(OfSites):
    """The leading singular directions of W + ΔW, and how near W's own come to each.

    Attributes:
        sigma: [site, direction], singular values of W + ΔW, the largest first; NaN beyond the
            weight's size.
        cosine: the largest |cosine| of each direction with a left singular direction of W; NaN
            beyond the weight's size.
        nearest: the index of that direction of W; −1 beyond the weight's size.
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
        numbers = {"sigma": self.sigma, "cosine": self.cosine}
        directions = {"direction": range(self.sigma.shape[1])}
        table = long_table(numbers, site_labels(self.sites), directions)
        table = table.assign(
            nearest=self.nearest.flatten().tolist(), intruder=table["cosine"] < self.threshold
        )
        return table.drop(columns="module").dropna(subset=["sigma"]).reset_index(drop=True)

    def overlaps(self, site: str) -> pd.DataFrame:
        """|cosine| of one site's leading directions of W + ΔW (rows) and of W (columns).

        Args:
            site: its name.

        Raises:
            SiteError: no such site.
        """
        overlap = self.overlap[self._index(site)]
        return pd.DataFrame(overlap.cpu().double().numpy())

    def plot(self, site: str | None = None) -> drawing.Figure:
        """How many intruders each site has, layer × kind; or the overlaps of one site.

        Args:
            site: its name.

        Raises:
            SiteError: no such site.
        """
        index = None if site is None else self._index(site)
        return drawing.figure(self, index)

    def _index(self, site: str) -> int:
        return one_site(self.sites, site)


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

    They are left singular directions, along which a module writes, in the Hugging Face basis. Norms
    and experts are left out.

    Cost: no forward pass; two dense SVDs for each site, in float64.

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
    count = whole("k", k, 1)
    below = number("threshold", threshold)
    if not 0 < below <= 1:
        raise ArgumentError(f"threshold={below}: expected a cosine above 0, at most 1.")
    chosen = [i for i in chosen_sites(lens.sites, sites) if _is_weight(lens.updates[i])]
    if not chosen:
        raise SiteError("norms and experts alone were chosen, and no weight of a module.")
    found: list[_Leading] = []
    for index in tqdm(chosen, desc="intruders", leave=False, disable=not progress):
        site_update = lens.updates[index]
        assert isinstance(site_update.update, Update), "norms are left out above"
        weight = lens.host.base_weight(site_update.site, "the SVD of W + ΔW")
        found.append(_leading_directions(weight, site_update.update, count))
    return Intruders(
        sigma=torch.stack([leading.sigma for leading in found]),
        cosine=torch.stack([leading.cosine for leading in found]),
        nearest=torch.stack([leading.nearest for leading in found]),
        overlap=torch.stack([leading.overlap for leading in found]),
        threshold=below,
        sites=tuple(lens.sites[index] for index in chosen),
        meta=lens.describe(),
    )


def _is_weight(site_update: SiteUpdate) -> bool:
    """Whether the update changes one weight matrix, and neither a norm nor a stack of experts."""
    return isinstance(site_update.update, Update) and not site_update.update.experts


class _Leading(NamedTuple):
    """The first k left singular directions of one W + ΔW.

    Beyond the weight's size, values are NaN and indices −1.
    """

    sigma: Float[Tensor, " direction"]
    cosine: Float[Tensor, " direction"]
    nearest: Int[Tensor, " direction"]
    overlap: Float[Tensor, "direction direction"]


def _leading_directions(weight: Float[Tensor, "out in"], update: Update, k: int) -> _Leading:
    """Compare the first k directions of W + ΔW with all of W's own."""
    W = in_float64(weight)
    A = in_float64(update.A).to(W)
    B = in_float64(update.B).to(W)
    U, _, _ = torch.linalg.svd(W, full_matrices=False)
    U_tuned, sigma, _ = torch.linalg.svd(W + update.scale * B @ A, full_matrices=False)
    cosines = (U.T @ U_tuned[:, :k]).abs().clamp(max=1.0).cpu()
    largest, nearest = cosines.max(0)
    missing = k - cosines.shape[1]
    return _Leading(
        sigma=pad(sigma[:k].cpu(), (0, missing), value=torch.nan),
        cosine=pad(largest, (0, missing), value=torch.nan),
        nearest=pad(nearest, (0, missing), value=-1),
        overlap=pad(cosines[:k].T, (0, missing, 0, missing), value=torch.nan),
    )
