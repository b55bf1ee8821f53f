"""How TransformerLens processed the weights of a model: folded norms, centred weights.

1. `infer_processing` processes the base's weight in each known way and compares the results with
   the model's weight. It does not rely on the options with which the model was loaded.
2. A value bias b̂_V = b_V + W_V β is folded into b_O by every processing; it is taken from the base,
   because the model only holds its image (`folded_value_bias`).

Comparisons are in float64, some rows at a time, so that a large head is never copied whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.compat import in_float64
from lens_lora.core import SiteFactors
from lens_lora.core.model import (
    BaseParameters,
    BaseWeights,
    OwnParameters,
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
    base: BaseParameters, site: SiteFactors, weight: Float[Tensor, "out in"]
) -> Processing:
    """Find how the model's weight at a site was processed.

    Raises:
        ModelStateError: the model was processed and no base was given; or its weights contradict
            what its configuration says about its norms.
    """
    own = base.own
    norm_path = own.family.norm_path(site.layer, site.kind)
    if base.given is None and not own.needs_base():
        return Processing(folded=False, centred=own.is_centred(site.kind, weight))
    given = base.required(site, norm_path or "value biases")
    gamma = None
    if norm_path is not None:
        gamma, _ = given.affine(norm_path)
    inferred = infer_processing(
        site.name,
        weight,
        given.weight(site.path, site.rows) * own.embedding_scale(site.kind),
        gamma,
        centres_reads=own.family.norm == "LN",
        centres_writes=own.may_be_centred(site.kind),
    )
    folded = norm_path is not None and own.is_folded(site.layer, site.kind)
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
def folded_value_bias(base: BaseParameters, site: SiteFactors) -> Float[Tensor, " out"] | None:
    """Rep(b̂_V), [n_heads · d_head], if b̂_V was folded into b_O, else None.

    Raises:
        ModelStateError: b̂_V was folded, or may have been, and the base was not given.
    """
    own = base.own
    if not own.may_have_folded_biases():
        return None
    b_V = own.bias(site.layer, "v")
    if b_V is not None and bool((b_V != 0).any()):
        return None
    if base.given is None:
        b_O = own.bias(site.layer, "o")
        if b_O is None or bool((b_O == 0).all()):
            return None
        if not own.family.value_bias and not own.is_folded(site.layer, "v"):
            return None
    total = _value_bias(own, site.layer, base.required(site, "value biases"))
    if not bool(total.any()):
        return None
    heads = own.heads
    by_kv_head = total.view(heads.n_kv, heads.d_head)
    return by_kv_head.repeat_interleave(heads.n_heads // heads.n_kv, dim=0).flatten()


def _value_bias(own: OwnParameters, layer: int, given: BaseWeights) -> Float[Tensor, " kv_out"]:
    """Compute b̂_V = b_V + W_V β, with β where the norm was folded, in float64."""
    path = own.family.path(layer, "v")
    norm_path = own.family.norm_path(layer, "v")
    place = cast(Place, own.family.place(path))
    rows = fused_rows(place, "v", own.heads, len(given.weight(path)))
    total = torch.zeros(own.heads.n_kv * own.heads.d_head, dtype=torch.float64)
    b_V = given.bias(path, rows)
    if b_V is not None:
        total += b_V.cpu().double()
    if norm_path and own.is_folded(layer, "v"):
        _, beta = given.affine(norm_path)
        if beta is not None:
            total += (in_float64(given.weight(path, rows)) @ in_float64(beta)).cpu()
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
    reads = [_Read(gamma=None, is_centred=False)]
    if gamma is not None:
        reads.append(_Read(gamma, is_centred=False))
        if centres_reads:
            reads.append(_Read(gamma, is_centred=True))
    writes = (False, True) if centres_writes else (False,)
    error = math.inf
    processing = Processing(folded=False, centred=False)
    for read, centred in itertools.product(reads, writes):
        error_of_this = _largest_error(chunks, read, centred=centred)
        if error_of_this < error:
            error = error_of_this
            processing = Processing(folded=read.gamma is not None, centred=centred)
    size = max(largest_entry(base), largest_entry(weight))
    if error > 16 * eps * size:
        raise ModelStateError(
            f"{name}: no known processing turns hf_model's weight into the model's (they differ by "
            f"{error:.3g}, and the largest entry is {size:.3g}). Pass the base that this hooked "
            "model was made from; refactor_factored_attn_matrices is not supported."
        )
    return processing


class _Read(NamedTuple):
    """Processing that the columns of a weight may have had.

    Attributes:
        gamma: γ of the norm, which was folded in; None if it was not.
        is_centred: whether the input was centred then.
    """

    gamma: Float[Tensor, " in"] | None
    is_centred: bool

    def applied(self, rows: Float[Tensor, "some in"]) -> Float[Tensor, "some in"]:
        """Rows of the base's weight as they are after this, in float64."""
        wide = in_float64(rows)
        if self.gamma is not None:
            wide = wide * in_float64(self.gamma).to(wide.device)
        if self.is_centred:
            wide = wide - wide.mean(1, keepdim=True)
        return wide


def _largest_error(chunks: Sequence[tuple[Tensor, Tensor]], read: _Read, *, centred: bool) -> float:
    """The largest difference between the model's rows and the base's, processed in one way.

    Args:
        chunks: some rows of the model's weight, and the same rows of the base's, at a time.
        read: what was done to the columns.
        centred: whether the output was centred.
    """
    mean: Tensor | float = 0.0
    if centred:
        mean = mean_row(read.applied(base) for _, base in chunks)
    largest = 0.0
    for weight, base in chunks:
        wide = in_float64(weight)
        expected = (read.applied(base) - mean).to(wide.device)
        largest = max(largest, float((wide - expected).abs().max()))
    return largest
