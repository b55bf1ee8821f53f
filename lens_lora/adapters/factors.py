"""One module's update: ΔW = s B A, and what PEFT can put beside it."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import AdapterError
from lens_lora.float64 import in_float64

__all__ = ["LoRAFactors", "dense_factors", "require_numbers", "require_products", "size_of"]

_BESIDE = ("lora_bias", "trained_bias", "magnitude", "base_weight")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class LoRAFactors:
    """One module's update ΔW = scale · B A, and perhaps Δb.

        >>> LoRAFactors(A=torch.ones(2, 8), B=torch.ones(4, 3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lens_lora.errors.AdapterError: A is (2, 8) and B is (4, 3); expected A [rank, in] and ...

    Args:
        A: [rank, in], reads the module's input (for an embedding: [rank, vocabulary]).
        B: [out, rank], writes its output.
        scale: s of the note: α/r, or α/√r for rsLoRA.
        lora_bias: [out], a bias of B's own: Δb = scale · lora_bias.
        trained_bias: [out], the module's bias after training: Δb = trained_bias − the base's.
        magnitude: [out], DoRA's m: ΔW = m/‖W + sBA‖_row ⊙ (W + sBA) − W, with W the base's.
        base_weight: the base's weight as the adapter saw it, where the file holds it, stored as
            Hugging Face does. What differs from the base is a part of the update.
        strength: multiplies the whole update.

    Raises:
        AdapterError: A and B disagree on the rank, are not matrices, are not finite, or are so
            large that their products overflow.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scale: float = 1.0
    lora_bias: Float[Tensor, "out"] | None = None
    trained_bias: Float[Tensor, "out"] | None = None
    magnitude: Float[Tensor, "out"] | None = None
    base_weight: Tensor | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        for name in ("A", "B", *_BESIDE):
            require_numbers(name, getattr(self, name), may_lack=name in _BESIDE)
        if not all(isinstance(s, numbers.Real) for s in (self.scale, self.strength)):
            raise AdapterError(f"scale is {self.scale!r}, strength {self.strength!r}; not numbers.")
        if not (math.isfinite(self.scale) and math.isfinite(self.strength)):
            raise AdapterError(f"scale is {self.scale}, strength {self.strength}.")
        self._require_shapes()
        self._require_no_overflow()

    def _require_shapes(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"A is {tuple(self.A.shape)} and B is {tuple(self.B.shape)}; "
                "expected A [rank, in] and B [out, rank] with the same rank."
            )
        if 0 in self.A.shape or 0 in self.B.shape:
            raise AdapterError(f"empty factors: A {tuple(self.A.shape)}, B {tuple(self.B.shape)}.")
        for name in ("lora_bias", "trained_bias", "magnitude"):
            vector = getattr(self, name)
            if vector is not None and vector.shape != self.B.shape[:1]:
                raise AdapterError(
                    f"{name} is {tuple(vector.shape)} and B writes {self.B.shape[0]} features."
                )

    def _require_no_overflow(self) -> None:
        sizes = {name: size_of(getattr(self, name)) for name in ("A", "B", *_BESIDE)}
        sizes["ΔW"] = abs(self.scale * self.strength) * sizes["A"] * sizes["B"]
        require_products(sizes, torch.promote_types(self.A.dtype, self.B.dtype))

    @property
    def rank(self) -> int:
        """r: of A's rows and B's columns."""
        return self.A.shape[0]

    @property
    def width(self) -> int | None:
        """How many features A reads; None where a constant leaves it open (Adapter.constant)."""
        is_open = self.A.shape[1] == 1 and self.lora_bias is not None
        return None if is_open and not bool(self.A.any()) else self.A.shape[1]

    @property
    def needs_base_weight(self) -> bool:
        """Whether ΔW depends on the base model's W (DoRA)."""
        return self.magnitude is not None

    def scaled(self, factor: float) -> LoRAFactors:
        """The whole update times a number.

        Args:
            factor: what ΔW and Δb are multiplied by.
        """
        if self.trained_bias is None and self.magnitude is None:
            return dataclasses.replace(self, scale=self.scale * factor)
        return dataclasses.replace(self, strength=self.strength * factor)

    def rows(self, rows: Tensor) -> LoRAFactors:
        """The update of some output features only (one part of a fused projection).

        Args:
            rows: their indices, [row].
        """
        cut = {
            name: getattr(self, name)[rows]
            for name in ("B", "lora_bias", "trained_bias", "magnitude")
            if getattr(self, name) is not None
        }
        return dataclasses.replace(self, **cut, base_weight=None)

    def materialise(self, weight: Float[Tensor, "out in"] | None = None) -> Float[Tensor, "out in"]:
        """ΔW, dense; biases are no part of it.

        Args:
            weight: the base's W, which DoRA's ΔW depends on.

        Raises:
            AdapterError: DoRA without the weight.
        """
        dtype = torch.promote_types(self.A.dtype, self.B.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
        plain = self.scale * (self.B.to(dtype) @ self.A.to(dtype))
        if self.magnitude is None:
            return self.strength * plain
        if weight is None:
            raise AdapterError("DoRA's ΔW depends on the base model's weight; pass it.")
        turned = weight.to(plain) + plain
        size = turned.norm(dim=1, keepdim=True)
        return self.strength * (self.magnitude[:, None] / size * turned - weight.to(plain))

    def norm(self) -> float:
        """Frobenius norm of ΔW, without building it: ‖BA‖² = tr((BᵀB)(AAᵀ)).

        What biases add, ‖Δb‖, is `bias_norm`.

        Raises:
            AdapterError: DoRA, whose ΔW depends on the base model.
        """
        if self.magnitude is not None:
            raise AdapterError("DoRA's ΔW depends on the base model's weight; materialise it.")
        A, B = in_float64(self.A), in_float64(self.B)
        squared = max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0)
        return abs(self.scale * self.strength) * math.sqrt(squared)

    def bias_norm(self) -> float:
        """‖Δb‖, added whatever the input; NaN for a trained bias, as that needs the base's."""
        if self.trained_bias is not None:
            return math.nan
        return abs(self.scale * self.strength) * size_of(self.lora_bias)


def require_numbers(name: str, tensor: Tensor | None, *, may_lack: bool) -> None:
    """Refuse what is no finite tensor of floating point.

    Args:
        name: of the tensor, for the error.
        tensor: of an adapter.
        may_lack: whether None is right.

    Raises:
        AdapterError: naming the tensor.
    """
    if tensor is None and may_lack:
        return
    if not isinstance(tensor, Tensor):
        raise AdapterError(f"{name} is a {type(tensor).__name__}; expected a tensor.")
    if tensor.dtype not in _DTYPES:
        raise AdapterError(
            f"factors must be floating point of 16 bits or more, and {name} is "
            f"{tensor.dtype}; dequantise the adapter before it is read."
        )
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"the factors contain NaN or infinite entries (in {name}).")


def require_products(sizes: Mapping[str, float], dtype: torch.dtype) -> None:
    """Refuse sizes whose products overflow.

    Products of tensors larger than √max are infinite, or NaN, wherever they are applied.

    Args:
        sizes: norm by the tensor's name.
        dtype: in which it is computed.

    Raises:
        AdapterError: naming the tensor.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    limit = math.sqrt(torch.finfo(dtype).max)
    for name, size in sizes.items():
        if not size <= limit:
            raise AdapterError(
                f"{name} is too large to compute with: of norm {size:.2g}, and products beyond "
                f"{limit:.2g} overflow in {dtype}. The training diverged, or the file is damaged."
            )


def size_of(tensor: Tensor | None) -> float:
    """The norm of a tensor's entries in float64; 0 for None.

    Args:
        tensor: of any shape.
    """
    if tensor is None:
        return 0.0
    return float(torch.linalg.vector_norm(in_float64(tensor.detach())))


def dense_factors(delta: Float[Tensor, "out in"]) -> LoRAFactors:
    """Any ΔW as factors, without loss: an identity stands on its smaller side.

    Args:
        delta: ΔW.
    """
    out, inputs = delta.shape
    if out <= inputs:
        return LoRAFactors(delta, torch.eye(out, dtype=delta.dtype, device=delta.device))
    return LoRAFactors(torch.eye(inputs, dtype=delta.dtype, device=delta.device), delta)
