"""Models of torch that are compiled, or whose weights are spread over processes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lens_lora.compat.torch_modules import children_of, own_parameters

# The names that wrappers for training (torch.compile, FSDP, checkpointing) give to the wrapped
# module; the keys of files that were saved from them contain these names.
WRAPPED_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def uncompiled(model: Any) -> Any:
    """The model inside the wrapper of `torch.compile`; any other model is returned as it is.

    The wrapper is of a private class, and runs code that ignores hooks which were added later.
    """
    if type(model).__name__ == "OptimizedModule":
        return children_of(model)["_orig_mod"]
    return model


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called; nothing public tells, or undoes it."""
    return module._compiled_call_impl is not None


def samples_experts(module: nn.Module) -> bool:
    """Whether a module draws experts at random in training mode, whatever its settings are.

    Phi-3.5-MoE does (`sparsemixer`): in its router in transformers 5, in the block of experts in 4.
    """
    return type(module).__name__ in ("PhimoeTopKRouter", "PhimoeSparseMoeBlock")


def compile_no_more(model: nn.Module) -> None:
    """Let the modules of a model compute what they did before `compile()`, for good."""
    for module in model.modules():
        module._compiled_call_impl = None


def is_sharded(parameter: Any) -> bool:
    """Whether this is a DTensor, of which a process may hold only a part.

    The class is recognised by its name, because importing it takes as long as importing torch.
    """
    return "DTensor" in [cls.__name__ for cls in type(parameter.data).__mro__]


def gathers_weights(module: nn.Module) -> bool:
    """Whether FSDP2 gathers the module's weights whenever it runs; recognised by name as well."""
    return "FSDPModule" in [cls.__name__ for cls in type(module).__mro__]


def gathered_modules(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """The modules whose weights FSDP2 gathers, with all modules inside them.

    Args:
        modules: the modules of the model; for a bridge, also those of its Hugging Face model.
    """
    gathered: set[nn.Module] = set()
    for module in modules:
        if gathers_weights(module):
            gathered.update(module.modules())
    return gathered


def is_over_ranks(modules: Collection[nn.Module]) -> bool:
    """Whether each process holds parts of a model's weights, and gets the rest from the others.

    Args:
        modules: as for `gathered_modules`.
    """
    if gathered_modules(modules):
        return True
    return any(map(is_sharded, itertools.chain.from_iterable(map(_weights_in, modules))))


def _weights_in(module: nn.Module) -> Collection[nn.Parameter]:
    return own_parameters(module).values()


class Split(NamedTuple):
    """How a weight is split over processes along one of its axes.

    Attributes:
        group: the processes.
        axis: which axis is split.
        first, size: the first entry along this axis that this process holds, and how many it holds.
    """

    group: Any
    axis: int
    first: int
    size: int


def split_of(weight: Any) -> Split | None:
    """How a DTensor is split into consecutive parts along one axis; None if it is not so split."""
    placements = weight.placements
    is_in_order = len(placements) == 1 and type(placements[0]).__name__ == "Shard"
    if not is_in_order:
        return None
    mesh = weight.device_mesh
    axis = placements[0].dim % weight.ndim
    # A DTensor is divided as torch.chunk divides.
    sizes = [len(part) for part in torch.arange(weight.shape[axis]).chunk(mesh.size())]
    sizes += [0] * (mesh.size() - len(sizes))
    rank = mesh.get_local_rank()
    return Split(mesh.get_group(), axis, sum(sizes[:rank]), sizes[rank])


def part_here(weight: Any) -> Tensor:
    """The part of a DTensor that this process holds."""
    return weight.to_local()


def in_whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or a DTensor gathered from all processes; each of them must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]
