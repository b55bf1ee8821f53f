"""Sums of each site's δ over the tokens of each text, in its own rank space: δ itself is not built.

δ = W u,  W = [s·B | Δb] in the Hugging Face basis,  W = QR  →  ‖δ‖ = ‖R u‖
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.core import (
    LoraLens,
    Prompts,
    SiteUpdate,
    distinct_tokens,
)
from lens_lora.core.function.memory import ROW_TOKENS
from lens_lora.core.model import NormUpdate
from lens_lora.errors import UnsupportedAdapterError
from lens_lora.hidden.site_activations import site_activations
from lens_lora.texts.batches import (
    over_texts,
)


@dataclasses.dataclass(frozen=True, eq=False)
class UpdateSums:
    """Of every site and text, over its `distinct_tokens`.

    Attributes:
        writes: W of each site, [out, rank].
        roots: R of each site, [rank, rank].
        sums: Σ_t u, padded with zeros beyond a site's rank.
        apart: the same over the tokens that no text of the other half has after the same ones.
        squares: Σ_t ‖δ‖².
        first: ‖δ‖ at the text's first token.
        counts, apart_counts: how many tokens.
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
        """μ of each site over all texts, or over one half of them, in the Hugging Face basis."""
        if half is None:
            mean = self.sums.sum(0) / self.counts.sum()
        else:
            mean = self.apart[half].sum(0) / self.apart_counts[half].sum()
        return [W @ mean[site, : W.shape[1]] for site, W in enumerate(self.writes)]

    def euclidean(self) -> Float[Tensor, "text site rank"]:
        """Σ_t R u, whose inner product is that of δ."""
        turned = torch.zeros_like(self.sums)
        for site, R in enumerate(self.roots):
            turned[:, site, : len(R)] = self.sums[:, site, : R.shape[1]] @ R.T
        return turned


def update_sums(lens: LoraLens, texts: Prompts, apart: Bool[Tensor, "text pos"]) -> UpdateSums:
    """One forward pass of the adapted model."""
    writes = tuple(map(_writes, lens.plan.updates))
    roots = tuple(torch.linalg.qr(W, mode="r").R for W in writes)
    ranks = [W.shape[1] for W in writes]
    sites, distinct = range(len(writes)), distinct_tokens(texts)
    shape = (texts.batch, len(writes))
    sums, apart_sums = (torch.zeros(*shape, max(ranks), dtype=torch.float64) for _ in range(2))
    squares, first = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))

    def visit(index: list[int], rows: Prompts) -> None:
        values = site_activations(lens, rows, lens.gates(1.0), sites, ranks).values.cpu().double()
        counted, is_apart = (mask[index, : rows.tokens.shape[1]] for mask in (distinct, apart))
        for site, (R, rank) in enumerate(zip(roots, ranks, strict=True)):
            u = values[:, site, :, :rank]
            size = (u @ R.T).square().sum(-1)
            sums[index, site, :rank] = u.masked_fill(~counted[..., None], 0.0).sum(1)
            apart_sums[index, site, :rank] = u.masked_fill(~is_apart[..., None], 0.0).sum(1)
            squares[index, site] = size.masked_fill(~counted, 0.0).sum(1)
            first[index, site] = size[:, 0].sqrt()

    over_texts(lens, texts, ROW_TOKENS, visit, "activations", progress=False)
    counts = distinct.sum(1), apart.sum(1)
    return UpdateSums(writes, roots, sums, apart_sums, squares, first, *counts)


def _writes(site_update: SiteUpdate) -> Float[Tensor, "out rank"]:
    site, update = site_update.site, site_update.update
    if isinstance(update, NormUpdate):
        raise UnsupportedAdapterError(
            f"{site.name} ({site.module}): a norm's update Δγ ⊙ n + Δβ has no constant of its own; "
            "leave the norms out with adapter.without(…)."
        )
    if update.experts:
        raise UnsupportedAdapterError(
            f"{site.name} ({site.module}): each expert writes into a space of its own, so a stack "
            "of them has no constant; leave it out with adapter.without(…)."
        )
    B = update.B.detach().cpu().double() * update.scale
    bias = update.bias
    return B if bias is None else torch.cat([B, bias.detach().cpu().double()[:, None]], 1)
