"""log p of each token of one response, at several gate vectors.

As `function.gated_readout`, but not summed over the response: points that share their first layers
share the work there, where the model's blocks allow it. At most one forward pass a point.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.engine import branching
from lens_lora.engine.batching import branches_at_once, rows_at_once
from lens_lora.engine.function import require_finite
from lens_lora.engine.read import read_tokens
from lens_lora.hooked.gates import ScaleInject
from lens_lora.lens import LoraLens
from lens_lora.readouts.rows import Reading

__all__ = ["tokens_at_gates"]


def tokens_at_gates(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "point site"],
    *,
    progress: bool,
    what: str,
) -> Float[Tensor, "point token"]:
    """log p(y_t | x, y_<t) at each point.

    Args:
        lens: the adapter over the model.
        reading: of one response to one prompt.
        gates: the points.
        progress: show a bar.
        what: the bar's name.

    Raises:
        NumericsError: a log-probability that is not finite.
    """
    grows = branching.pays(lens, gates)
    order = branching.neighbours_first(lens, gates) if grows else torch.arange(len(gates))
    most = branches_at_once(lens, reading) if grows else rows_at_once(lens, reading)
    found = []
    with (
        torch.no_grad(),
        tqdm(total=len(gates), desc=what, leave=False, disable=not progress) as bar,
    ):
        for some in gates[order.to(gates.device)].split(most):
            found.append(_grown(lens, reading, some) if grows else _rows(lens, reading, some))
            bar.update(len(some))
    values = torch.cat(found)[order.argsort()]
    require_finite(values, "a log-probability")
    return values


def _rows(lens: LoraLens, reading: Reading, gates: Tensor) -> Float[Tensor, "point token"]:
    with lens.injected(ScaleInject(lens.plan, gates)):
        return read_tokens(lens, reading.repeat(len(gates)))


def _grown(lens: LoraLens, reading: Reading, gates: Tensor) -> Float[Tensor, "point token"]:
    branches = branching.Tree.of(lens, gates)
    grown = reading.grown(branches.width)
    return branches.run(lens, lambda: read_tokens(lens, grown))
