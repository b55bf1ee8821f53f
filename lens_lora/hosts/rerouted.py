"""The tokens that a mixture of experts sends to other experts when the adapter is on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora.compat import add_pre_hook
from lens_lora.core import Function, ScaleInject
from lens_lora.core.model import extensions
from lens_lora.hosts.experts import experts_by_layer
from lens_lora.spans import Temporary


@extensions.rerouted_tokens.provide
def rerouted_tokens(g: Function) -> dict[str, Float[Tensor, " batch"]]:
    """Count the tokens of each prompt that have other experts at ε = 1 than at 0, by layer.

    It takes two forward passes, or none if the model has no stacks of experts.

    Args:
        g: the function.
    """
    stacks = experts_by_layer(g.lens.model)
    if not stacks:
        return {}
    counts: dict[str, list[Tensor]] = {f"layer {layer}": [] for layer in stacks}
    for group in g.groups():
        real = group.rows.real.to(g.lens.device)
        base = _chosen(group, 0.0, stacks)
        adapted = _chosen(group, 1.0, stacks)
        for layer in stacks:
            is_other = (base[layer] != adapted[layer]).any(-1).view(real.shape)
            by_row = (is_other & real).sum(1).double()
            counts[f"layer {layer}"].append(group.reading.by_prompt(by_row))
    return {layer: torch.cat(by_group) for layer, by_group in counts.items()}


def _chosen(
    g: Function, scale: float, stacks: Mapping[int, nn.Module]
) -> dict[int, Int[Tensor, "token slot"]]:
    """The experts of every token at this strength, in order, by layer.

    Args:
        g: the function, whose prompts are few enough for one pass.
        scale: the strength.
        stacks: the modules that run experts, by layer.
    """
    chosen: dict[int, Tensor] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, layer: int) -> None:
        index = args[1] if len(args) > 1 else kwargs["top_k_index"]
        chosen[layer] = index.sort(-1).values

    def record(span: Temporary) -> None:
        for layer, module in stacks.items():
            add_pre_hook(span, module, functools.partial(keep, layer=layer), with_kwargs=True)

    write = ScaleInject(g.lens.plan, g.lens.gates(scale))
    g.passes.observe(write, under=Temporary(record), logits=False)
    return chosen
