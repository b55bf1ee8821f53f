"""Reading f(ε) and g(ε) = readout(f(ε)) of the forward pass that is made.

1. One forward pass under the hooks that are on the model gives f or g at each row's last token, or
   at all tokens of a response (`read_logits`, `read_value`, `read_tokens`). Only what is read is
   unembedded, and of a readout of a few logits only their rows of W_U.
2. Derivatives of each token's ℓ, log p or a divergence: with c_t = ∂ℓ_t/∂x_t of the final residual
   stream x, once for all, the derivative along ẋ is c_t · ẋ_t, and c_t is what goes back from token
   t. No tangent or covector is unembedded (`token_covectors`), unless the model does more than
   unembed x.

Cost: one forward pass.
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

from lens_lora.compat import hooks_of, own_forward, replace_forward
from lens_lora.core.model import LoraLens, ScaleInject, attached
from lens_lora.core.model.unembedding import unembed, unembedded_only, unrounded
from lens_lora.core.readout.prompts import Prompts
from lens_lora.core.readout.reading import (
    PICKS,
    AtPoint,
    Columns,
    LogProbs,
    Picks,
    Reading,
    at_some,
)
from lens_lora.errors import ModelStateError
from lens_lora.spans import Temporary

# From logits and their places (no places for all logits) to the factor of each logit.
Factor = Callable[[Tensor, tuple[Tensor, ...]], Tensor]
_Unembedding = tuple[Tensor, Tensor | None]
_Final = Float[Tensor, "row *slot d"]


# --- f and g


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
    if prompts.reads is None:
        logits = logits[:, 0]
    return logits.to(lens.gate_dtype)


def gated_logits(
    lens: LoraLens, prompts: Prompts, gates: Float[Tensor, "*row site"]
) -> Float[Tensor, "row *slot vocab"]:
    """Run f(ε) and read it at the read position; gates [site], or [row, site]. One forward pass."""
    with lens.injected(ScaleInject(lens.plan, gates)):
        return read_logits(lens, prompts)


def logits_dtype(lens: LoraLens) -> torch.dtype:
    """The dtype in which logits are made: float32 or better, unless the model itself makes them."""
    is_made_by_model = _plain_unembedding(lens) is None
    return lens.dtype if is_made_by_model else lens.gate_dtype


def read_value(lens: LoraLens, reading: Reading) -> Float[Tensor, " batch"]:
    """One forward pass under the hooks now on the model: g, read at each row's last token or slots.

    A reading inside the model ends the pass at its hook point.

    For a readout of a few logits only their rows of W_U are used, and a sum over a response is
    computed a few tokens at a time, unless a hook is on the unembedding or the whole model, or
    something (a soft-cap) changes the logits after it.
    """
    read = reading.read
    if isinstance(read, AtPoint):
        return read(read_activation(lens, reading.rows, read.name))
    if _plain_unembedding(lens) is None or not isinstance(read, Picks | Columns):
        return read(read_logits(lens, reading.rows))
    return value_of_final(lens, read, read_final(lens, reading.rows))


def read_tokens(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch token"]:
    """One forward pass under the hooks now on the model: log p of each token of a response.

    Zero beyond a prompt's own tokens. The reading must be of one response a prompt.
    """
    read = cast(LogProbs, reading.read)
    if _plain_unembedding(lens) is None:
        terms = read.terms_in(read_logits(lens, reading.rows))
    else:
        terms = terms_of_final(lens, read, read_final(lens, reading.rows))
    return read.by_token(terms)


def read_for_slopes(lens: LoraLens, reading: Reading) -> Float[Tensor, " batch"]:
    """Read g as `read_value` does, with first derivatives only.

    Each token of a long response is unembedded once, with its covector, where going back through
    `read_value` would compute its logits again.
    """
    read = reading.read
    if not isinstance(read, Picks) or len(read.rows) <= PICKS or not ends_plainly(lens):
        return read_value(lens, reading)
    final = read_final(lens, reading.rows)
    covectors, terms = token_covectors(lens, reading, final)
    value = read.of(terms)
    # Σ c_t · (x_t − x_t) is zero, and has the derivatives of g.
    zero = (final - final.detach()).to(covectors)
    change = (covectors * zero).flatten(1).sum(1)
    return value + reading.by_prompt(change)


def differentiable_tokens(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch token"]:
    """Numbers whose derivatives are those of each token's log p; their values mean nothing.

    One forward pass; what goes back from one number is not unembedded.
    """
    if not ends_plainly(lens):
        return read_tokens(lens, reading)
    final = read_final(lens, reading.rows)
    covectors, _ = token_covectors(lens, reading, final)
    return (covectors * final.to(covectors)).sum(-1)


# --- From the final residual stream, where only W_U and b_U come after it


def read_final(lens: LoraLens, prompts: Prompts) -> _Final:
    """One forward pass under the hooks now on the model: the unembedding's input where it is read.

    That is each row's last token, or its slots.
    """
    with _no_unembedding(lens):
        final = lens.run(prompts)
    return prompts.at_read(final) if prompts.reads is None else prompts.at_slots(final)


def value_of_final(
    lens: LoraLens, read: Picks | Columns, final: _Final, factor: Factor | None = None
) -> Float[Tensor, " batch"]:
    """Read g from the final residual stream, if only W_U and b_U come after it. No forward pass."""
    if isinstance(read, Picks):
        return read.of(terms_of_final(lens, read, final, factor))
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    ids = read.ids.to(weight.device)
    final = final.to(weight.device, lens.gate_dtype)
    few_logits = torch.einsum("rd,rkd->rk", final, weight[ids].to(final))
    if bias is not None:
        few_logits = few_logits + bias[ids.to(bias.device)].to(final)
    if factor is not None:
        few_logits = few_logits * factor(few_logits, ()).gather(-1, ids)
    return read.of(few_logits)


def terms_of_final(
    lens: LoraLens, read: Picks, final: _Final, factor: Factor | None = None
) -> Float[Tensor, " pick"]:
    """The term of each pick, of a few picks at a time; going back computes their logits again.

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

    run = terms
    picks_at_once = 2 * PICKS
    if torch.is_grad_enabled():
        picks_at_once = PICKS
        if len(read.rows) > PICKS:
            run = functools.partial(
                checkpoint, terms, use_reentrant=False, preserve_rng_state=False
            )
    chunks = _picks(read).split(picks_at_once)
    return torch.cat([run(picked[chunk], chunk) for chunk in chunks])


def logits_of_final(lens: LoraLens, final: _Final, out: Float[Tensor, "row *slot vocab"]) -> None:
    """The logits of all that is read, made some at a time, if the model `ends_plainly`."""
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    flat = final.flatten(0, -2)
    for chunk in torch.arange(len(flat), device="cpu").split(PICKS):
        places = torch.unravel_index(chunk, final.shape[:-1])
        logits = unembed(flat[chunk].to(weight.device), weight, bias, lens.gate_dtype)
        out[places] = logits.to(out.device)


def token_covectors(
    lens: LoraLens, reading: Reading, final: _Final
) -> tuple[_Final, Float[Tensor, " pick"]]:
    """Return c_t = ∂ℓ_t/∂x_t, with x the final residual stream where it is read, and the ℓ_t.

    Only of a model that `ends_plainly`. No forward pass.
    """
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    read = cast(Picks, reading.read)
    covectors = torch.zeros_like(final, dtype=lens.gate_dtype)
    weights = read.weights.to(covectors)
    places = read.places(final.device)
    values: list[Tensor] = []
    for chunk in _picks(read).split(PICKS):
        where = at_some(places, chunk)
        with torch.enable_grad():
            x = final.detach()[where].to(weight.device).requires_grad_()
            terms = read.terms(unembed(x, weight, bias, lens.gate_dtype), chunk)
            (slopes,) = torch.autograd.grad(terms.sum(), x)
        weighted = weights[chunk.to(weights.device), None] * slopes.to(covectors)
        covectors.index_put_(where, weighted, accumulate=True)
        values.append(terms.detach())
    return covectors, torch.cat(values)


def _picks(read: Picks) -> Int[Tensor, " pick"]:
    return torch.arange(len(read.rows), device="cpu")


# --- How the model ends


def ends_plainly(lens: LoraLens) -> bool:
    """Whether the logits are x @ W_U + b_U of the final residual stream x and nothing else."""
    is_adapted = any(site.kind == "unembed" for site in lens.sites)
    return not is_adapted and _plain_unembedding(lens) is not None


def _plain_unembedding(lens: LoraLens) -> _Unembedding | None:
    """(W_U, b_U) where the logits are final @ W_U + b_U and nothing else; None otherwise."""
    return None if _changes_logits(lens) else lens.host.unembedding()


def _changes_logits(lens: LoraLens) -> bool:
    """Whether something on the unembedding, or a hook on the whole model, may change the logits."""
    whole_model = (lens.model, getattr(lens.model, "original_model", lens.model))
    parts = list(lens.model.unembed.modules())
    if any(hooks_of(module).forward for module in (*whole_model, *parts)):
        return True
    # Accelerate replaces the forward of a module.
    return any(hooks_of(part).before or own_forward(part) is not None for part in parts)


def _no_unembedding(lens: LoraLens) -> AbstractContextManager[None]:
    """Within the block, the model returns the unembedding's input instead of logits."""

    def residual_itself(residual: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args, kwargs
        return unrounded(residual)

    return Temporary(lambda span: replace_forward(span, lens.model.unembed, residual_itself))


# --- Passes without logits


def run_without_logits(lens: LoraLens, prompts: Prompts) -> None:
    """One forward pass under the hooks now on the model, for what hooks see of it.

    Nothing is unembedded, unless a hook (a site's own, too) is on the unembedding, or one on the
    whole model.
    """
    unembedding = _no_unembedding(lens)
    if _changes_logits(lens):
        unembedding = contextlib.nullcontext()
    with unembedding:
        lens.run(prompts)


class _Reached(Exception):
    """The pass has come to the hook point that is read, and need not go on."""


def read_activation(lens: LoraLens, prompts: Prompts, name: str) -> Float[Tensor, "row pos *d"]:
    """The activation at a hook point that fires once, in float32 or better.

    The forward pass, under the hooks now on the model, ends there. It goes on to its end where
    accelerate moves weights, as these are put back only after a module has run.

    Raises:
        ModelStateError: nothing passes this point.
    """
    may_end = not any(own_forward(module) is not None for module in lens.model.modules())
    seen: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:
        del hook
        # A block that runs again on the way back comes here once more, and is to go on.
        is_first = not seen
        seen.append(activation)
        if may_end and is_first:
            raise _Reached

    with contextlib.suppress(_Reached), attached(lens.model, [(name, keep)]):
        run_without_logits(lens, prompts)
    if not seen:
        raise ModelStateError(
            f"{name}: no activation passes this hook point in a forward pass",
            remedy="name another point; lens.model.hook_dict has all names.",
        )
    return seen[0].to(lens.gate_dtype)
