"""The token that is said next: the likeliest, or one drawn from the distribution.

A draw is a function of the logits and of one number of noise, u in [0, 1), fixed for each prompt
and place before anything is run: tokens are sorted by probability, and u points into the cumulated
sum. So the same logits and seed give the same tokens, whichever pass computed the logits.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora import arguments
from lens_lora.errors import ArgumentError
from lens_lora.float64 import in_float64

__all__ = ["Sampling"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draws from the fewest tokens whose probabilities sum to this.
        seed: of the noise.

    Raises:
        ArgumentError: temperature below 0, top_p outside (0, 1], or a seed that is no whole number.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        temperature = arguments.number("temperature", self.temperature)
        top_p = arguments.number("top_p", self.top_p)
        arguments.whole("seed", self.seed, 0)
        if temperature < 0:
            raise ArgumentError(f"temperature={temperature}: expected 0 (greedy) or more.")
        if not 0 < top_p <= 1:
            raise ArgumentError(f"top_p={top_p}: expected a probability above 0, 1 for all tokens.")
        if temperature == 0 and top_p < 1:
            raise ArgumentError(
                f"top_p={top_p} with temperature=0, which takes the likeliest token whatever top_p "
                "is; pass a temperature, such as 1.0."
            )

    def noise(self, prompts: int, tokens: int) -> Float[Tensor, "prompt token"]:
        """u of each prompt and place.

        Args:
            prompts: how many.
            tokens: the most that are said after each.
        """
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        shape = (prompts, tokens)
        return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")

    def choose(
        self, logits: Float[Tensor, "place vocab"], noise: Float[Tensor, "place"]
    ) -> Int[Tensor, "place"]:
        """The token at each place.

        Args:
            logits: of the next token.
            noise: u of each place.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        p, ids = (in_float64(logits) / self.temperature).softmax(-1).sort(-1, descending=True)
        before = p.cumsum(-1) - p
        # Half a unit of rounding: tokens that reach top_p exactly are enough.
        kept = torch.where(before < self.top_p - torch.finfo(p.dtype).eps / 2, p, 0.0).cumsum(-1)
        reached = (noise.to(kept)[:, None] * kept[:, -1:]).contiguous()
        at = torch.searchsorted(kept, reached, right=True).clamp_max(p.shape[-1] - 1)
        return ids.gather(-1, at)[:, 0].to(logits.device)
