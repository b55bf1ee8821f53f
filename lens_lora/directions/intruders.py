"""Intruder dimensions (arXiv 2410.21228) are directions along which the base does not write.

With W = UΣVᵀ and W + ΔW = U'Σ'V'ᵀ, each leading left singular direction u'_j of the tuned weight is
compared with all those of W. If the largest |⟨u_i, u'_j⟩| is small, the base does not write along
u'_j, and the direction is an intruder. With the intruders J scaled by a factor c, the update is

    ΔW + (c − 1) Σ_{j∈J} σ'_j u'_j v'_jᵀ,

which is an adapter again: c = 0 takes them out of W + ΔW, and c = 1 changes nothing.

Cost: two dense singular value decompositions for each site, in float64 and in Hugging Face's basis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    Adapter,
    LoRAFactors,
    LoraLens,
    OfSites,
    Sites,
    SiteUpdate,
    TrainedModule,
    Update,
    alone,
    drawing,
    storage,
    tables,
)
from lens_lora.errors import ArgumentError, SiteError

# A result that holds an adapter is saved with it.
for _kind in (Adapter, LoRAFactors, TrainedModule):
    storage.stored(_kind)


@final
class Intruders(OfSites):
    """The leading singular directions of W + ΔW, and the nearest direction of W to each.

    Attributes:
        sigma: [site, direction], singular values of W + ΔW, the largest first; NaN beyond the
            weight's size.
        cosine: the largest |cosine| of each direction with a left singular direction of W; NaN
            beyond the weight's size.
        nearest: the index of that direction of W; −1 beyond the weight's size.
        overlap: [site, direction, direction of W], |cosine| of the leading directions of both.
        threshold: a direction whose `cosine` is below it is an intruder.
        written: σ'_j u'_j of each module's intruders, in Hugging Face's basis.
        read: v'_j of each module's intruders.
        original: the adapter whose updates these are.
        sites, meta: see `OfSites`; sites of norms and experts are left out.
    """

    sigma: Float[Tensor, "site direction"]
    cosine: Float[Tensor, "site direction"]
    nearest: Int[Tensor, "site direction"]
    overlap: Float[Tensor, "site direction direction"]
    threshold: float
    written: Mapping[str, Float[Tensor, "_intruder _out"]]
    read: Mapping[str, Float[Tensor, "_intruder _in"]]
    original: Adapter

    @property
    def counts(self) -> Int[Tensor, " site"]:
        """The number of intruders among each site's leading directions."""
        return (self.cosine < self.threshold).sum(1)

    def to_frame(self) -> pd.DataFrame:
        """One row per site and direction."""
        numbers = {"sigma": self.sigma, "cosine": self.cosine}
        directions = {"direction": range(self.sigma.shape[1])}
        table = tables.long_table(numbers, Sites(self.sites).columns(), directions)
        table = table.assign(
            nearest=self.nearest.flatten().tolist(), intruder=table["cosine"] < self.threshold
        )
        return table.dropna(subset=["sigma"]).reset_index(drop=True)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k intruders with the largest singular values, over all sites.

        Args:
            k: the number of intruders.

        Returns:
            A data frame: site, module, layer, kind, direction, sigma, cosine, nearest.

        Raises:
            ArgumentError: k is not a whole number, or is below 0.
        """
        count = whole("k", k, 0)
        table = self.to_frame()
        intruding = table.loc[table["intruder"]].drop(columns="intruder")
        largest_first = intruding["sigma"].sort_values(ascending=False, kind="stable").index
        return intruding.loc[largest_first[:count]].reset_index(drop=True)

    def adapter(self, scale: float) -> Adapter:
        """The adapter with its intruders scaled: ΔW + (scale − 1) Σ σ'_j u'_j v'_jᵀ.

        An intruder is a direction of W + ΔW and not of ΔW alone. So scale 0, which removes the
        component σ'_j u'_j v'_jᵀ from the tuned weight, also removes the small part of it that is
        W's. `ll.scale_intruders` measures what this does.

        Args:
            scale: 0 to take them out, 1 to leave them as they are.

        Returns:
            An adapter whose rank in each module is larger by its number of intruders; the adapter
            itself if there are none.

        Raises:
            ArgumentError: the scale is not a finite number; the adapter is a sum of adapters.
            AdapterError: the update of a module with intruders is not a product of factors (DoRA,
                a full weight, a trained bias).
        """
        factor = number("scale", scale)
        if any("@" in key for key in self.original.modules):
            raise ArgumentError(
                f"{self.original.name!r} is a sum of adapters, which were decomposed one by one",
                remedy="make one adapter of them, a.mixed(b), or take each by itself.",
            )
        if not self.written:
            return self.original
        intruders_alone: dict[str, LoRAFactors] = {}
        for path, written in self.written.items():
            intruders_alone[path] = LoRAFactors(A=self.read[path], B=written.T.contiguous())
        taken_away = Adapter.from_factors(intruders_alone, name="intruders").scaled(1 - factor)
        remaining = self.original - taken_away
        return remaining.named(f"{self.original.name}, intruders times {factor:g}")

    def overlaps(self, site: str) -> pd.DataFrame:
        """|cosine| of one site's leading directions of W + ΔW (rows) and of W (columns).

        Args:
            site: its name.

        Raises:
            SiteError: no site has this name.
        """
        overlap = self.overlap[self._index(site)]
        return pd.DataFrame(overlap.cpu().double().numpy())

    def plot(self, site: str | None = None) -> drawing.Figure:
        """The number of intruders by layer and kind of module, or the overlaps of one site.

        Args:
            site: its name; None for the numbers of all sites.

        Raises:
            SiteError: no site has this name.
        """
        index = None if site is None else self._index(site)
        return drawing.figure(self, index)

    def _index(self, site: str) -> int:
        return Sites(self.sites).one(site)


@alone
def intruders(
    lens: LoraLens,
    k: int = 10,
    threshold: float = 0.5,
    *,
    sites: str | Sequence[str] | None = None,
    progress: bool = True,
) -> Intruders:
    """The leading singular directions of W + ΔW that W lacks (arXiv 2410.21228).

    They are left singular directions, along which a module writes, in Hugging Face's basis. Norms
    and experts are left out.

    Cost: no forward pass; two dense SVDs for each site, in float64.

    Args:
        lens: the adapter over the model.
        k: the number of leading directions of each site.
        threshold: a direction whose largest |cosine| with those of W is below it is an intruder.
        sites: names or globs of the sites; None for all.
        progress: show a bar.

    Raises:
        ArgumentError: k is below 1, or the threshold is outside (0, 1].
        SiteError: a name matches no site, or no site has a weight.
        ModelStateError: the model is processed or quantised and the lens has no `hf_model`; the
            model or the adapter was changed after the lens was made.
    """
    lens.check_state()
    count = whole("k", k, 1)
    below = number("threshold", threshold)
    if not 0 < below <= 1:
        raise ArgumentError(f"threshold={below}: expected a cosine above 0, at most 1.")
    chosen = [i for i in lens.sites.chosen(sites) if _is_weight(lens.updates[i])]
    if not chosen:
        raise SiteError("only norms and experts were chosen, and no weight of a module.")
    by_site: list[_Leading] = []
    written: dict[str, list[Tensor]] = {}
    read: dict[str, list[Tensor]] = {}
    for index in tqdm(chosen, desc="intruders", leave=False, disable=not progress):
        site_update = lens.updates[index]
        weight = lens.host.base_weight(site_update.site, "the SVD of W + ΔW")
        leading = _leading_directions(weight, site_update.linear, count)
        by_site.append(leading)
        # A module that the base ties to the adapted one changes with it and is not listed again.
        is_own = site_update.site.path == site_update.site.module
        intruding = (leading.cosine < below).nonzero().flatten()
        if is_own and len(intruding):
            # The sites of a fused module add their intruders to those of one module.
            key = site_update.site.key
            writes = _in_rows_of_module(leading.written[intruding], site_update, lens)
            written.setdefault(key, []).append(writes)
            read.setdefault(key, []).append(leading.read[intruding])
    return Intruders(
        sigma=torch.stack([leading.sigma for leading in by_site]),
        cosine=torch.stack([leading.cosine for leading in by_site]),
        nearest=torch.stack([leading.nearest for leading in by_site]),
        overlap=torch.stack([leading.overlap for leading in by_site]),
        threshold=below,
        written={key: torch.cat(parts).to(lens.gate_dtype) for key, parts in written.items()},
        read={key: torch.cat(parts).to(lens.gate_dtype) for key, parts in read.items()},
        original=lens.adapter,
        sites=tuple(lens.sites[index] for index in chosen),
        meta=lens.describe(),
    )


def _is_weight(site_update: SiteUpdate) -> bool:
    """Whether the update changes one weight matrix, and neither a norm nor a stack of experts."""
    return site_update.norm is None and not site_update.linear.experts


def _in_rows_of_module(
    written: Float[Tensor, "intruder out"], site_update: SiteUpdate, lens: LoraLens
) -> Float[Tensor, "intruder out_of_module"]:
    """A site's writes, placed in its own rows of a fused module such as GPT-2's c_attn."""
    site = site_update.site
    if site.rows is None:
        return written
    module = lens.adapter.modules[site.key]
    outputs = module.B if isinstance(module, LoRAFactors) else module.weight
    assert outputs is not None, "a site with a weight changes it"
    of_module = written.new_zeros(len(written), len(outputs))
    of_module[:, site.rows] = written
    return of_module


class _Leading(NamedTuple):
    """The first k singular directions of one W + ΔW.

    Beyond the weight's size values are NaN and indices −1, and `written` and `read` have no rows.

    Attributes:
        sigma: σ'_j.
        cosine: the largest |cosine| of u'_j with a left singular direction of W.
        nearest: the index of that direction.
        overlap: |cosine| of the first k directions of both.
        written: σ'_j u'_j.
        read: v'_j.
    """

    sigma: Float[Tensor, " direction"]
    cosine: Float[Tensor, " direction"]
    nearest: Int[Tensor, " direction"]
    overlap: Float[Tensor, "direction direction"]
    written: Float[Tensor, "known out"]
    read: Float[Tensor, "known in"]


def _leading_directions(weight: Float[Tensor, "out in"], update: Update, k: int) -> _Leading:
    """Compare the first k directions of W + ΔW with all those of W."""
    W = in_float64(weight)
    A = in_float64(update.A).to(W)
    B = in_float64(update.B).to(W)
    U, _, _ = torch.linalg.svd(W, full_matrices=False)
    U_tuned, sigma, Vh_tuned = torch.linalg.svd(W + update.scale * B @ A, full_matrices=False)
    cosines = (U.T @ U_tuned[:, :k]).abs().clamp(max=1.0).cpu()
    largest, nearest = cosines.max(0)
    missing = k - cosines.shape[1]
    return _Leading(
        sigma=pad(sigma[:k].cpu(), (0, missing), value=torch.nan),
        cosine=pad(largest, (0, missing), value=torch.nan),
        nearest=pad(nearest, (0, missing), value=-1),
        overlap=pad(cosines[:k].T, (0, missing, 0, missing), value=torch.nan),
        written=(sigma[:k, None] * U_tuned[:, :k].T).cpu(),
        read=Vh_tuned[:k].cpu(),
    )
