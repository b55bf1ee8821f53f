"""First order of several readouts of the same prompts, through one graph.

One forward pass has ε in its graph, and a covector for each readout goes back through it, all of
them in one batch (`function/gate_graph.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function.cache import Evaluations
from lens_lora.core.function.forward import gated_logits, read_logits
from lens_lora.core.function.gate_graph import slopes_of_each
from lens_lora.core.results.attribution import Attribution


def from_one_graph(questions: Sequence[Evaluations], at: float) -> dict[Evaluations, Attribution]:
    """First order of those readouts that can share one graph, by their g.

    They run the prompts themselves as rows, and are read from the logits. The passes of the exact
    ends are shared as well: each g is told its values there, so that it does not run them again.

    Args:
        questions: g of each readout.
        at: the gate value at which the derivative is taken.
    """
    sharing = [g for g in questions if g.rows is g.prompts and g.reading.reads_logits]
    if not sharing:
        return {}
    lens = sharing[0].lens
    prompts = sharing[0].prompts
    values_at: dict[float, Float[Tensor, "readout batch"]] = {}

    def values_of(logits: Tensor) -> Float[Tensor, "readout batch"]:
        return torch.stack([g.reading.read(logits) for g in sharing])

    def values_here() -> Float[Tensor, "readout batch"]:
        values = values_of(read_logits(lens, prompts))
        values_at[at] = values.detach()  # They come with the slopes, and are kept for each g.
        return values

    slopes = slopes_of_each(
        lens, prompts, lens.gates(at), values_here, progress=sharing[0].progress
    )
    with torch.no_grad():
        for end in {0.0, 1.0} - {at}:
            values_at[end] = values_of(gated_logits(lens, prompts, lens.gates(end)))
    found: dict[Evaluations, Attribution] = {}
    for i, g in enumerate(sharing):
        for strength, values in values_at.items():
            g.know(strength, values[i])
        lens.sites.require_finite(slopes[i])
        found[g] = Attribution.of(g, slopes[i], method="first_order", at=at, mode="reverse")
    return found
