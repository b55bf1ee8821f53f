"""Slow, obvious references: one forward pass a number, no batching, no streaming.

The functions `peft_*` use nothing of this package: they run Hugging Face's forward pass with PEFT's
adapter active and its scale s turned up and down. `autograd_first_order` differentiates g(ε) with ε
in the graph, and `plain_readout` runs the hooked model, one prompt at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
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


# --- Edges, from Hugging Face and PEFT alone


@dataclasses.dataclass(frozen=True)
class Stream:
    """Where the branches of a Hugging Face model read and write, by the paths of its modules.

    Attributes:
        layer: path of a layer, with '{l}'.
        final: path of the final norm.
        attn, mlp: (the branch, the norm that it reads or '', what makes its output).
        is_parallel: whether both branches read the same.
    """

    layer: str
    final: str
    attn: tuple[str, str, str]
    mlp: tuple[str, str, str]
    is_parallel: bool = False

    def readers(self, layers: int) -> list[tuple[str, str, str]]:
        """(name, the module that reads, its norm), in the order of a forward pass."""
        readers: list[tuple[str, str, str]] = []
        for layer in range(layers):
            prefix = f"{self.layer.format(l=layer)}."
            for name, (branch, norm, _) in self._branches():
                path_of_norm = f"{prefix}{norm}" if norm else ""
                readers.append((f"blocks.{layer}.{name}", f"{prefix}{branch}", path_of_norm))
        return [*readers, ("logits", self.final, "")]

    def writer(self, module: str, layers: int) -> tuple[int, str, str]:
        """The layer of a module, the branch that it is in, and what makes that branch's output."""
        for layer in range(layers):
            prefix = f"{self.layer.format(l=layer)}."
            for name, (branch, _, out) in self._branches():
                if module.startswith(f"{prefix}{branch}"):
                    return layer, name, f"{prefix}{out}"
        raise LookupError(module)

    def _branches(self) -> list[tuple[str, tuple[str, str, str]]]:
        return [("attn", self.attn), ("mlp", self.mlp)]

    def is_downstream(self, layer: int, branch: str, reader: str) -> bool:
        """Whether a reader sees what a branch of a layer writes."""
        if reader == "logits" or int(reader.split(".")[1]) > layer:
            return True
        is_next_branch = branch == "attn" and reader == f"blocks.{layer}.mlp"
        return is_next_branch and not self.is_parallel


@contextlib.contextmanager
def adding(
    peft: PeftModel, stream: Stream, added: dict[str, Tensor], layers: int
) -> Iterator[None]:
    """Let each named reader read x + what is added to it, before its norm, and no other reader."""
    model: Any = peft.base_model.model
    inputs_of_norms: dict[str, Tensor] = {}
    handles: list[Any] = []

    def keep(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            inputs_of_norms[path] = args[0]

        return hook

    def replaced(name: str, norm: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            if norm:
                x = model.get_submodule(norm).forward(inputs_of_norms[norm] + added[name])
            elif args:
                x = args[0] + added[name]
            else:
                x = kwargs["hidden_states"] + added[name]
            if args:
                return (x, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": x}

        return hook

    for name, path, norm in stream.readers(layers):
        if norm:
            handles.append(model.get_submodule(norm).register_forward_pre_hook(keep(norm)))
        if name in added:
            hook = replaced(name, norm)
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def branch_output(peft: PeftModel, tokens: Tensor, path: str, factors: dict[str, float]) -> Tensor:
    """What a branch adds to the stream at these gates, [batch, pos, d]."""
    outputs: list[Any] = []
    module = peft.base_model.model.get_submodule(path)
    handle = module.register_forward_hook(lambda module, args, out: outputs.append(out))
    try:
        with torch.no_grad(), peft_scales(peft, factors):
            peft(tokens)
    finally:
        handle.remove()
    (output,) = outputs
    return output[0] if isinstance(output, tuple) else output


def peft_edges(
    peft: PeftModel,
    tokens: Tensor,
    read: Read,
    stream: Stream,
    modules: list[str],
    at: float,
    step: float = STEP,
) -> tuple[list[str], Tensor]:
    """Readers by name, and the edges ⟨δ_l, G_m⟩, [batch, module, reader].

    G_m is the gradient of zeros that are added before a reader's norm; δ_l is the derivative of the
    branch's output by the gate of a module, by central differences.
    """
    layers = peft.config.num_hidden_layers
    names = [name for name, _, _ in stream.readers(layers)]
    width = peft.get_input_embeddings().weight.shape[1]
    zeros = {name: torch.zeros(*tokens.shape, width, requires_grad=True) for name in names}
    gates = dict.fromkeys(modules, at)
    with adding(peft, stream, zeros, layers), peft_scales(peft, gates):
        value = read(peft(tokens).logits[:, -1]).sum()
        gradients = torch.autograd.grad(value, list(zeros.values()))
    edges = torch.zeros(len(tokens), len(modules), len(names))
    for column, module in enumerate(modules):
        layer, branch, out = stream.writer(module, layers)

        def write(eps: float, module: str = module, out: str = out) -> Tensor:
            return branch_output(peft, tokens, out, gates | {module: at + eps})

        delta = central_difference(write, step)
        for reader, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
            if stream.is_downstream(layer, branch, name):
                edges[:, column, reader] = (delta * gradient).sum((1, 2))
    return names, edges


def peft_path_patch(
    peft: PeftModel,
    tokens: Tensor,
    read: Read,
    stream: Stream,
    modules: list[str],
    pair: tuple[str | Sequence[str], str],
    how: str,
) -> Tensor:
    """The effect of one edge: the reader alone sees the branches' change, and all else follows.

    With several modules as the writer, each branch reads the stream of the plain run, and the
    reader the sum of what the branches before it write.
    """
    writer, reader = pair
    writers = [writer] if isinstance(writer, str) else writer
    layers = peft.config.num_hidden_layers
    plain_gate = 1.0 if how == "leave_one_out" else 0.0
    gates = dict.fromkeys(modules, plain_gate)
    branches: dict[str, list[str]] = {}
    for module in writers:
        layer, branch, out = stream.writer(module, layers)
        if stream.is_downstream(layer, branch, reader):
            branches.setdefault(out, []).append(module)
    change: Any = 0.0
    for out, members in branches.items():
        switched = gates | dict.fromkeys(members, 1 - plain_gate)
        moved = branch_output(peft, tokens, out, switched)
        change = change + moved - branch_output(peft, tokens, out, gates)
    plain = peft_readout(peft, tokens, read, gates)
    with adding(peft, stream, {reader: change}, layers):
        patched = peft_readout(peft, tokens, read, gates)
    return plain - patched if how == "leave_one_out" else patched - plain
