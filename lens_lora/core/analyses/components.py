"""What makes a first-order shift large or small (note, §3, after Prop. 1).

    a_l = ‖δz_l‖ · ‖Jᵀu_y‖ · cos(δz_l, Jᵀu_y),   and the gain ‖J δz_l‖ / ‖δz_l‖.

1. One backward pass shows z, δz and Jᵀu_y of every site. Their squares and products are summed over
   a prompt's real positions (of every row that the readout reads) and the site's features; for v on
   a model with folded value biases, over both places where its update is added.
2. The gain takes each site's whole-vocabulary tangent at the read position, less its mean, so that
   it does not depend on the constant that a centred unembedding removes.
"""

from __future__ import annotations

from typing import final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.analyses.own_analyses import analysis
from lens_lora.core.function.function import Function
from lens_lora.core.function.memory import graph_groups
from lens_lora.core.function.reverse import site_gradients
from lens_lora.core.model import Injection, LoraLens
from lens_lora.core.readout import Reading
from lens_lora.core.results.base import OfSites, long_table, site_labels


@final
class Components(OfSites):
    """Per prompt and site, at the base model: what makes a first-order shift large or small.

    Attributes:
        z_norm, delta_norm: ‖z‖ and ‖δz‖.
        sensitivity: ‖Jᵀu_y‖, how much the readout listens to the site's output.
        cosine: cos(δz, Jᵀu_y); NaN where either is zero.
        gain: ‖J δz‖ / ‖δz‖ over the whole vocabulary; NaN where δz is zero.
        sites, meta: see `OfSites`.
    """

    z_norm: Float[Tensor, "batch site"]
    delta_norm: Float[Tensor, "batch site"]
    sensitivity: Float[Tensor, "batch site"]
    cosine: Float[Tensor, "batch site"]
    gain: Float[Tensor, "batch site"]

    @property
    def first_order(self) -> Float[Tensor, "batch site"]:
        """a_l, as the product of its three components."""
        product = self.delta_norm * self.sensitivity * self.cosine
        return torch.where(self.cosine.isnan(), torch.zeros_like(product), product)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site."""
        labels = site_labels(self.sites)
        sites = {name: labels[name] for name in ("site", "layer", "kind")}
        fields = ("z_norm", "delta_norm", "sensitivity", "cosine", "gain", "first_order")
        numbers = {name: getattr(self, name) for name in fields}
        return long_table(numbers, {"prompt": range(len(self.z_norm))}, sites)


@analysis(takes_max_memory=True)
def components(g: Function) -> Components:
    """‖z‖, ‖δz‖, ‖Jᵀu_y‖, cosine and gain of every site, at the base model.

    Cost: one forward and one backward, and for the gain one dual forward pass per site.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        max_memory: bytes beside the model and the result, as for `lens.within`, whose bound it
            replaces.
        progress: show a bar.

    Raises:
        ArgumentError: less memory than one site takes.
        ModelStateError: the model has an operation without a forward-mode derivative.
        TokenError, PromptError: a readout or prompt that does not fit the model.
    """
    g.require_slope_at_base()
    lens = g.lens
    by_prompt = g.reading.by_prompt
    squares = {name: by_prompt(rows) for name, rows in squared_norms(g).items()}
    z, delta, gradient = (squares[name].sqrt() for name in ("z", "delta", "gradient"))

    def centred_square(tangent: Float[Tensor, "row site *slot vocab"]) -> Float[Tensor, "row site"]:
        square = (tangent - tangent.mean(-1, keepdim=True)).square().sum(-1)
        mask = g.rows.read_mask.to(square.device)[:, None]
        return (square.view(*square.shape[:2], -1) * mask).sum(-1)

    each_site = torch.eye(len(lens.sites))
    moved = by_prompt(g.tangent(each_site, read=centred_square).T)
    return Components(
        sites=lens.sites,
        z_norm=z,
        delta_norm=delta,
        sensitivity=gradient,
        cosine=torch.where(delta * gradient > 0, squares["inner"] / (delta * gradient), torch.nan),
        gain=torch.where(delta > 0, moved.sqrt() / delta, torch.nan),
        meta=lens.describe(g.prompts),
    )


def squared_norms(g: Function) -> dict[str, Float[Tensor, "row site"]]:
    """‖z‖², ‖δz‖², ‖Jᵀu_y‖² and ⟨δz, Jᵀu_y⟩ of every row, by name. One forward and one backward."""
    groups = graph_groups(g.lens, g.reading)
    squares = [_squared_norms(g.lens, group) for group in groups]
    return {name: torch.cat([of_group[name] for of_group in squares]) for name in squares[0]}


def _squared_norms(lens: LoraLens, reading: Reading) -> dict[str, Float[Tensor, "row site"]]:
    real, read = (mask[..., None] for mask in (reading.prompts.real, reading.prompts.read_mask))
    shape = (len(reading.owner), len(lens.sites))
    squares = {
        name: torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)
        for name in ("z", "delta", "gradient", "inner")
    }
    repeated: dict[int, tuple[Injection, Tensor | None, Tensor, Tensor]] = {}

    def visit(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        if injection.ports.repeats == 1:
            add(injection, weight, gradient, z)
            return
        # A norm that the model runs several times adds the same δ each time.
        if injection.site in repeated:
            gradient = gradient + repeated[injection.site][2]
        repeated[injection.site] = (injection, weight, gradient, z)

    def add(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        delta = injection.map(z)
        # The unembedding is run at the positions that are read alone.
        kept = (read if lens.sites[injection.site].kind == "unembed" else real).to(delta.device)
        delta, gradient = delta * kept, gradient.to(delta.dtype) * kept
        # An embedding's input is one-hot.
        held = injection.map.inputs(z)
        inputs = held.to(delta.dtype) if z.is_floating_point() else torch.ones_like(kept * 1.0)
        copies = z.shape[2] if z.ndim == 4 else 1
        sums = {"z": (inputs.flatten(2) * kept).flatten(1).square().sum(1) / copies}
        # What waits for a partner's gate is nothing at the base model.
        if weight is None:
            sums["delta"] = delta.flatten(1).square().sum(1)
            sums["gradient"] = gradient.flatten(1).square().sum(1)
            sums["inner"] = (gradient * delta).flatten(1).sum(1)
        for name, total in sums.items():
            squares[name][:, injection.site] += total.to(lens.device)

    site_gradients(lens, reading, lens.gates(0.0), visit)
    for once in repeated.values():
        add(*once)
    return squares
