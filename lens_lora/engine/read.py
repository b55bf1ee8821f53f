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
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lens_lora.hooked.unembedded import unembed, unembedded_only, unrounded
from lens_lora.lens import LoraLens
from lens_lora.readouts.picks import PICKS, Columns, LogProbs, Picks, at_some
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.rows import Reading
from lens_lora.temporary import Temporary

__all__ = [
    "Move",
    "differentiable_tokens",
    "ends_plainly",
    "logits_dtype",
    "logits_of_final",
    "read_final",
    "read_for_slopes",
    "read_logits",
    "read_tokens",
    "read_value",
    "run_without_logits",
    "terms_of_final",
    "token_covectors",
]

Move = Callable[[Tensor, tuple[Tensor, ...]], Tensor]
_Unembedding = tuple[Tensor, Tensor | None]


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
    """In which the logits that are read are rounded: float32 or better but where they pass a hook.

    Args:
        lens: the adapter over the model.
    """
    return lens.dtype if _plain_unembedding(lens) is None else lens.gate_dtype


def read_value(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch"]:
    """One forward pass under the hooks now on the model: g, read at each row's last token or slots.

    For a readout of a few logits only their rows of W_U are used, and a sum over a response is
    computed a few tokens at a time, unless a hook is on the unembedding or the whole model, or
    something (a soft-cap) changes the logits after it.
    """
    if isinstance(reading.read, Picks):
        return reading.read.of(_terms(lens, reading.prompts, reading.read))
    unembedding = _plain_unembedding(lens)
    if unembedding is None or not isinstance(reading.read, Columns):
        return reading.read(read_logits(lens, reading.prompts))
    weight, bias = unembedding
    with _no_unembedding(lens):
        final = reading.prompts.at_read(lens.run(reading.prompts))
    ids, final = reading.read.ids.to(weight.device), final.to(lens.gate_dtype)
    few = torch.einsum("rd,rkd->rk", final, weight[ids].to(final))
    few = few if bias is None else few + bias[ids.to(bias.device)].to(final)
    return reading.read.of(few)


def read_tokens(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch token"]:
    """One forward pass under the hooks now on the model: log p of each token of a response.

    Zero beyond a prompt's own tokens. The reading must be of one response a prompt.
    """
    read = cast(LogProbs, reading.read)
    return read.by_token(_terms(lens, reading.prompts, read))


def _terms(lens: LoraLens, prompts: Prompts, read: Picks) -> Float[Tensor, "pick"]:
    if _plain_unembedding(lens) is not None:
        return terms_of_final(lens, read, read_final(lens, prompts))
    logits = read_logits(lens, prompts)
    return read.terms(logits[read.places(logits.device)], _every(read))


def terms_of_final(
    lens: LoraLens, read: Picks, final: Float[Tensor, "row *slot d"], move: Move | None = None
) -> Float[Tensor, "pick"]:
    """A few picks at a time; on the way back the logits of those are computed once more.

    No forward pass.

    Args:
        lens: over a model of whose logits nothing but W_U and b_U is on, under the present hooks.
        read: what is read.
        final: the residual stream where it is read.
        move: of logits, and of the places that they are at.
    """
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    places = read.places(final.device)
    picked = final[places].to(weight.device)

    def of_some(residual: Tensor, some: Tensor) -> Tensor:
        logits = unembed(residual, weight, bias, lens.gate_dtype)
        return read.terms(logits if move is None else move(logits, at_some(places, some)), some)

    is_graphed = torch.is_grad_enabled()
    chunks = _every(read).split(PICKS if is_graphed else 2 * PICKS)
    again = len(chunks) > 1 and is_graphed
    found = [
        checkpoint(of_some, picked[some], some, use_reentrant=False, preserve_rng_state=False)
        if again
        else of_some(picked[some], some)
        for some in chunks
    ]
    return torch.cat(found)


def logits_of_final(
    lens: LoraLens, final: Float[Tensor, "row *slot d"], out: Float[Tensor, "row *slot vocab"]
) -> None:
    """The logits of all that is read, made some at a time. No forward pass.

    Args:
        lens: over a model that `ends_plainly`.
        final: the residual stream where it is read.
        out: where they go.
    """
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    flat = final.flatten(0, -2)
    for some in torch.arange(len(flat), device="cpu").split(PICKS):
        places = torch.unravel_index(some, final.shape[:-1])
        logits = unembed(flat[some].to(weight.device), weight, bias, lens.gate_dtype)
        out[places] = logits.to(out.device)


def _every(read: Picks) -> Int[Tensor, "pick"]:
    return torch.arange(len(read.rows), device="cpu")


def read_final(lens: LoraLens, prompts: Prompts) -> Float[Tensor, "row *slot d"]:
    """One forward pass under the hooks now on the model: the unembedding's input where it is read.

    That is each row's last token, or its slots.
    """
    with _no_unembedding(lens):
        final = lens.run(prompts)
    return prompts.at_read(final) if prompts.reads is None else prompts.at_slots(final)


def token_covectors(
    lens: LoraLens, reading: Reading, final: Float[Tensor, "row *slot d"]
) -> tuple[Float[Tensor, "row *slot d"], Float[Tensor, "pick"]]:
    """c_t = ∂ℓ_t/∂x_t, of the final residual stream x where it is read, and the ℓ_t themselves.

    No forward pass.

    Args:
        lens: over a model that `ends_plainly`.
        reading: a sum of terms ℓ_t, such as log p of each token of a response.
        final: x.
    """
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    read, found = cast(Picks, reading.read), []
    covectors = torch.zeros_like(final, dtype=lens.gate_dtype)
    places, weights = read.places(final.device), read.weights.to(covectors)
    for some in _every(read).split(PICKS):
        where = at_some(places, some)
        with torch.enable_grad():
            x = final.detach()[where].to(weight.device).requires_grad_()
            logits = unembed(x, weight, bias, lens.gate_dtype)
            terms = read.terms(logits, some)
            (slopes,) = torch.autograd.grad(terms.sum(), x)
        weighted = weights[some.to(weights.device), None] * slopes.to(covectors)
        covectors.index_put_(where, weighted, accumulate=True)
        found.append(terms.detach())
    return covectors, torch.cat(found)


def read_for_slopes(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch"]:
    """As `read_value`, with first derivatives only.

    Of a long response each token is unembedded once, with its covector, where going back through
    `read_value` would compute its logits again.
    """
    read = reading.read
    if not isinstance(read, Picks) or len(read.rows) <= PICKS or not ends_plainly(lens):
        return read_value(lens, reading)
    at = read_final(lens, reading.prompts)
    covectors, terms = token_covectors(lens, reading, at)
    moved = covectors * (at - at.detach()).to(covectors)
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
    hooked = any(module._forward_hooks for module in whole)
    return hooked or any(map(_is_changed, lens.model.unembed.modules()))


def _is_changed(module: torch.nn.Module) -> bool:
    """Whether the module has hooks, or a replaced forward (accelerate does that)."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def _no_unembedding(lens: LoraLens) -> AbstractContextManager[None]:
    """Within the block, the model returns the unembedding's input instead of logits."""
    # A Bridge's component passes attributes on to the module that it wraps; its own dict it keeps.
    own = vars(lens.model.unembed)

    def replace(span: Temporary) -> None:
        span.way_back(lambda: own.pop("forward", None))
        own["forward"] = lambda residual, *args, **kwargs: unrounded(residual)

    return Temporary(replace)


def run_without_logits(lens: LoraLens, prompts: Prompts) -> None:
    """One forward pass under the hooks now on the model, for what hooks see of it.

    Nothing is unembedded, unless a hook (a site's own, too) is on the unembedding, or one on the
    whole model.
    """
    with contextlib.nullcontext() if _changes_logits(lens) else _no_unembedding(lens):
        lens.run(prompts)
