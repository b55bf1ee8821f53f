"""Slow, obvious references: one forward pass a number, no batching, no streaming.

`peft_*` use nothing of this package: Hugging Face's forward pass with PEFT's adapter active and
its scale s turned up and down. `autograd_*` differentiate g(ε) with ε in the graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

import lens_lora as ll
from lens_lora.core.model.gates import ScaleInject

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


def seen(model: torch.nn.Module, module: str, row: Tensor) -> Tensor:
    """What a Hugging Face module reads, [token, d]."""
    kept: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])

    handle = model.get_submodule(module).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(row)
    handle.remove()
    return kept[0][0]


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
        named = []
        for layer in range(layers):
            before = f"{self.layer.format(l=layer)}."
            for name, (branch, norm, _) in (("attn", self.attn), ("mlp", self.mlp)):
                path = f"{before}{norm}" if norm else ""
                named.append((f"blocks.{layer}.{name}", f"{before}{branch}", path))
        return [*named, ("logits", self.final, "")]

    def writer(self, module: str, layers: int) -> tuple[int, str, str]:
        """The layer of a module, the branch that it is in, and what makes that branch's output."""
        for layer in range(layers):
            before = f"{self.layer.format(l=layer)}."
            for name, (branch, _, out) in (("attn", self.attn), ("mlp", self.mlp)):
                if module.startswith(f"{before}{branch}"):
                    return layer, name, f"{before}{out}"
        raise LookupError(module)

    def is_downstream(self, layer: int, branch: str, reader: str) -> bool:
        """Whether a reader sees what a branch of a layer writes."""
        if reader == "logits" or int(reader.split(".")[1]) > layer:
            return True
        same = reader == f"blocks.{layer}.mlp" and branch == "attn"
        return same and not self.is_parallel


@contextlib.contextmanager
def adding(
    peft: PeftModel, stream: Stream, added: dict[str, Tensor], layers: int
) -> Iterator[None]:
    """Each named reader reads x + what is added to it, before its norm, and no other one does."""
    model: Any = peft.base_model.model
    read: dict[str, Tensor] = {}
    handles = []

    def keep(path: str) -> Callable[..., None]:
        return lambda module, args: read.__setitem__(path, args[0])

    def replaced(name: str, norm: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            x = read[norm] if norm else (args[0] if args else kwargs["hidden_states"])
            x = x + added[name]
            x = model.get_submodule(norm).forward(x) if norm else x
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

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
    """What a branch adds to the stream at these gates."""
    outs: list[Any] = []
    module = peft.base_model.model.get_submodule(path)
    handle = module.register_forward_hook(lambda module, args, out: outs.append(out))
    try:
        with torch.no_grad(), peft_scales(peft, factors):
            peft(tokens)
    finally:
        handle.remove()
    return outs[0][0] if isinstance(outs[0], tuple) else outs[0]


def peft_edges(
    peft: PeftModel,
    tokens: Tensor,
    read: Read,
    stream: Stream,
    modules: list[str],
    at: float,
    step: float = 1e-4,
) -> tuple[list[str], Tensor]:
    """Readers, and ⟨δ_l, G_m⟩ [batch, module, reader]: zeros before each reader's norm, and central
    differences of order four of each branch's output.
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

        near, far = write(step) - write(-step), write(2 * step) - write(-2 * step)
        delta = (8 * near - far) / (12 * step)
        for m, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
            if stream.is_downstream(layer, branch, name):
                edges[:, column, m] = (delta * gradient).sum((1, 2))
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

    Of several modules each branch reads the stream of the plain run, and the reader the sum of what
    the branches before it write.
    """
    scale, (writer, reader) = float(how == "leave_one_out"), pair
    layers = peft.config.num_hidden_layers
    gates = dict.fromkeys(modules, scale)
    branches: dict[str, list[str]] = {}
    for module in [writer] if isinstance(writer, str) else writer:
        layer, branch, out = stream.writer(module, layers)
        if stream.is_downstream(layer, branch, reader):
            branches.setdefault(out, []).append(module)
    delta: Any = 0.0
    for out, members in branches.items():
        switched = gates | dict.fromkeys(members, 1 - scale)
        moved = branch_output(peft, tokens, out, switched)
        delta = delta + moved - branch_output(peft, tokens, out, gates)
    plain = peft_readout(peft, tokens, read, gates)
    with adding(peft, stream, {reader: delta}, layers):
        patched = peft_readout(peft, tokens, read, gates)
    return plain - patched if scale else patched - plain
