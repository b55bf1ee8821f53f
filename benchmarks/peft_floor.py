"""The honest floor: slopes and the exact shift by PEFT and autograd alone, beside this package.

    python benchmarks/peft_floor.py --tokens 8 64 --turns 9

`Floor` is what one would write by hand: each LoRA layer's scaling becomes its own times a gate, one
forward and one backward pass at gates of zero give every slope and g(0), and one forward pass at
gates of one gives g(1). `ll.first_order` gives the same numbers with labels, checks and a result.
Both are compared before they are timed, in turns, on one thread, in processor seconds.
"""

from __future__ import annotations

import argparse
import copy

import torch
from measuring import median_seconds
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

import lens_lora as ll
from lens_lora.demonstration import shipped_adapter
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model

DOC = 5
PRE = 6
ADAPTER = "default"
# Both are float32: their slopes differ by rounding alone.
SAME = 1e-4


class Floor:
    """Slopes and the exact shift of a margin, by PEFT with a gate for each module."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model.requires_grad_(False).eval()
        self._layers = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }
        self._scalings = [layer.scaling[ADAPTER] for layer in self._layers.values()]

    @property
    def modules(self) -> list[str]:
        """The adapted modules, in the order of the slopes."""
        return list(self._layers)

    def margin(self, gates: Tensor, ids: Tensor) -> Tensor:
        """g at these gates."""
        for layer, scaling, gate in zip(self._layers.values(), self._scalings, gates, strict=True):
            layer.scaling[ADAPTER] = scaling * gate
        logits = self._model(ids, logits_to_keep=1).logits[:, -1]
        return (logits[:, DOC] - logits[:, PRE]).sum()

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The slope of every module at the base, and the exact shift."""
        gates = torch.zeros(len(self._layers), requires_grad=True)
        base = self.margin(gates, ids)
        (slopes,) = torch.autograd.grad(base, gates)
        with torch.no_grad():
            adapted = self.margin(torch.ones(len(self._layers)), ids)
        return slopes, adapted - base.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--turns", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    base, tokenizer = load_embedded(quiet=True)
    floor = Floor(PeftModel.from_pretrained(copy.deepcopy(base), str(shipped_adapter())))
    model, class_name = hooked_model(base, tokenizer)
    lens = ll.LoraLens(model, ll.load_adapter(shipped_adapter()))
    margin = ll.Margin(DOC, PRE)
    print(
        f"{class_name}, {len(floor.modules)} modules, one thread, median of {asked.turns} turns\n"
    )
    print("| tokens | floor | `ll.first_order` | ratio | largest difference of a slope |")
    print("| --- | --- | --- | --- | --- |")
    for tokens in asked.tokens:
        ids = torch.randint(1000, 40000, (1, tokens), generator=torch.Generator().manual_seed(0))
        slopes, shift = floor(ids)
        found = ll.first_order(lens, ids, margin)
        by_module = {
            site.module: value for site, value in zip(found.sites, found.values[0], strict=True)
        }
        expected = torch.stack([by_module[name] for name in floor.modules])
        apart = float((slopes - expected).abs().max() / expected.abs().max())
        if apart > SAME or not torch.allclose(found.shift[0], shift, rtol=SAME, atol=SAME):
            raise SystemExit(f"{tokens} tokens: the two disagree, by {apart:.1e} of a slope")
        seconds = median_seconds(
            {
                "floor": lambda ids=ids: floor(ids),
                "call": lambda ids=ids: ll.first_order(lens, ids, margin),
            },
            asked.turns,
        )
        ratio = seconds["call"] / seconds["floor"]
        print(
            f"| {tokens} | {1e3 * seconds['floor']:.0f} ms | {1e3 * seconds['call']:.0f} ms | "
            f"{ratio:.2f} | {apart:.0e} |"
        )


if __name__ == "__main__":
    main()
