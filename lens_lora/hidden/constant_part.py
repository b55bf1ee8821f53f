"""The constant part of what a site writes: a steering vector for each module, whatever the input.

    δ_lt = μ_l + (δ_lt − μ_l),     share_l = 1 − Σ‖δ_lt − μ̂_l‖² / Σ‖δ_lt‖²

1. u of every site and token in one forward pass of the adapted model, so that δ is that of the
   Hugging Face modules (`core/function/activations.py`).
2. Of each text, μ̂_l is the mean over the *other* texts: in sample the share would be inflated. The
   first token is left out, a sink whose δ is another one, and its size is shown apart. A token with
   the same tokens before it as in an earlier text counts once: it is not held out from that text.
3. What the constants alone do: the texts are cut in two halves, and the constants of each are
   applied to the other half, as an adapter and so at every token, the first one too. A beginning
   that texts of both halves share is in neither half's constants. By KL, over the same tokens,

       kept = 1 − Σ KL(adapted ‖ constant) / Σ KL(adapted ‖ base)

   and of a readout Σ (g_constant − g₀) / Σ (g₁ − g₀).

A large share of δ need not carry what the adapter does, so both are measured. Nor need constants
that keep most of the KL keep a fact's margin, so with a readout there are both numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, cast, final

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.arguments import whole
from lens_lora.core import (
    Adapter,
    LoraLens,
    Prompts,
    PromptsLike,
    Readout,
    Update,
    alone,
    beginnings,
    distinct_tokens,
)
from lens_lora.core.adapter.factors import constant_factors, output_count
from lens_lora.core.function.asked import Asked, ask_prompts
from lens_lora.core.function.forward import gated_readout
from lens_lora.core.results import base as results_base
from lens_lora.core.results.tokens import held_out_share
from lens_lora.errors import PromptError
from lens_lora.hidden.update_sums import UpdateSums, update_sums
from lens_lora.texts.batches import (
    require_own_tokens,
    require_second_token,
)
from lens_lora.texts.divergences import text_divergences

_HALVES = (slice(0, None, 2), slice(1, None, 2))


@final
class ConstantPart(results_base.OfSites, results_base.Pictured):
    """How much of an adapter is the same whatever the input.

    `plot` is the share of each site, layer × kind of module.

    Attributes:
        share: [site], 1 − Σ‖δ − μ̂‖² / Σ‖δ‖², μ̂ the mean over the other texts: 1 where δ is one
            vector, 0 where its mean says nothing of it, below where another text's misleads. NaN
            where δ is zero.
        size: [site], the root mean square of ‖δ‖ over tokens after first ones.
        mean_size: [site], ‖μ‖.
        first_size: [site], the mean ‖δ‖ at the texts' first tokens, no part of the others.
        base, constant, adapted: [text], the readout of the base model, with the constants of the
            other half of the texts alone, and of the adapted model. By KL: Σ_t KL(adapted ‖ it).
        base_kl, constant_kl: [text], Σ_t KL(adapted ‖ it) in nats, whatever the readout.
        vectors: μ by module path, as the Hugging Face module writes it.
        widths: how many features each module reads.
        steering: what the constants add by hook point, in the hooked model's basis, heads laid
            flat: steering vectors.
        readout, units: by which the model is compared.
        sites, meta: see `OfSites`; all that are adapted.
    """

    BY_KL = "KL(adapted ‖ ·)"

    share: Float[Tensor, " site"]
    size: Float[Tensor, " site"]
    mean_size: Float[Tensor, " site"]
    first_size: Float[Tensor, " site"]
    base: Float[Tensor, " text"]
    constant: Float[Tensor, " text"]
    adapted: Float[Tensor, " text"]
    base_kl: Float[Tensor, " text"]
    constant_kl: Float[Tensor, " text"]
    vectors: Annotated[Mapping[str, Float[Tensor, " _out"]], "module"]
    widths: Annotated[Mapping[str, int], "module"]
    steering: Mapping[str, Float[Tensor, " _d"]]
    readout: str
    units: str

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
    def kept_kl(self) -> float:
        """The same by KL, whatever the readout: it may be large where a fact's margin is lost."""
        return 1 - float(self.constant_kl.sum() / self.base_kl.sum())

    @property
    def total_share(self) -> float:
        """The share of Σ_l ‖δ_l‖² over all sites."""
        weights = self.size.square()
        return float((self.share.nan_to_num() * weights).sum() / weights.sum())

    def to_frame(self) -> pd.DataFrame:
        """One row per site: the share, and the sizes of δ, of its mean, and at first tokens."""
        columns = results_base.site_labels(self.sites)
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


@alone
def constant_part(
    lens: LoraLens, texts: PromptsLike, readout: Readout | None = None, *, progress: bool = True
) -> ConstantPart:
    """How much of each site's δ is one vector, on held-out texts, and what the vectors alone do.

    Cost: four forward passes over the texts, seven with a readout.

    Args:
        lens: the adapter over the model.
        texts: strings, conversations, ids, or `Prompts`; two at least, of two tokens at least.
        readout: what of the adapter's effect the constants are to keep, at each text's end, beside
            all of it by KL at every token; None for the KL alone.
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
    by_kl = _by_kl(asked, judged, progress)
    base, constant, adapted = by_kl if readout is None else _by_readout(asked, judged, progress)
    count = int(sums.counts.sum())
    return ConstantPart(
        share=held_out_share(sums.euclidean(), sums.squares, sums.counts),
        size=(sums.squares.sum(0) / count).sqrt(),
        mean_size=torch.stack([mean.norm() for mean in sums.means()]),
        first_size=sums.first.mean(0),
        base=base,
        constant=constant,
        adapted=adapted,
        base_kl=by_kl[0],
        constant_kl=by_kl[1],
        sites=lens.sites,
        vectors=vectors,
        widths=widths,
        steering=_steering(lens.with_adapter(_constants(vectors, widths))),
        readout=ConstantPart.BY_KL if readout is None else readout.label,
        units="nats" if readout is None else readout.units,
        meta=asked.describe(),
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
    return sums[0], sums[1], sums[2]


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
    vectors, widths = dict[str, Tensor](), dict[str, int]()
    for site_update, mean in zip(lens.plan.updates, sums.means(half), strict=True):
        site = site_update.site
        key = site.path + site.key.removeprefix(site.module)
        widths[key] = cast(Update, site_update.update).A.shape[1]
        rows, out = slice(None), len(mean)
        if site.rows is not None:
            rows, out = site.rows, output_count(lens.adapter.modules[site.key], widths[key])
        vectors.setdefault(key, mean.new_zeros(out))[rows] = mean
    return {key: vector.to(lens.gate_dtype) for key, vector in vectors.items()}, widths


def _steering(lens: LoraLens) -> dict[str, Float[Tensor, " d"]]:
    """What a lens of constants adds at each hook point, in the model's basis, heads laid flat."""
    added: dict[str, Tensor] = {}
    for injection in lens.plan.injections:
        zero = injection.map.A.new_zeros(1, 1, injection.map.width)
        vector, name = injection.map(zero).flatten().cpu(), injection.ports.write
        added[name] = added[name] + vector if name in added else vector
    return added
