"""Which processing was done to a weight: inferred from the weights, not from options of loading.

The base's weight, processed in each known way, is compared with the hooked model's, some rows at a
time in float64: a large head is never copied whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import ModelStateError
from lens_lora.float64 import in_float64

__all__ = ["Processing", "infer_processing", "is_centred"]

_ENTRIES = 2**23  # of a weight that are compared at a time, 64 MB in float64


@dataclasses.dataclass(frozen=True)
class Processing:
    """What was done to one weight.

    Attributes:
        folded: γ and β of the norm before it were multiplied in.
        centred: what it writes sums to zero over the residual stream.
    """

    folded: bool
    centred: bool


def infer_processing(
    name: str,
    weight: Float[Tensor, "out in"],
    base: Float[Tensor, "out in"],
    gamma: Float[Tensor, "in"] | None,
    *,
    centres_reads: bool,
    centres_writes: bool,
) -> Processing:
    """Which processing turns the base's weight into the model's, found by comparing them.

    Args:
        name: of the site, for the error.
        weight: the hooked model's.
        base: the Hugging Face base's.
        gamma: γ of the norm that the linear reads; None where it reads none.
        centres_reads: whether folding this norm also centres what the weight reads (LayerNorm).
        centres_writes: whether this weight may have been centred.

    Raises:
        ModelStateError: no processing does, so the model was not made from this base.
    """
    eps = max(torch.finfo(dtype).eps for dtype in (weight.dtype, base.dtype, torch.float32))
    rows = list(zip(_chunks(weight), _chunks(base), strict=True))
    found: list[tuple[float, Processing]] = []
    for folded in (False, True) if gamma is not None else (False,):
        for centre_read in (False, True) if folded and centres_reads else (False,):
            made = functools.partial(
                _as_processed, gamma=gamma if folded else None, centre_read=centre_read
            )
            for centred in (False, True) if centres_writes else (False,):
                mean = _mean_row(map(made, (of_base for _, of_base in rows))) if centred else 0.0
                error = max(_apart(own, made(of_base) - mean) for own, of_base in rows)
                found.append((error, Processing(folded, centred)))
    error, processing = min(found, key=lambda pair: pair[0])
    size = max(_largest(base), _largest(weight))
    if error > 16 * eps * size:
        raise ModelStateError(
            f"{name}: no known processing turns hf_model's weight into the model's (they differ by "
            f"{error:.3g}, and the largest entry is {size:.3g}). Pass the base that this hooked "
            "model was made from; refactor_factored_attn_matrices is not supported."
        )
    return processing


def is_centred(weight: Float[Tensor, "out in"]) -> bool:
    """Whether every column of a writing weight sums to zero over the residual stream.

    Args:
        weight: of a module that writes to the residual stream.
    """
    eps, rows = torch.finfo(weight.dtype).eps, _chunks(weight)
    mean = _mean_row(map(in_float64, rows))
    return float(mean.abs().max()) <= 8 * eps * _largest(weight)


def _chunks(weight: Float[Tensor, "out in"]) -> tuple[Tensor, ...]:
    """Some rows at a time: a large matrix is not copied whole into float64."""
    return weight.split(max(1, _ENTRIES // weight.shape[1]))


def _mean_row(chunks: Iterable[Float[Tensor, "some in"]]) -> Float[Tensor, "in"]:
    total, count = torch.zeros(()), 0
    for some in chunks:
        total, count = total.to(some) + some.sum(0), count + len(some)
    return total / count


def _apart(own: Tensor, expected: Tensor) -> float:
    wide = in_float64(own)
    return float((wide - expected.to(wide.device)).abs().max())


def _largest(weight: Tensor) -> float:
    low, high = weight.aminmax()
    return max(-float(low), float(high))


def _as_processed(
    rows: Float[Tensor, "some in"], gamma: Float[Tensor, "in"] | None, centre_read: bool
) -> Float[Tensor, "some in"]:
    wide = in_float64(rows)
    wide = wide if gamma is None else wide * in_float64(gamma).to(wide.device)
    return wide - wide.mean(1, keepdim=True) if centre_read else wide
