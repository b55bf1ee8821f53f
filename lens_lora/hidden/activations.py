"""What a site adds at each token: rank activations u_l = A_l z_l, and the constant part of B_l u_l.

Rank activations (`activations`). For an adapter of rank 1 it is one number per site and token, the
"LoRA neuron" of arXiv 2506.11618 and 2511.06739.

1. Gauge 'svd': u = ΣVᵀx of sBA = UΣVᵀ, of each site in the Hugging Face basis; unique up to equal
   singular values, and ‖u‖ = ‖ΔWx‖. Gauge 'trained': the unscaled Ax of the file, which another
   training run would give in other coordinates.
2. One row holds a prompt and its response.
3. Sinks (the first token, and outliers of ‖z‖) are marked, and left out of examples and means.
4. Conversations begin alike, and a token with the same tokens before it has the same u: examples
   and means over several rows count it once.

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
    Gauge,
    LoraLens,
    PromptsLike,
    Scale,
    alone,
    beginnings,
    chosen_sites,
    first_of_each,
    name_of_scale,
)
from lens_lora.core.function.activations import in_gauge
from lens_lora.core.function.asked import ask_prompts
from lens_lora.core.model.sites import match_sites, one_site
from lens_lora.core.results import base as results_base
from lens_lora.core.results import drawing
from lens_lora.core.results import tokens as text_tokens
from lens_lora.core.results.tokens import Positions, Sign, context_of, require_sign
from lens_lora.hidden.site_activations import activation_ranks, site_activations
from lens_lora.responses.answers import AnswerLike, continued

_EXAMPLE = ["rank", "prompt", "position", "token", "value", "context"]


@final
class Activations(results_base.OfSites):
    """u of each site, token and rank. NaN at padding, and beyond a site's own rank.

    Attributes:
        values: [batch, site, token, rank].
        ranks: how many coordinates each of them has.
        sinks: [batch, token], the first token of each row, and tokens whose ‖z‖ is an outlier.
        beginnings: [batch, token], a number for each token with all before it, the same where two
            rows begin alike; 0 at padding.
        starts: [batch], the position at which the response begins; where there is none, the length.
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
        """How many tokens beside sinks an earlier row has after the same ones; they count once."""
        counted = self._chosen(None, sinks=False)
        return int(counted.sum() - first_of_each(self.beginnings.numpy(), counted).sum())

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
        prompts, _, positions, ranks = map(range, self.values.shape)
        axes = {"prompt": prompts}, results_base.site_labels(self.sites), {"position": positions}
        frame = results_base.long_table({"value": self.values}, *axes, {"rank": ranks})
        frame = frame.dropna(subset="value", ignore_index=True)
        prompt, position = frame["prompt"].to_numpy(), frame["position"].to_numpy()
        frame.insert(6, "token", results_base.tokens_at(self.str_tokens, prompt, position))
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
        """The k tokens at which each direction of a site is largest, with what stands around them.

        Where several prompts begin alike, a token with the same tokens before it counts once.

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
        counted = self._chosen(None, sinks)
        if prompt is not None:
            counted[np.arange(len(values)) != results_base.only_prompt(prompt, len(values))] = False
        counted = first_of_each(self.beginnings.numpy(), counted)
        values = np.where(counted[..., None], values, np.nan)
        rows: list[tuple[Any, ...]] = []
        for r in text_tokens.require_ranks(rank, values.shape[-1]):
            direction = values[..., r]
            for flat_index in text_tokens.strongest(direction.ravel(), way, k):
                p, t = (int(i) for i in np.unravel_index(flat_index, direction.shape))
                tokens, value = self.str_tokens[p], float(direction[p, t])
                rows.append((r, p, t, tokens[t], value, context_of(tokens, t, context)))
        return pd.DataFrame(rows, columns=_EXAMPLE)

    def mean(
        self, positions: Positions = None, *, sinks: bool = False
    ) -> Float[Tensor, "site rank"]:
        """The mean of u over tokens of all prompts, without sinks.

        Where several prompts begin alike, a token with the same tokens before it counts once.

        Args:
            positions: None for all tokens, 'response', or of each prompt an index, a slice or
                indices; negative ones count from its end.
            sinks: count sinks too.

        Raises:
            ArgumentError: positions at which there is no token.
        """
        return self.values.movedim(1, 2)[self._once(positions, sinks)].mean(0)

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
        rows = self.values.movedim(1, 2)[self._once(positions, sinks)]
        site, rank = torch.tensor(self.directions("*"), device=rows.device).T
        return rows[:, site, rank]

    def contexts(
        self, positions: Positions = None, *, sinks: bool = False, context: int = 4
    ) -> pd.DataFrame:
        """Where each row of `matrix` stands: prompt, position, token, context.

        Args:
            positions, sinks: as for `matrix`.
            context: how many tokens are shown on either side of each, which stands in ⟦ ⟧.

        Raises:
            ArgumentError: positions at which there is no token, or a context below 0.
        """
        width = whole("context", context, 0)
        rows = [
            (p, t, self.str_tokens[p][t], context_of(self.str_tokens[p], t, width))
            for p, t in self._once(positions, sinks).nonzero().tolist()
        ]
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
        rows = self.values.movedim(1, 2)[self._once(None, sinks=False)].cpu().double().numpy()
        names = [(self.sites[index].name, r) for index, r in self.directions(site)]
        values = [text_tokens.spread_of(rows[:, index, r]) for index, r in self.directions(site)]
        labels = ({"site": name, "rank": r} for name, r in names)
        return pd.DataFrame([both | row for both, row in zip(labels, values, strict=True)])

    def _once(self, positions: Positions, sinks: bool) -> Bool[Tensor, "batch token"]:
        """The tokens at these positions, each with all before it once."""
        chosen = text_tokens.require_some(positions, self._chosen(positions, sinks))
        once = first_of_each(self.beginnings.numpy(), chosen)
        return torch.from_numpy(once).to(self.values.device)

    def _chosen(self, positions: Positions, sinks: bool) -> NDArray[np.bool_]:
        """[batch, token]: the tokens at these positions of every row."""
        chosen = np.zeros(self.sinks.shape, bool)
        rows = zip(self.str_tokens, self.starts.tolist(), strict=True)
        for p, (tokens, start) in enumerate(rows):
            chosen[p, : len(tokens)] = text_tokens.chosen_positions(positions, len(tokens), start)
        return chosen & (sinks | ~self.sinks.cpu().numpy())

    def plot(self, site: str | None = None, prompt: int | None = None) -> drawing.Figure:
        """Heat map of directions over the tokens of one prompt; sinks are grey.

        Of several prompts at once, how each direction is spread over their tokens (`spread`). Of
        more than 40 directions those of largest |u| are shown, and the title says so.

        Args:
            site: a name or glob: every rank of these. Without it, the first rank of each site.
            prompt: an index; without it, the only prompt, or all.

        Raises:
            SiteError: no such site.
            ArgumentError: no such prompt.
        """
        return drawing.figure(self, site, prompt)


@alone
def activations(
    lens: LoraLens,
    prompts: PromptsLike,
    response: AnswerLike | None = None,
    *,
    gauge: Gauge = "svd",
    scale: Scale = 1.0,
    sites: str | Sequence[str] | None = None,
) -> Activations:
    """u_l = A_l z_l of every site, token and rank. One forward pass.

    The adapter's rank space is the same in every gauge, its coordinates are not: as trained they
    depend on the run, 'svd' has one direction for each singular value of ΔW, the largest first.

    Args:
        lens: the adapter over the model.
        prompts: strings, ids, or `Prompts`.
        response: what is said after each prompt: a string, ids, or one of these per prompt.
        gauge: 'svd', u = ΣVᵀx of sBA = UΣVᵀ with the entry of largest magnitude of each of U's
            columns positive, or 'trained', the unscaled Ax of the file.
        scale: the gates at which z is read, as for `LoraLens.gates`.
        sites: names or globs; only these are kept. Without it, all.

    Raises:
        ArgumentError: another gauge.
        UnsupportedAdapterError: a norm, or in gauge 'trained' DoRA or a weight trained whole.
        SiteError: a name or glob that matches no site.
        TokenError, PromptError: a response or prompt that does not fit the model.
        ModelStateError: a site that did not run.
        NumericsError: non-finite activations.
    """
    prompts = ask_prompts(lens, prompts).prompts
    chosen = chosen_sites(lens.sites, sites)
    turned = in_gauge(lens, gauge)
    ranks = activation_ranks(lens, chosen, gauge)
    rows = prompts if response is None else continued(lens.model, prompts, response)
    seen = site_activations(turned, rows, lens.gates(scale), chosen, ranks)
    return Activations(
        values=seen.values,
        sites=tuple(lens.sites[i] for i in chosen),
        ranks=ranks,
        sinks=seen.sinks,
        beginnings=beginnings(rows),
        starts=rows.lengths.new_tensor(rows.asked_lengths),
        gauge=gauge,
        at=name_of_scale(scale),
        str_tokens=lens.str_tokens(rows),
        meta=lens.describe(rows),
    )
