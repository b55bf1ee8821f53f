"""Hook points whose value the model ignores: patching them would show a false zero.

1. In one run each point's own activation is put back; in another, with noise of the same size.
2. Where both runs give the same logits to the last bit, the model ignores the point.

Cost: two forward passes of a few tokens a point, batched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from lens_lora.engine.batching import rows_at_once
from lens_lora.engine.read import read_logits
from lens_lora.engine.recording import record
from lens_lora.engine.swap import Patch, swaps
from lens_lora.float64 import in_float64
from lens_lora.hooked.attaching import attached
from lens_lora.lens import LoraLens, Scale
from lens_lora.readouts.prompts import Prompts

__all__ = ["unheard"]

_TRIED_TOKENS = 4


def unheard(lens: LoraLens, prompts: Prompts, scale: Scale, names: Sequence[str]) -> list[str]:
    """The points at which noise changes no bit of the logits: the model ignores their value.

    The noise is as large as the activation. Two forward passes a name, batched.

    Args:
        lens: the adapter over the model.
        prompts: one row; a short one is lengthened, as a single token attends to itself only.
        scale: the adapter's strength in the run.
        names: of the hook points.
    """
    longer = prompts.tokens.repeat(1, _TRIED_TOKENS)[
        :, : max(_TRIED_TOKENS, len(prompts.tokens[0]))
    ]
    prompts = Prompts(longer, torch.full_like(prompts.lengths, longer.shape[1]))
    own = record(lens, prompts, scale, names)
    noisy = {name: [_noisy(t) for t in firings] for name, firings in own.firings.items()}
    silent: list[str] = []
    step = rows_at_once(lens, prompts)
    for start in range(0, len(names), step):
        some = list(names[start : start + step])
        patches, many = [Patch(name, None) for name in some], prompts.repeat(len(some))
        logits: list[Tensor] = []
        for donor in (own, dataclasses.replace(own, firings=noisy)):
            hooks = swaps(donor, patches, 1)
            with torch.no_grad(), lens.applied(scale), attached(lens.model, hooks):
                logits.append(read_logits(lens, many))
        same = (logits[0] == logits[1]).all(-1).tolist()
        silent += [name for name, is_same in zip(some, same, strict=True) if is_same]
    return silent


def _noisy(tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    size = in_float64(tensor[tensor.isfinite()]).square().mean().sqrt().to(tensor)
    return tensor + noise * torch.where(size > 0, size, torch.ones_like(size))
