"""Slow, obvious references: one forward pass a number, no batching, no streaming.

The functions `peft_*` use nothing of this package: they run Hugging Face's forward pass with PEFT's
adapter active and its scale s turned up and down. `autograd_first_order` differentiates g(ε) with ε
in the graph, and `plain_readout` runs the hooked model, one prompt at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

import lens_lora as ll
from lens_lora.core import ScaleInject

# Reads a number of each prompt from logits [batch, vocab].
Read = Callable[[Tensor], Tensor]
# The step of central differences.
STEP = 1e-4


@contextlib.contextmanager
def peft_scales(peft: PeftModel, factors: dict[str, float]) -> Iterator[None]:
    """Multiply PEFT's s of each module by a factor, within the block."""
    layers = {module: lora_layer(peft, module) for module in factors}
    before = {module: layer.scaling["default"] for module, layer in layers.items()}
    try:
        for module, factor in factors.items():
            layers[module].scaling["default"] = before[module] * factor
        yield
    finally:
        for module, layer in layers.items():
            layer.scaling["default"] = before[module]


def lora_layer(peft: PeftModel, path: str) -> Any:
    """PEFT's layer of a module; of a parameter, the wrapper that has its name.

    Several parameters of one module have a wrapper each, one within the other.
    """
    model: Any = peft.base_model.model
    try:
        layer = model.get_submodule(path)
        parameter = "weight"
    except AttributeError:
        owner, _, parameter = path.rpartition(".")
        layer = model.get_submodule(owner)
    while getattr(layer, "parameter_name", parameter) != parameter:
        layer = layer.base_layer
    return layer


def peft_readout(peft: PeftModel, tokens: Tensor, read: Read, factors: dict[str, float]) -> Tensor:
    """g at these gates, [batch]."""
    with torch.no_grad(), peft_scales(peft, factors):
        return read(peft(tokens).logits[:, -1])


def rule_at_cosines(nodes: int) -> tuple[list[float], list[float]]:
    """Points (1 − cos(πj/n))/2 on [0, 1], and the weights that integrate every power up to n.

    The weights solve for the integrals of the Legendre polynomials, which are zero but the first.
    """
    points = (1 - np.cos(np.pi * np.arange(nodes) / (nodes - 1))) / 2
    powers = np.polynomial.legendre.legvander(2 * points - 1, nodes - 1)
    integrals = np.eye(nodes)[0]
    return points.tolist(), np.linalg.solve(powers.T, integrals).tolist()


def central_difference(f: Callable[[float], Tensor], step: float) -> Tensor:
    """The derivative of f at 0, to order four in the step."""
    near = f(step) - f(-step)
    far = f(2 * step) - f(-2 * step)
    return (8 * near - far) / (12 * step)


def peft_first_order(
    peft: PeftModel, tokens: Tensor, read: Read, modules: list[str], at: float, step: float = STEP
) -> dict[str, Tensor]:
    """∂g/∂ε of each module, by central differences."""
    slopes: dict[str, Tensor] = {}
    for module in modules:

        def g(eps: float, module: str = module) -> Tensor:
            factors = dict.fromkeys(modules, at) | {module: at + eps}
            return peft_readout(peft, tokens, read, factors)

        slopes[module] = central_difference(g, step)
    return slopes


def autograd_first_order(
    lens: ll.LoraLens, tokens: Tensor, readout: ll.Readout, at: float
) -> Tensor:
    """∂g/∂ε with ε in the graph, one prompt at a time, [batch, site]."""
    slopes: list[Tensor] = []
    for row in range(len(tokens)):
        gates = lens.gates(at).requires_grad_()
        with torch.enable_grad(), lens.injected(ScaleInject(lens.plan, gates)):
            logits = lens.model(tokens[row : row + 1], return_type="logits")[:, -1]
            (value,) = readout.of_logits(lens.model, 1)(logits)
            (slope,) = torch.autograd.grad(value, gates)
        slopes.append(slope)
    return torch.stack(slopes)


def plain_readout(lens: ll.LoraLens, tokens: Tensor, readout: ll.Readout, gates: Tensor) -> Tensor:
    """g at one gate vector through `run_with_hooks`, one prompt at a time, [batch]."""
    values: list[Tensor] = []
    for row in range(len(tokens)):
        with torch.no_grad():
            logits = lens.model.run_with_hooks(
                tokens[row : row + 1], return_type="logits", fwd_hooks=lens.fwd_hooks(gates)
            )
        (value,) = readout.of_logits(lens.model, 1)(logits[:, -1])
        values.append(value)
    return torch.stack(values)


def seen(model: torch.nn.Module, module: str, row: Tensor) -> Tensor:
    """What a Hugging Face module reads, [token, d]."""
    inputs: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    handle = model.get_submodule(module).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(row)
    handle.remove()
    return inputs[0][0]
