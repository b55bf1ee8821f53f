"""A model that is known by its configuration alone: its sizes, and what its weights would take.

The Hugging Face model is made on torch's device 'meta', where a tensor has a shape and no numbers.
Nothing is downloaded but a configuration that the user names by a hub id.
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
    """What of a model lies on one device.

    Attributes:
        blocks: how many blocks.
        weights: bytes of all weights there, tied ones counted once.
    """

    blocks: int
    weights: int


@dataclasses.dataclass(frozen=True)
class UnloadedModel:
    """A model as its configuration says it will be.

    Attributes:
        sizes: as the planner of passes needs them.
        weights: bytes of all weights, tied ones counted once.
        factors: numbers in LoRA factors of rank 1 on every linear module of the blocks.
        devices: what lies on each device.
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
    """Read what the planner asks of a model from its configuration alone.

    Args:
        name: a folder, a config.json, or a hub id.
        dtype: of the weights; None for what the configuration says.
        keeps_patterns: whether attention patterns will be hook points (eager attention).
        max_memory: the bound in bytes that the lens will have.
        devices: over how many equal devices the model is spread.

    Raises:
        ModelStateError: no configuration there, or one of no causal language model.
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
    """What lies on each of several equal devices, over which all bytes are divided evenly.

    Embeddings come first, blocks follow one another, and the last norm and the head come last. A
    block is never divided, as under device_map='balanced'; it lies on the device in whose part of
    all bytes its middle is.

    Args:
        model: on torch's device 'meta'.
        layers: how many blocks it has.
        devices: how many there are.
    """
    # A list of as many modules as there are layers; a mixture's experts are within its blocks.
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks = next(list(found) for found in lists if len(found) == layers)
    # Tied weights are one parameter, which is listed where it is first used.
    of_block = {
        id(weight): place for place, block in enumerate(blocks, 1) for weight in block.parameters()
    }
    sizes = [0] * (layers + 2)
    place = 0
    for weight in model.parameters():
        place = of_block.get(id(weight), 0 if place == 0 else layers + 1)
        sizes[place] += weight.nbytes
    found = [OnDevice(0, 0)] * devices
    before = 0
    for place, size in enumerate(sizes):
        middle = (before + size / 2) / sum(sizes)
        device = min(int(devices * middle), devices - 1)
        so_far = found[device]
        is_block = 1 <= place <= layers
        found[device] = OnDevice(so_far.blocks + is_block, so_far.weights + size)
        before += size
    return tuple(found)


def _linears_of_blocks(model: PreTrainedModel) -> list[tuple[int, int]]:
    """The shape of the weight of each linear module of the blocks, on which a LoRA may lie."""
    head = model.get_output_embeddings()
    shapes: list[tuple[int, int]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            rows, columns = module.weight.shape
            shapes.append((rows, columns))
    return shapes
