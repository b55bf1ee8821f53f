"""A model that is known only by its configuration: its sizes, and the memory of its weights.

The Hugging Face model is made on torch's device 'meta', where a tensor has a shape and no numbers.
Nothing is downloaded except the configuration, if the user names it by a hub id.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lens_lora.core import ModelSizes
from lens_lora.errors import ModelStateError


@dataclasses.dataclass(frozen=True)
class OnDevice:
    """The part of a model that is on one device.

    Attributes:
        blocks: the number of its blocks.
        weights: the bytes of its weights, where tied weights count once.
    """

    blocks: int
    weights: int


@dataclasses.dataclass(frozen=True)
class UnloadedModel:
    """A model that was not loaded, as its configuration describes it.

    Attributes:
        sizes: the sizes that the planner of passes needs.
        weights: the bytes of all weights, where tied weights count once.
        factors: the number of entries of LoRA factors of rank 1 on every linear module of blocks.
        devices: the part of the model on each device.
    """

    sizes: ModelSizes
    weights: int
    factors: int
    devices: tuple[OnDevice, ...]


def unloaded(
    name: str,
    dtype: torch.dtype | None,
    *,
    keeps_patterns: bool = True,
    max_memory: float | None = None,
    devices: int = 1,
) -> UnloadedModel:
    """Read from a configuration alone what the planner needs to know about a model.

    Args:
        name: a folder, a config.json, or a hub id.
        dtype: the dtype of the weights; None for the one that the configuration names.
        keeps_patterns: whether attention patterns will be hook points (eager attention).
        max_memory: the bound in bytes that the lens will have.
        devices: the number of equal devices over which the model is spread.

    Raises:
        ModelStateError: there is no configuration, or it is not of a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        chosen = dtype or stored or torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=chosen)
    except (OSError, ValueError) as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise ModelStateError(
            f"{name}: no configuration of a causal language model: {first_line}"
        ) from error
    linears = _linears_of_blocks(model)
    text = config.get_text_config()
    d_model = int(text.hidden_size)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None)
    sizes = ModelSizes(
        n_layers=int(text.num_hidden_layers),
        d_model=d_model,
        d_mlp=int(inner or 4 * d_model),
        n_heads=int(text.num_attention_heads),
        d_vocab=int(text.vocab_size),
        sites=len(linears),
        dtype=chosen,
        keeps_patterns=keeps_patterns,
        max_memory=max_memory,
    )
    weights = {id(weight): weight.nbytes for weight in model.parameters()}
    factors = sum(rows + columns for rows, columns in linears)
    return UnloadedModel(
        sizes, sum(weights.values()), factors, _spread(model, sizes.n_layers, devices)
    )


def _spread(model: PreTrainedModel, layers: int, devices: int) -> tuple[OnDevice, ...]:
    """Divide a model evenly over equal devices, by the bytes of its weights.

    The embeddings come first, then the blocks, and then the last norm and the head. As with
    device_map='balanced', a block is never divided: it lies on the device in whose share of all
    bytes its middle falls.

    Args:
        model: the model on torch's device 'meta'.
        layers: the number of its blocks.
        devices: the number of devices.
    """
    sizes = _sizes_in_order(model, layers)
    parts = [OnDevice(0, 0)] * devices
    before = 0
    for place, size in enumerate(sizes):
        middle = (before + size / 2) / sum(sizes)
        device = min(int(devices * middle), devices - 1)
        blocks, weights = dataclasses.astuple(parts[device])
        is_block = 1 <= place <= layers
        if is_block:
            blocks += 1
        parts[device] = OnDevice(blocks, weights + size)
        before += size
    return tuple(parts)


def _sizes_in_order(model: PreTrainedModel, layers: int) -> list[int]:
    """The bytes of the modules before the blocks, of each block, and of the modules after them.

    Tied weights are one parameter, which is counted at its first use.
    """
    # The blocks are the first list with as many modules as there are layers: a list of experts
    # comes later, as it is within a block.
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    of_layers = [modules for modules in lists if len(modules) == layers]
    if not of_layers:
        lengths = [len(modules) for modules in lists]
        raise ModelStateError(
            f"{type(model).__name__}: its configuration names {layers} layers, and its lists of "
            f"modules have {lengths}, so its blocks are not known",
            remedy="load the model, and ask ll.LoraLens of it what it takes.",
        )
    blocks = of_layers[0]
    place_of_weight: dict[int, int] = {}
    for place, block in enumerate(blocks, start=1):
        for weight in block.parameters():
            place_of_weight[id(weight)] = place

    behind_blocks = layers + 1
    sizes = [0] * (layers + 2)
    has_seen_a_block = False
    for weight in model.parameters():
        if id(weight) in place_of_weight:
            has_seen_a_block = True
            place = place_of_weight[id(weight)]
        else:
            place = behind_blocks if has_seen_a_block else 0
        sizes[place] += weight.nbytes
    return sizes


def _linears_of_blocks(model: PreTrainedModel) -> list[tuple[int, int]]:
    """The shape of the weight of each linear module of the blocks, to which a LoRA may be added."""
    head = model.get_output_embeddings()
    shapes: list[tuple[int, int]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            rows, columns = module.weight.shape
            shapes.append((rows, columns))
    return shapes
