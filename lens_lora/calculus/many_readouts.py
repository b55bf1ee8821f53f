"""First order of several readouts of the same prompts (note, Prop. 1), out of one forward pass.

a_l(y) = ∂g_y/∂ε_l    for k readouts g_y: one forward pass, k backward passes as one batch
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.attribution import Attribution
from lens_lora.calculus.cost import COVECTOR_TOKENS, rows_at_once
from lens_lora.calculus.first_order import first_order, labelled
from lens_lora.calculus.function import gated_logits, read_logits, require_finite
from lens_lora.calculus.gate_graph import gate_graph
from lens_lora.calculus.slopes import require_finite_sites
from lens_lora.errors import ArgumentError
from lens_lora.lens import LoraLens
from lens_lora.prompts import Prompts, PromptsLike
from lens_lora.reading import Reading
from lens_lora.readout import Readout, bound

__all__ = ["first_orders"]


def first_orders(
    lens: LoraLens,
    prompts: PromptsLike,
    readouts: Sequence[Readout],
    *,
    at: float = 0.0,
    max_memory: float | None = None,
    progress: bool = True,
) -> tuple[Attribution, ...]:
    """`first_order` of each of several readouts, by site.

    Cost: one forward pass and a backward pass per readout, as one batch, and two forward passes for
    all their exact shifts. An answer of several tokens has rows of its own, and is run by itself.

    Args:
        at: the gate value at which the derivative is taken: 0 base, 1 adapted.
        max_memory: bytes for the readouts that go at once, beside the graph of the forward pass.

    Raises:
        ArgumentError: no readouts, or something that is none.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    if not readouts:
        raise ArgumentError("readouts=[] asks for nothing; give at least one.")
    ready = lens.prompts(prompts)
    readings = [bound(readout, lens.model, ready) for readout in readouts]
    together = [i for i, reading in enumerate(readings) if reading.prompts is ready]
    found: dict[int, Attribution] = {}
    if together:
        some = [readings[i] for i in together]
        ends = _ends(lens, ready, some)
        slopes = _slopes(lens, ready, some, at, max_memory, progress)
        for j, i in enumerate(together):
            found[i] = labelled(
                lens,
                readings[i],
                readouts[i],
                slopes[j],
                (),
                method="first_order",
                at=float(at),
                ends=ends[j],
            )
    for i, readout in enumerate(readouts):
        if i not in found:
            found[i] = first_order(lens, ready, readout, at=at, progress=progress)
    return tuple(found[i] for i in range(len(readouts)))


def _slopes(
    lens: LoraLens,
    prompts: Prompts,
    readings: Sequence[Reading],
    at: float,
    max_memory: float | None,
    progress: bool,
) -> Float[Tensor, "readout batch site"]:
    def read() -> Float[Tensor, "readout batch"]:
        logits = read_logits(lens, prompts)
        return torch.stack([reading.read(logits) for reading in readings])

    graph = gate_graph(lens, prompts, lens.gates(float(at)), read)
    step = rows_at_once(lens, prompts, COVECTOR_TOKENS, max_memory)
    slopes = graph.slopes_of_each(step, progress=progress)
    for of_one in slopes:
        require_finite_sites(lens, of_one)
    return slopes


def _ends(
    lens: LoraLens, prompts: Prompts, readings: Sequence[Reading]
) -> Float[Tensor, "readout end batch"]:
    with torch.no_grad():
        logits = [gated_logits(lens, prompts, lens.gates(end)) for end in (0.0, 1.0)]
        ends = torch.stack(
            [torch.stack([reading.read(end) for end in logits]) for reading in readings]
        )
    require_finite(ends, "a readout")
    return ends
