"""ConstantPart: how much of each site's δ is one vector, what the vectors alone do, and they."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, final

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.constant import constant_factors
from lens_lora.arguments import whole
from lens_lora.hooked.sites import Site
from lens_lora.results import drawing
from lens_lora.results.measured import Result, site_labels

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["ConstantPart", "constants"]


def constants(vectors: Mapping[str, Float[Tensor, "out"]], widths: Mapping[str, int]) -> Adapter:
    """The adapter that adds these vectors.

    Args:
        vectors: by module path, in a sum of adapters by 'path@name'.
        widths: what each module reads.
    """
    return Adapter.from_factors(constant_factors(vectors, widths), name="constant part")


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ConstantPart(Result):
    """How much of an adapter is the same whatever the input.

    Attributes:
        share: [site], 1 − Σ‖δ − μ̂‖² / Σ‖δ‖², μ̂ the mean over the other texts: 1 where δ is one
            vector, 0 where its mean says nothing of it, below where another text's misleads. NaN
            where δ is zero.
        size: [site], the root mean square of ‖δ‖ over tokens after first ones.
        mean_size: [site], ‖μ‖.
        first_size: [site], the mean ‖δ‖ at the texts' first tokens, no part of the others.
        base, constant, adapted: [text], the readout of the base model, with the constants of the
            other half of the texts alone, and of the adapted model. By KL: Σ_t KL(adapted ‖ it).
        sites: the adapted sites.
        vectors: μ by module path, as the Hugging Face module writes it.
        widths: how many features each module reads.
        steering: what the constants add by hook point, in the hooked model's basis, heads laid
            flat: steering vectors.
        readout, units: by which the model is compared.
        meta: model, adapter, dtype and versions.
    """

    share: Float[Tensor, "site"]
    size: Float[Tensor, "site"]
    mean_size: Float[Tensor, "site"]
    first_size: Float[Tensor, "site"]
    base: Float[Tensor, "text"]
    constant: Float[Tensor, "text"]
    adapted: Float[Tensor, "text"]
    sites: tuple[Site, ...]
    vectors: Mapping[str, Float[Tensor, "out"]]
    widths: Mapping[str, int]
    steering: Mapping[str, Float[Tensor, "d"]]
    readout: str
    units: str
    meta: Mapping[str, str]

    @property
    def adapter(self) -> Adapter:
        """The constants alone, over all texts, as an adapter: applied, saved, compared as any."""
        return constants(self.vectors, self.widths)

    @property
    def kept(self) -> float:
        """How much of the adapter's effect the constants alone keep on held-out texts.

        Σ (constant − base) / Σ (adapted − base) over texts; by KL, 1 − Σ KL(adapted ‖ constant) /
        Σ KL(adapted ‖ base), negative where the constants lead away from the adapted model.
        """
        return float((self.constant - self.base).sum() / (self.adapted - self.base).sum())

    @property
    def total_share(self) -> float:
        """The share of Σ_l ‖δ_l‖² over all sites."""
        weights = self.size.square()
        return float((self.share.nan_to_num() * weights).sum() / weights.sum())

    def to_frame(self) -> pd.DataFrame:
        """One row per site: the share, and the sizes of δ, of its mean, and at first tokens."""
        columns = site_labels(self.sites)
        for name in ("share", "size", "mean_size", "first_size"):
            columns[name] = getattr(self, name).double().tolist()
        return pd.DataFrame(columns)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k sites of largest ‖μ‖.

        Args:
            k: how many.
        """
        order = self.mean_size.argsort(descending=True)[: whole("k", k, 0)].tolist()
        return self.to_frame().iloc[order].reset_index(drop=True)

    def texts_to_frame(self) -> pd.DataFrame:
        """One row per text: base, constant and adapted."""
        columns = {name: getattr(self, name).tolist() for name in ("base", "constant", "adapted")}
        return pd.DataFrame({"text": range(len(self.base)), **columns})

    def plot(self) -> Figure:
        """The share of each site, layer × kind of module."""
        return drawing.figure(self)
