"""A model whose linear maps transformers has split over processes (`tp_plan="auto"`).

When transformers has loaded the model, a map that is split by rows writes only this process's part
of its output, and a map that is split by columns reads only a part of its input. A lens reads the
whole input of a map, and adds to its whole output. So this module makes every split map read and
write whole rows, on every process:

    by rows (colwise):     y = joined(W_part · x)        joined puts the parts of all side by side
    by columns (rowwise):  y = summed(W_part · part(x))  summed adds what all processes computed

1. Only the weights stay split. Activations are whole, and equal, on every process, so that
   everything else is computed as on a single process; attention runs over all heads on each.
2. Both have derivatives in both modes and of any order: the adjoint of a sum over processes is a
   copy, and the adjoint of a copy is a sum.
3. All processes must make the same calls on the same prompts, in the same order.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.overrides import handle_torch_function, has_torch_function_unary

from lens_lora import compat
from lens_lora.core import Adapter, TrainedModule
from lens_lora.core.adapter import module_path
from lens_lora.core.model import modules_of
from lens_lora.errors import AdapterError, ModelStateError

# The ways in which transformers splits modules that can be made whole here, by the names of its
# plans. Embeddings and the norms of heads compute the same as on one process.
_MADE_WHOLE = {
    "colwise",
    "colwise_rep",
    "colwise_gather_output",
    "rowwise",
    "rowwise_rep",
    "rowwise_split_input",
    "embedding_rowwise",
    "replicated_with_grad_allreduce",
    "replicate",
}

# The number of a layer within a path; a plan has a star in its place.
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def make_maps_whole(hf_model: Any) -> None:
    """Let every linear map that transformers has split read and write whole rows, for good.

    Args:
        hf_model: a model of any kind; one that is not split stays as it is.

    Raises:
        ModelStateError: a module is split in a way that is not known here.
    """
    if not is_split(hf_model):
        return
    for module in split_maps(hf_model):
        compat.set_forward(module, SplitLinear(module))


def split_maps(hf_model: Any) -> list[Any]:
    """The linear maps whose weights are divided among the processes.

    Args:
        hf_model: a model that is split.

    Raises:
        ModelStateError: a module is split in a way that is not known here.
    """
    for name, style in hf_model.tp_plan.items():
        if style not in _MADE_WHOLE:
            raise split_otherwise(f"{name} is split over processes as {style!r}")
    maps: list[Any] = []
    for path, module in hf_model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        planned = hf_model.tp_plan.get(_NUMBER.sub(".*", path), "")
        weight: Any = module.weight
        if compat.is_sharded(weight):
            if compat.split_of(weight) is None:
                raise split_otherwise(f"{path}.weight is a DTensor of {weight.placements}")
            maps.append(module)
        elif planned.startswith(("colwise", "rowwise")):
            raise split_otherwise(f"{path} is split as {planned!r}, and its weight is no DTensor")
    if not maps:
        raise split_otherwise(
            f"the model was loaded for {hf_model.tp_size} processes by tp_plan=, and none of its "
            "weights is a DTensor"
        )
    return maps


def is_split(hf_model: Any) -> bool:
    """Whether transformers has loaded the model for several processes, with parts of weights."""
    return (getattr(hf_model, "tp_size", None) or 1) > 1


def computes_whole(module: nn.Module) -> bool:
    """Whether a module of a split model reads and writes the same as on one process."""
    return isinstance(module, nn.Embedding) or isinstance(compat.own_forward(module), SplitLinear)


def split_otherwise(fact: str) -> ModelStateError:
    """The error of a model whose weights are split in a way that is not known here."""
    return ModelStateError(
        f"{fact}: a lens adds to the whole output of a map, and knows how to join maps that "
        "transformers (5.17 or later) has split by rows or by columns.",
        remedy="Load the model without tp_plan: on one device, or over several by "
        "ll.load(name, adapter, device_map='balanced').",
        in_shell="Load the model on one device, or over several by --device-map balanced.",
    )


def refuse_modules_trained_whole(model: nn.Module, adapter: Adapter) -> None:
    """Refuse modules that were trained whole if the base's weights are split over processes.

    Args:
        model: the base, or the hooked model.
        adapter: the adapter to be laid over it.

    Raises:
        AdapterError: the adapter has such a module.
    """
    trained = [key for key, update in adapter.modules.items() if isinstance(update, TrainedModule)]
    if trained and compat.is_over_ranks(modules_of(model)):
        path = module_path(trained[0])
        raise AdapterError(
            f"{path} was trained whole (modules_to_save, or a norm), and the base's weights are "
            "split over processes (tp_plan= or FSDP2): W' − W is not made from their parts",
            remedy=f"load the model whole on every process, or leave the module out: "
            f"adapter.without_modules({path!r}).",
            in_shell="load the model whole on every process.",
        )


class SplitLinear:
    """The forward of a linear map if this process holds only some rows or columns of its weight.

    Args:
        module: the map; its weight is a DTensor.

    Raises:
        ModelStateError: the weight is split in a way that is not known here.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        split = compat.split_of(module.weight)
        if split is None:
            raise split_otherwise(f"a weight is a DTensor of {module.weight.placements}")
        self._group = split.group
        self._by_rows = split.axis == 0
        self._first = split.first
        self._size = split.size

    def __call__(self, x: Float[Tensor, "*row in"]) -> Float[Tensor, "*row out"]:
        """The whole output of the whole input, on every process."""
        part = compat.part_here(self._module.weight)
        x = _copied(x, self._group)
        if self._by_rows:
            rows = linear(x, part)
            after = self._module.out_features - self._first - self._size
            padded = pad(rows, (self._first, after))
        else:
            padded = linear(x.narrow(-1, self._first, self._size), part)
        y = _summed(padded, self._group)
        bias = self._module.bias
        return y if bias is None else y + compat.in_whole(bias)


def _summed(x: Tensor, group: Any) -> Tensor:
    """The sum over processes, also of tensors that carry tangents of their own."""
    if has_torch_function_unary(x):
        return handle_torch_function(_summed, (x,), x, group)
    return _Summed.apply(x, group)


def _copied(x: Tensor, group: Any) -> Tensor:
    """Mark a tensor as one that every process has; it may carry tangents of its own."""
    if has_torch_function_unary(x):
        return handle_torch_function(_copied, (x,), x, group)
    return _Copied.apply(x, group)


class _Summed(torch.autograd.Function):
    """The sum of the tensors of all processes, on each of them. Its adjoint is `_Copied`."""

    @staticmethod
    def forward(x: Tensor, group: Any) -> Tensor:
        summed = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        del output
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Copied.apply(gradients[0], ctx.group), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Summed.apply(tangents[0], ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        del info
        x, group = args
        return _Summed.apply(x, group), in_dims[0]


class _Copied(torch.autograd.Function):
    """A tensor that every process has; gradients of all are summed. Its adjoint is `_Summed`."""

    @staticmethod
    def forward(x: Tensor, group: Any) -> Tensor:
        del group
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        del output
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Summed.apply(gradients[0], ctx.group), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Copied.apply(tangents[0], ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        del info
        x, group = args
        return _Copied.apply(x, group), in_dims[0]
