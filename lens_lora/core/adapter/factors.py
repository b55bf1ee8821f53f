"""The update of one module: factors with ΔW = s B A, or the parameters after training.

PEFT also trains whole modules (`modules_to_save`), rows of an embedding or a head
(`trainable_token_indices`) and biases (`bias="all"`), and stores whole embeddings
(`save_embedding_layers`). All of these replace parameters of the base:

    linear module, head    ΔW = W' − W     [out, in],      Δb = b' − b   [out]
    embedding              ΔW = (E' − E)ᵀ  [d, vocab]
    rows t of either       the same, and 0 outside these rows
    norm                   Δγ = γ' − γ,    Δβ = β' − β     [d]

so each of them is an exact update, given the base (core/model/updates.py).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lens_lora import guesses
from lens_lora.compat import float64_device, in_float64
from lens_lora.core.adapter.dense import is_reversal, reversal, written_out
from lens_lora.errors import AdapterError, UnsupportedAdapterError

# The fields of `LoRAFactors` with one number for each output feature.
_VECTORS = ("lora_bias", "trained_bias", "magnitude")
# The tensors of a `TrainedModule`.
_TRAINED = ("weight", "bias", "base_weight")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class LoRAFactors(guesses.Answering):
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
        base_weight: the base's weight during training, if the file holds it, stored as Hugging Face
            does. Its difference from the base at hand is a part of the update.
        strength: multiplies the whole update.
        experts: for a parameter that holds all experts in one tensor (`target_parameters`), their
            number: ΔW_e = scale · B_e A_e, where the ranks of the experts follow one another. 1 for
            a parameter of a module that is not linear, such as a router; 0 for a linear module.

    Raises:
        AdapterError: A and B disagree on the rank, are not matrices, are not finite, or are so
            large that their products overflow.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scale: float = 1.0
    lora_bias: Float[Tensor, " out"] | None = None
    trained_bias: Float[Tensor, " out"] | None = None
    magnitude: Float[Tensor, " out"] | None = None
    base_weight: Tensor | None = None
    strength: float = 1.0
    experts: int = 0

    remedies: ClassVar[Mapping[str, str]] = guesses.OF_FACTORS

    @classmethod
    def dense(cls, delta: Float[Tensor, "out in"]) -> LoRAFactors:
        """Write any ΔW as factors, without loss.

        One factor is the identity in reverse, which takes no memory (`core/adapter/dense.py`).

        Args:
            delta: ΔW.
        """
        out, inputs = delta.shape
        if out <= inputs:
            return cls(delta.flip(0), reversal(out, delta.dtype, delta.device))
        return cls(reversal(inputs, delta.dtype, delta.device), delta.flip(1))

    def __post_init__(self) -> None:
        for name in ("A", "B"):
            if isinstance(getattr(self, name), Tensor):
                object.__setattr__(self, name, written_out(getattr(self, name)))
        tensors = {"A": self.A, "B": self.B, **_tensors(self, (*_VECTORS, "base_weight"))}
        sizes = _finite_norms(tensors)
        _require_finite(scale=self.scale, strength=self.strength)
        self._require_shapes()
        sizes["ΔW"] = abs(self.scale * self.strength) * sizes["A"] * sizes["B"]
        _require_products(sizes, torch.promote_types(self.A.dtype, self.B.dtype))

    def _require_shapes(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            shapes = f"A is {tuple(self.A.shape)} and B is {tuple(self.B.shape)}"
            expected = "A [rank, in] and B [out, rank] with the same rank"
            raise AdapterError(f"{shapes}; expected {expected}.")
        if self.experts < 0 or (self.experts and self.rank % self.experts):
            raise AdapterError(f"{self.rank} ranks for {self.experts} experts; each has as many.")
        if 0 in self.A.shape or 0 in self.B.shape:
            raise AdapterError(f"empty factors: A {tuple(self.A.shape)}, B {tuple(self.B.shape)}.")
        for name, vector in _tensors(self, _VECTORS).items():
            if vector.shape != self.B.shape[:1]:
                shape = tuple(vector.shape)
                raise AdapterError(f"{name} is {shape} and B writes {len(self.B)} features.")

    @property
    def rank(self) -> int:
        """The rank r: the number of A's rows and of B's columns."""
        return self.A.shape[0]

    def by_expert(self) -> list[LoRAFactors]:
        """The factors of each expert; for any other module, these factors alone."""
        if self.experts < 2:
            return [self]
        rows_of_A = self.A.chunk(self.experts)
        columns_of_B = self.B.chunk(self.experts, 1)
        return [
            dataclasses.replace(self, A=A, B=B, experts=0)
            for A, B in zip(rows_of_A, columns_of_B, strict=True)
        ]

    @property
    def width(self) -> int | None:
        """The number of features that A reads; None if it is left open (`Adapter.constant`)."""
        may_be_open = self.A.shape[1] == 1 and self.lora_bias is not None
        if may_be_open and not bool(self.A.any()):
            return None
        return self.A.shape[1]

    @property
    def is_plain(self) -> bool:
        """Whether the update is s·B·A of one linear map, and nothing else."""
        other_tensors = (self.lora_bias, self.trained_bias, self.magnitude, self.base_weight)
        return not self.experts and all(tensor is None for tensor in other_tensors)

    @property
    def needs_base_weight(self) -> bool:
        """Whether ΔW depends on the base model's W (DoRA)."""
        return self.magnitude is not None

    @property
    def is_dense(self) -> bool:
        """Whether one factor is the identity in reverse, and the other holds all of ΔW."""
        return not self.experts and (is_reversal(self.A) or is_reversal(self.B))

    @property
    def base_part(self) -> str | None:
        """The part of the update that depends on the base's own parameters, in words.

        None if the update does not depend on the base.
        """
        if self.magnitude is not None:
            return "DoRA's magnitude"
        return None if self.trained_bias is None else "a trained bias"

    def output_count(self, inputs: int) -> int:
        """The number of features that the whole module writes.

        Args:
            inputs: the number of features that it reads.
        """
        del inputs
        return len(self.B)

    def scaled(self, factor: float) -> LoRAFactors:
        """Multiply the whole update by a number.

        Args:
            factor: multiplies ΔW and Δb.
        """
        if self.trained_bias is None and self.magnitude is None:
            return dataclasses.replace(self, scale=self.scale * factor)
        return dataclasses.replace(self, strength=self.strength * factor)

    def rows(self, rows: Tensor) -> LoRAFactors:
        """The update of some output features only (one part of a fused projection).

        Args:
            rows: indices of output features, [row].
        """
        by_output = _tensors(self, ("B", *_VECTORS))
        cut = {name: tensor[rows] for name, tensor in by_output.items()}
        if not self.experts and is_reversal(self.B):
            part = LoRAFactors.dense(self.A.flip(0)[rows])
            cut |= {"A": part.A, "B": part.B}
        return dataclasses.replace(self, **cut, base_weight=None)

    def materialise(
        self,
        weight: Float[Tensor, "out in"] | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "out in"]:
        """Compute the dense ΔW, without biases; for experts [ΔW_1 … ΔW_E], [out, expert · in].

        It is computed in the widest dtype of A, B, the weight and `dtype`.

        Args:
            weight: the base's W, on which DoRA's ΔW depends; for experts as wide as ΔW.
            dtype: a dtype such as torch.float64, so that the product of factors in half precision
                is not rounded to half precision; None for the dtype of the factors.

        Raises:
            AdapterError: DoRA without the weight.
        """
        widest = torch.promote_types(self.A.dtype, self.B.dtype)
        if weight is not None:
            widest = torch.promote_types(widest, weight.dtype)
        if dtype is not None:
            widest = torch.promote_types(widest, dtype)
        if self.experts > 1:
            return torch.cat([each.materialise(dtype=widest) for each in self.by_expert()], 1)
        plain = self.scale * self._product(widest)
        if self.magnitude is None:
            return self.strength * plain
        if weight is None:
            raise AdapterError("DoRA's ΔW depends on the base model's weight; pass it.")
        turned = weight.to(plain) + plain
        size = turned.norm(dim=1, keepdim=True)
        return self.strength * (self.magnitude[:, None] / size * turned - weight.to(plain))

    def _product(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Compute BA; where one factor is the identity in reverse, by reversing the other."""
        if is_reversal(self.B):
            return self.A.to(dtype).flip(0)
        if is_reversal(self.A):
            return self.B.to(dtype).flip(1)
        return self.B.to(dtype) @ self.A.to(dtype)

    def norm(self) -> float:
        """The Frobenius norm of ΔW, without building ΔW: ‖BA‖² = tr((BᵀB)(AAᵀ)).

        The norm of a change of bias, ‖Δb‖, is `bias_norm`.

        Raises:
            AdapterError: DoRA, whose ΔW depends on the base model.
        """
        if self.magnitude is not None:
            raise AdapterError("DoRA's ΔW depends on the base model's weight: use materialise.")
        if self.experts > 1:
            return math.hypot(*(each.norm() for each in self.by_expert()))
        if self.is_dense:
            change = self.A if is_reversal(self.B) else self.B
            return abs(self.scale * self.strength) * norm_of(change)
        A = in_float64(self.A)
        B = in_float64(self.B)
        squared = float(((B.T @ B) * (A @ A.T)).sum())
        return abs(self.scale * self.strength) * math.sqrt(max(squared, 0.0))

    def bias_norm(self) -> float:
        """‖Δb‖; NaN for a trained bias, whose change depends on the base."""
        if self.trained_bias is not None:
            return math.nan
        return abs(self.scale * self.strength) * norm_of(self.lora_bias)


@dataclasses.dataclass(frozen=True)
class TrainedModule(guesses.Answering):
    """A module's parameters after training, which replace the base's: ΔW = weight − W.

        >>> import torch
        >>> TrainedModule(weight=torch.ones(4, 8)).rank
        4

    Args:
        weight: the weight as Hugging Face stores it: [out, in] for a linear module ([in, out] for
            GPT-2's Conv1D), [vocab, d] for an embedding, [d] for a norm. None if only the bias
            changes.
        bias: the bias, [out], or β of a norm.
        tokens: [row], the ids of the rows of an embedding or a head that `weight` holds; None for
            all rows.
        base_weight: the base's whole weight during training, if the file holds it. PEFT writes it
            into the base; if the module itself is a copy, it only changes what is tied to the base.
        tied: whether a head that the base ties to this embedding changes with it, and vice versa. A
            copy of its own (`modules_to_save`) does not.
        strength: multiplies the whole update.

    Raises:
        AdapterError: tensors that are not finite or do not fit together.
    """

    weight: Tensor | None = None
    bias: Float[Tensor, " out"] | None = None
    tokens: Int[Tensor, " row"] | None = None
    base_weight: Tensor | None = None
    tied: bool = False
    strength: float = 1.0

    remedies: ClassVar[Mapping[str, str]] = guesses.OF_FACTORS

    def __post_init__(self) -> None:
        tensors = _tensors(self, _TRAINED)
        sizes = _finite_norms(tensors)
        _require_finite(strength=self.strength)
        if self.weight is None and self.bias is None:
            raise AdapterError("a trained module has a weight or a bias, and this one has neither.")
        if self.weight is not None:
            shape = tuple(self.weight.shape)
            if len(shape) not in (1, 2) or 0 in shape:
                raise AdapterError(f"weight is {shape}; expected a matrix, or a norm's vector.")
        if self.bias is not None:
            shape = tuple(self.bias.shape)
            if len(shape) != 1 or 0 in shape:
                raise AdapterError(f"bias is {shape}; expected a vector.")
        self._require_tokens()
        first_tensor = next(iter(tensors.values()))
        _require_products(sizes, first_tensor.dtype)

    def _require_tokens(self) -> None:
        if self.tokens is None:
            return
        is_tensor = isinstance(self.tokens, Tensor)
        if not is_tensor or self.tokens.dtype not in (torch.int32, torch.int64):
            raise AdapterError(f"tokens are {self.tokens!r}; expected a tensor of ids.")
        ids = self.tokens.tolist()
        shape = () if self.weight is None else self.weight.shape
        if self.tokens.ndim != 1 or len(shape) != 2 or len(ids) not in shape:
            raise AdapterError(f"tokens are {ids}, weight {tuple(shape)}; expected one row each.")
        if len(set(ids)) < len(ids) or min(ids) < 0:
            raise AdapterError(f"tokens are {ids}; expected ids from 0 on, each once.")

    @property
    def rank(self) -> int:
        """The rank that ΔW may have: the smaller side of `weight`; 1 for a bias alone."""
        return 1 if self.weight is None else min(self.weight.shape)

    @property
    def base_part(self) -> str:
        """The part of the update that depends on the base's parameters, which is all of it."""
        return "a module that was trained whole"

    def output_count(self, inputs: int) -> int:
        """How many features the whole module writes.

        Args:
            inputs: how many features it reads.
        """
        if self.weight is not None:
            return self.weight.numel() // inputs  # stored as [out, in] or [in, out]
        return 0 if self.bias is None else len(self.bias)

    def scaled(self, factor: float) -> TrainedModule:
        """The whole update times a number.

        Args:
            factor: the number that multiplies ΔW and Δb.
        """
        return dataclasses.replace(self, strength=self.strength * factor)

    def turned(self) -> TrainedModule:
        """The same module with its weights transposed; a norm's vector stays as it is."""
        matrices = {
            name: weight.T
            for name, weight in _tensors(self, ("weight", "base_weight")).items()
            if weight.ndim == 2
        }
        return dataclasses.replace(self, **matrices)

    def rows(self, rows: Tensor) -> TrainedModule:
        """The update of some output features only, of parameters turned to [out, in].

        Args:
            rows: indices of output features, [row].
        """
        cut = {name: tensor[rows] for name, tensor in _tensors(self, _TRAINED).items()}
        return dataclasses.replace(self, **cut)

    def norm(self) -> float:
        """‖ΔW‖_F is not known here.

        Raises:
            AdapterError: always: ΔW depends on the base model's weight.
        """
        raise AdapterError("a trained module's ΔW depends on the base; see lens.delta_w(site).")

    def bias_norm(self) -> float:
        """‖Δb‖; NaN where a bias was trained, as that needs the base's."""
        return 0.0 if self.bias is None else math.nan


ModuleUpdate: TypeAlias = LoRAFactors | TrainedModule
Updates = Mapping[str, ModuleUpdate]  # by Hugging Face module path
# The output rows of each part of a fused module, by the adapter's own key.
Parts = Mapping[str, Sequence[Int[Tensor, " _row"]]]


def module_path(key: str) -> str:
    """The module's path, without the name of its part in a sum."""
    return key.partition("@")[0]


def natural(item: tuple[str, Any]) -> list[tuple[int, int, str]]:
    """A sort key of (module path, anything), with 'layers.2' before 'layers.10'."""
    path, _ = item
    parts: list[tuple[int, int, str]] = []
    for part in path.split("."):
        # Numbers come before names; of two numbers the one with fewer digits is smaller.
        if part.isdigit():
            parts.append((0, len(part), part))
        else:
            parts.append((1, 0, part))
    return parts


def plain(path: str, update: ModuleUpdate) -> LoRAFactors:
    """The update, if it is sBA and a change of bias that the file holds.

    Raises:
        UnsupportedAdapterError: an update that is a change only beside the base.
    """
    part = update.base_part
    if isinstance(update, LoRAFactors) and part is None and update.base_weight is None:
        return update
    raise UnsupportedAdapterError(
        f"{path}: the adapter holds {part or 'a weight of the base'}, so its ΔW depends on the "
        "base model. Make it plain first: Adapter.between(base, peft_model.merge_and_unload())."
    )


def expert_factors(parts: Sequence[LoRAFactors]) -> LoRAFactors:
    """The factors of a stack of experts; those of a lower rank are filled up with zeros.

    Args:
        parts: the factors of each expert.
    """
    rank = max(part.rank for part in parts)
    rows_of_A: list[Tensor] = []
    columns_of_B: list[Tensor] = []
    for part in parts:
        missing = rank - part.rank
        scaled_B = part.scale * part.strength * part.B
        rows_of_A.append(functional.pad(part.A, (0, 0, 0, missing)))
        columns_of_B.append(functional.pad(scaled_B, (0, missing)))
    A = torch.cat(rows_of_A)
    B = torch.cat(columns_of_B, 1)
    return LoRAFactors(A, B, experts=len(parts))


def norm_of(tensor: Tensor | None) -> float:
    """The Euclidean norm of a tensor's entries in float64; 0 for None."""
    if tensor is None:
        return 0.0
    if is_reversal(tensor):
        return math.sqrt(len(tensor))
    entries = tensor.detach().to(float64_device(tensor.device))
    return float(torch.linalg.vector_norm(entries, dtype=torch.float64))


def _tensors(update: ModuleUpdate, names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors of an update, without those that it does not have."""
    tensors = {name: getattr(update, name) for name in names}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _finite_norms(tensors: Mapping[str, Any]) -> dict[str, float]:
    """The norm of each tensor; anything but finite tensors of floating point is refused."""
    norms: dict[str, float] = {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise AdapterError(f"{key} is a {type(tensor).__name__}; expected a tensor.")
        if tensor.dtype not in _DTYPES:
            fact = f"factors must be floating point of 16 bits or more, and {key} is {tensor.dtype}"
            raise AdapterError(f"{fact}; dequantise the adapter before loading it.")
        norm = norm_of(tensor)
        # A finite norm has finite terms; the norm of finite terms may overflow.
        if not math.isfinite(norm) and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"the factors contain NaN or infinite entries (in {key}).")
        norms[key] = norm
    return norms


def _require_finite(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise AdapterError(f"{name} is {value!r}; expected a finite number.")


def _require_products(sizes: Mapping[str, float], dtype: torch.dtype) -> None:
    """Refuse tensors larger than √max: their products are infinite, or NaN, wherever applied."""
    dtype = torch.promote_types(dtype, torch.float32)
    limit = math.sqrt(torch.finfo(dtype).max)
    for name, size in sizes.items():
        if not size <= limit:
            raise AdapterError(
                f"{name} is too large to compute with: its norm is {size:.2g}, and beyond "
                f"{limit:.2g} products overflow in {dtype}. The training diverged, or the file is "
                "damaged."
            )
