"""The second way of `studies.py`: Hugging Face, PEFT and hooks of torch, and no lens_lora.

Each function runs one text after another, without batches and padding.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

# From what a module puts out, or reads, to what stands in its place; None leaves it.
Change = Callable[[Tensor], Tensor | None]


class ByHand:
    """A base under PEFT, with one adapter or several that can be switched on.

    Args:
        base: the Hugging Face model, which is copied.
        tokenizer: of the base.
        folders: the adapters by name.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: Any, folders: dict[str, Path]) -> None:
        self.tokenizer = tokenizer
        (first, folder), *others = folders.items()
        model = copy.deepcopy(base)
        self.peft = PeftModel.from_pretrained(model, str(folder), adapter_name=first).eval()
        for name, other in others:
            self.peft.load_adapter(str(other), adapter_name=name)
        # With all of them active; `at` switches each on or off.
        self.peft.base_model.set_adapter(list(folders))
        self.names = list(folders)
        self.layers = {
            path: module
            for path, module in self.peft.base_model.model.named_modules()
            if hasattr(module, "scaling") and hasattr(module, "lora_A")
        }
        self.scaling = {path: dict(layer.scaling) for path, layer in self.layers.items()}

    def module(self, path: str) -> nn.Module:
        """A module of the Hugging Face model."""
        return self.peft.base_model.model.get_submodule(path)

    @contextlib.contextmanager
    def at(self, strength: Callable[[str, str], float]) -> Iterator[None]:
        """Within the block each module has this strength, from the adapter's name and its path."""
        try:
            for path, layer in self.layers.items():
                for name, scaling in self.scaling[path].items():
                    layer.scaling[name] = scaling * strength(name, path)
            yield
        finally:
            for path, layer in self.layers.items():
                layer.scaling.update(self.scaling[path])

    def ids(self, text: str) -> Tensor:
        """The tokens of a text, as one row."""
        return torch.tensor([self.tokenizer(text, add_special_tokens=False).input_ids])

    def one_id(self, text: str) -> int:
        """The only token of a text."""
        (token,) = self.tokenizer(text, add_special_tokens=False).input_ids
        return token

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """The logits after each token, in float64."""
        return self.peft(input_ids=ids).logits[0].double()

    def margin(self, text: str, doc: str, pre: str) -> float:
        """The logit of one token less that of another, after the text."""
        last = self.logits(self.ids(text))[-1]
        return float(last[self.one_id(doc)] - last[self.one_id(pre)])

    def log_p(self, prompt: str, response: str) -> float:
        """Σ log p of the tokens of a response."""
        before = self.ids(prompt)
        ids = torch.cat([before, self.ids(response)], 1)
        log_p = self.logits(ids)[:-1].log_softmax(-1)
        of_next = log_p.gather(1, ids[0, 1:, None])[:, 0]
        return float(of_next[before.shape[1] - 1 :].sum())

    def activation(self, path: str, ids: Tensor) -> Tensor:
        """What a module puts out at each token, in float64."""
        seen: list[Tensor] = []

        def keep(out: Tensor) -> None:
            seen.append(out[0].double())

        with self.changed(path, keep):
            self.logits(ids)
        return seen[-1]

    @contextlib.contextmanager
    def changed(self, path: str, change: Change, *, at_input: bool = False) -> Iterator[None]:
        """Within the block a module puts out, or reads, what `change` makes of it."""

        def on_output(_: nn.Module, args: Any, output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            made = change(whole)
            if made is None or not isinstance(output, tuple):
                return made
            return (made, *output[1:])

        def on_input(_: nn.Module, args: Any) -> Any:
            made = change(args[0])
            return None if made is None else (made, *args[1:])

        module = self.module(path)
        if at_input:
            handle = module.register_forward_pre_hook(on_input)
        else:
            handle = module.register_forward_hook(on_output)
        try:
            yield
        finally:
            handle.remove()


def all_off(name: str, path: str) -> float:
    """The base model."""
    return 0.0


def without(wanted: Callable[[str], bool]) -> Callable[[str, str], float]:
    """All modules but those that are wanted off."""
    return lambda name, path: 0.0 if wanted(path) else 1.0


def removed(direction: Tensor) -> Change:
    """Take a direction out of every token but the first."""
    unit = direction / direction.norm()

    def change(h: Tensor) -> Tensor:
        v = unit.to(h)
        projected = h - (h @ v)[..., None] * v
        return torch.cat([h[:, :1], projected[:, 1:]], 1)

    return change


def mean(values: Sequence[float]) -> float:
    """The mean of some numbers."""
    return sum(values) / len(values)
