"""The honest floor: slopes and the exact shift by PEFT and autograd alone, beside this package.

    python -m benchmarks.cost --floor --tokens 8 64 256 --turns 9 --write

`Floor` is what one would write by hand: each LoRA layer's scaling becomes its own times a gate, one
forward and one backward pass at gates of zero give every slope and g(0), and one forward pass at
gates of one gives g(1). `ll.first_order` gives the same numbers with labels, checks and a result.
Both are compared before they are timed, in turns, in processor seconds.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lens_lora as ll
from benchmarks.measuring import MARGIN
from lens_lora.demonstration import shipped_adapter

ADAPTER = "default"
# Both are float32: their slopes differ by rounding alone.
SAME = 1e-4


class Floor:
    """Slopes and the exact shift of a margin, by PEFT with a gate for each module."""

    def __init__(self, model: PeftModel, doc: int, pre: int) -> None:
        self._doc = doc
        self._pre = pre
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
        return (logits[:, self._doc] - logits[:, self._pre]).sum()

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The slope of every module at the base, and the exact shift."""
        gates = torch.zeros(len(self._layers), requires_grad=True)
        base = self.margin(gates, ids)
        (slopes,) = torch.autograd.grad(base, gates)
        with torch.no_grad():
            adapted = self.margin(torch.ones(len(self._layers)), ids)
        return slopes, adapted - base.detach()


def floor_of_demo(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Floor:
    """The floor of the demo's adapter.

    Args:
        base: the embedded model, which PEFT changes.
        tokenizer: of the model.
    """
    peft_model = PeftModel.from_pretrained(base, str(shipped_adapter()))
    doc, pre = (tokenizer(word).input_ids[-1] for word in (MARGIN.doc, MARGIN.pre))
    return Floor(peft_model, doc, pre)


def difference(floor: Floor, lens: ll.LoraLens, prompts: ll.results.Prompts) -> float:
    """The largest difference of a slope, as a share of the largest slope.

    Raises:
        SystemExit: slopes or shifts differ by more than rounding.
    """
    slopes, shift = floor(prompts.tokens)
    found = ll.first_order(lens, prompts, MARGIN)
    by_module = {
        site.module: value for site, value in zip(found.sites, found.values[0], strict=True)
    }
    expected = torch.stack([by_module[name] for name in floor.modules])
    apart = float((slopes - expected).abs().max() / expected.abs().max())
    if apart > SAME or not torch.allclose(found.shift[0], shift, rtol=SAME, atol=SAME):
        raise SystemExit(f"the two disagree, by {apart:.1e} of a slope")
    return apart
