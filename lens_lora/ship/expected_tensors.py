"""Compute what a merge is to make of each tensor: W + ΔW, b + Δb, or a trained parameter.

`ExpectedTensors` finds, for each module of an adapter, the tensors of the base that a merge
changes, and `Expected.tensor` computes what is to stand there. Matrices are turned to [out, in],
whichever way the module stores them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lens_lora.core import Adapter, LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.formats.own_forward import is_transposed
from lens_lora.hosts.experts import as_one_map
from lens_lora.ship.merged_folder import sharing_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Expected(NamedTuple):
    """The tensor that a merge is to put in the place of one of the base's.

    Attributes:
        update: what the adapter adds to the module.
        turned: turns the module's tensor to [out, in].
        is_bias: whether the tensor is the module's bias, and not its weight.
    """

    update: ModuleUpdate
    turned: Callable[[Tensor], Tensor]
    is_bias: bool = False

    def tensor(self, W: Tensor) -> Tensor | None:
        """Compute the tensor that a merge must store: a weight as [out, in], a bias as it is.

        None for a weight whose shapes do not fit.

        Args:
            W: the base's tensor, as it is stored.
        """
        if self.is_bias:
            return _expected_bias(W, self.update)
        if isinstance(self.update, TrainedModule):
            return self._trained_weight(W, self.update)
        return self._weight_with_factors(W, self.update)

    def _trained_weight(self, W: Tensor, update: TrainedModule) -> Tensor | None:
        stored = W if update.base_weight is None else update.base_weight.to(W)
        weight = stored if update.weight is None else update.weight.to(W)
        if update.tokens is not None:
            weight = stored.index_copy(0, update.tokens, weight)
        return self.turned(weight) if weight.shape == W.shape else None

    def _weight_with_factors(self, W: Tensor, update: LoRAFactors) -> Tensor | None:
        stored = W if update.base_weight is None else update.base_weight.to(W)
        matrix = self.turned(stored)
        # A stack of experts is one map whose inputs lie side by side: [out, expert · in].
        experts = max(update.experts, 1)
        width = matrix.shape[1] // experts if update.width is None else update.width
        if stored.shape != W.shape or matrix.shape != (len(update.B), experts * width):
            return None
        return matrix + update.materialise(matrix)


def _expected_bias(b: Tensor, update: ModuleUpdate) -> Tensor:
    trained = update.bias if isinstance(update, TrainedModule) else update.trained_bias
    bias = b if trained is None else trained.to(b)
    if isinstance(update, TrainedModule) or update.lora_bias is None:
        return bias
    return bias + update.scale * update.strength * update.lora_bias.to(b)


class ExpectedTensors:
    """The base's tensors, and what a merge of the adapter is to make of them.

    Attributes:
        state: the base's tensors by name.
        tied: the other names of each tensor that is tied, by its name.
        changed: what the adapter changes, by name of the tensor.
        unknown: modules of the adapter that the base lacks.
        added_biases: names of biases that the adapter adds to maps of the base that have none.
    """

    def __init__(self, adapter: Adapter, base: PreTrainedModel) -> None:
        self.state: dict[str, Tensor] = base.state_dict()
        self.tied: dict[str, tuple[str, ...]] = sharing_in(base)
        self.changed: dict[str, Expected] = {}
        self.unknown: list[str] = []
        self.added_biases: list[str] = []
        modules = dict(base.named_modules())
        for key, update in adapter.modules.items():
            self._add(key, update, modules)

    def _add(self, key: str, update: ModuleUpdate, modules: Mapping[str, nn.Module]) -> None:
        if key in self.state:
            # A parameter, such as a stack of experts.
            name = key
            path = key.rpartition(".")[0]
        else:
            name = f"{key}.weight"
            path = key
        owner = modules.get(path)
        if owner is None or name not in self.state:
            self.unknown.append(key)
            return
        self.changed[name] = Expected(update, _turned(owner, update))
        self._add_bias(f"{key}.bias", update)
        if isinstance(update, TrainedModule) and update.tied:
            for other in self.tied.get(name, ()):
                self.changed.setdefault(other, self.changed[name])

    def _add_bias(self, name: str, update: ModuleUpdate) -> None:
        if name in self.state:
            self.changed[name] = Expected(update, torch.clone, is_bias=True)
        elif _adds_bias(update):
            self.added_biases.append(name)


def _turned(owner: Any, update: ModuleUpdate) -> Callable[[Tensor], Tensor]:
    """The function that turns a module's weight to [out, in]."""
    if isinstance(update, LoRAFactors) and update.experts > 1:
        return functools.partial(as_one_map, owner)
    if is_transposed(owner):
        return torch.t
    return torch.clone


def _adds_bias(update: ModuleUpdate) -> bool:
    if isinstance(update, TrainedModule):
        return update.bias is not None
    if update.trained_bias is not None:
        return True
    added = update.lora_bias
    return added is not None and update.strength != 0 and bool(added.any())
