"""The rounding of a model, as noise: of its embedding, and of the logits that are read.

No forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from lens_lora.engine.read import Move, logits_dtype
from lens_lora.float64 import in_float64
from lens_lora.hooked.attaching import HookFn
from lens_lora.lens import LoraLens

__all__ = ["of_embedding", "of_logits", "unit"]


def unit(lens: LoraLens) -> float:
    """Of rounding, relative: the dtype's, or that of activations which a kernel rounds to 8 bit."""
    return max(torch.finfo(lens.dtype).eps / 2, lens.plan.activation_rounding)


def of_embedding(
    lens: LoraLens,
    rows: Bool[Tensor, "row"] | None = None,
    generator: torch.Generator | None = None,
) -> HookFn:
    """A hook that moves the embedding by about one rounding of the model's dtype.

    Args:
        lens: the adapter over the model.
        rows: which rows are moved; None for all.
        generator: of the noise; None for one of its own.
    """
    draw = torch.Generator(device="cpu").manual_seed(0) if generator is None else generator

    def perturb(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        if rows is not None:
            noise[~rows] = 0
        wide = in_float64(tensor)
        moved = wide * (1 + unit(lens) * noise.to(wide.device))
        return moved.to(tensor.dtype).to(tensor.device)

    return perturb


def of_logits(lens: LoraLens, shape: tuple[int, ...], generator: torch.Generator) -> Move:
    """Moves logits by about their last rounding, which runs may share: they then hide it.

    One draw for the vocabulary, with a sign of its own for each row and slot.
    """
    relative = torch.finfo(logits_dtype(lens)).eps / 2
    noise = torch.randn(int(lens.model.cfg.d_vocab_out), generator=generator, dtype=torch.float64)
    signs = 2 * torch.randint(2, shape, generator=generator) - 1

    def move(logits: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        own = signs[tuple(index.to(signs.device) for index in places)] if places else signs
        return logits * (1 + relative * noise.to(logits) * own[..., None].to(logits))

    return move
