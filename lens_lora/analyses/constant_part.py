"""How much of an adapter is a constant, whatever the input: a steering vector for each module.

    δ_lt = μ_l + (δ_lt − μ_l),     share_l = 1 − Σ‖δ_lt − μ̂_l‖² / Σ‖δ_lt‖²

1. u of every site and token in one forward pass of the adapted model, so that δ is that of the
   Hugging Face modules (`engine/activations.py`).
2. Of each text, μ̂_l is the mean over the *other* texts: in sample the share would be inflated. The
   first token is left out, a sink whose δ is another one, and its size is shown apart. A token with
   the same tokens before it as in an earlier text counts once: it is not held out from that text.
3. What the constants alone do: the texts are cut in two halves, and the constants of each are
   applied, as an adapter and at every token, to the other half. A beginning that texts of both
   halves share is in neither half's constants. By KL, over the same tokens,

       kept = 1 − Σ KL(adapted ‖ constant) / Σ KL(adapted ‖ base)

   and of a readout Σ (g_constant − g₀) / Σ (g₁ − g₀).

A large share of δ need not carry what the adapter does, so both are measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, cast, final

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.factors import constant_factors, output_count
from lens_lora.arguments import whole
from lens_lora.engine.asked import Asked, ask_prompts
from lens_lora.engine.function import gated_readout
from lens_lora.engine.texts import (
    UpdateSums,
    beginnings,
    distinct_tokens,
    require_own_tokens,
    require_second_token,
    text_divergences,
    update_sums,
)
from lens_lora.errors import PromptError
from lens_lora.model.basis import Update
from lens_lora.model.hooks import alone
from lens_lora.model.lens import LoraLens
from lens_lora.model.sites import Site
from lens_lora.readouts.prompts import Prompts, PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results import drawing
from lens_lora.results.base import Result, site_labels
from lens_lora.results.tokens import held_out_share

_HALVES = (slice(0, None, 2), slice(1, None, 2))


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

    share: Float[Tensor, " site"]
    size: Float[Tensor, " site"]
    mean_size: Float[Tensor, " site"]
    first_size: Float[Tensor, " site"]
    base: Float[Tensor, " text"]
    constant: Float[Tensor, " text"]
    adapted: Float[Tensor, " text"]
    sites: Annotated[tuple[Site, ...], "site"]
    vectors: Annotated[Mapping[str, Float[Tensor, " _out"]], "module"]
    widths: Annotated[Mapping[str, int], "module"]
    steering: Mapping[str, Float[Tensor, " _d"]]
    readout: str
    units: str
    meta: Mapping[str, str]

    @property
    def adapter(self) -> Adapter:
        """The constants alone, over all texts, as an adapter: applied, saved, compared as any."""
        return _constants(self.vectors, self.widths)

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

    def plot(self) -> drawing.Figure:
        """The share of each site, layer × kind of module."""
        return drawing.figure(self)


@alone
def constant_part(
    lens: LoraLens,
    texts: PromptsLike,
    readout: Readout | None = None,
    *,
    progress: bool = True,
) -> ConstantPart:
    """How much of each site's δ is one vector, on held-out texts, and what the vectors alone do.

    Cost: four forward passes over the texts, five with a readout.

    Args:
        lens: the adapter over the model.
        texts: strings, conversations, ids, or `Prompts`; two at least, of two tokens at least.
        readout: what of the adapter's effect the constants are to keep, at each text's end; None
            for all of it, by KL at every token.
        progress: show a bar.

    Raises:
        PromptError: one text alone, a text of one token, or one that another text begins with.
        UnsupportedAdapterError: the adapter changes norms.
        ArgumentError, TokenError: a readout that does not fit the model.
        NumericsError: non-finite activations or logits.
    """
    asked = ask_prompts(lens, texts)
    rows = asked.prompts
    require_second_token(rows, "constants")
    if rows.batch < 2:
        raise PromptError("constants are judged on other texts than their own; give two or more.")
    require_own_tokens(rows)
    if readout is not None:
        asked = asked.about(readout)
    sums = update_sums(lens, rows, _apart(rows))
    vectors, widths = _by_module(lens, sums)
    # The constants of each half are judged on the other.
    judged = [
        lens.with_adapter(_constants(*_by_module(lens, sums, half))) for half in _HALVES[::-1]
    ]
    ends_of = _by_kl if readout is None else _by_readout
    base, constant, adapted = ends_of(asked, judged, progress)
    count = int(sums.counts.sum())
    return ConstantPart(
        share=held_out_share(sums.euclidean(), sums.squares, sums.counts),
        size=(sums.squares.sum(0) / count).sqrt(),
        mean_size=torch.stack([mean.norm() for mean in sums.means()]),
        first_size=sums.first.mean(0),
        base=base,
        constant=constant,
        adapted=adapted,
        sites=lens.sites,
        vectors=vectors,
        widths=widths,
        steering=_steering(lens.with_adapter(_constants(vectors, widths))),
        readout="KL(adapted ‖ ·)" if readout is None else readout.label,
        units="nats" if readout is None else readout.units,
        meta=lens.describe(),
    )


def _constants(vectors: Mapping[str, Float[Tensor, " out"]], widths: Mapping[str, int]) -> Adapter:
    """The adapter that adds these vectors."""
    return Adapter.from_factors(constant_factors(vectors, widths), name="constant part")


def _apart(rows: Prompts) -> Bool[Tensor, "text pos"]:
    """The tokens of each half that no text of the other has after the same ones."""
    halves = [rows.chosen(range(rows.batch)[half]) for half in _HALVES]
    apart = torch.zeros(rows.tokens.shape, dtype=torch.bool)
    for half, texts, others in zip(_HALVES, halves, halves[::-1], strict=True):
        # None that any of the other texts has after the same tokens.
        kept = distinct_tokens(texts) & ~torch.isin(beginnings(texts), beginnings(others))
        apart[half, : kept.shape[1]] = kept
    return apart


Ends = tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]


def _by_kl(asked: Asked, judged: Sequence[LoraLens], progress: bool) -> Ends:
    """Σ_t KL of the adapted model from the base, from the constants, and from itself."""
    lens, rows = asked.lens, asked.prompts
    sums, counted = torch.zeros(3, rows.batch, dtype=torch.float64), distinct_tokens(rows)
    adapted = (lens, lens.gates(1.0))
    for half, constant in zip(_HALVES, judged, strict=True):
        both = [(lens, lens.gates(0.0)), (constant, constant.gates(1.0))]
        index = list(range(rows.batch)[half])
        texts = rows.chosen(index)
        sums[:2, index] = text_divergences(adapted, both, texts, counted[index], progress=progress)
    base, constant, none = sums
    return base, constant, none


def _by_readout(asked: Asked, judged: Sequence[LoraLens], progress: bool) -> Ends:
    """g of base, constant and adapted model; each text by the constants of the other half."""
    base, adapted = asked.ends.cpu().double()
    constant = torch.empty_like(base)
    for half, lens in zip(_HALVES, judged, strict=True):
        values = gated_readout(lens, asked.reading, lens.gates(1.0)[None], progress=progress)
        constant[half] = values[half, 0].cpu().double()
    return base, constant, adapted


def _by_module(
    lens: LoraLens, sums: UpdateSums, half: slice | None = None
) -> tuple[dict[str, Float[Tensor, " out"]], dict[str, int]]:
    """μ of each module as its Hugging Face module writes it, and the width that it reads."""
    vectors: dict[str, Tensor] = {}
    widths: dict[str, int] = {}
    for site_update, mean in zip(lens.plan.updates, sums.means(half), strict=True):
        site = site_update.site
        key = site.path + site.key.removeprefix(site.module)
        widths[key] = cast(Update, site_update.update).A.shape[1]
        rows, out = slice(None), len(mean)
        if site.rows is not None:
            rows, out = site.rows, output_count(lens.adapter.modules[site.key], widths[key])
        vectors.setdefault(key, mean.new_zeros(out))[rows] = mean
    dtype = lens.gate_dtype
    return {key: vector.to(dtype) for key, vector in vectors.items()}, widths


def _steering(lens: LoraLens) -> dict[str, Float[Tensor, " d"]]:
    """What a lens of constants adds at each hook point, in the model's basis, heads laid flat."""
    added: dict[str, Tensor] = {}
    for injection in lens.plan.injections:
        zero = injection.map.A.new_zeros(1, 1, injection.map.width)
        vector, name = injection.map(zero).flatten().cpu(), injection.ports.write
        added[name] = added[name] + vector if name in added else vector
    return added
