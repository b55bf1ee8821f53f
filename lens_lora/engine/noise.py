"""The noise floor: how far a readout moves from rounding alone.

A small difference of two float32 readouts may be rounding only. The floor is measured: relative
noise of the size of the model's rounding is added to the token embedding a few times, and the floor
is the root mean square of the readout's changes, never less than one rounding of the readout.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.function import read_logits
from lens_lora.hooked.attaching import HookFn
from lens_lora.hooked.gates import ScaleInject
from lens_lora.lens import LoraLens
from lens_lora.readouts.rows import Reading

__all__ = ["noise_floor", "roundings"]

_DRAWS = 8


def noise_floor(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch"]:
    """σ of g(1) − g(0) from rounding, in the readout's units. Eight forward passes, batched.

    The unit of rounding is 2⁻²⁴ for float32, 2⁻⁵³ for float64, 2⁻⁹ for bfloat16.
    """
    prompts = reading.prompts
    perturb = roundings(lens, exact=prompts.batch)
    many = prompts.tiled(1 + _DRAWS)
    adapted = ScaleInject(lens.plan, lens.gates(1.0))
    with torch.no_grad(), lens.injected(adapted, before=[(lens.embedding_output, perturb)]):
        rows = read_logits(lens, many).unflatten(0, (1 + _DRAWS, prompts.batch))
    values = torch.stack([reading.read(row) for row in rows])
    moved = (values[1:] - values[0]).square().mean(0).sqrt()
    largest = prompts.over_slots(rows[0].abs().amax(-1).to(moved.dtype).square())
    rounding = _unit(lens) * reading.by_prompt(largest).sqrt()
    return 2**0.5 * torch.maximum(moved, rounding)


def roundings(lens: LoraLens, exact: int = 0) -> HookFn:
    """A hook that moves the embedding by about one rounding of the model's dtype.

    The first `exact` rows are left as they are.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)

    def perturb(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        noise[:exact] = 0
        return (tensor.double() * (1 + _unit(lens) * noise.to(tensor.device))).to(tensor.dtype)

    return perturb


def _unit(lens: LoraLens) -> float:
    return torch.finfo(lens.dtype).eps / 2
