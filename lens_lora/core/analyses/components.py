"""The three components of a first-order shift, and the gain (note, §3, after Prop. 1).

    a_l = ‖δz_l‖ · ‖Jᵀu_y‖ · cos(δz_l, Jᵀu_y),   and the gain ‖J δz_l‖ / ‖δz_l‖.

1. One backward pass shows z, δz and Jᵀu_y of every site. Their squares and products are summed over
   the real positions of a prompt's rows and over the site's features. For v, on a model with folded
   value biases, they are summed over both places where its update is added.
2. The gain takes each site's tangent of all logits at the read position. Its mean over the
   vocabulary is subtracted, as a centred unembedding would do, so that the gain does not depend on
   how the model was processed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, final, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import word
from lens_lora.core.analyses.own_analyses import analysis
from lens_lora.core.function.function import Function
from lens_lora.core.function.memory import graph_groups
from lens_lora.core.function.reverse import site_gradients
from lens_lora.core.model import Injection, LoraLens
from lens_lora.core.model.sites import Sites
from lens_lora.core.readout import Reading
from lens_lora.core.results import drawing
from lens_lora.core.results.base import OfSites
from lens_lora.core.results.tables import long_table

Component = Literal["z_norm", "delta_norm", "sensitivity", "cosine", "gain", "first_order"]


@final
class Components(OfSites):
    """The components that make each site's first-order shift large or small, at the base model.

    Attributes:
        z_norm, delta_norm: ‖z‖ and ‖δz‖.
        sensitivity: ‖Jᵀu_y‖, how strongly the readout depends on the site's output.
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
        """The first-order shift a_l, as the product of its three components."""
        product = self.delta_norm * self.sensitivity * self.cosine
        return torch.where(self.cosine.isnan(), torch.zeros_like(product), product)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site."""
        numbers = {name: getattr(self, name) for name in get_args(Component)}
        prompts = {"prompt": range(len(self.z_norm))}
        return long_table(numbers, prompts, Sites(self.sites).columns())

    def plot(self, of: Component = "first_order", prompt: int | None = None) -> drawing.Figure:
        """A heatmap of one of the numbers, layer × kind of module; hovering shows all of them.

        Args:
            of: 'z_norm', 'delta_norm', 'sensitivity', 'cosine', 'gain' or 'first_order'.
            prompt: an index; without it, the mean over the prompts in which the number exists.

        Raises:
            ArgumentError: another number, or no such prompt.
        """
        return drawing.figure(self, word("of", of, get_args(Component)), prompt)


@analysis(takes_max_memory=True)
def components(g: Function) -> Components:
    """‖z‖, ‖δz‖, ‖Jᵀu_y‖, cosine and gain of every site, at the base model.

    Cost: one forward and one backward pass, and for the gain one dual forward pass per site.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        max_memory: how many bytes may be used besides the model and the result; it replaces the
            bound of `lens.within`.
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
    z = squares["z"].sqrt()
    delta = squares["delta"].sqrt()
    gradient = squares["gradient"].sqrt()

    def centred_square(tangent: Float[Tensor, "row site *slot vocab"]) -> Float[Tensor, "row site"]:
        square = (tangent - tangent.mean(-1, keepdim=True)).square().sum(-1)
        mask = g.rows.read_mask.to(square.device)[:, None]
        return (square.view(*square.shape[:2], -1) * mask).sum(-1)

    each_site = torch.eye(len(lens.sites))
    output_norm = by_prompt(g.tangent(each_site, read=centred_square).T).sqrt()
    product = delta * gradient
    return Components(
        sites=lens.sites,
        z_norm=z,
        delta_norm=delta,
        sensitivity=gradient,
        cosine=torch.where(product > 0, squares["inner"] / product, torch.nan),
        gain=torch.where(delta > 0, output_norm / delta, torch.nan),
        meta=lens.describe(g.prompts),
    )


def squared_norms(g: Function) -> dict[str, Float[Tensor, "row site"]]:
    """‖z‖², ‖δz‖², ‖Jᵀu_y‖² and ⟨δz, Jᵀu_y⟩ of every row, as 'z', 'delta', 'gradient' and 'inner'.

    One forward and one backward pass.

    Args:
        g: the function.
    """
    of_groups: list[dict[str, Tensor]] = []
    for group in graph_groups(g.lens, g.reading):
        sums = _SquaredNorms(g.lens, group)
        site_gradients(g.lens, group, g.lens.gates(0.0), sums.visit)
        of_groups.append(sums.finished())
    joined: dict[str, Tensor] = {}
    for name in of_groups[0]:
        joined[name] = torch.cat([sums[name] for sums in of_groups])
    return joined


class _Visited(NamedTuple):
    """An injection, with its input and the gradient at its output.

    Attributes:
        injection: where a site's update is added.
        weight: the gate of the partner by which δ is multiplied; None without a partner.
        gradient: Jᵀu_y, [row, pos, out].
        z: the site's input.
    """

    injection: Injection
    weight: Tensor | None
    gradient: Tensor
    z: Tensor


class _SquaredNorms:
    """Sums of squares and products over the positions and features of each row, site by site."""

    def __init__(self, lens: LoraLens, reading: Reading) -> None:
        self._lens = lens
        self._real = reading.rows.real[..., None]
        self._read = reading.rows.read_mask[..., None]
        shape = (len(reading.owner), len(lens.sites))
        self._squares = {
            name: torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)
            for name in ("z", "delta", "gradient", "inner")
        }
        # The norms that the model runs several times, by site, with the sum of their gradients.
        self._repeated: dict[int, _Visited] = {}

    def visit(
        self, injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor
    ) -> None:
        """Take what a pass shows of an injection."""
        visited = _Visited(injection, weight, gradient, z)
        if injection.ports.repeats == 1:
            self._add(visited)
            return
        # Such a norm adds the same δ each time, so its gradients are summed.
        earlier = self._repeated.get(injection.site)
        if earlier is not None:
            visited = visited._replace(gradient=gradient + earlier.gradient)
        self._repeated[injection.site] = visited

    def finished(self) -> dict[str, Float[Tensor, "row site"]]:
        """The sums of the whole pass."""
        for visited in self._repeated.values():
            self._add(visited)
        self._repeated.clear()
        return self._squares

    def _add(self, visited: _Visited) -> None:
        injection, weight, gradient, z = visited
        site = injection.site
        delta = injection.map(z)
        # The unembedding is run at the positions that are read alone.
        is_unembedding = self._lens.sites[site].kind == "unembed"
        counted = self._read if is_unembedding else self._real
        counted = counted.to(delta.device)
        self._count("z", site, self._square_of_inputs(injection, z, counted, delta.dtype))
        if weight is not None:
            return  # δ is multiplied by the partner's gate, which is zero at the base
        delta = delta * counted
        gradient = gradient.to(delta.dtype) * counted
        self._count("delta", site, delta.flatten(1).square().sum(1))
        self._count("gradient", site, gradient.flatten(1).square().sum(1))
        self._count("inner", site, (gradient * delta).flatten(1).sum(1))

    def _square_of_inputs(
        self, injection: Injection, z: Tensor, counted: Tensor, dtype: torch.dtype
    ) -> Float[Tensor, " row"]:
        inputs = torch.ones_like(counted * 1.0)  # an embedding's input is one-hot
        if z.is_floating_point():
            inputs = injection.map.inputs(z).to(dtype)
        copies = z.shape[2] if z.ndim == 4 else 1
        return (inputs.flatten(2) * counted).flatten(1).square().sum(1) / copies

    def _count(self, name: str, site: int, totals: Float[Tensor, " row"]) -> None:
        self._squares[name][:, site] += totals.to(self._lens.device)
