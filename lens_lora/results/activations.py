"""Activations: u of each site, token and rank, with its examples and means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.arguments import whole
from lens_lora.errors import ArgumentError
from lens_lora.hooked.sites import Site, match_sites, one_site
from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt
from lens_lora.results.examples import (
    Positions,
    Sign,
    chosen_positions,
    context_of,
    require_ranks,
    require_sign,
    strongest,
)
from lens_lora.results.measured import Result, site_labels

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Activations"]

_EXAMPLE = ["position", "token", "value", "context"]


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Activations(Result):
    """u of each site, token and rank. NaN at padding, and beyond a site's own rank.

    Attributes:
        values: [batch, site, token, rank].
        sites: those of the site axis.
        ranks: how many coordinates each of them has.
        sinks: [batch, token], the first token of each row, and tokens whose ‖z‖ is an outlier.
        starts: [batch], the position at which the response begins; where there is none, the length.
        gauge: 'svd' or 'trained'.
        at: the gates at which z was read.
        str_tokens: each row's tokens, prompt and response.
        meta: model, adapter, dtype and versions.
    """

    values: Float[Tensor, "batch site token rank"]
    sites: tuple[Site, ...]
    ranks: tuple[int, ...]
    sinks: Bool[Tensor, "batch token"]
    starts: Int[Tensor, "batch"]
    gauge: str
    at: str
    str_tokens: tuple[tuple[str, ...], ...]
    meta: Mapping[str, str]

    def of(self, site: str) -> Float[Tensor, "batch token rank"]:
        """The values of one site, of its own rank.

        Args:
            site: its name, or a glob that matches it alone.

        Raises:
            SiteError: no such site, or several.
        """
        index = one_site([s.name for s in self.sites], site)
        return self.values[:, index, :, : self.ranks[index]]

    def directions(self, site: str | None = None) -> list[tuple[int, int]]:
        """(site, rank) of every direction of some sites, or of the first one of each site.

        Args:
            site: a name or glob; None for the first direction of each site.

        Raises:
            SiteError: no such site.
        """
        if site is None:
            return [(index, 0) for index in range(len(self.sites))]
        chosen = sorted(match_sites([s.name for s in self.sites], {site: True}))
        return [(index, r) for index in chosen for r in range(self.ranks[index])]

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site, token and rank, sinks and tokens of the response marked."""
        slots = torch.arange(self.values.shape[-1])
        exists = slots < torch.tensor(self.ranks)[:, None]
        lengths = torch.tensor([len(row) for row in self.str_tokens])
        real = torch.arange(self.values.shape[2]) < lengths[:, None]
        index = (real[:, None, :, None] & exists[None, :, None, :]).nonzero()
        prompt, site, position, rank = index.T
        texts = zip(prompt.tolist(), position.tolist(), strict=True)
        columns: dict[str, Any] = {"prompt": prompt.tolist()}
        columns |= site_labels([self.sites[i] for i in site.tolist()])
        columns |= {
            "position": position.tolist(),
            "token": [self.str_tokens[p][i] for p, i in texts],
            "sink": self.sinks.cpu()[prompt, position].tolist(),
            "response": (position >= self.starts.cpu()[prompt]).tolist(),
            "rank": rank.tolist(),
            "value": self.values.cpu()[tuple(index.T)].cpu().double().tolist(),
        }
        return pd.DataFrame(columns)

    def top(
        self,
        site: str,
        k: int = 10,
        prompt: int | None = None,
        *,
        rank: int | None = None,
        sign: Sign = 1,
        context: int = 4,
        sinks: bool = False,
    ) -> pd.DataFrame:
        """The k tokens at which each direction of a site is largest, with what stands around them.

        Args:
            site: its name, or a glob that matches it alone.
            k: how many of each direction.
            prompt: an index; without it, of all prompts.
            rank: one direction; without it, each of the site's.
            sign: 1 for the largest values above zero, −1 for those below.
            context: how many tokens are shown on either side of each, which stands in ⟦ ⟧.
            sinks: count sinks too.

        Raises:
            SiteError: no such site, or several.
            ArgumentError: no such prompt or rank, another sign, or a k or context below 0.
        """
        values = self.of(site).cpu().double().numpy()
        k, context, way = whole("k", k, 0), whole("context", context, 0), require_sign(sign)
        if not sinks:
            values = np.where(self.sinks.cpu().numpy()[..., None], np.nan, values)
        if prompt is not None:
            others = np.arange(len(values)) != only_prompt(prompt, len(values))
            values = np.where(others[:, None, None], np.nan, values)
        found: list[dict[str, Any]] = []
        for r in require_ranks(rank, values.shape[-1]):
            mine = values[..., r]
            for flat in strongest(mine.ravel(), way, k):
                p, at = (int(i) for i in np.unravel_index(flat, mine.shape))
                tokens = self.str_tokens[p]
                found.append(
                    {
                        "rank": r,
                        "prompt": p,
                        "position": at,
                        "token": tokens[at],
                        "value": float(mine[p, at]),
                        "context": context_of(tokens, at, context),
                    }
                )
        return pd.DataFrame(found, columns=["rank", "prompt", *_EXAMPLE])

    def mean(
        self, positions: Positions = None, *, sinks: bool = False
    ) -> Float[Tensor, "site rank"]:
        """The mean of u over tokens of all prompts, without sinks.

        Args:
            positions: None for all tokens, 'response', or of each prompt an index, a slice or
                indices; negative ones count from its end.
            sinks: count sinks too.

        Raises:
            ArgumentError: positions at which there is no token.
        """
        chosen = torch.zeros_like(self.sinks)
        for p, (tokens, start) in enumerate(
            zip(self.str_tokens, self.starts.tolist(), strict=True)
        ):
            mask = chosen_positions(positions, len(tokens), start)
            chosen[p, : len(tokens)] = torch.from_numpy(mask)
        chosen &= torch.ones_like(chosen) if sinks else ~self.sinks
        if not bool(chosen.any()):
            raise ArgumentError(
                f"positions={positions!r}: no token is there that is not a sink; ask for others, "
                "or with sinks=True."
            )
        return self.values.movedim(1, 2)[chosen].mean(0)

    def plot(self, site: str | None = None, prompt: int | None = None) -> Figure:
        """Heat map of directions over the tokens of one prompt; sinks are grey.

        Of more than 40 directions those of largest |u| are shown, and the title says so.

        Args:
            site: a name or glob: every rank of these. Without it, the first rank of each site.
            prompt: an index; without it, the only prompt.

        Raises:
            SiteError: no such site.
            ArgumentError: no such prompt, or several and none named.
        """
        return drawing.figure(self, site, prompt)
