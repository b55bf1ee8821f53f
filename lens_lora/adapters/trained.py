"""A module's own parameters after training, beside the factors that an adapter has elsewhere.

PEFT trains whole modules (`modules_to_save`), rows of an embedding or a head
(`trainable_token_indices`) and biases (`bias="all"`), and stores embeddings whole
(`save_embedding_layers`). All of them take the place of the base's parameters:

    linear module, head    ΔW = W' − W     [out, in],      Δb = b' − b   [out]
    embedding              ΔW = (E' − E)ᵀ  [d, vocab]
    rows t of either       the same, and 0 outside these rows
    norm                   Δγ = γ' − γ,    Δβ = β' − β     [d]

so each is an exact update where the base is at hand (hooked/updates.py).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.adapters.factors import LoRAFactors, require_numbers, require_products, size_of
from lens_lora.errors import AdapterError

__all__ = ["ModuleUpdate", "TrainedModule"]

_TENSORS = ("weight", "bias", "base_weight")


@dataclasses.dataclass(frozen=True)
class TrainedModule:
    """A module's parameters after training, in place of the base's: ΔW = weight − W.

        >>> import torch
        >>> TrainedModule(weight=torch.ones(4, 8)).rank
        4

    Args:
        weight: as Hugging Face stores it: [out, in] of a linear module ([in, out] of GPT-2's
            Conv1D), [vocab, d] of an embedding, [d] of a norm. None where only the bias changes.
        bias: [out], or β of a norm.
        tokens: [row], which rows of an embedding or a head `weight` holds; None for all.
        base_weight: all of the base's weight as the adapter saw it, where the file holds it. PEFT
            writes it into the base; beside a copy only what is tied to the base's sees it.
        tied: whether a head that the base ties to this embedding changes with it, and the other
            way round. A copy of its own (`modules_to_save`) does not.
        strength: multiplies the whole update.

    Raises:
        AdapterError: tensors that are not finite or do not fit together.
    """

    weight: Tensor | None = None
    bias: Float[Tensor, "out"] | None = None
    tokens: Int[Tensor, "row"] | None = None
    base_weight: Tensor | None = None
    tied: bool = False
    strength: float = 1.0

    def __post_init__(self) -> None:
        for name in _TENSORS:
            require_numbers(name, getattr(self, name), may_lack=True)
        if not isinstance(self.strength, numbers.Real) or not math.isfinite(self.strength):
            raise AdapterError(f"strength is {self.strength!r}; expected a finite number.")
        if self.weight is None and self.bias is None:
            raise AdapterError("a trained module has a weight or a bias, and this one has neither.")
        if self.weight is not None and (self.weight.ndim not in (1, 2) or 0 in self.weight.shape):
            raise AdapterError(
                f"weight is {tuple(self.weight.shape)}; expected a matrix, or a norm's vector."
            )
        if self.bias is not None and (self.bias.ndim != 1 or not len(self.bias)):
            raise AdapterError(f"bias is {tuple(self.bias.shape)}; expected a vector.")
        self._require_tokens()
        held = [tensor for name in _TENSORS if (tensor := getattr(self, name)) is not None]
        sizes = {name: size_of(getattr(self, name)) for name in _TENSORS}
        require_products(sizes, held[0].dtype)

    def _require_tokens(self) -> None:
        if self.tokens is None:
            return
        if not isinstance(self.tokens, Tensor) or self.tokens.dtype not in (
            torch.int32,
            torch.int64,
        ):
            raise AdapterError(f"tokens are {self.tokens!r}; expected a tensor of ids.")
        ids, shape = self.tokens.tolist(), () if self.weight is None else self.weight.shape
        if self.tokens.ndim != 1 or len(shape) != 2 or len(ids) not in shape:
            raise AdapterError(
                f"tokens are {ids}, and weight is {tuple(shape)}; expected one row each."
            )
        if len(set(ids)) < len(ids) or min(ids) < 0:
            raise AdapterError(f"tokens are {ids}; expected ids from 0 on, each once.")

    @property
    def rank(self) -> int:
        """The rank that ΔW may have: the smaller side of `weight`; 1 for a bias alone."""
        return 1 if self.weight is None else min(self.weight.shape)

    def scaled(self, factor: float) -> TrainedModule:
        """The whole update times a number.

        Args:
            factor: what ΔW and Δb are multiplied by.
        """
        return dataclasses.replace(self, strength=self.strength * factor)

    def turned(self) -> TrainedModule:
        """With `weight` and `base_weight` transposed; a norm's vector is its own."""
        held = {"weight": self.weight, "base_weight": self.base_weight}
        weights = {name: t.T for name, t in held.items() if t is not None and t.ndim == 2}
        return dataclasses.replace(self, **weights)

    def rows(self, rows: Tensor) -> TrainedModule:
        """The update of some output features only, of parameters turned to [out, in].

        Args:
            rows: their indices, [row].
        """
        cut = {
            name: getattr(self, name)[rows] for name in _TENSORS if getattr(self, name) is not None
        }
        return dataclasses.replace(self, **cut)

    def norm(self) -> float:
        """‖ΔW‖_F is not known here.

        Raises:
            AdapterError: always: ΔW depends on the base model's weight.
        """
        raise AdapterError(
            "ΔW of a trained module depends on the base model's weight: lens.delta_w(site) of a "
            "LoraLens has it."
        )

    def bias_norm(self) -> float:
        """‖Δb‖; NaN where a bias was trained, as that needs the base's."""
        return 0.0 if self.bias is None else math.nan


ModuleUpdate: TypeAlias = LoRAFactors | TrainedModule
