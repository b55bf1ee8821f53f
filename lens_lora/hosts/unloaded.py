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
class UnloadedModel:
    """A model as its configuration says it will be.

    Attributes:
        sizes: as the planner of passes needs them.
        weights: bytes of all weights, tied ones counted once.
        factors: numbers in LoRA factors of rank 1 on every linear module of the blocks.
    """

    sizes: ModelSizes
    weights: int
    factors: int


def unloaded(
    name: str,
    dtype: torch.dtype | None,
    *,
    keeps_patterns: bool = True,
    max_memory: float | None = None,
) -> UnloadedModel:
    """Read what the planner asks of a model from its configuration alone.

    Args:
        name: a folder, a config.json, or a hub id.
        dtype: of the weights; None for what the configuration says.
        keeps_patterns: whether attention patterns will be hook points (eager attention).
        max_memory: the bound in bytes that the lens will have.

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
    return UnloadedModel(sizes, sum(weights.values()), factors)


def _linears_of_blocks(model: PreTrainedModel) -> list[tuple[int, int]]:
    """The shape of the weight of each linear module of the blocks, on which a LoRA may lie."""
    head = model.get_output_embeddings()
    shapes: list[tuple[int, int]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            rows, columns = module.weight.shape
            shapes.append((rows, columns))
    return shapes
