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
class Branch:
    """Attention or the MLP of every layer, by paths within the layer.

    Attributes:
        module: the branch itself.
        norm: the norm that it reads; '' if it reads the stream itself.
        output: the module whose output is added to the stream.
    """

    module: str
    norm: str
    output: str


@dataclasses.dataclass(frozen=True)
class Reader:
    """What reads the stream: a branch of a layer, or the final norm as 'logits'.

    Attributes:
        name: such as 'blocks.1.mlp'.
        module: the path of the module.
        norm: the path of the norm that the module reads; '' if it reads the stream itself.
    """

    name: str
    module: str
    norm: str


@dataclasses.dataclass(frozen=True)
class Writer:
    """The branch of a layer that an adapted module is in.

    Attributes:
        layer: the layer's number.
        branch: 'attn' or 'mlp'.
        output: the path of the module whose output is added to the stream.
    """

    layer: int
    branch: str
    output: str


@dataclasses.dataclass(frozen=True)
class Stream:
    """Where the branches of a Hugging Face model read and write, by the paths of its modules.

    Attributes:
        layer: path of a layer, with '{l}'.
        final: path of the final norm.
        attn: the paths of attention.
        mlp: the paths of the MLP.
        is_parallel: whether both branches read the same.
    """

    layer: str
    final: str
    attn: Branch
    mlp: Branch
    is_parallel: bool = False

    def readers(self, layers: int) -> list[Reader]:
        """Every reader, in the order of a forward pass."""
        readers: list[Reader] = []
        for layer in range(layers):
            prefix = f"{self.layer.format(l=layer)}."
            for name, branch in self._branches().items():
                readers.append(
                    Reader(
                        name=f"blocks.{layer}.{name}",
                        module=f"{prefix}{branch.module}",
                        norm=f"{prefix}{branch.norm}" if branch.norm else "",
                    )
                )
        readers.append(Reader("logits", self.final, norm=""))
        return readers

    def writer(self, module: str, layers: int) -> Writer:
        """The branch that an adapted module is in."""
        for layer in range(layers):
            prefix = f"{self.layer.format(l=layer)}."
            for name, branch in self._branches().items():
                if module.startswith(f"{prefix}{branch.module}"):
                    return Writer(layer, name, f"{prefix}{branch.output}")
        raise LookupError(module)

    def _branches(self) -> dict[str, Branch]:
        return {"attn": self.attn, "mlp": self.mlp}

    def is_downstream(self, writer: Writer, reader: str) -> bool:
        """Whether a reader sees what a writer adds to the stream."""
        if reader == "logits" or int(reader.split(".")[1]) > writer.layer:
            return True
        is_next_branch = writer.branch == "attn" and reader == f"blocks.{writer.layer}.mlp"
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

    for reader in stream.readers(layers):
        if reader.norm:
            norm = model.get_submodule(reader.norm)
            handles.append(norm.register_forward_pre_hook(keep(reader.norm)))
        if reader.name in added:
            hook = replaced(reader.name, reader.norm)
            module = model.get_submodule(reader.module)
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
    names = [reader.name for reader in stream.readers(layers)]
    width = peft.get_input_embeddings().weight.shape[1]
    zeros = {name: torch.zeros(*tokens.shape, width, requires_grad=True) for name in names}
    gates = dict.fromkeys(modules, at)
    with adding(peft, stream, zeros, layers), peft_scales(peft, gates):
        value = read(peft(tokens).logits[:, -1]).sum()
        gradients = torch.autograd.grad(value, list(zeros.values()))
    edges = torch.zeros(len(tokens), len(modules), len(names))
    for column, module in enumerate(modules):
        writer = stream.writer(module, layers)

        def output_at(eps: float, module: str = module, path: str = writer.output) -> Tensor:
            return branch_output(peft, tokens, path, gates | {module: at + eps})

        delta = central_difference(output_at, step)
        for index, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
            if stream.is_downstream(writer, name):
                edges[:, column, index] = (delta * gradient).sum((1, 2))
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
    written, reader = pair
    modules_switched = [written] if isinstance(written, str) else written
    layers = peft.config.num_hidden_layers
    plain_gate = 1.0 if how == "leave_one_out" else 0.0
    gates = dict.fromkeys(modules, plain_gate)
    modules_by_output: dict[str, list[str]] = {}
    for module in modules_switched:
        writer = stream.writer(module, layers)
        if stream.is_downstream(writer, reader):
            modules_by_output.setdefault(writer.output, []).append(module)
    change: Any = 0.0
    for output, members in modules_by_output.items():
        switched = gates | dict.fromkeys(members, 1 - plain_gate)
        moved = branch_output(peft, tokens, output, switched)
        change = change + moved - branch_output(peft, tokens, output, gates)
    plain = peft_readout(peft, tokens, read, gates)
    with adding(peft, stream, {reader: change}, layers):
        patched = peft_readout(peft, tokens, read, gates)
    return plain - patched if how == "leave_one_out" else patched - plain
