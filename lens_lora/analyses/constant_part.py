"""How much of an adapter is a constant, whatever the input: a steering vector for each module.

    δ_lt = μ_l + (δ_lt − μ_l),     share_l = 1 − Σ‖δ_lt − μ̂_l‖² / Σ‖δ_lt‖²

1. u of every site and token in one forward pass of the adapted model, so that δ is that of the
   Hugging Face modules (`engine/update_sums.py`).
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

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.trained import ModuleUpdate
from lens_lora.engine.asked import Asked, ask_prompts
from lens_lora.engine.divergences import text_divergences
from lens_lora.engine.function import gated_readout
from lens_lora.engine.texts import (
    distinct_tokens,
    require_own_tokens,
    require_second_token,
    unshared,
)
from lens_lora.engine.update_sums import UpdateSums, update_sums
from lens_lora.errors import PromptError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.basis import Update
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts, PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results.constancy import held_out_share
from lens_lora.results.constant_part import ConstantPart, constants

__all__ = ["constant_part"]

_HALVES = (slice(0, None, 2), slice(1, None, 2))


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
    about = None if readout is None else asked.about(readout)
    sums = update_sums(lens, rows, _apart(rows))
    vectors, widths = _by_module(lens, sums)
    others = [lens.with_adapter(constants(*_by_module(lens, sums, half))) for half in _HALVES]
    of = _by_kl if about is None else _by_readout
    base, constant, adapted = of(about or asked, others, progress)
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
        steering=_steering(lens.with_adapter(constants(vectors, widths))),
        readout="KL(adapted ‖ ·)" if readout is None else readout.label,
        units="nats" if readout is None else readout.units,
        meta=lens.describe(),
    )


def _apart(rows: Prompts) -> Bool[Tensor, "text pos"]:
    """The tokens of each half that no text of the other has after the same ones."""
    halves = [rows.chosen(range(rows.batch)[half]) for half in _HALVES]
    found = torch.zeros(rows.tokens.shape, dtype=torch.bool)
    for half, own, other in zip(_HALVES, halves, halves[::-1], strict=True):
        kept = unshared(own, other)
        found[half, : kept.shape[1]] = kept
    return found


Ends = tuple[Float[Tensor, "batch"], Float[Tensor, "batch"], Float[Tensor, "batch"]]


def _by_kl(asked: Asked, others: list[LoraLens], progress: bool) -> Ends:
    """Of base, constant and adapted model, Σ_t KL of the adapted from it."""
    lens, rows = asked.lens, asked.prompts
    found, counted = torch.zeros(2, rows.batch, dtype=torch.float64), distinct_tokens(rows)
    for start, other in zip((1, 0), others, strict=True):
        held_out = list(range(start, rows.batch, 2))
        both = [(lens, lens.gates(0.0)), (other, other.gates(1.0))]
        reference = (lens, lens.gates(1.0))
        some, own = rows.chosen(held_out), counted[held_out]
        found[:, held_out] = text_divergences(reference, both, some, own, progress=progress)
    return found[0], found[1], torch.zeros_like(found[0])


def _by_readout(asked: Asked, others: list[LoraLens], progress: bool) -> Ends:
    """g of base, constant and adapted model; each text by the constants of the other half."""
    base, adapted = (end.cpu().double() for end in asked.ends)
    constant = torch.empty_like(base)
    for start, other in zip((1, 0), others, strict=True):
        gates = other.gates(1.0)[None]
        values = gated_readout(other, asked.reading, gates, progress=progress)
        constant[start::2] = values[start::2, 0].cpu().double()
    return base, constant, adapted


def _by_module(
    lens: LoraLens, sums: UpdateSums, half: slice | None = None
) -> tuple[dict[str, Float[Tensor, "out"]], dict[str, int]]:
    """μ of each module as its Hugging Face module writes it, and the width that it reads."""
    vectors: dict[str, Tensor] = {}
    widths: dict[str, int] = {}
    for one, mean in zip(lens.plan.updates, sums.means(half), strict=True):
        site = one.site
        key = site.path + (f"@{site.adapter}" if site.adapter else "")
        rows = slice(None) if site.rows is None else site.rows
        out = len(mean) if site.rows is None else _out(lens.adapter.modules[key])
        vectors.setdefault(key, mean.new_zeros(out))[rows] = mean
        widths[key] = cast(Update, one.update).A.shape[1]
    dtype = lens.gate_dtype
    return {key: vector.to(dtype) for key, vector in vectors.items()}, widths


def _out(update: ModuleUpdate) -> int:
    """The output features of a fused module."""
    held = update.B if isinstance(update, LoRAFactors) else update.weight
    return 0 if held is None else len(held)


def _steering(lens: LoraLens) -> dict[str, Float[Tensor, "d"]]:
    """What a lens of constants adds at each hook point, in the model's basis, heads laid flat."""
    found: dict[str, Tensor] = {}
    for injection in lens.plan.injections:
        zero = injection.map.A.new_zeros(1, 1, injection.map.width)
        added = injection.map(zero).flatten().cpu()
        name = injection.ports.write
        found[name] = found[name] + added if name in found else added
    return found
