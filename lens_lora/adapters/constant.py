"""Steering as an adapter: a module that adds one vector whatever its input, ΔW = 0 and Δb.

In PEFT's format it is a LoRA with A = 0, B = 0 and a bias of B's own (`lora_bias`). A has as many
columns as the module's input; where that is not known, one, which fits every module (`LoRAFactors.
width`), and the model's own is taken when the adapter is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.trained import ModuleUpdate
from lens_lora.errors import AdapterError, ArgumentError

__all__ = ["constant_factors"]


def constant_factors(
    vectors: Mapping[str, Float[Tensor, "out"]],
    like: nn.Module | Mapping[str, ModuleUpdate] | Mapping[str, int] | None,
) -> dict[str, LoRAFactors]:
    """Factors that add each vector to its module's output.

    Args:
        vectors: by Hugging Face module path.
        like: the base model, updates of the same modules, or widths, for that of A; None to leave
            it open.

    Raises:
        ArgumentError: no vectors by path, or a `like` that is neither.
        AdapterError: a vector that is none, or a module that `like` lacks.
    """
    if not isinstance(vectors, Mapping) or not all(isinstance(path, str) for path in vectors):
        raise ArgumentError(
            f"vectors are a {type(vectors).__name__}; expected {{module path: vector}}, such as "
            "{'model.layers.3.mlp.down_proj': vector}."
        )
    return {path: _constant(path, vector, like) for path, vector in vectors.items()}


def _constant(path: str, vector: Any, like: Any) -> LoRAFactors:
    if not isinstance(vector, Tensor) or vector.ndim != 1 or not vector.is_floating_point():
        what = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise AdapterError(f"{path}: {what}; expected a vector of floating point, [out].")
    vector = vector.detach().clone()
    zeros = vector.new_zeros(len(vector), 1)
    width = 1 if like is None else _width(path, like)
    return LoRAFactors(vector.new_zeros(1, width), zeros, lora_bias=vector)


def _width(path: str, like: Any) -> int:
    """The number of features that a module reads."""
    if isinstance(like, Mapping):
        update = like.get(path)
        if isinstance(update, int):
            return update
        if not isinstance(update, LoRAFactors):
            raise AdapterError(f"{path}: `like` holds no factors of this module.")
        return update.A.shape[1]
    if not isinstance(like, nn.Module):
        raise ArgumentError(
            f"like is a {type(like).__name__}; expected the base model or an adapter of the same "
            "modules."
        )
    try:
        module: Any = like.get_submodule(path)
    except AttributeError as error:
        raise AdapterError(f"{path}: the model in `like` has no such module.") from error
    width = getattr(module, "in_features", None) or getattr(module, "nx", None)
    if width is None:
        raise AdapterError(
            f"{path}: a {type(module).__name__}, no linear module, so PEFT's format holds no "
            "constant of it."
        )
    return int(width)
