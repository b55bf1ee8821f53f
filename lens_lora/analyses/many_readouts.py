"""First order of several readouts of the same prompts: ∂g_y/∂ε_l of each readout y.

1. One forward pass with ε in its graph; a covector for each readout goes back, as one batch.
2. The exact ends of all of them come from the same two forward passes.
3. A readout of several tokens has rows of its own, and is run by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.analyses.first_order import first_order_of, labelled
from lens_lora.arguments import number
from lens_lora.engine.asked import Asked, ask_prompts
from lens_lora.engine.function import gated_logits, require_finite
from lens_lora.engine.gate_graph import slopes_of_each
from lens_lora.engine.read import read_logits
from lens_lora.engine.reverse import require_finite_sites
from lens_lora.errors import ArgumentError
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results.attribution import Attribution

__all__ = ["first_orders"]


@alone
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
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readouts: at least one.
        at: the gate value at which the derivative is taken: 0 base, 1 adapted.
        max_memory: bytes for the readouts that go at once, beside the graph of the forward pass.
        progress: show a bar.

    Returns:
        An Attribution for each readout, in their order.

    Raises:
        ArgumentError: no readouts, or something that is none.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    if not isinstance(readouts, Sequence) or not readouts:
        raise ArgumentError(f"readouts={readouts!r}: expected a list of at least one.")
    at = number("at", at)
    prompt_rows = ask_prompts(lens, prompts, max_memory)
    every = [prompt_rows.about(readout) for readout in readouts]
    if at == 0:
        every = [asked.require_slope_at_base() for asked in every]
    found: dict[int, Attribution] = {}
    together = [i for i, asked in enumerate(every) if asked.reading.prompts is asked.prompts]
    if together:
        some = [every[i] for i in together]
        _share_ends(some)
        slopes = _slopes(some, at, progress)
        for i, asked, values in zip(together, some, slopes, strict=True):
            found[i] = labelled(asked, values, method="first_order", at=at)
    for i, asked in enumerate(every):
        if i not in found:
            found[i] = first_order_of(asked, at=at, progress=progress)
    return tuple(found[i] for i in range(len(readouts)))


def _slopes(
    some: Sequence[Asked], at: float, progress: bool
) -> Float[Tensor, "readout batch site"]:
    """Of readouts of the same rows."""
    lens, prompts = some[0].lens, some[0].prompts

    def read() -> Float[Tensor, "readout batch"]:
        logits = read_logits(lens, prompts)
        return torch.stack([asked.reading.read(logits) for asked in some])

    slopes = slopes_of_each(lens, prompts, lens.gates(at), read, progress=progress)
    for of_one in slopes:
        require_finite_sites(lens, of_one)
    return slopes


def _share_ends(some: Sequence[Asked]) -> None:
    """The ends of all of them, out of the same two forward passes."""
    lens, prompts = some[0].lens, some[0].prompts
    with torch.no_grad():
        logits = [gated_logits(lens, prompts, lens.gates(end)) for end in (0.0, 1.0)]
        for asked in some:
            ends = torch.stack([asked.reading.read(end) for end in logits])
            require_finite(ends, "a readout")
            asked.know_ends(ends)
