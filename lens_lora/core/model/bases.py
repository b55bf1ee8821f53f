"""The unprocessed Hugging Face base: its weights, by module path.

Processing (folded norms, centred weights, folded value biases) removes from the hooked model
something that the adapter was trained with. The base still has it.

1. `BaseWeights` reads W, b, γ and β by module path, without a copy.
2. `is_same` tells whether two tensors are one up to rounding: what an adapter's file repeats of the
   base is no update.

Comparisons are in float64, some rows at a time: a large head is never copied whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.compat import in_float64, in_whole
from lens_lora.errors import ModelStateError
from lens_lora.families import HEADS, Family

_ENTRIES = 2**23  # compared at a time: 64 MB in float64
# So many columns tell that a weight is not centred.
_FEW_COLUMNS = 8


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
        """The module at a path, within a layer of PEFT where one is there."""
        try:
            module = self._model.get_submodule(path)
        except AttributeError as error:
            raise ModelStateError(
                f"hf_model ({type(self._model).__name__}) has no module {path}; is it the base "
                "model of this hooked model, with its language-model head?"
            ) from error
        return getattr(module, "base_layer", module)

    def weight(self, path: str, rows: Tensor | None = None) -> Float[Tensor, "out in"]:
        """The weight W of a linear map, or of an embedding with the vocabulary as its input.

        Args:
            path: the path of the module.
            rows: the output rows of a fused projection; None for all.
        """
        return _rows(stored_weight(self._module(path)), rows)

    def bias(self, path: str, rows: Tensor | None = None) -> Float[Tensor, " out"] | None:
        """The bias b of a linear map; None where it has none."""
        bias = getattr(self._module(path), "bias", None)
        return None if bias is None else _rows(in_whole(bias.detach()), rows)

    @property
    def head(self) -> str:
        """The path of the language-model head."""
        return next((path for path in HEADS if hasattr(self._model, path)), HEADS[0])

    @property
    def is_tied(self) -> bool:
        """Whether its config ties the head to the token embedding."""
        return bool(getattr(self._model.config, "tie_word_embeddings", False))

    def affine(self, path: str) -> tuple[Tensor, Tensor | None]:
        """The parameters (γ, β) of a norm; γ is 1 where it has none, and β None."""
        norm = self._module(path)
        bias = getattr(norm, "bias", None) if self._family.norm == "LN" else None
        weight = cast("Tensor | None", norm.weight)
        if weight is None:
            gamma = torch.ones(cast("tuple[int, ...]", norm.normalized_shape))
        else:
            gamma = in_whole(weight.detach()) + self._family.gamma_offset
        beta = None if bias is None else in_whole(bias.detach())
        return gamma, beta


def stored_weight(linear: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a linear, a Conv1D or an embedding, turned."""
    weight = in_whole(cast(Tensor, linear.weight).detach())
    is_transposed = type(linear).__name__ == "Conv1D" or isinstance(linear, nn.Embedding)
    return weight.T if is_transposed else weight


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows.to(tensor.device)]


class Processing(NamedTuple):
    """How a hooked model's weight was processed.

    Attributes:
        folded: whether γ and β of the norm before it were multiplied in.
        centred: whether what it writes sums to zero over the residual stream.
    """

    folded: bool
    centred: bool


def is_centred(weight: Float[Tensor, "out in"]) -> bool:
    """Whether every column of a writing weight sums to zero over the residual stream."""
    limit = 8 * torch.finfo(weight.dtype).eps * largest_entry(weight)
    # A weight that is not centred shows it in its first columns already.
    for columns in (weight[:, :_FEW_COLUMNS], weight):
        mean = mean_row(map(in_float64, chunks_of(columns)))
        if not float(mean.abs().max()) <= limit:
            return False
    return True


def is_same(held: Tensor, base: Tensor) -> bool:
    """Whether they agree entry by entry, to one rounding of the coarser dtype.

    An adapter may hold the base's parameters in a coarser dtype than the model.
    """
    if held.shape != base.shape:
        return False
    coarser = max(held.dtype, base.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    limits = torch.finfo(coarser)
    smallest = limits.smallest_normal * limits.eps
    for chunk, expected in zip(chunks_of(held), chunks_of(base), strict=True):
        own = in_float64(chunk.to(expected.device, coarser))
        of_base = in_float64(expected.to(coarser))
        if not torch.allclose(own, of_base, rtol=limits.eps, atol=smallest):
            return False
    return True


def chunks_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor in parts of some rows, so that a large one is never copied whole."""
    entries_of_row = max(1, tensor[:1].numel())
    rows_at_once = max(1, _ENTRIES // entries_of_row)
    return tensor.split(rows_at_once)


def mean_row(chunks: Iterable[Float[Tensor, "some in"]]) -> Float[Tensor, " in"]:
    """The mean over the rows of all chunks."""
    total: Tensor | float = 0.0
    count = 0
    for chunk in chunks:
        total = total + chunk.sum(0)
        count += len(chunk)
    return cast(Tensor, total) / count


def largest_entry(weight: Tensor) -> float:
    """The largest magnitude of an entry."""
    low, high = weight.aminmax()
    return max(-float(low), float(high))
