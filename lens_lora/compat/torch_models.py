"""Models of torch that are compiled, or whose weights are spread over processes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lens_lora.compat.torch_modules import modules_in, own_parameters

# What modules that wrap others during training call the wrapped one, which stands in the keys of
# files that were saved from them: of torch.compile, FSDP and checkpointing.
WRAPPED_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def uncompiled(model: Any) -> Any:
    """The model that `torch.compile` has wrapped; any other model itself.

    The wrapper is of a private class, and runs code that does not look for hooks added later.
    """
    if type(model).__name__ == "OptimizedModule":
        return modules_in(model)["_orig_mod"]
    return model


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called; nothing public tells it, or takes it back."""
    return module._compiled_call_impl is not None


def samples_experts(module: nn.Module) -> bool:
    """Whether it draws experts by chance in training, whatever its settings are.

    Phi-3.5-MoE does (`sparsemixer`): in transformers 5 in its router, in 4 in the block of experts.
    """
    return type(module).__name__ in ("PhimoeTopKRouter", "PhimoeSparseMoeBlock")


def compile_no_more(model: nn.Module) -> None:
    """Let the modules of a model compute what they did before `compile()`, for good."""
    for module in model.modules():
        module._compiled_call_impl = None


def is_sharded(parameter: Any) -> bool:
    """Whether it is a DTensor, of which a process may hold a part only.

    Asked for by name, as to import the class takes as long as to import torch.
    """
    return "DTensor" in [cls.__name__ for cls in type(parameter.data).__mro__]


def gathers_weights(module: nn.Module) -> bool:
    """Whether FSDP2 puts the module's weights together whenever it runs; asked for by name too."""
    return "FSDPModule" in [cls.__name__ for cls in type(module).__mro__]


def gathered_modules(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """The modules whose weights FSDP2 puts together, and all that is within them.

    Args:
        modules: those of the model; of a bridge also those of its Hugging Face model.
    """
    gathered: set[nn.Module] = set()
    for module in modules:
        if gathers_weights(module):
            gathered.update(module.modules())
    return gathered


def is_over_ranks(modules: Collection[nn.Module]) -> bool:
    """Whether processes hold parts of a model's weights, and send one another what they lack.

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
        first, size: the first of its entries that this process holds, and how many it holds.
    """

    group: Any
    axis: int
    first: int
    size: int


def split_of(weight: Any) -> Split | None:
    """How a DTensor is split along one axis in parts that follow one another; None if otherwise."""
    placements = weight.placements
    is_in_order = len(placements) == 1 and type(placements[0]).__name__ == "Shard"
    if not is_in_order:
        return None
    mesh = weight.device_mesh
    axis = placements[0].dim % weight.ndim
    # As torch.chunk divides, which DTensor follows.
    sizes = [len(part) for part in torch.arange(weight.shape[axis]).chunk(mesh.size())]
    sizes += [0] * (mesh.size() - len(sizes))
    rank = mesh.get_local_rank()
    return Split(mesh.get_group(), axis, sum(sizes[:rank]), sizes[rank])


def part_here(weight: Any) -> Tensor:
    """The part of a DTensor that this process holds."""
    return weight.to_local()


def in_whole(tensor: Tensor) -> Tensor:
    """A tensor as it is; a DTensor gathered from all processes, each of which must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]
