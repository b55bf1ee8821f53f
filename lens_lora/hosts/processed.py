"""How TransformerLens processed the weights of a model: folded norms, centred weights.

1. `infer_processing` processes the base's weight in each known way and compares the results with
   the model's weight. It does not rely on the options with which the model was loaded.
2. A value bias b̂_V = b_V + W_V β is folded into b_O by every processing; it is taken from the base,
   because the model only holds its image (`folded_value_bias`).

Comparisons are in float64, some rows at a time, so that a large head is never copied whole.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.compat import in_float64
from lens_lora.core import SiteFactors
from lens_lora.core.model import (
    BaseWeights,
    HookedHost,
    Processing,
    chunks_of,
    fused_rows,
    largest_entry,
    mean_row,
)
from lens_lora.core.model import (
    folded_value_bias as declared_value_bias,
)
from lens_lora.core.model import (
    processing_of as declared_processing,
)
from lens_lora.errors import ModelStateError
from lens_lora.families import Place


@declared_processing.provide
def processing_of(
    host: HookedHost, site: SiteFactors, weight: Float[Tensor, "out in"]
) -> Processing:
    """Find how the model's weight at a site was processed.

    Raises:
        ModelStateError: the model was processed and no base was given; or its weights contradict
            what its configuration says about its norms.
    """
    norm_path = host.family.norm_path(site.layer, site.kind)
    if host.base is None and not host.needs_base():
        return Processing(folded=False, centred=host.is_centred(site.kind, weight))
    base = host.required_base(site, norm_path or "value biases")
    gamma = None if norm_path is None else base.affine(norm_path)[0]
    inferred = infer_processing(
        site.name,
        weight,
        base.weight(site.path, site.rows) * host.embedding_scale(site.kind),
        gamma,
        centres_reads=host.family.norm == "LN",
        centres_writes=host.may_be_centred(site.kind),
    )
    folded = norm_path is not None and host.is_folded(site.layer, site.kind)
    # A γ of ones leaves no trace in the weights.
    shows = gamma is not None and bool((gamma != 1).any())
    if shows and folded != inferred.folded:
        stated, seen = ("were", "were not") if folded else ("were not", "were")
        raise ModelStateError(
            f"{site.name}: the model says its norms {stated} folded, its weights show that they "
            f"{seen}. Load the model again from the base."
        )
    return Processing(folded, inferred.centred)


@declared_value_bias.provide
def folded_value_bias(host: HookedHost, site: SiteFactors) -> Float[Tensor, " out"] | None:
    """Rep(b̂_V), [n_heads · d_head], if b̂_V was folded into b_O, else None.

    Raises:
        ModelStateError: b̂_V was folded, or may have been, and the base was not given.
    """
    if not host.may_have_folded_biases():
        return None
    b_V = host.bias(site.layer, "v")
    if b_V is not None and bool((b_V != 0).any()):
        return None
    if host.base is None:
        b_O = host.bias(site.layer, "o")
        if b_O is None or bool((b_O == 0).all()):
            return None
        if not host.family.value_bias and not host.is_folded(site.layer, "v"):
            return None
    total = _value_bias(host, site.layer, host.required_base(site, "value biases"))
    if not bool(total.any()):
        return None
    heads = host.heads
    by_kv_head = total.view(heads.n_kv, heads.d_head)
    return by_kv_head.repeat_interleave(heads.n_heads // heads.n_kv, dim=0).flatten()


def _value_bias(host: HookedHost, layer: int, base: BaseWeights) -> Float[Tensor, " kv_out"]:
    """Compute b̂_V = b_V + W_V β, with β where the norm was folded, in float64."""
    path = host.family.path(layer, "v")
    norm_path = host.family.norm_path(layer, "v")
    place = cast(Place, host.family.place(path))
    rows = fused_rows(place, "v", host.heads, len(base.weight(path)))
    total = torch.zeros(host.heads.n_kv * host.heads.d_head, dtype=torch.float64)
    b_V = base.bias(path, rows)
    if b_V is not None:
        total += b_V.cpu().double()
    if norm_path and host.is_folded(layer, "v"):
        _, beta = base.affine(norm_path)
        if beta is not None:
            total += (in_float64(base.weight(path, rows)) @ in_float64(beta)).cpu()
    return total


def infer_processing(
    name: str,
    weight: Float[Tensor, "out in"],
    base: Float[Tensor, "out in"],
    gamma: Float[Tensor, " in"] | None,
    centres_reads: bool,
    centres_writes: bool,
) -> Processing:
    """Find the processing that turns the base's weight into the model's, by comparing the two.

    Args:
        name: the name of the site, for errors.
        weight: the model's weight.
        base: the base's weight.
        gamma: γ of the norm that the map reads; None if it reads no norm.
        centres_reads: whether the input may have been centred, as the output of a LayerNorm may.
        centres_writes: whether the output may have been centred, as one that is added to the
            residual stream may.

    Raises:
        ModelStateError: no processing does, so the model was not made from this base.
    """
    eps = max(torch.finfo(dtype).eps for dtype in (weight.dtype, base.dtype, torch.float32))
    chunks = list(zip(chunks_of(weight), chunks_of(base), strict=True))
    # What may have been done to the columns: γ folded in, with the input centred or not.
    reads: list[tuple[Tensor | None, bool]] = [(None, False)]
    if gamma is not None:
        reads.append((gamma, False))
        if centres_reads:
            reads.append((gamma, True))
    writes = (False, True) if centres_writes else (False,)
    errors: list[tuple[float, Processing]] = []
    for (factor, is_read_centred), centred in itertools.product(reads, writes):
        processed = functools.partial(_as_processed, gamma=factor, centre_read=is_read_centred)
        error = _largest_error(chunks, processed, centred)
        errors.append((error, Processing(factor is not None, centred)))
    error, processing = min(errors, key=lambda pair: pair[0])
    size = max(largest_entry(base), largest_entry(weight))
    if error > 16 * eps * size:
        raise ModelStateError(
            f"{name}: no known processing turns hf_model's weight into the model's (they differ by "
            f"{error:.3g}, and the largest entry is {size:.3g}). Pass the base that this hooked "
            "model was made from; refactor_factored_attn_matrices is not supported."
        )
    return processing


def _as_processed(
    rows: Float[Tensor, "some in"], gamma: Float[Tensor, " in"] | None, centre_read: bool
) -> Float[Tensor, "some in"]:
    """Rows of the base's weight, with γ folded in and the input centred if this is asked for."""
    wide = in_float64(rows)
    if gamma is not None:
        wide = wide * in_float64(gamma).to(wide.device)
    if centre_read:
        wide = wide - wide.mean(1, keepdim=True)
    return wide


def _largest_error(
    chunks: Sequence[tuple[Tensor, Tensor]], processed: Callable[[Tensor], Tensor], centred: bool
) -> float:
    """The largest difference between the model's rows and the base's, processed in one way."""
    mean: Tensor | float = 0.0
    if centred:
        mean = mean_row(processed(base) for _, base in chunks)
    largest = 0.0
    for weight, base in chunks:
        wide = in_float64(weight)
        expected = (processed(base) - mean).to(wide.device)
        largest = max(largest, float((wide - expected).abs().max()))
    return largest
