"""Edges from Hugging Face and PEFT alone: slow and obvious, one forward pass a number."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from reference import STEP, Read, central_difference, peft_readout, peft_scales
from torch import Tensor


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
