"""`scale_intruders` measures what scaled intruders do to the taught behaviour and ordinary text.

The intruders of an adapter are scaled by a factor c, and the whole adapter by the same factor for
comparison (`directions/intruders.py`). For each of the two and each c there are

    share   Σ_p s_p (g_p(c) − g_p(0)) / Σ_p |g_p(1) − g_p(0)|    of the taught behaviour, with s_p
            the sign of prompt p's shift: 1 with the adapter unchanged, 0 with the base model;
    KL      Σ_t KL(base ‖ scaled) / tokens                       on texts about other things;
    loss    Σ_t −log p(y_t) / tokens, minus that of the base     on these texts: the forgetting.

Every way of weakening an adapter lowers both the share and the KL. So the KL is to be compared with
that of the whole adapter, scaled down to the same share.

Cost: the SVDs of `intruders`; a forward pass of the prompts and one of the texts for each factor,
twice, and one of each for the base.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple, final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.arguments import numbers_of
from lens_lora.core import (
    Evaluations,
    LoraLens,
    Pictured,
    Prompts,
    PromptsLike,
    Read,
    Readout,
    alone,
    tables,
)
from lens_lora.directions.intruders import intruders
from lens_lora.directions.losses import PredictedTokens, texts_or_neutral
from lens_lora.errors import ArgumentError
from lens_lora.texts.batches import (
    TOKENS_AT_ONCE,
    Gated,
    logits_of,
    over_texts,
    require_second_token,
)

# The two things that are scaled, along the first axis of a result.
SCALED = ("intruders", "whole adapter")


@final
class ScaledIntruders(Read, Pictured):
    """The effects of scaling the intruders, and of scaling the whole adapter by the same factors.

    `plot` shows the KL on ordinary text over the share of the behaviour that is kept.

    Attributes:
        scales: the factors, the smallest first.
        count: the number of intruders.
        base, adapted: [batch], g with the base model and with the unchanged adapter.
        values: [what, scale, batch], g with the intruders scaled, and with the whole adapter.
        base_loss: [text], the mean of −log p(y_t) of the base, in nats per token after the first.
        loss: [what, scale, text], the same with the intruders, or the whole adapter, scaled.
        kl: [what, scale, text], the mean of KL(base ‖ scaled), in nats per token.
        tokens: [text], the number of tokens that the means are over.
        str_tokens, readout, units, meta: see `Read`.
    """

    scales: Annotated[tuple[float, ...], "scale"]
    count: int
    base: Float[Tensor, " batch"]
    adapted: Float[Tensor, " batch"]
    values: Float[Tensor, "what=2 scale batch"]
    base_loss: Float[Tensor, " text"]
    loss: Float[Tensor, "what=2 scale text"]
    kl: Float[Tensor, "what=2 scale text"]
    tokens: Int[Tensor, " text"]

    @property
    def share(self) -> Float[Tensor, "what scale"]:
        """The share of the taught behaviour that is kept: 1 as with the adapter, 0 as without."""
        shift = (self.adapted - self.base).double()
        along = (self.values - self.base).double() * shift.sign()
        return along.sum(2) / shift.abs().sum()

    @property
    def mean_kl(self) -> Float[Tensor, "what scale"]:
        """KL(base ‖ scaled) in nats per token, over all texts."""
        return self._over_texts(self.kl)

    @property
    def forgetting(self) -> Float[Tensor, "what scale"]:
        """The rise of the base's loss in nats per token, over all texts."""
        return self._over_texts(self.loss - self.base_loss)

    @property
    def whole_at_same_share(self) -> Float[Tensor, " scale"]:
        """The KL of the whole adapter, scaled down until it keeps the same share.

        It is interpolated between the factors that were tried and the base, which keeps nothing and
        has a KL of 0. NaN if the whole adapter keeps that share nowhere between them.
        """
        shares, shares_of_whole = self.share.tolist()
        _, kl_of_whole = self.mean_kl.tolist()
        path = [(0.0, 0.0), *zip(shares_of_whole, kl_of_whole, strict=True)]
        return torch.tensor([_interpolated(path, share) for share in shares]).double()

    def _over_texts(self, means: Float[Tensor, "what scale text"]) -> Float[Tensor, "what scale"]:
        weights = self.tokens.double()
        return (means.double() * weights).sum(2) / weights.sum()

    def to_frame(self) -> pd.DataFrame:
        """One row for intruders or whole adapter and each factor: value, share, KL, forgetting.

        The value is the mean of g over prompts.
        """
        numbers = {
            "value": self.values.double().mean(2),
            "share": self.share,
            "kl": self.mean_kl,
            "forgetting": self.forgetting,
        }
        return tables.long_table(numbers, {"scaled": SCALED}, {"scale": self.scales})


def _interpolated(path: Sequence[tuple[float, float]], share: float) -> float:
    """The KL at the first place on a path of (share, KL) at which this share is kept."""
    for (before, kl_before), (after, kl_after) in itertools.pairwise(path):
        if min(before, after) <= share <= max(before, after):
            if before == after:
                return kl_after
            weight = (share - before) / (after - before)
            return kl_before + weight * (kl_after - kl_before)
    return math.nan


@alone
def scale_intruders(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    scales: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    k: int = 10,
    threshold: float = 0.5,
    sites: str | Sequence[str] | None = None,
    texts: PromptsLike | None = None,
    progress: bool = True,
) -> ScaledIntruders:
    """Scale an adapter's intruders, and measure the taught behaviour and ordinary text.

    `ll.intruders(lens, k, threshold).adapter(scale)` is the adapter that this measures.

    Cost: two dense SVDs for each site; a forward pass of the prompts, and one of the texts, for
    each factor, twice, and one of each for the base.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`, that ask for the taught behaviour.
        readout: the number that measures the behaviour, in the logits or inside the model.
        scales: the factors; 0 removes the intruders, and 1 leaves them.
        k, threshold, sites: the choice of intruders, as for `ll.intruders`.
        texts: texts about other things, of at least two tokens each; None for an eighth of the
            package's neutral texts.
        progress: show a bar.

    Raises:
        ArgumentError: there are no scales, or one is below 0; the adapter is a sum of adapters.
        AdapterError: the update of a module with intruders is not a product of factors.
        SiteError: a name matches no site, or no site has a weight.
        ModelStateError: the model is processed or quantised and the lens has no `hf_model`.
        TokenError, PromptError: a readout, prompt or text does not fit the model.
        NumericsError: a logit is not finite.
    """
    factors = _factors(scales)
    f = lens.function(prompts, progress=progress)
    g = Evaluations(f.about(Readout.required(readout)))
    rows = lens.function(texts_or_neutral(lens, texts)).prompts
    require_second_token(rows, "the loss")
    its_intruders = intruders(lens, k, threshold, sites=sites, progress=progress)
    adapters = [its_intruders.adapter(factor) for factor in factors]
    # For a readout inside the model these are the modules before its point.
    moving = list(g.lens.adapter.modules)
    with_intruders_scaled: list[Tensor] = []
    for adapter in adapters:
        of_readout = lens.with_adapter(adapter.only(*moving))
        with_intruders_scaled.append(g.over(of_readout)(1.0))
    with_whole_scaled = g.along(factors)
    base, adapted = g.ends
    lenses = [lens.with_adapter(adapter) for adapter in adapters]
    models: list[Gated] = [(scaled, scaled.gates(1.0)) for scaled in lenses]
    models += [(lens, lens.gates(factor)) for factor in factors]
    sums = _on_texts(lens, models, rows, progress=progress)
    tokens = (rows.lengths - 1).cpu()
    shape = len(SCALED), len(factors)
    return ScaledIntruders(
        scales=tuple(factors),
        count=int(its_intruders.counts.sum()),
        base=base,
        adapted=adapted,
        values=torch.stack([torch.stack(with_intruders_scaled), with_whole_scaled]),
        base_loss=sums.base_loss / tokens,
        loss=(sums.loss / tokens).unflatten(0, shape),
        kl=(sums.kl / tokens).unflatten(0, shape),
        tokens=tokens,
        **g.labels(),
    )


def _factors(scales: Sequence[float]) -> list[float]:
    """The factors in order, the smallest first.

    Raises:
        ArgumentError: there are no factors, or one is below 0.
    """
    factors = sorted(numbers_of("scales", scales))
    if not factors or factors[0] < 0:
        raise ArgumentError(
            f"scales={scales!r}: expected factors of at least 0", remedy="write (0, 0.5, 1), say."
        )
    return factors


class _TextSums(NamedTuple):
    """Sums over the tokens of each text after its first, in nats.

    Attributes:
        base_loss: Σ_t −log p(y_t) of the base.
        loss: the same of each model.
        kl: Σ_t KL(base ‖ model).
    """

    base_loss: Float[Tensor, " text"]
    loss: Float[Tensor, "model text"]
    kl: Float[Tensor, "model text"]


def _on_texts(
    lens: LoraLens, models: Sequence[Gated], texts: Prompts, *, progress: bool
) -> _TextSums:
    """The loss of the base and of each model on texts, and their KL. One forward pass each."""
    base_loss = torch.zeros(texts.batch, dtype=torch.float64)
    loss = torch.zeros(len(models), texts.batch, dtype=torch.float64)
    kl = torch.zeros_like(loss)
    base_model = lens, lens.gates(0.0)

    def visit(index: list[int], rows: Prompts) -> None:
        predicted = PredictedTokens.of(rows)
        base = logits_of(base_model, rows)
        p = base.softmax(-1)
        base_loss[index] = predicted.loss(base)
        for row, model in enumerate(models):
            logits = logits_of(model, rows)
            loss[row, index] = predicted.loss(logits)
            kl[row, index] = predicted.divergence(base, p, logits)

    over_texts(lens, texts, TOKENS_AT_ONCE, visit, "ordinary text", progress)
    return _TextSums(base_loss, loss, kl)
