"""Slow, obvious references: one forward pass a number, no batching, no streaming.

`peft_*` use nothing of this package: Hugging Face's forward pass with PEFT's adapter active and
its scale s turned up and down. `autograd_*` differentiate g(ε) with ε in the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

import lens_lora as ll
from lens_lora.model.gates import ScaleInject

Read = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def peft_scales(peft: PeftModel, factors: dict[str, float]) -> Iterator[None]:
    """PEFT's s of each module times a factor."""
    layers = {m: lora_layer(peft, m) for m in factors}
    old = {m: layer.scaling["default"] for m, layer in layers.items()}
    try:
        for m, factor in factors.items():
            layers[m].scaling["default"] = old[m] * factor
        yield
    finally:
        for m, layer in layers.items():
            layer.scaling["default"] = old[m]


def lora_layer(peft: PeftModel, path: str) -> Any:
    """PEFT's layer of a module; of a parameter, the wrapper that has its name."""
    held: Any = peft.base_model.model
    owner, _, parameter = path.rpartition(".")
    with contextlib.suppress(AttributeError):
        held, parameter = held.get_submodule(path), "weight"
    layer = held if parameter == "weight" else held.get_submodule(owner)
    while getattr(layer, "parameter_name", parameter) != parameter:
        layer = layer.base_layer
    return layer


def peft_readout(peft: PeftModel, tokens: Tensor, read: Read, factors: dict[str, float]) -> Tensor:
    """g at these gates, [batch]."""
    with torch.no_grad(), peft_scales(peft, factors):
        return read(peft(tokens).logits[:, -1])


def peft_first_order(
    peft: PeftModel, tokens: Tensor, read: Read, modules: list[str], at: float, step: float = 1e-4
) -> dict[str, Tensor]:
    """∂g/∂ε of each module by central differences of order four."""
    found = {}
    for module in modules:

        def g(eps: float, module: str = module) -> Tensor:
            factors = dict.fromkeys(modules, at) | {module: at + eps}
            return peft_readout(peft, tokens, read, factors)

        near, far = g(step) - g(-step), g(2 * step) - g(-2 * step)
        found[module] = (8 * near - far) / (12 * step)
    return found


def autograd_first_order(
    lens: ll.LoraLens, tokens: Tensor, readout: ll.Readout, at: float
) -> Tensor:
    """∂g/∂ε with ε in the graph, one prompt at a time: [batch, site]."""
    rows = []
    for row in range(len(tokens)):
        gates = lens.gates(at).requires_grad_()
        with torch.enable_grad(), lens.injected(ScaleInject(lens.plan, gates)):
            logits = lens.model(tokens[row : row + 1], return_type="logits")[:, -1]
            (value,) = readout.bind(lens.model, 1)(logits)
            rows.append(torch.autograd.grad(value, gates)[0])
    return torch.stack(rows)


def plain_readout(lens: ll.LoraLens, tokens: Tensor, readout: ll.Readout, gates: Tensor) -> Tensor:
    """g at one gate vector through `run_with_hooks`, prompt by prompt: [batch]."""
    found = []
    for row in range(len(tokens)):
        with torch.no_grad():
            logits = lens.model.run_with_hooks(
                tokens[row : row + 1], return_type="logits", fwd_hooks=lens.fwd_hooks(gates)
            )
        found.append(readout.bind(lens.model, 1)(logits[:, -1])[0])
    return torch.stack(found)
