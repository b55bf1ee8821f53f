"""Sums of each site's δ over the tokens of each text, in its own rank space; δ itself is not built.

    δ = W u,  W = [s·B | Δb] in the Hugging Face basis,  W = QR  →  ‖δ‖ = ‖R u‖

Cost: one forward pass of the adapted model, without the unembedding.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.engine.activations import site_activations
from lens_lora.engine.batching import ROW_TOKENS
from lens_lora.engine.texts import by_length, distinct_tokens
from lens_lora.errors import UnsupportedAdapterError
from lens_lora.hooked.norm_map import NormUpdate
from lens_lora.hooked.updates import SiteUpdate
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts

__all__ = ["UpdateSums", "update_sums"]


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
    counts: Int[Tensor, "text"]
    apart_counts: Int[Tensor, "text"]

    def means(self, half: slice | None = None) -> list[Float[Tensor, "_out"]]:
        """μ of each site over all texts, or over one half of them, in the Hugging Face basis.

        Args:
            half: of the texts; no token that the other half has too is in it.
        """
        if half is None:
            mean = self.sums.sum(0) / self.counts.sum()
        else:
            mean = self.apart[half].sum(0) / self.apart_counts[half].sum()
        return [W @ mean[site, : W.shape[1]] for site, W in enumerate(self.writes)]

    def euclidean(self) -> Float[Tensor, "text site rank"]:
        """Σ_t R u, whose inner product is that of δ."""
        found = torch.zeros_like(self.sums)
        for site, R in enumerate(self.roots):
            found[:, site, : len(R)] = self.sums[:, site, : R.shape[1]] @ R.T
        return found


def update_sums(lens: LoraLens, texts: Prompts, apart: Bool[Tensor, "text pos"]) -> UpdateSums:
    """One forward pass of the adapted model.

    Args:
        lens: the adapter over the model.
        texts: as tokens.
        apart: the tokens that no text of the other half has after the same ones.

    Raises:
        UnsupportedAdapterError: a norm that the adapter changes.
        ModelStateError: a site that did not run.
        NumericsError: non-finite activations.
    """
    writes = tuple(_writes(one) for one in lens.plan.updates)
    roots = tuple(torch.linalg.qr(W, mode="r").R for W in writes)
    ranks = [W.shape[1] for W in writes]
    every, distinct = list(range(len(writes))), distinct_tokens(texts)
    shape = (texts.batch, len(writes))
    sums, own = (torch.zeros(*shape, max(ranks), dtype=torch.float64) for _ in range(2))
    squares, first = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    for index, some in by_length(texts, ROW_TOKENS):
        seen = site_activations(lens, some, lens.gates(1.0), every, ranks).values.cpu().double()
        counted = distinct[index, : some.tokens.shape[1]]
        for site, (R, rank) in enumerate(zip(roots, ranks, strict=True)):
            u = seen[:, site, :, :rank]
            size = (u @ R.T).square().sum(-1)
            sums[index, site, :rank] = u.masked_fill(~counted[..., None], 0.0).sum(1)
            kept = apart[index, : some.tokens.shape[1], None]
            own[index, site, :rank] = u.masked_fill(~kept, 0.0).sum(1)
            squares[index, site] = size.masked_fill(~counted, 0.0).sum(1)
            first[index, site] = size[:, 0].sqrt()
    counts = distinct.sum(1), apart.sum(1)
    return UpdateSums(writes, roots, sums, own, squares, first, *counts)


def _writes(one: SiteUpdate) -> Float[Tensor, "out rank"]:
    if isinstance(one.update, NormUpdate):
        raise UnsupportedAdapterError(
            f"{one.site.name} ({one.site.module}): a norm's update Δγ ⊙ n + Δβ has no constant of "
            "its own; leave the norms out with adapter.without(…)."
        )
    B = one.update.B.detach().cpu().double() * one.update.scale
    bias = one.update.bias
    return B if bias is None else torch.cat([B, bias.detach().cpu().double()[:, None]], 1)
