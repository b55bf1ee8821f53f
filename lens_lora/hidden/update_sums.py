"""Sums of each site's δ over the tokens of each text, in the site's own rank space.

    δ = W u,    W = [s·B | Δb] in the Hugging Face basis,    W = Q R,    ‖δ‖ = ‖R u‖

So δ itself, which is as wide as the module's output, is never built.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.core import LoraLens, Prompts, SiteUpdate
from lens_lora.errors import UnsupportedAdapterError
from lens_lora.stream.site_activations import site_activations
from lens_lora.texts.batches import over_texts


@dataclasses.dataclass(frozen=True, eq=False)
class UpdateSums:
    """Sums of every site's update over the tokens that are `distinct`.

    Attributes:
        writes: W of each site, [out, rank].
        roots: R of each site, [rank, rank].
        sums: Σ_t u, padded with zeros beyond a site's rank.
        apart: Σ_t u over tokens that no text of the other half has after the same tokens.
        squares: Σ_t ‖δ‖².
        first: ‖δ‖ at the text's first token.
        counts, apart_counts: the numbers of tokens in `sums` and in `apart`.
    """

    writes: tuple[Float[Tensor, "_out _rank"], ...]
    roots: tuple[Float[Tensor, "_small _rank"], ...]
    sums: Float[Tensor, "text site rank"]
    apart: Float[Tensor, "text site rank"]
    squares: Float[Tensor, "text site"]
    first: Float[Tensor, "text site"]
    counts: Int[Tensor, " text"]
    apart_counts: Int[Tensor, " text"]

    def means(self, half: slice | None = None) -> list[Float[Tensor, " _out"]]:
        """The mean μ of each site in the Hugging Face basis.

        Args:
            half: the texts whose tokens in `apart` the mean is over; None for all texts.
        """
        if half is None:
            mean = self.sums.sum(0) / self.counts.sum()
        else:
            mean = self.apart[half].sum(0) / self.apart_counts[half].sum()
        return [W @ mean[site, : W.shape[1]] for site, W in enumerate(self.writes)]

    def euclidean(self) -> Float[Tensor, "text site rank"]:
        """The sums Σ_t R u, whose inner products are those of Σ_t δ."""
        turned = torch.zeros_like(self.sums)
        for site, R in enumerate(self.roots):
            turned[:, site, : len(R)] = self.sums[:, site, : R.shape[1]] @ R.T
        return turned


def update_sums(lens: LoraLens, texts: Prompts, apart: Bool[Tensor, "text pos"]) -> UpdateSums:
    """Sum each site's δ over the tokens of each text, in one forward pass of the adapted model.

    Args:
        lens: the adapter over the model.
        texts: all texts.
        apart: True at tokens that no text of the other half has after the same tokens.

    Raises:
        UnsupportedAdapterError: the adapter changes norms, or stacks of experts.
        NumericsError: an activation is not finite.
    """
    f = lens.function(texts)
    writes = tuple(_writes(site_update) for site_update in lens.updates)
    roots = tuple(torch.linalg.qr(W, mode="r").R for W in writes)
    ranks = [W.shape[1] for W in writes]
    sites = range(len(writes))
    distinct = texts.distinct()
    by_rank = texts.batch, len(writes), max(ranks)
    sums = torch.zeros(by_rank, dtype=torch.float64)
    apart_sums = torch.zeros(by_rank, dtype=torch.float64)
    squares = torch.zeros(texts.batch, len(writes), dtype=torch.float64)
    first = torch.zeros(texts.batch, len(writes), dtype=torch.float64)

    def visit(index: list[int], rows: Prompts) -> None:
        seen = site_activations(f.of_rows(rows), lens.gates(1.0), sites, ranks)
        activations = seen.values.cpu().double()
        width = rows.tokens.shape[1]
        is_counted = distinct[index, :width]
        is_apart = apart[index, :width]
        for site in sites:
            rank = ranks[site]
            u = activations[:, site, :, :rank]
            square = (u @ roots[site].T).square().sum(-1)
            sums[index, site, :rank] = u.masked_fill(~is_counted[..., None], 0.0).sum(1)
            apart_sums[index, site, :rank] = u.masked_fill(~is_apart[..., None], 0.0).sum(1)
            squares[index, site] = square.masked_fill(~is_counted, 0.0).sum(1)
            first[index, site] = square[:, 0].sqrt()

    over_texts(lens, texts, f.passes.tokens_at_once(), visit, "activations", progress=False)
    return UpdateSums(
        writes=writes,
        roots=roots,
        sums=sums,
        apart=apart_sums,
        squares=squares,
        first=first,
        counts=distinct.sum(1),
        apart_counts=apart.sum(1),
    )


def _writes(site_update: SiteUpdate) -> Float[Tensor, "out rank"]:
    """The matrix W = [s·B | Δb] of one site."""
    site = site_update.site
    if site_update.norm is not None:
        raise UnsupportedAdapterError(
            f"{site.name} ({site.module}): a norm's update Δγ ⊙ n + Δβ has no constant of its own",
            remedy="leave the norms out with adapter.without_modules(…).",
        )
    update = site_update.linear
    if update.experts:
        raise UnsupportedAdapterError(
            f"{site.name} ({site.module}): each expert writes into a space of its own, so a stack "
            "of them has no constant",
            remedy="leave it out with adapter.without_modules(…).",
        )
    B = update.B.detach().cpu().double() * update.scale
    if update.bias is None:
        return B
    bias = update.bias.detach().cpu().double()
    return torch.cat([B, bias[:, None]], 1)
