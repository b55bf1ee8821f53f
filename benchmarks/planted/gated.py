"""Run, record and train updates of modules behind gates, on the Hugging Face model.

    out_l = W_l z_l + γ_rl (ΔW_l z_l + Δb_l)        row r, module l

1. A forward hook on each module adds its update, times the gate that the row gives it. No hook or
   gate of the package is used, so what confirms a plant is not what is judged on it.
2. `fit` takes Adam steps, at a falling rate, on Σ_r ((g_r − target_r) / size)², with g_r the margin
   of row r. A gate that is NaN is drawn anew, 0 or 1, at every step: what such a row asks then
   holds at all corners of its gates.

Cost: a forward pass of all rows; three for a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

import lens_lora as ll

Updates = dict[str, ll.LoRAFactors]
_BLOCK = re.compile(r"\.layers\.(\d+)\.")
# Training ends once every row is this near its target, as a share of `size`.
CLOSE = 0.04
# Rows that run together in `Gated.at_gates`.
ROWS = 16


@dataclasses.dataclass(frozen=True)
class Question:
    """The margin of two tokens after a prompt.

    Attributes:
        prompt: the text.
        ids: of the prompt, the first token included.
        doc, pre: ids of the token that is taught, and of the one before.
        words: the two tokens as text.
    """

    prompt: str
    ids: tuple[int, ...]
    doc: int
    pre: int
    words: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Aim:
    """One row of training: a question, the gates of the modules, and the margin to reach."""

    question: Question
    gates: Mapping[str, float]
    target: float


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear module of the blocks, by path."""
    modules = model.named_modules()
    return {path: m for path, m in modules if isinstance(m, nn.Linear) and _BLOCK.search(path)}


def block_of(path: str) -> int:
    """The number of the block that a module lies in."""
    match = _BLOCK.search(path)
    if match is None:
        raise ValueError(f"{path} is in no block")
    return int(match[1])


def fresh(model: PreTrainedModel, paths: Iterable[str], rank: int, seed: int) -> Updates:
    """Factors as PEFT starts them: A uniform within 1/√in, B zero."""
    generator = torch.Generator().manual_seed(seed)
    modules = linears(model)
    updates = {}
    for path in paths:
        weight = modules[path].weight
        out, width = weight.shape
        A = (2 * torch.rand(rank, width, generator=generator) - 1) / width**0.5
        factors = ll.LoRAFactors(A.to(weight), weight.new_zeros(out, rank), scale=2.0)
        updates[path] = _trainable(factors, ("A", "B"))
    return updates


def constants(vectors: Mapping[str, Tensor], model: PreTrainedModel) -> Updates:
    """Constant vectors by module, which can be trained."""
    adapter = ll.Adapter.constant(vectors, model)
    return {
        path: _trainable(factors, ("lora_bias",))
        for path, factors in adapter.modules.items()
        if isinstance(factors, ll.LoRAFactors)
    }


def _trainable(factors: ll.LoRAFactors, names: Sequence[str]) -> ll.LoRAFactors:
    """The same factors, of which the named tensors can be trained."""
    for name in names:
        getattr(factors, name).requires_grad_()
    return factors


def detached(updates: Updates) -> Updates:
    """The same numbers, no longer trained."""
    copies: Updates = {}
    for path, factors in updates.items():
        bias = factors.lora_bias
        copies[path] = dataclasses.replace(
            factors,
            A=factors.A.detach(),
            B=factors.B.detach(),
            lora_bias=None if bias is None else bias.detach(),
        )
    return copies


@dataclasses.dataclass(frozen=True)
class Gated:
    """A model whose modules may be given updates."""

    model: PreTrainedModel

    def margins(
        self, updates: Updates, questions: Sequence[Question], gates: Float[Tensor, "row module"]
    ) -> Float[Tensor, " row"]:
        """The margin of each row's question; columns of gates are in the order of `updates`."""
        ids, last = self._padded(questions)
        with self._hooked(updates, gates):
            stream = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings().weight
        directions = torch.stack([head[q.doc] - head[q.pre] for q in questions])
        return (stream[torch.arange(len(last)), last] * directions).sum(1)

    def corners(
        self, updates: Updates, question: Question, sets: Sequence[Collection[str]]
    ) -> list[float]:
        """The values of g with the modules of each set switched on, and no others."""
        rows = []
        for members in sets:
            rows.append([float(path in members) for path in updates])
        return self.at_gates(updates, question, torch.tensor(rows))

    def at_gates(
        self, updates: Updates, question: Question, gates: Float[Tensor, "row module"]
    ) -> list[float]:
        """The values of g at each row of gates; columns are in the order of `updates`."""
        values: list[float] = []
        with torch.no_grad():
            for part in gates.split(ROWS):
                values += self.margins(updates, [question] * len(part), part).tolist()
        return values

    def recorded(
        self,
        updates: Updates,
        question: Question,
        paths: Iterable[str],
        gates: Float[Tensor, "row module"],
    ) -> dict[str, tuple[Float[Tensor, "row pos in"], Float[Tensor, "row pos out"]]]:
        """By module its input and its output, with the updates at each row of gates."""
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        modules = linears(self.model)

        def keep(path: str, module: Any, args: tuple[Tensor], out: Tensor) -> None:
            kept[path] = (args[0].detach(), out.detach())

        with torch.no_grad(), self._hooked(updates, gates), contextlib.ExitStack() as stack:
            for path in paths:
                hook = functools.partial(keep, path)
                stack.callback(modules[path].register_forward_hook(hook).remove)
            ids, _ = self._padded([question] * len(gates))
            self.model.base_model(input_ids=ids, use_cache=False)
        return kept

    @contextlib.contextmanager
    def _hooked(self, updates: Updates, gates: Tensor) -> Generator[None]:
        """Add each update, times its gates, to the output of its module while the context lasts."""

        def add(
            factors: ll.LoRAFactors, column: Tensor, module: Any, args: tuple[Tensor], out: Tensor
        ) -> Tensor:
            """Return γ (ΔW z + Δb) added to the output."""
            written = factors.scale * (args[0] @ factors.A.T) @ factors.B.T
            if factors.lora_bias is not None:
                written = written + factors.scale * factors.lora_bias
            return out + column[:, None, None].to(out) * written

        with contextlib.ExitStack() as stack:
            for index, (path, factors) in enumerate(updates.items()):
                hook = functools.partial(add, factors, gates[:, index])
                module = self.model.get_submodule(path)
                stack.callback(module.register_forward_hook(hook).remove)
            yield

    def _padded(
        self, questions: Sequence[Question]
    ) -> tuple[Int[Tensor, "row pos"], Int[Tensor, " row"]]:
        """Ids padded on the right, where no causal model looks, and the positions that are read."""
        lengths = [len(question.ids) for question in questions]
        longest = max(lengths)
        rows = []
        for question in questions:
            padding = [0] * (longest - len(question.ids))
            rows.append([*question.ids, *padding])
        return torch.tensor(rows), torch.tensor(lengths) - 1


def fit(
    gated: Gated,
    updates: Updates,
    aims: Sequence[Aim],
    *,
    size: float,
    steps: int,
    rate: float,
    seed: int,
) -> float:
    """Train the updates in place, until all margins are near their targets or the steps are done.

    Args:
        gated: the model.
        updates: of which the tensors that require gradients are trained.
        aims: the rows of training.
        size: what errors are divided by, in logits.
        steps: the largest number of steps.
        rate: the learning rate at the first step; it falls to a twentieth at the last.
        seed: of the gates that are drawn anew at each step.

    Returns:
        the largest error of a row at the last step, as a share of `size`.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: list[Tensor] = []
    for factors in updates.values():
        for tensor in (factors.A, factors.B, factors.lora_bias):
            if tensor is not None and tensor.requires_grad:
                tensors.append(tensor)
    optimizer = torch.optim.Adam(tensors, lr=rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    rows = []
    for aim in aims:
        rows.append([aim.gates.get(path, 0.0) for path in updates])
    wanted = torch.tensor(rows)
    is_drawn = wanted.isnan()
    targets = torch.tensor([aim.target for aim in aims])
    questions = [aim.question for aim in aims]
    miss = float("inf")
    for _ in range(steps):
        drawn = torch.randint(2, wanted.shape, generator=generator).float()
        gates = torch.where(is_drawn, drawn, wanted)
        errors = (gated.margins(updates, questions, gates) - targets) / size
        miss = float(errors.detach().abs().max())
        # Where gates are drawn, one draw near the target does not speak for the others.
        if miss < CLOSE and not bool(is_drawn.any()):
            break
        optimizer.zero_grad()
        errors.square().sum().backward()
        optimizer.step()
        falling.step()
    return miss
