"""The constant part of what each site writes: a steering vector, the same for every input.

Over the tokens t of texts, each site's δ splits into its mean μ and the rest:

    δ_lt = μ_l + (δ_lt − μ_l),     share_l = 1 − Σ‖δ_lt − μ̂_l‖² / Σ‖δ_lt‖²

1. One forward pass of the adapted model gives u of every site and token in Hugging Face's basis, so
   δ is that of the Hugging Face modules (`hidden/update_sums.py`).
2. μ̂_l is the mean over the *other* texts, because a mean over the same text would inflate the
   share. The first token of a text is left out, because it is a sink with another δ; its size is
   reported separately. A token with the same tokens before it as in an earlier text counts once,
   because it is not held out from that text.
3. To measure what the constants do by themselves, the texts are divided into two halves, and the
   constants of each half are applied to the other half. They are applied as an adapter, so at every
   token, including the first. A beginning that texts of both halves share is in neither half's
   constants. By KL, over the same tokens,

       kept = 1 − Σ KL(adapted ‖ constant) / Σ KL(adapted ‖ base)

   and by a readout, Σ (g_constant − g₀) / Σ (g₁ − g₀).

A large share of δ need not mean that the constants have the adapter's effect, so both are measured.
Constants that keep most of the KL need not keep a fact's margin either, so a readout is measured
separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple, final

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.arguments import whole
from lens_lora.core import (
    Adapter,
    Evaluations,
    Function,
    LoraLens,
    OfSites,
    Pictured,
    Prompts,
    PromptsLike,
    Readout,
    Sites,
    alone,
)
from lens_lora.errors import PromptError
from lens_lora.hidden.update_sums import UpdateSums, update_sums
from lens_lora.stream.held_out import held_out_share
from lens_lora.texts.batches import require_own_tokens, require_second_token
from lens_lora.texts.divergences import text_divergences

# The halves alternate, so that both have early and late texts.
_HALVES = (slice(0, None, 2), slice(1, None, 2))


@final
class ConstantPart(OfSites, Pictured):
    """How much of what an adapter writes is the same vector for every input.

    `plot` shows the share of each site, by layer and kind of module.

    Attributes:
        share: [site], 1 − Σ‖δ − μ̂‖² / Σ‖δ‖², with μ̂ the mean over the other texts: 1 if δ is one
            vector, 0 if its mean explains nothing of it, negative if the mean of other texts is
            misleading. NaN if δ is zero.
        size: [site], the root mean square of ‖δ‖ over all tokens except first ones.
        mean_size: [site], ‖μ‖.
        first_size: [site], the mean ‖δ‖ at the texts' first tokens, which are in no other number.
        base, constant, adapted: [text], the readout of the base model, of the base with the
            constants of the other half of the texts, and of the adapted model. Without a readout
            each is Σ_t KL(adapted ‖ that model).
        base_kl, constant_kl: [text], Σ_t KL(adapted ‖ that model) in nats, for any readout.
        vectors: μ by module path, as the Hugging Face module writes it.
        widths: the number of features that each module reads.
        steering: the steering vectors that the constants add at each hook point, in the hooked
            model's basis, with the axis of heads flattened.
        readout, units: the readout by which the model is compared, and its units.
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
        """The constants over all texts, as an adapter that can be applied, saved and compared."""
        return _adapter_of(self.vectors, self.widths)

    @property
    def kept(self) -> float:
        """The share of the adapter's effect that the constants alone keep on held-out texts.

        Σ (constant − base) / Σ (adapted − base) over texts. By KL it is 1 − Σ KL(adapted ‖
        constant) / Σ KL(adapted ‖ base), which is negative if the constants lead away from the
        adapted model.
        """
        return float((self.constant - self.base).sum() / (self.adapted - self.base).sum())

    @property
    def kept_kl(self) -> float:
        """The share of the KL that the constants keep; it may be large though a fact is lost."""
        return 1 - float(self.constant_kl.sum() / self.base_kl.sum())

    @property
    def total_share(self) -> float:
        """The share of Σ_l ‖δ_l‖² over all sites."""
        weights = self.size.square()
        return float((self.share.nan_to_num() * weights).sum() / weights.sum())

    def to_frame(self) -> pd.DataFrame:
        """One row per site: the share, and the sizes of δ, of its mean, and at first tokens."""
        columns = Sites(self.sites).columns()
        columns["constant_share"] = self.share.double().tolist()
        columns["size"] = self.size.double().tolist()
        columns["mean_size"] = self.mean_size.double().tolist()
        columns["first_size"] = self.first_size.double().tolist()
        return pd.DataFrame(columns)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k sites of largest ‖μ‖.

        Args:
            k: how many.
        """
        count = whole("k", k, 0)
        order = self.mean_size.argsort(descending=True)[:count].tolist()
        return self.to_frame().iloc[order].reset_index(drop=True)


@alone
def constant_part(
    lens: LoraLens, texts: PromptsLike, readout: Readout | None = None, *, progress: bool = True
) -> ConstantPart:
    """Measure how much of each site's δ is one vector, on held-out texts, and what it does alone.

    Cost: four forward passes over the texts, seven with a readout.

    Args:
        lens: the adapter over the model.
        texts: strings, conversations, ids, or `Prompts`; at least two, of at least two tokens.
        readout: also measures how much of the adapter's effect on this readout the constants keep,
            at the end of each text; None for only the KL at every token.
        progress: show a bar.

    Raises:
        PromptError: a single text, a text of one token, or a text with which another one begins.
        UnsupportedAdapterError: the adapter changes norms.
        ArgumentError, TokenError: a readout that does not fit the model.
        NumericsError: an activation or a logit is not finite.
    """
    rows = lens.function(texts).prompts
    require_second_token(rows, "constants")
    if rows.batch < 2:
        raise PromptError("constants are measured on other texts than their own; give two or more.")
    require_own_tokens(rows)
    g: Evaluations | None = None
    if readout is not None:
        f = lens.function(rows, progress=progress)
        g = Evaluations(f.about(Readout.required(readout)))
    sums = update_sums(lens, rows, _apart(rows))
    constants = _Constants.of(lens, sums)
    # For each half, the constants of the other half.
    held_out = [_Constants.of(lens, sums, half).over(lens) for half in reversed(_HALVES)]
    by_kl = _by_kl(lens, rows, held_out, progress)
    ends = by_kl
    label = ConstantPart.BY_KL
    units = "nats"
    if g is not None:
        assert readout is not None
        ends = _by_readout(g, held_out)
        label = readout.label
        units = readout.units
    count = int(sums.counts.sum())
    return ConstantPart(
        share=held_out_share(sums.euclidean(), sums.squares, sums.counts),
        size=(sums.squares.sum(0) / count).sqrt(),
        mean_size=torch.stack([mean.norm() for mean in sums.means()]),
        first_size=sums.first.mean(0),
        base=ends.base,
        constant=ends.constant,
        adapted=ends.adapted,
        base_kl=by_kl.base,
        constant_kl=by_kl.constant,
        sites=lens.sites,
        vectors=constants.vectors,
        widths=constants.widths,
        steering=_steering(constants.over(lens)),
        readout=label,
        units=units,
        meta=lens.describe(rows),
    )


def _apart(rows: Prompts) -> Bool[Tensor, "text pos"]:
    """The tokens that count: those that no text of the other half has after the same tokens."""
    indices = range(rows.batch)
    is_apart = torch.zeros(rows.tokens.shape, dtype=torch.bool)
    for half, other_half in zip(_HALVES, reversed(_HALVES), strict=True):
        texts = rows.chosen(indices[half])
        others = rows.chosen(indices[other_half])
        is_shared = torch.isin(texts.marks(), others.marks())
        counted = texts.distinct() & ~is_shared
        is_apart[half, : counted.shape[1]] = counted
    return is_apart


# --- The constants as an adapter


class _Constants(NamedTuple):
    """A vector for each module, as its Hugging Face module writes it.

    Attributes:
        vectors: μ by module path.
        widths: the number of features that each module reads.
    """

    vectors: dict[str, Float[Tensor, " _out"]]
    widths: dict[str, int]

    @classmethod
    def of(cls, lens: LoraLens, sums: UpdateSums, half: slice | None = None) -> _Constants:
        """The means over all texts, or over one half of them.

        Sites that share a fused module fill their own rows of its vector.
        """
        vectors: dict[str, Tensor] = {}
        widths: dict[str, int] = {}
        for site_update, mean in zip(lens.updates, sums.means(half), strict=True):
            site = site_update.site
            key = site.path + site.key.removeprefix(site.module)
            widths[key] = site_update.linear.A.shape[1]
            if site.rows is None:
                vectors[key] = mean
                continue
            if key not in vectors:
                out = lens.adapter.modules[site.key].output_count(widths[key])
                vectors[key] = mean.new_zeros(out)
            vectors[key][site.rows] = mean
        return cls(
            {key: vector.to(lens.gate_dtype) for key, vector in vectors.items()},
            widths,
        )

    def over(self, lens: LoraLens) -> LoraLens:
        """The constants in place of the lens's adapter."""
        return lens.with_adapter(_adapter_of(self.vectors, self.widths))


def _adapter_of(vectors: Mapping[str, Float[Tensor, " out"]], widths: Mapping[str, int]) -> Adapter:
    """The adapter that adds these vectors."""
    return Adapter.constant(vectors, widths, name="constant part")


def _steering(lens: LoraLens) -> dict[str, Float[Tensor, " d"]]:
    """The vectors that a lens of constants adds at each hook point.

    They are in the model's basis, with the axis of heads flattened.
    """
    added: dict[str, Tensor] = {}
    for injection in lens.injections:
        zero = injection.map.A.new_zeros(1, 1, injection.map.width)
        vector = injection.map(zero).flatten().cpu()
        name = injection.ports.write
        if name in added:
            vector = vector + added[name]
        added[name] = vector
    return added


# --- What the constants do by themselves


class _Ends(NamedTuple):
    """A number for each text, in the base, with the constants alone, and in the adapted model."""

    base: Float[Tensor, " batch"]
    constant: Float[Tensor, " batch"]
    adapted: Float[Tensor, " batch"]


def _by_kl(lens: LoraLens, rows: Prompts, held_out: Sequence[LoraLens], progress: bool) -> _Ends:
    """Sum KL(adapted ‖ ·) over each text's tokens, for the base, the constants, and itself (0)."""
    base_kl = torch.zeros(rows.batch, dtype=torch.float64)
    constant_kl = torch.zeros(rows.batch, dtype=torch.float64)
    counted = rows.distinct()
    adapted = lens, lens.gates(1.0)
    base = lens, lens.gates(0.0)
    for half, constants in zip(_HALVES, held_out, strict=True):
        index = list(range(rows.batch)[half])
        others = [base, (constants, constants.gates(1.0))]
        divergences = text_divergences(
            adapted, others, rows.chosen(index), counted[index], progress=progress
        )
        base_kl[index] = divergences[0]
        constant_kl[index] = divergences[1]
    return _Ends(base_kl, constant_kl, torch.zeros_like(base_kl))


def _by_readout(g: Function, held_out: Sequence[LoraLens]) -> _Ends:
    """The readout of each text, with the constants of the half that the text is not in."""
    base, adapted = g.ends.cpu().double()
    constant = torch.empty_like(base)
    for half, constants in zip(_HALVES, held_out, strict=True):
        values = g.over(constants)(1.0)
        constant[half] = values[half].cpu().double()
    return _Ends(base, constant, adapted)
