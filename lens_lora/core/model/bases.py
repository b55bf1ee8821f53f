"""The unprocessed Hugging Face base, and how the hooked model's weights differ from it.

Processing (folded norms, centred weights, folded value biases) removes from the hooked model
something that the adapter was trained with. The base still has it.

1. `BaseWeights` reads W, b, γ and β by module path, without a copy.
2. `infer_processing` finds out which processing was done to a weight. It does not trust the options
   of loading: it processes the base's weight in each known way and compares.
3. `is_same` tells whether two tensors are one up to rounding: what an adapter's file repeats of the
   base is no update.

Comparisons are in float64, some rows at a time: a large head is never copied whole.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.compat import in_float64
from lens_lora.errors import ModelStateError
from lens_lora.families import HEADS, Family

_ENTRIES = 2**23  # compared at a time: 64 MB in float64


class BaseWeights:
    """Weights, norms and biases of the base, by module path. Nothing is copied.

    Raises:
        ModelStateError: the model is wrapped by TransformerLens, which rewrites weights in place,
            or has merged adapters.
    """

    def __init__(self, hf_model: nn.Module, family: Family) -> None:
        for module in hf_model.modules():
            if type(module).__module__.startswith("transformer_lens"):
                raise ModelStateError(
                    "hf_model is wrapped by a TransformerBridge, which rewrites its weights in "
                    "place; pass a freshly loaded copy of the base model."
                )
            if getattr(module, "merged", False) is True:
                raise ModelStateError(
                    "hf_model has a merged PEFT adapter; call unmerge_adapter() or pass the bare "
                    "base model."
                )
        self._model = hf_model
        self._family = family

    def _module(self, path: str) -> nn.Module:
        try:
            module = self._model.get_submodule(path)
        except AttributeError as error:
            raise ModelStateError(
                f"hf_model ({type(self._model).__name__}) has no module {path}; is it the base "
                "model of this hooked model, with its language-model head?"
            ) from error
        return getattr(module, "base_layer", module)

    def weight(self, path: str, rows: Tensor | None = None) -> Float[Tensor, "out in"]:
        """W of a linear, or of an embedding with the vocabulary as its input.

        `rows` are the output rows of a fused projection; None for all.
        """
        return _rows(stored_weight(self._module(path)), rows)

    def bias(self, path: str, rows: Tensor | None = None) -> Float[Tensor, " out"] | None:
        """b of a linear; None where it has none."""
        bias = getattr(self._module(path), "bias", None)
        return None if bias is None else _rows(bias.detach(), rows)

    @property
    def head(self) -> str:
        """The path of the language-model head."""
        return next((path for path in HEADS if hasattr(self._model, path)), HEADS[0])

    @property
    def is_tied(self) -> bool:
        """Whether its config ties the head to the token embedding."""
        return bool(getattr(self._model.config, "tie_word_embeddings", False))

    def affine(self, path: str) -> tuple[Tensor, Tensor | None]:
        """(γ, β) of a norm; β is None for an RMS norm, and γ is 1 for a norm without one."""
        norm = self._module(path)
        bias = getattr(norm, "bias", None) if self._family.norm == "LN" else None
        weight = cast("Tensor | None", norm.weight)
        if weight is None:
            gamma = torch.ones(cast("tuple[int, ...]", norm.normalized_shape))
        else:
            gamma = weight.detach() + self._family.gamma_offset
        return gamma, None if bias is None else bias.detach()


def stored_weight(linear: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a linear, a Conv1D or an embedding, turned."""
    weight = cast(Tensor, linear.weight).detach()
    is_transposed = type(linear).__name__ == "Conv1D" or isinstance(linear, nn.Embedding)
    return weight.T if is_transposed else weight


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows.to(tensor.device)]


class Processing(NamedTuple):
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
    gamma: Float[Tensor, " in"] | None,
    centres_reads: bool,
    centres_writes: bool,
) -> Processing:
    """Which processing turns the base's weight into the model's, found by comparing them.

    `gamma` is that of the norm which the linear reads. What the weight reads may have been centred
    as well where that is a LayerNorm, and what it writes where that is the residual stream.

    Raises:
        ModelStateError: no processing does, so the model was not made from this base.
    """
    eps = max(torch.finfo(dtype).eps for dtype in (weight.dtype, base.dtype, torch.float32))
    chunks = list(zip(_chunks(weight), _chunks(base), strict=True))
    reads: list[tuple[Tensor | None, bool]] = [(None, False)]  # γ folded in, and centred or not
    if gamma is not None:
        reads += [(gamma, False), (gamma, True)] if centres_reads else [(gamma, False)]
    errors: list[tuple[float, Processing]] = []
    for (factor, centre), centred in itertools.product(reads, (False, True)[: 1 + centres_writes]):
        processed = functools.partial(_as_processed, gamma=factor, centre_read=centre)
        error = _largest_error(chunks, processed, centred)
        errors.append((error, Processing(factor is not None, centred)))
    error, processing = min(errors, key=lambda pair: pair[0])
    size = max(_largest(base), _largest(weight))
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
    wide = in_float64(rows)
    wide = wide if gamma is None else wide * in_float64(gamma).to(wide.device)
    return wide - wide.mean(1, keepdim=True) if centre_read else wide


def _largest_error(
    chunks: Sequence[tuple[Tensor, Tensor]], processed: Callable[[Tensor], Tensor], centred: bool
) -> float:
    """Between the model's rows and the base's, processed in one way."""
    mean = _mean_row(processed(base) for _, base in chunks) if centred else 0.0
    return max(
        float((wide - (processed(base) - mean).to(wide.device)).abs().max())
        for wide, base in ((in_float64(weight), base) for weight, base in chunks)
    )


def is_centred(weight: Float[Tensor, "out in"]) -> bool:
    """Whether every column of a writing weight sums to zero over the residual stream."""
    mean = _mean_row(map(in_float64, _chunks(weight)))
    return float(mean.abs().max()) <= 8 * torch.finfo(weight.dtype).eps * _largest(weight)


def is_same(held: Tensor, base: Tensor) -> bool:
    """Whether they agree entry by entry, to one rounding of the coarser dtype.

    An adapter may hold the base's parameters in a coarser dtype than the model.
    """
    if held.shape != base.shape:
        return False
    coarser = max(held.dtype, base.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    limits = torch.finfo(coarser)
    return all(
        torch.allclose(
            in_float64(chunk.to(expected.device, coarser)),
            in_float64(expected.to(coarser)),
            rtol=limits.eps,
            atol=limits.smallest_normal * limits.eps,
        )
        for chunk, expected in zip(_chunks(held), _chunks(base), strict=True)
    )


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.split(max(1, _ENTRIES // max(1, tensor[:1].numel())))


def _mean_row(chunks: Iterable[Float[Tensor, "some in"]]) -> Float[Tensor, " in"]:
    sums, counts = zip(*((chunk.sum(0), len(chunk)) for chunk in chunks), strict=True)
    return functools.reduce(torch.add, sums) / sum(counts)


def _largest(weight: Tensor) -> float:
    low, high = weight.aminmax()
    return max(-float(low), float(high))


# --- Names

# What the host libraries call a model without a name.
_NO_NAMES = ("model", "custom")


def names_of(model: Any, hf_model: Any) -> list[str]:
    """The names by which the base at hand is known; perhaps none.

    They are the Hugging Face model's own where it has one: a hooked model may have been made from
    another's weights under the name of its architecture.
    """
    own: list[object] = []
    for holder in (hf_model, getattr(model, "original_model", None)):
        own.append(getattr(getattr(holder, "config", None), "name_or_path", None))
    hooked = [getattr(model.cfg, name, None) for name in ("model_name", "tokenizer_name")]
    for names in (own, hooked):
        named = [str(name) for name in names if name and name not in _NO_NAMES]
        if named:
            return list(dict.fromkeys(named))
    return []
