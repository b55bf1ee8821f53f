"""What did this fine-tune change? Texts that have nothing to do with it, and nothing asked.

1. Base and adapted model read the same texts (`readouts/neutral.py`, or the caller's). Every number
   is over the tokens after each text's first, which is a sink; a token with the same tokens before
   it as in an earlier text counts once.
2. Where KL is largest; which tokens are promoted in the mean, by logits and by probability; what
   the mean Δh on the first tokens reads as through the unembedding (arXiv 2510.13900), and which
   blocks add it; how much of Δh is one vector (arXiv 2507.08218); which sites hold the KL's
   quadratic part.
3. The same of null adapters, of the same sizes in random directions, and of unrelated adapters: a
   finding means what it says as far as it exceeds theirs.

Nothing is tested for significance: controls are few, and say how large a chance finding is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.random_directions import null_adapter
from lens_lora.analyses.null_test import fused_parts
from lens_lora.arguments import whole
from lens_lora.engine.asked import ask_prompts
from lens_lora.engine.final_reading import read_through
from lens_lora.engine.text_changes import EARLY, TextSums, text_sums
from lens_lora.engine.texts import distinct_tokens, require_second_token
from lens_lora.errors import ArgumentError
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens
from lens_lora.readouts.neutral import neutral_texts
from lens_lora.readouts.prompts import Prompts, PromptsLike
from lens_lora.results.constancy import held_out_share
from lens_lora.results.what_changed import Changes, WhatChanged

__all__ = ["what_changed"]


@alone
def what_changed(
    lens: LoraLens,
    texts: PromptsLike | None = None,
    unrelated: Adapter | Sequence[Adapter] = (),
    *,
    nulls: int = 2,
    seed: int = 0,
    split: bool = True,
    progress: bool = True,
) -> WhatChanged:
    """What the adapter changes over texts that have nothing to do with it, beside controls.

    Cost: two forward passes over the texts and about five for the split by site; one for each
    control. No logits of more than 512 tokens are held at a time.

    Args:
        lens: the adapter over the model.
        texts: strings, conversations, ids, or `Prompts`, of two tokens at least; None for a hundred
            plain sentences and ten openings of conversations that come with the package.
        unrelated: adapters that were trained for something else.
        nulls: how many null adapters.
        seed: of their random directions, as for `null_adapter`.
        split: whether to split the quadratic KL by site.
        progress: show a bar.

    Raises:
        ArgumentError: `unrelated` is no adapter, or `nulls` below 0.
        PromptError: a text of one token, or one that does not fit the model.
        UnsupportedAdapterError: null adapters of DoRA or of trained modules; use nulls=0, or make
            the change plain as the message says.
        ModelStateError: for the split, an operation without a forward-mode derivative.
        NumericsError: non-finite logits or derivatives.
    """
    others = [unrelated] if isinstance(unrelated, Adapter) else list(unrelated)
    if not all(isinstance(other, Adapter) for other in others):
        raise ArgumentError("unrelated: expected an ll.Adapter, or several.")
    asked = ask_prompts(lens, neutral_texts(lens.model) if texts is None else texts)
    rows = asked.prompts
    require_second_token(rows, "every number")
    parts = fused_parts(lens)
    draws = range(whole("nulls", nulls, 0))
    random = [null_adapter(lens.adapter, seed, draw, parts=parts) for draw in draws]
    lenses = [lens, *(lens.with_adapter(other) for other in (*random, *others))]
    sums, shares = text_sums(lenses, rows, split=split, progress=progress)
    found, *controls = (_changes(one, rows) for one in sums)
    return WhatChanged(
        found=found,
        nulls=tuple(controls[: len(random)]),
        unrelated=tuple(controls[len(random) :]),
        sites=lens.sites,
        shares=(shares / int(distinct_tokens(rows).sum())).cpu(),
        strings=lens.vocabulary,
        str_tokens=asked.str_tokens,
        texts=_described(rows, texts is None),
        meta=lens.describe(),
    )


def _described(rows: Prompts, ours: bool) -> str:
    what = "neutral texts that come with lens_lora" if ours else "texts of the caller"
    return (
        f"{rows.batch} {what}, {int(distinct_tokens(rows).sum())} distinct tokens after first ones"
    )


def _changes(sums: TextSums, rows: Prompts) -> Changes:
    counted = distinct_tokens(rows)
    counts, early = counted.sum(1), int(counted[:, 1 : 1 + EARLY].sum())
    mean = {name: value / early for name, value in sums.early.items()}
    stream = sums.points.stream
    constant = held_out_share(sums.stream, sums.squares, counts).tolist()
    return Changes(
        name=sums.lens.adapter.name,
        kl=sums.kl,
        logit=_centred(sums.logits / int(counts.sum())),
        probability=(sums.probabilities / int(counts.sum())).float().cpu(),
        readings={
            name: _centred(read_through(sums.lens, value / early).double())
            for name, value in sums.read.items()
        },
        early_size={name: float(mean[name].norm()) for name in stream},
        writers=_writers(mean, stream[-1], sums.points.writers),
        constant=dict(zip(stream, constant, strict=True)),
        places=sums.places,
        place_ids=sums.place_ids,
        place_changes=sums.place_changes,
    )


def _writers(
    mean: dict[str, Float[Tensor, "d"]], last: str, names: Sequence[str]
) -> dict[str, float]:
    whole_shift = mean[last]
    size = whole_shift.square().sum()
    found = {name: float(mean[name] @ whole_shift / size) for name in names}
    return {**found, "rest": 1.0 - sum(found.values())}


def _centred(values: Float[Tensor, "vocab"]) -> Float[Tensor, "vocab"]:
    return (values - values.mean()).to(torch.float32).cpu()
