"""What a public call was asked: a lens, prompts, a readout; bound and tokenised once, handed on.

An `Asked` lives within one public call, for users' hooks may change between calls.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.function import gated_readout
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout, bound
from lens_lora.readouts.rows import Reading

__all__ = ["Asked", "ask"]


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """One question, bound to a lens.

    Attributes:
        reading: the rows that are run, and g of each prompt from their logits.
        readout: what is read.
    """

    lens: LoraLens
    reading: Reading
    readout: Readout

    @functools.cached_property
    def ends(self) -> Float[Tensor, "end batch"]:
        """g(0) and g(1), exact. Two forward passes, at the first use."""
        both = torch.stack([self.lens.gates(0.0), self.lens.gates(1.0)])
        return gated_readout(self.lens, self.reading, both).T.contiguous()

    @functools.cached_property
    def str_tokens(self) -> tuple[tuple[str, ...], ...]:
        """Each prompt's tokens."""
        return self.reading.tokens_of(self.lens.str_tokens(self.reading.prompts))


def ask(lens: LoraLens, prompts: PromptsLike, readout: Readout) -> Asked:
    """Tokenise the prompts and look up the readout's tokens, once.

    Raises:
        ArgumentError: something that is no readout.
        TokenError, PromptError: a readout or prompt that does not fit the model.
    """
    return Asked(lens, bound(readout, lens.model, lens.prompts(prompts)), readout)
