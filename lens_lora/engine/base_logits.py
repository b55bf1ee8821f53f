"""f(0) where a divergence is read: the base distribution that it holds.

The rows are run as many at a time as there is memory for beside what is held, and unembedded some
tokens at a time, straight to where they stay. One forward pass.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.batching import pass_groups
from lens_lora.engine.read import ends_plainly, logits_of_final, read_final, read_logits
from lens_lora.hooked.gates import ScaleInject
from lens_lora.lens import LoraLens
from lens_lora.readouts.divergence import KL, held
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.rows import Reading

__all__ = ["base_logits"]


def base_logits(lens: LoraLens, readout: KL, reading: Reading) -> Float[Tensor, "row *slot vocab"]:
    """The logits of each row at gates of zero, in `lens.gate_dtype`.

    Args:
        lens: the adapter over the model.
        readout: the divergence.
        reading: of some prompts, by the readout.

    Raises:
        ArgumentError: they are beyond the bound of the lens.
    """
    prompts = reading.prompts
    slots = [] if prompts.reads is None else [prompts.slots]
    shape = len(prompts.tokens), *slots, int(lens.model.cfg.d_vocab_out)
    found = torch.empty(shape, dtype=lens.gate_dtype, device=lens.device)
    first = 0
    at_base = ScaleInject(lens.plan, lens.gates(0.0))
    with torch.no_grad(), lens.injected(at_base):
        for some in pass_groups(lens, held(readout, reading, found)):
            own = slice(first, first := first + len(some.owner))
            _fill(lens, some.prompts, found[own])
    return found


def _fill(lens: LoraLens, prompts: Prompts, out: Float[Tensor, "row *slot vocab"]) -> None:
    """What is beyond a group's slots is read by nothing, and stays as it is."""
    if prompts.reads is not None:
        out = out[:, : prompts.slots]
    if ends_plainly(lens):
        logits_of_final(lens, read_final(lens, prompts), out)
    else:
        out.copy_(read_logits(lens, prompts))
