"""Constants as factors: a vector that a module adds to its output, whatever its input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.core.adapter.factors import LoRAFactors
from lens_lora.errors import AdapterError, ArgumentError


def constant_factors(
    vectors: Mapping[str, Float[Tensor, " out"]], like: nn.Module | Mapping[str, int] | None
) -> dict[str, LoRAFactors]:
    """Factors that add each vector to its module's output, whatever the input: ΔW = 0, and Δb.

    PEFT stores that as a LoRA with A = 0, B = 0 and a bias of B's own (`lora_bias`).

    Args:
        vectors: the vector of each module, by its path.
        like: the base, or the modules' input widths by path: A has as many columns. Without it A
            has one column, which fits every module (`LoRAFactors.width`).

    Raises:
        ArgumentError: no vectors by module path, or another `like`.
        AdapterError: a value that is no vector, or a module that `like` lacks.
    """
    if not isinstance(vectors, Mapping) or not all(isinstance(path, str) for path in vectors):
        expected = "{module path: vector}, such as {'model.layers.3.mlp.down_proj': vector}"
        raise ArgumentError(f"vectors are a {type(vectors).__name__}; expected {expected}.")
    return {path: _constant(path, vector, like) for path, vector in vectors.items()}


def _constant(path: str, vector: Any, like: Any) -> LoRAFactors:
    if not isinstance(vector, Tensor) or vector.ndim != 1 or not vector.is_floating_point():
        shown = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise AdapterError(f"{path}: {shown}; expected a vector of floating point, [out].")
    width = 1 if like is None else _input_width(path, like)
    return LoRAFactors(
        A=vector.new_zeros(1, width),
        B=vector.new_zeros(len(vector), 1),
        lora_bias=vector.detach().clone(),
    )


def _input_width(path: str, like: Any) -> int:
    if isinstance(like, Mapping):
        if path not in like:
            raise AdapterError(f"{path}: `like` holds no factors of this module.")
        return like[path]
    if not isinstance(like, nn.Module):
        raise ArgumentError(f"like is a {type(like).__name__}; expected the base or an adapter.")
    try:
        module: Any = like.get_submodule(path)
    except AttributeError as error:
        raise AdapterError(f"{path}: the model in `like` has no such module.") from error
    width = getattr(module, "in_features", None) or getattr(module, "nx", None)
    if width is None:
        kind = type(module).__name__
        raise AdapterError(f"{path}: a {kind} is no linear module: PEFT has no constants of it.")
    return int(width)
