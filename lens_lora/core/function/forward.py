"""Run one forward pass, and read f(ε) or g(ε) = readout(f(ε)) from it.

1. The pass runs under the hooks that are on the model, and is read at each row's last token, or at
   all tokens of a response (`read_logits`, `read_value`, `read_tokens`). Only what is read is
   unembedded; a readout of a few logits uses only their rows of W_U.
2. For a long response, let ℓ_t be the term of token t, a log-probability or a divergence, and c_t =
   ∂ℓ_t/∂x_t its gradient in the final residual stream x. The c_t are computed once
   (`token_covectors`). The derivative of ℓ_t along ẋ is then c_t · ẋ_t, and a backward pass from
   token t begins with c_t, so no tangent and no covector is unembedded. This holds only if the
   model does nothing but unembed x (`ends_plainly`).

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
from lens_lora.core.model.unembedding import Unembedding, unembedded_only, unrounded
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

# Maps logits and their places (no places: all of them) to a factor for each logit.
Factor = Callable[[Tensor, tuple[Tensor, ...]], Tensor]
_Final = Float[Tensor, "row *slot d"]


# --- f and g


def read_logits(lens: LoraLens, prompts: Prompts) -> Float[Tensor, "row *slot vocab"]:
    """Run one forward pass under the hooks on the model, and read the logits.

    They are read at each row's last token, or with an axis of slots at several tokens. Only what is
    read is unembedded. The result is float32 or better, as readouts need.
    """
    unembedding = _plain_unembedding(lens)
    if unembedding is not None and unembedding.weight.dtype != lens.gate_dtype:
        final = read_final(lens, prompts)
        return unembedding.logits(final, lens.gate_dtype)
    with unembedded_only(lens.model, prompts.at_slots):
        logits = lens.run(prompts)
    if prompts.reads is None:
        logits = logits[:, 0]
    return logits.to(lens.gate_dtype)


def gated_logits(
    lens: LoraLens, prompts: Prompts, gates: Float[Tensor, "*row site"]
) -> Float[Tensor, "row *slot vocab"]:
    """Run one forward pass at these gates, [site] or [row, site], and read the logits."""
    with lens.injected(ScaleInject(lens.plan, gates)):
        return read_logits(lens, prompts)


def logits_dtype(lens: LoraLens) -> torch.dtype:
    """The dtype of logits as they are made: float32 or better, unless the model makes them."""
    is_made_by_model = _plain_unembedding(lens) is None
    return lens.dtype if is_made_by_model else lens.gate_dtype


def read_value(lens: LoraLens, reading: Reading) -> Float[Tensor, " batch"]:
    """Run one forward pass under the hooks on the model, and read g.

    A readout of a few logits uses only their rows of W_U, and a sum over a response is computed a
    few tokens at a time. All logits are computed if a hook is on the unembedding or on the whole
    model, or if something else, such as a soft-cap, changes them. For a readout inside the model
    the pass ends at its hook point.
    """
    read = reading.read
    if isinstance(read, AtPoint):
        return read(read_activation(lens, reading.rows, read.name))
    if _plain_unembedding(lens) is None or not isinstance(read, Picks | Columns):
        return read(read_logits(lens, reading.rows))
    return value_of_final(lens, read, read_final(lens, reading.rows))


def read_tokens(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch token"]:
    """Run one forward pass under the hooks on the model, and read log p of each response token.

    It is zero beyond the end of a shorter response. Each prompt must have one response.
    """
    read = cast(LogProbs, reading.read)
    if _plain_unembedding(lens) is None:
        terms = read.terms_in(read_logits(lens, reading.rows))
    else:
        terms = terms_of_final(lens, read, read_final(lens, reading.rows))
    return read.by_token(terms)


def read_for_slopes(lens: LoraLens, reading: Reading) -> Float[Tensor, " batch"]:
    """Read g as `read_value` does, but with first derivatives only.

    Each token of a long response is unembedded once, together with its covector. A backward pass
    through `read_value` would unembed it again.
    """
    read = reading.read
    if not isinstance(read, Picks) or len(read.rows) <= PICKS or not ends_plainly(lens):
        return read_value(lens, reading)
    final = read_final(lens, reading.rows)
    covectors, terms = token_covectors(lens, reading, final)
    value = read.weighted_sum(terms)
    # Σ c_t · (x_t − constant x_t) is zero, and has the derivatives of g.
    zero = (final - final.detach()).to(covectors)
    change = (covectors * zero).flatten(1).sum(1)
    return value + reading.by_prompt(change)


def differentiable_tokens(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch token"]:
    """Numbers with the derivatives of each token's log p; the values themselves mean nothing.

    It takes one forward pass. A backward pass from one of them does not pass the unembedding.
    """
    if not ends_plainly(lens):
        return read_tokens(lens, reading)
    final = read_final(lens, reading.rows)
    covectors, _ = token_covectors(lens, reading, final)
    return (covectors * final.to(covectors)).sum(-1)


# --- From the final residual stream to g, if only W_U and b_U come after it


def read_final(lens: LoraLens, prompts: Prompts) -> _Final:
    """Run one forward pass under the hooks on the model, and read the unembedding's input.

    It is read at each row's last token, or at its slots.
    """
    with _no_unembedding(lens):
        final = lens.run(prompts)
    return prompts.at_read(final) if prompts.reads is None else prompts.at_slots(final)


def value_of_final(
    lens: LoraLens, read: Picks | Columns, final: _Final, factor: Factor | None = None
) -> Float[Tensor, " batch"]:
    """Compute g from the final residual stream. No forward pass."""
    if isinstance(read, Picks):
        return read.weighted_sum(terms_of_final(lens, read, final, factor))
    weight, bias = _required_unembedding(lens)
    ids = read.ids.to(weight.device)
    final = final.to(weight.device, lens.gate_dtype)
    few_logits = torch.einsum("rd,rkd->rk", final, weight[ids].to(final))
    if bias is not None:
        few_logits = few_logits + bias[ids.to(bias.device)].to(final)
    if factor is not None:
        few_logits = few_logits * factor(few_logits, ()).gather(-1, ids)
    return read.signed_sum(few_logits)


def terms_of_final(
    lens: LoraLens, read: Picks, final: _Final, factor: Factor | None = None
) -> Float[Tensor, " pick"]:
    """Compute the term of each pick, of a few picks at a time. No forward pass.

    A backward pass computes the logits of the picks again, so that they are not all held.
    """
    unembedding = _required_unembedding(lens)
    places = read.places(final.device)
    picked = final[places].to(unembedding.weight.device)

    def terms(residual: Tensor, picks: Tensor) -> Tensor:
        logits = unembedding.logits(residual, lens.gate_dtype)
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
    """Write all logits that are read into `out`, a few at a time; the model must end plainly."""
    unembedding = _required_unembedding(lens)
    flat = final.flatten(0, -2)
    for chunk in torch.arange(len(flat), device="cpu").split(PICKS):
        places = torch.unravel_index(chunk, final.shape[:-1])
        logits = unembedding.logits(flat[chunk], lens.gate_dtype)
        out[places] = logits.to(out.device)


def token_covectors(
    lens: LoraLens, reading: Reading, final: _Final
) -> tuple[_Final, Float[Tensor, " pick"]]:
    """Compute c_t = ∂ℓ_t/∂x_t in the final residual stream x, and the ℓ_t.

    The model must end plainly (`ends_plainly`). No forward pass.
    """
    unembedding = _required_unembedding(lens)
    read = cast(Picks, reading.read)
    covectors = torch.zeros_like(final, dtype=lens.gate_dtype)
    weights = read.weights.to(covectors)
    places = read.places(final.device)
    values: list[Tensor] = []
    for chunk in _picks(read).split(PICKS):
        where = at_some(places, chunk)
        with torch.enable_grad():
            x = final.detach()[where].to(unembedding.weight.device).requires_grad_()
            logits = unembedding.logits(x, lens.gate_dtype)
            terms = read.terms(logits, chunk)
            (slopes,) = torch.autograd.grad(terms.sum(), x)
        weighted = weights[chunk.to(weights.device), None] * slopes.to(covectors)
        covectors.index_put_(where, weighted, accumulate=True)
        values.append(terms.detach())
    return covectors, torch.cat(values)


def _picks(read: Picks) -> Int[Tensor, " pick"]:
    return torch.arange(len(read.rows), device="cpu")


# --- How the model ends


def ends_plainly(lens: LoraLens) -> bool:
    """Whether logits = x @ W_U + b_U for the final residual stream x, with no update of W_U."""
    is_adapted = any(site.kind == "unembed" for site in lens.sites)
    return not is_adapted and _plain_unembedding(lens) is not None


def _plain_unembedding(lens: LoraLens) -> Unembedding | None:
    """W_U and b_U if logits = x @ W_U + b_U for what the unembedding reads; None otherwise."""
    return None if _changes_logits(lens) else lens.host.unembedding()


def _required_unembedding(lens: LoraLens) -> Unembedding:
    """W_U and b_U of a model that is known to do nothing but unembed x."""
    unembedding = lens.host.unembedding()
    assert unembedding is not None, "the caller has seen that nothing follows the unembedding"
    return unembedding


def _changes_logits(lens: LoraLens) -> bool:
    """Whether a hook on the unembedding or on the whole model may change the logits."""
    wrapped_model = getattr(lens.model, "original_model", lens.model)
    parts = list(lens.model.unembed.modules())
    if any(hooks_of(module).forward for module in (lens.model, wrapped_model, *parts)):
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
    """Run one forward pass under the hooks on the model, for what the hooks see.

    Nothing is unembedded, unless a hook (such as that of an adapted unembedding) is on the
    unembedding or on the whole model.
    """
    unembedding = _no_unembedding(lens)
    if _changes_logits(lens):
        unembedding = contextlib.nullcontext()
    with unembedding:
        lens.run(prompts)


class _Reached(Exception):
    """Raised when the pass has reached the hook point that is read, and need not go on."""


def read_activation(lens: LoraLens, prompts: Prompts, name: str) -> Float[Tensor, "row pos *d"]:
    """Run a forward pass up to a hook point that fires once, and read the activation there.

    It is float32 or better. If accelerate moves weights, the pass goes on to its end, as weights
    are put back only after their module has run.

    Raises:
        ModelStateError: nothing passes this point.
    """
    may_end = not any(own_forward(module) is not None for module in lens.model.modules())
    seen: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:
        del hook
        # A block that runs again in a backward pass comes here once more, and then goes on.
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
