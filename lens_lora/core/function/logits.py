"""The logits f(ε) where the rows are read, at many points.

All logits are kept, in one tensor that is made first. So the forward passes take as many rows at a
time as the bound of the lens has room for beside it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function import forward, memory
from lens_lora.core.function.corners import Points
from lens_lora.core.model import LoraLens, ScaleInject
from lens_lora.core.readout import Prompts


def logits_at_points(
    lens: LoraLens, rows: Prompts, points: Points, held_bytes: int
) -> Float[Tensor, "point row *slot vocab"]:
    """Run f of every row at each point. One forward pass a point.

    Args:
        lens: the adapter over the model.
        rows: what is run.
        points: the gates.
        held_bytes: what a readout holds beside these logits.
    """
    shape = [len(points), rows.batch]
    if rows.reads is not None:
        shape.append(rows.slots)
    shape.append(int(lens.model.cfg.d_vocab_out))
    logits = torch.empty(shape, dtype=lens.gate_dtype, device=lens.device)
    step = memory.rows_of_logits(lens, rows, logits.nbytes + held_bytes) or rows.batch
    for gates, out in zip(points, logits, strict=True):
        write = ScaleInject(lens.plan, gates)
        for first in range(0, rows.batch, step):
            group = rows.cut(first, first + step)
            with torch.no_grad(), lens.injected(write):
                _read_into(lens, group, out[first : first + step])
    return logits


def _read_into(lens: LoraLens, rows: Prompts, out: Float[Tensor, "some *slot vocab"]) -> None:
    """Write the logits of one forward pass, under the hooks now on the model, into `out`.

    Where only the unembedding comes after the final residual stream, some tokens are unembedded at
    a time. Rows with fewer slots than `out` repeat their last one.
    """
    own_slots = out if rows.reads is None else out[:, : rows.slots]
    if forward.ends_plainly(lens):
        forward.logits_of_final(lens, forward.read_final(lens, rows), own_slots)
    else:
        own_slots.copy_(forward.read_logits(lens, rows))
    if rows.reads is not None:
        last_slot = out[:, rows.slots - 1 : rows.slots]
        out[:, rows.slots :] = last_slot
