"""What one forward pass is read for, under the hooks that are then on the model.

1. f or g at each row's last token, or at all tokens of a response (`read_logits`, `read_value`,
   `read_tokens`). Only what is read is unembedded, and of a readout of a few logits only their rows
   of W_U.
2. Derivatives of each token's ℓ, log p or a divergence: with c_t = ∂ℓ_t/∂x_t of the final residual
   stream x, once for all, the derivative along ẋ is c_t · ẋ_t, and c_t is what goes back from token
   t. No tangent or covector is unembedded (`token_covectors`), unless the model does more than
   unembed x.

Cost: one forward pass each.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lens_lora.compat import Temporary, hooks_of, own_forward, replace_forward
from lens_lora.model.hooks import unembed, unembedded_only, unrounded
from lens_lora.model.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.reading import PICKS, Columns, LogProbs, Picks, Reading, at_some

# What logits are multiplied by, at these places or, without places, all of them.
Factor = Callable[[Tensor, tuple[Tensor, ...]], Tensor]
_Unembedding = tuple[Tensor, Tensor | None]
_Final = Float[Tensor, "row *slot d"]


def read_logits(lens: LoraLens, prompts: Prompts) -> Float[Tensor, "row *slot vocab"]:
    """One forward pass under the hooks now on the model: logits at each row's last token.

    Rows that are read at several tokens have an axis of slots. Only what is read is unembedded. The
    result is float32 or better, as readouts need it.
    """
    unembedding = _plain_unembedding(lens)
    if unembedding is not None and unembedding[0].dtype != lens.gate_dtype:
        final = read_final(lens, prompts)
        return unembed(final.to(unembedding[0].device), *unembedding, lens.gate_dtype)
    with unembedded_only(lens.model, prompts.at_slots):
        logits = lens.run(prompts)
    return (logits[:, 0] if prompts.reads is None else logits).to(lens.gate_dtype)


def logits_dtype(lens: LoraLens) -> torch.dtype:
    """The dtype of the logits that are read: float32 or better, but where they pass a hook."""
    return lens.dtype if _plain_unembedding(lens) is None else lens.gate_dtype


def read_value(lens: LoraLens, reading: Reading) -> Float[Tensor, " batch"]:
    """One forward pass under the hooks now on the model: g, read at each row's last token or slots.

    For a readout of a few logits only their rows of W_U are used, and a sum over a response is
    computed a few tokens at a time, unless a hook is on the unembedding or the whole model, or
    something (a soft-cap) changes the logits after it.
    """
    read = reading.read
    if _plain_unembedding(lens) is None or not isinstance(read, Picks | Columns):
        return read(read_logits(lens, reading.prompts))
    return value_of_final(lens, read, read_final(lens, reading.prompts))


def value_of_final(
    lens: LoraLens, read: Picks | Columns, final: _Final, factor: Factor | None = None
) -> Float[Tensor, " batch"]:
    """g from the final residual stream, if only W_U and b_U come after it. No forward pass."""
    if isinstance(read, Picks):
        return read.of(terms_of_final(lens, read, final, factor))
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    ids, final = read.ids.to(weight.device), final.to(weight.device, lens.gate_dtype)
    few = torch.einsum("rd,rkd->rk", final, weight[ids].to(final))
    few = few if bias is None else few + bias[ids.to(bias.device)].to(final)
    return read.of(few if factor is None else few * factor(few, ()).gather(-1, ids))


def read_tokens(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch token"]:
    """One forward pass under the hooks now on the model: log p of each token of a response.

    Zero beyond a prompt's own tokens. The reading must be of one response a prompt.
    """
    read = cast(LogProbs, reading.read)
    if _plain_unembedding(lens) is None:
        return read.by_token(read.terms_in(read_logits(lens, reading.prompts)))
    return read.by_token(terms_of_final(lens, read, read_final(lens, reading.prompts)))


def terms_of_final(
    lens: LoraLens, read: Picks, final: _Final, factor: Factor | None = None
) -> Float[Tensor, " pick"]:
    """A few picks at a time; on the way back the logits of those are computed once more.

    Only where nothing but W_U and b_U comes after the final residual stream. No forward pass.
    """
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    places = read.places(final.device)
    picked = final[places].to(weight.device)

    def terms(residual: Tensor, picks: Tensor) -> Tensor:
        logits = unembed(residual, weight, bias, lens.gate_dtype)
        if factor is not None:
            logits = logits * factor(logits, at_some(places, picks))
        return read.terms(logits, picks)

    is_graphed = torch.is_grad_enabled()
    chunks = _picks(read).split(PICKS if is_graphed else 2 * PICKS)
    if len(chunks) > 1 and is_graphed:
        again = functools.partial(checkpoint, terms, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(picked[chunk], chunk) for chunk in chunks])
    return torch.cat([terms(picked[chunk], chunk) for chunk in chunks])


def logits_of_final(lens: LoraLens, final: _Final, out: Float[Tensor, "row *slot vocab"]) -> None:
    """The logits of all that is read, made some at a time, if the model `ends_plainly`."""
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    flat = final.flatten(0, -2)
    for chunk in torch.arange(len(flat), device="cpu").split(PICKS):
        places = torch.unravel_index(chunk, final.shape[:-1])
        logits = unembed(flat[chunk].to(weight.device), weight, bias, lens.gate_dtype)
        out[places] = logits.to(out.device)


def _picks(read: Picks) -> Int[Tensor, " pick"]:
    return torch.arange(len(read.rows), device="cpu")


def read_final(lens: LoraLens, prompts: Prompts) -> _Final:
    """One forward pass under the hooks now on the model: the unembedding's input where it is read.

    That is each row's last token, or its slots.
    """
    with _no_unembedding(lens):
        final = lens.run(prompts)
    return prompts.at_read(final) if prompts.reads is None else prompts.at_slots(final)


def token_covectors(
    lens: LoraLens, reading: Reading, final: _Final
) -> tuple[_Final, Float[Tensor, " pick"]]:
    """c_t = ∂ℓ_t/∂x_t, of the final residual stream x where it is read, and the ℓ_t themselves.

    Only of a model that `ends_plainly`. No forward pass.
    """
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    read, values = cast(Picks, reading.read), []
    covectors = torch.zeros_like(final, dtype=lens.gate_dtype)
    places, weights = read.places(final.device), read.weights.to(covectors)
    for chunk in _picks(read).split(PICKS):
        where = at_some(places, chunk)
        with torch.enable_grad():
            x = final.detach()[where].to(weight.device).requires_grad_()
            logits = unembed(x, weight, bias, lens.gate_dtype)
            terms = read.terms(logits, chunk)
            (slopes,) = torch.autograd.grad(terms.sum(), x)
        weighted = weights[chunk.to(weights.device), None] * slopes.to(covectors)
        covectors.index_put_(where, weighted, accumulate=True)
        values.append(terms.detach())
    return covectors, torch.cat(values)


def read_for_slopes(lens: LoraLens, reading: Reading) -> Float[Tensor, " batch"]:
    """As `read_value`, with first derivatives only.

    Of a long response each token is unembedded once, with its covector, where going back through
    `read_value` would compute its logits again.
    """
    read = reading.read
    if not isinstance(read, Picks) or len(read.rows) <= PICKS or not ends_plainly(lens):
        return read_value(lens, reading)
    final = read_final(lens, reading.prompts)
    covectors, terms = token_covectors(lens, reading, final)
    moved = covectors * (final - final.detach()).to(covectors)
    return read.of(terms) + reading.by_prompt(moved.flatten(1).sum(1))


def ends_plainly(lens: LoraLens) -> bool:
    """Whether the logits are x @ W_U + b_U of the final residual stream x and nothing else."""
    adapted = any(site.kind == "unembed" for site in lens.sites)
    return not adapted and _plain_unembedding(lens) is not None


def differentiable_tokens(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch token"]:
    """Numbers with the derivatives of each token's log p, which are all that they are for.

    One forward pass; what goes back from one number is not unembedded.
    """
    if not ends_plainly(lens):
        return read_tokens(lens, reading)
    final = read_final(lens, reading.prompts)
    covectors, _ = token_covectors(lens, reading, final)
    return (covectors * final.to(covectors)).sum(-1)


def _plain_unembedding(lens: LoraLens) -> _Unembedding | None:
    """(W_U, b_U) where the logits are final @ W_U + b_U and nothing else; None otherwise."""
    return None if _changes_logits(lens) else lens.plan.host.unembedding()


def _changes_logits(lens: LoraLens) -> bool:
    """Whether something on the unembedding, or a hook on the whole model, may change the logits."""
    whole = (lens.model, getattr(lens.model, "original_model", lens.model))
    parts = list(lens.model.unembed.modules())
    hooked = any(hooks_of(module).forward for module in (*whole, *parts))
    # Accelerate replaces the forward of a module.
    return hooked or any(hooks_of(m).before or own_forward(m) is not None for m in parts)


def _no_unembedding(lens: LoraLens) -> AbstractContextManager[None]:
    """Within the block, the model returns the unembedding's input instead of logits."""

    def residual_itself(residual: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return unrounded(residual)

    return Temporary(lambda span: replace_forward(span, lens.model.unembed, residual_itself))


def run_without_logits(lens: LoraLens, prompts: Prompts) -> None:
    """One forward pass under the hooks now on the model, for what hooks see of it.

    Nothing is unembedded, unless a hook (a site's own, too) is on the unembedding, or one on the
    whole model.
    """
    with contextlib.nullcontext() if _changes_logits(lens) else _no_unembedding(lens):
        lens.run(prompts)
