"""Which site writes to which feature? d·δz_l of each site that writes to the residual stream.

1. One forward pass at the gates `at`.
2. At each such site δz_l is projected onto the directions, before any later module has seen it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.analyses.directions import Projection, directions_of
from lens_lora.arguments import number
from lens_lora.engine.asked import ask_prompts
from lens_lora.engine.function import require_finite
from lens_lora.errors import ModelStateError, SiteError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.gates import ScaleInject
from lens_lora.hooked.sites import WRITER_KINDS, Site, match_sites
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.results import drawing
from lens_lora.results.choosing import largest, prompt_rows
from lens_lora.results.measured import Result, site_labels

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["FeatureWrites", "feature_writes"]


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureWrites(Result):
    """What each site writes to each feature: d·δz_l, before any later module has seen it.

    Attributes:
        values: [batch, site, feature], at one position.
        sites: those that write to the residual stream.
        positions: the index within each prompt.
        str_tokens, features, units, at, meta: as in `FeatureShift`.
    """

    values: Float[Tensor, "batch site feature"]
    sites: tuple[Site, ...]
    positions: int
    str_tokens: tuple[tuple[str, ...], ...]
    features: str
    units: str
    at: float
    meta: Mapping[str, str]

    def top(self, site: str | None = None, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k pairs of site and feature of largest |d·δz|, of one site or of all.

        Args:
            site: its name; without it, all sites.
            k: how many.
            prompt: an index; without it, the mean over prompts.

        Raises:
            SiteError: no site that writes has this name.
            ArgumentError: no such prompt.
        """
        chosen = list(range(len(self.sites)))
        if site is not None:
            chosen = list(match_sites([s.name for s in self.sites], {site: 0}))
        values = self.of_prompt(prompt)[chosen]
        order, width = largest(values, k), values.shape[1]
        return pd.DataFrame(
            {
                "site": [self.sites[chosen[i // width]].name for i in order],
                "feature": [i % width for i in order],
                "write": values.flatten()[order].tolist(),
            }
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site and feature."""
        batch, sites, features = self.values.shape
        index = torch.cartesian_prod(*map(torch.arange, (batch, sites, features)))
        labels = site_labels([self.sites[i] for i in index[:, 1].tolist()])
        return pd.DataFrame(
            {
                "prompt": index[:, 0].tolist(),
                **{name: labels[name] for name in ("site", "layer", "kind")},
                "feature": index[:, 2].tolist(),
                "write": self.values.cpu().double().flatten().tolist(),
            }
        )

    def plot(self, k: int = 20, prompt: int | None = None) -> Figure:
        """Site × feature, of the k features that are written most.

        Args:
            k: how many features.
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return drawing.figure(self, k, prompt)

    def of_prompt(self, prompt: int | None) -> Float[Tensor, "site feature"]:
        """One prompt's values in float64, or the mean over prompts.

        Args:
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return self.values[prompt_rows(prompt, len(self.values))].cpu().double().mean(0)


@alone
def feature_writes(
    lens: LoraLens,
    prompts: PromptsLike,
    directions: Any,
    *,
    at: float = 0.0,
    positions: int = -1,
) -> FeatureWrites:
    """d·δz_l: what each site that writes to the residual stream writes to each feature.

    It is the direct part alone: what later modules make of it is in `feature_shift`. q, k, v, gate
    and up write to no residual stream, and are left out. One forward pass.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        directions: as in `feature_shift`, of the residual stream's width.
        at: the gates at which z is read: 0 in the base model, 1 in the adapted one.
        positions: an index within each prompt, negative ones from its own end.

    Raises:
        SiteError: the adapter has no site that writes to the residual stream.
        ModelStateError: the model normalises what they write (Gemma 2 and 3).
        ArgumentError: as `feature_shift`.
    """
    asked, features, at = ask_prompts(lens, prompts), directions_of(directions), number("at", at)
    writers = [i for i, site in enumerate(lens.sites) if site.kind in WRITER_KINDS]
    if not writers:
        raise SiteError(
            "no site of this adapter writes to the residual stream (o, down, an embedding); "
            "feature_shift sees what the others do."
        )
    if lens.plan.host.family.post_norm:
        raise ModelStateError(
            "this model normalises what attention and MLP write before it joins the residual "
            "stream, so δz is in another space; feature_shift with scale={site: 1} is exact."
        )
    project = Projection(asked.prompts, features, positions)
    deltas = _Deltas(lens, lens.gates(at), project)
    with torch.no_grad(), lens.injected(deltas):
        lens.run(asked.prompts)
    values = torch.stack([deltas.found[i].to(lens.device) for i in writers], 1)
    require_finite(values, "a site's δz")
    return FeatureWrites(
        values=values,
        sites=tuple(lens.sites[i] for i in writers),
        positions=int(positions),
        str_tokens=asked.str_tokens,
        features=features.kind,
        units=features.units,
        at=at,
        meta=lens.describe(),
    )


class _Deltas:
    """Runs at the gates, and keeps each writer's projected ∂(its output)/∂ε."""

    def __init__(self, lens: LoraLens, gates: Float[Tensor, "site"], project: Projection) -> None:
        self._injections, self._sites, self._gates = lens.plan.injections, lens.sites, gates
        self._scaled, self._project = ScaleInject(lens.plan, gates), project
        self.found: dict[int, Tensor] = {}

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = self._injections[index]
        if self._sites[injection.site].kind in WRITER_KINDS:
            weight = 1.0 if injection.partner is None else float(self._gates[injection.partner])
            written = weight * self._project(injection.map(z))
            self.found[injection.site] = self.found.get(injection.site, 0.0) + written
        return self._scaled(index, out, z)
