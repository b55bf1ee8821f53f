"""Rank activations u_l = A_l z_l: what each direction of each site reads at every token.

An adapter of rank 1 has one number for each site and token, the "LoRA neuron" of arXiv 2506.11618
and 2511.06739.

1. In gauge 'svd', u = ΣVᵀx, where sBA = UΣVᵀ is the SVD of each site's ΔW in the Hugging Face
   basis. It is unique up to equal singular values, and ‖u‖ = ‖ΔWx‖. In gauge 'trained', u = Ax with
   the file's own A, unscaled. Another training run would give other coordinates.
2. A row holds a prompt and its response.
3. Sinks (the first token, and outliers of ‖z‖) are marked, and left out of examples and means.
4. Conversations begin alike, and a token with the same tokens before it has the same u. Examples
   and means over several rows count such a token once.

Cost: one forward pass of the adapted model, without the unembedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lens_lora.arguments import whole
from lens_lora.core import (
    AnswerLike,
    ChosenPositions,
    Gauge,
    LoraLens,
    OfSites,
    Positions,
    PromptsLike,
    Scale,
    Sites,
    alone,
    drawing,
    first_of_each,
    tables,
)
from lens_lora.show.text import context_of
from lens_lora.stream.examples import (
    Sign,
    require_ranks,
    require_sign,
    require_some,
    spread_of,
    strongest,
)
from lens_lora.stream.site_activations import activation_ranks, site_activations

# The columns of a table of examples.
_EXAMPLE = ["rank", "prompt", "position", "token", "value", "context"]


@final
class Activations(OfSites):
    """Rank activations u of each site, token and rank.

    Attributes:
        values: [batch, site, token, rank]; NaN at padding, and beyond a site's own rank.
        ranks: the number of coordinates of each site.
        sinks: [batch, token], the first token of each row, and tokens whose ‖z‖ is an outlier.
        beginnings: [batch, token], a number that identifies a token together with all tokens before
            it, so that rows which begin alike have equal numbers; 0 at padding.
        starts: [batch], the position at which the response begins; without one, the length.
        gauge: 'svd' or 'trained'.
        at: the gates at which z was read.
        str_tokens: each row's tokens, prompt and response.
        sites, meta: see `OfSites`.
    """

    values: Float[Tensor, "batch site token rank"]
    ranks: Annotated[tuple[int, ...], "site rank"]
    sinks: Bool[Tensor, "batch token"]
    beginnings: Int[Tensor, "batch token"]
    starts: Int[Tensor, " batch"]
    gauge: str
    at: str
    str_tokens: Annotated[tuple[tuple[str, ...], ...], "batch token"]

    @property
    def repeated(self) -> int:
        """The number of tokens, without sinks, that an earlier row has too, after the same tokens.

        Such a token counts once.
        """
        counted = self._chosen(None, sinks=False)
        once = first_of_each(self.beginnings.numpy(), counted)
        return int(counted.sum() - once.sum())

    def of(self, site: str) -> Float[Tensor, "batch token rank"]:
        """The values of one site, of its own rank.

        Args:
            site: its name, or a glob that matches it alone.

        Raises:
            SiteError: no such site, or several.
        """
        index = Sites(self.sites).one(site)
        return self.values[:, index, :, : self.ranks[index]]

    def directions(self, site: str | None = None) -> list[tuple[int, int]]:
        """Every direction of some sites as (site, rank), or the first direction of each site.

        Args:
            site: a name or glob; None for the first direction of each site.

        Raises:
            SiteError: no such site.
        """
        if site is None:
            return [(index, 0) for index in range(len(self.sites))]
        directions: list[tuple[int, int]] = []
        for index in Sites(self.sites).chosen(site):
            directions += [(index, rank) for rank in range(self.ranks[index])]
        return directions

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site, token and rank, sinks and tokens of the response marked."""
        prompts, _, positions, ranks = self.values.shape
        frame = tables.long_table(
            {"value": self.values},
            {"prompt": range(prompts)},
            Sites(self.sites).columns(),
            {"position": range(positions)},
            {"rank": range(ranks)},
        )
        frame = frame.dropna(subset="value", ignore_index=True)
        prompt = frame["prompt"].to_numpy()
        position = frame["position"].to_numpy()
        # The token is the column after its position.
        frame.insert(6, "token", tables.tokens_at(self.str_tokens, prompt, position))
        frame.insert(7, "sink", self.sinks.cpu().numpy()[prompt, position])
        frame.insert(8, "response", position >= self.starts.cpu().numpy()[prompt])
        return frame

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
        """The k tokens at which each direction of a site is largest, with their context.

        If several prompts begin alike, a token with the same tokens before it counts once.

        Args:
            site: its name, or a glob that matches only this site.
            k: the number of tokens for each direction.
            prompt: an index; without it, all prompts.
            rank: one direction; without it, all directions of the site.
            sign: 1 for the largest values above zero, −1 for the lowest below zero.
            context: the number of tokens that are shown on either side of each, which is in ⟦ ⟧.
            sinks: whether sinks count too.

        Raises:
            SiteError: no such site, or several.
            ArgumentError: no such prompt or rank, another sign, or a k or context below 0.
        """
        values = self.of(site).cpu().double().numpy()
        count = whole("k", k, 0)
        width = whole("context", context, 0)
        require_sign(sign)
        counted = self._chosen(None, sinks)
        if prompt is not None:
            is_other = np.arange(len(values)) != self.only_prompt(prompt)
            counted[is_other] = False
        counted = first_of_each(self.beginnings.numpy(), counted)
        values = np.where(counted[..., None], values, np.nan)

        rows: list[tuple[Any, ...]] = []
        for r in require_ranks(rank, values.shape[-1]):
            by_token = values[..., r]
            for place in strongest(by_token.ravel(), int(sign), count).tolist():
                text, position = divmod(place, by_token.shape[1])
                tokens = self.str_tokens[text]
                value = float(by_token[text, position])
                around = context_of(tokens, position, width)
                rows.append((r, text, position, tokens[position], value, around))
        return pd.DataFrame(rows, columns=_EXAMPLE)

    def mean(
        self, positions: Positions = None, *, sinks: bool = False
    ) -> Float[Tensor, "site rank"]:
        """The mean of u over tokens of all prompts, without sinks.

        Where several prompts begin alike, a token with the same tokens before it counts once.

        Args:
            positions: None or 'each' for all tokens, 'prompt' or 'response', or in each prompt an
                index, a slice or indices; negative ones count from its end.
            sinks: count sinks too.

        Raises:
            ArgumentError: positions at which there is no token.
        """
        return self._by_token(positions, sinks=sinks).mean(0)

    def matrix(
        self, positions: Positions = None, *, sinks: bool = False
    ) -> Float[Tensor, "row direction"]:
        """A row for each token, a column for each direction, to fit a sparse autoencoder on.

        Columns are those of `directions("*")`, rows those of `contexts` with the same arguments.

        Args:
            positions, sinks: as for `mean`; repeated tokens count once here as well.

        Raises:
            ArgumentError: positions at which there is no token.
        """
        by_token = self._by_token(positions, sinks=sinks)
        site, rank = torch.tensor(self.directions("*"), device=by_token.device).T
        return by_token[:, site, rank]

    def contexts(
        self, positions: Positions = None, *, sinks: bool = False, context: int = 4
    ) -> pd.DataFrame:
        """The place of each row of `matrix`: prompt, position, token, context.

        Args:
            positions, sinks: as for `matrix`.
            context: the number of tokens that are shown on either side of each, which is in ⟦ ⟧.

        Raises:
            ArgumentError: positions at which there is no token, or a context below 0.
        """
        width = whole("context", context, 0)
        rows: list[tuple[int, int, str, str]] = []
        for prompt, position in self._once(positions, sinks).nonzero().tolist():
            tokens = self.str_tokens[prompt]
            context_there = context_of(tokens, position, width)
            rows.append((prompt, position, tokens[position], context_there))
        return pd.DataFrame(rows, columns=["prompt", "position", "token", "context"])

    def spread(self, site: str | None = None) -> pd.DataFrame:
        """How each direction's values are spread over the tokens of all prompts, sinks left out.

        A row for each direction: site, rank, mean, rms, least, lower and upper quarter, median,
        largest. A token that several prompts share with all before it counts once.

        Args:
            site: a name or glob: every rank of these. Without it, the first rank of each site.

        Raises:
            SiteError: no such site.
            ArgumentError: no token that is not a sink.
        """
        by_token = self._by_token(None, sinks=False).cpu().double().numpy()
        rows: list[dict[str, Any]] = []
        for index, rank in self.directions(site):
            row: dict[str, Any] = {"site": self.sites[index].name, "rank": rank}
            rows.append(row | spread_of(by_token[:, index, rank]))
        return pd.DataFrame(rows)

    def _by_token(self, positions: Positions, *, sinks: bool) -> Float[Tensor, "row site rank"]:
        """The activations u of the tokens that `_once` chooses."""
        return self.values.movedim(1, 2)[self._once(positions, sinks)]

    def _once(self, positions: Positions, sinks: bool) -> Bool[Tensor, "batch token"]:
        """Whether each token is at these positions, and not repeated from an earlier row."""
        chosen = require_some(positions, self._chosen(positions, sinks))
        once = first_of_each(self.beginnings.numpy(), chosen)
        return torch.from_numpy(once).to(self.values.device)

    def _chosen(self, positions: Positions, sinks: bool) -> NDArray[np.bool_]:
        """Whether each token is at these positions of its row, as [batch, token]."""
        positions_of_row = ChosenPositions.of(positions)
        chosen = np.zeros(self.sinks.shape, bool)
        starts = self.starts.tolist()
        for prompt, tokens in enumerate(self.str_tokens):
            length = len(tokens)
            chosen[prompt, :length] = positions_of_row.mask(length, starts[prompt])
        if sinks:
            return chosen
        return chosen & ~self.sinks.cpu().numpy()

    def plot(self, site: str | None = None, prompt: int | None = None) -> drawing.Figure:
        """A heatmap of directions over the tokens of one prompt; sinks are grey.

        For several prompts it shows how each direction is spread over their tokens (`spread`). If
        there are more than 40 directions, those of largest |u| are shown, and the title says so.

        Args:
            site: a name or glob: every rank of these. Without it, the first rank of each site.
            prompt: an index; without it, the only prompt, or all.

        Raises:
            SiteError: no such site.
            ArgumentError: no such prompt.
        """
        return drawing.figure(self, site, prompt)


@alone
def lora_activations(
    lens: LoraLens,
    prompts: PromptsLike,
    response: AnswerLike | None = None,
    *,
    gauge: Gauge = "svd",
    scale: Scale = 1.0,
    sites: str | Sequence[str] | None = None,
) -> Activations:
    """The LoRA's own activations, u_l = A_l z_l of every site, token and rank: its "neurons".

    Activations of the model itself are TransformerLens's, within `lens.applied()`.

    Cost: one forward pass.

    The rank space of a site is the same in every gauge, but its coordinates differ. In gauge
    'trained' they depend on the training run. Gauge 'svd' has one direction for each singular value
    of ΔW, the largest first.

    Args:
        lens: the adapter over the model.
        prompts: strings, ids, or `Prompts`.
        response: the response to each prompt: a string, ids, or one of these per prompt.
        gauge: 'svd', u = ΣVᵀx of sBA = UΣVᵀ, where the largest entry of each column of U is
            positive; or 'trained', the unscaled Ax of the file.
        scale: the gates at which z is read, in any form that `LoraLens.gates` takes.
        sites: names or globs of the sites to keep; None for all.

    Raises:
        ArgumentError: another gauge.
        UnsupportedAdapterError: a norm, or in gauge 'trained' DoRA or a weight trained whole.
        SiteError: a name or glob that matches no site.
        TokenError, PromptError: a response or prompt that does not fit the model.
        ModelStateError: a site did not run.
        NumericsError: an activation is not finite.
    """
    f = lens.function(prompts)
    chosen = lens.sites.chosen(sites)
    in_gauge = lens.in_gauge(gauge)
    ranks = activation_ranks(lens, chosen, gauge)
    rows = lens.prompts(f.prompts, response)
    of_rows = f.over(in_gauge).of_rows(rows)
    seen = site_activations(of_rows, lens.gates(scale), chosen, ranks)
    return Activations(
        values=seen.values,
        sites=tuple(lens.sites[i] for i in chosen),
        ranks=ranks,
        sinks=seen.sinks,
        beginnings=rows.marks(),
        starts=rows.lengths.new_tensor(rows.asked_lengths),
        gauge=gauge,
        at=lens.scale_in_words(scale),
        str_tokens=lens.str_tokens(rows),
        meta=lens.describe(rows),
    )
