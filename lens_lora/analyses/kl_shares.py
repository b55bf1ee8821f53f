"""The quadratic part of a KL, split exactly: q_l = ½ v_lᵀ F v.

    v_l = J δz_l at every token of the response,   v = Σ_l v_l,   F_t = diag p₀,t − p₀,t p₀,tᵀ
    D(ε·1) = ½ ε² Σ_t vᵀ F_t v + O(ε³),   Σ_l q_l = ½ vᵀ F v

1. One dual forward pass gives v, the joint tangent of all sites.
2. The covector F v goes back in one backward pass: ∂/∂ε_l of (Fv)ᵀf is v_lᵀ F v, and its parts by
   position, head and rank come as those of any readout.
3. How far the quadratic is from the divergence itself is measured along ε, by forward passes.

A share is negative where a site moves the distribution against the others.
Cost: a dual forward pass, a forward and a backward pass, and seven forward passes for the curve.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.analyses.first_order import labelled
from lens_lora.engine.asked import Asked, ask
from lens_lora.engine.forward import joint_tangent
from lens_lora.engine.function import gated_logits
from lens_lora.engine.reverse import require_finite_sites, site_slopes
from lens_lora.errors import ArgumentError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.sites import by_axes
from lens_lora.lens import LoraLens
from lens_lora.readouts.answers import AnswerLike
from lens_lora.readouts.divergence import KL, Linear
from lens_lora.readouts.prompts import Prompts, PromptsLike
from lens_lora.results import drawing
from lens_lora.results.attribution import Attribution
from lens_lora.results.measured import Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["KLShares", "kl_shares"]

_SCALES = (0.03, 0.1, 0.3, 0.5, 0.7, 0.85)


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KLShares(Result):
    """Which site made the base and adapted distributions differ, to second order in ε.

    Attributes:
        attribution: q_l in nats, split as asked; beside it D(0) = 0 and D(1), exact.
        scales: ε along the path, the last one 1.
        divergence: [batch, scale], D(ε·1), exact.
    """

    attribution: Attribution
    scales: Float[Tensor, "scale"]
    divergence: Float[Tensor, "batch scale"]

    @property
    def quadratic(self) -> Float[Tensor, "batch"]:
        """½ vᵀ F v, the sum of all shares: what D would be at ε = 1 if it were quadratic."""
        return self.attribution.total

    @property
    def ratio(self) -> Float[Tensor, "batch scale"]:
        """D(ε) over ε² ½ vᵀ F v: one where the divergence is quadratic so far."""
        return self.divergence / (self.scales**2 * self.quadratic[:, None])

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site and existing part, with its share of the quadratic."""
        frame = self.attribution.to_frame().drop(columns="share")
        whole = self.quadratic.double().cpu().numpy()[frame["prompt"].to_numpy()]
        return frame.assign(share=frame["value"] / whole)

    def along(self) -> pd.DataFrame:
        """One row per prompt and ε: the divergence, the quadratic, and their ratio."""
        rows = [
            {
                "prompt": p,
                "scale": float(scale),
                "divergence": float(self.divergence[p, i]),
                "quadratic": float(scale**2 * self.quadratic[p]),
                "ratio": float(self.ratio[p, i]),
            }
            for p in range(len(self.divergence))
            for i, scale in enumerate(self.scales)
        ]
        return pd.DataFrame(rows)

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k sites of largest share.

        Args:
            k: how many.
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return self.attribution.top(k, prompt).drop(columns="share")

    def plot(self, prompt: int | None = None) -> Figure:
        """Heatmap layer × kind of module.

        Args:
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return drawing.figure(self.attribution, prompt)


@alone
def kl_shares(
    lens: LoraLens,
    prompts: PromptsLike,
    response: AnswerLike | None = None,
    *,
    by: tuple[str, ...] | str = (),
    direction: Literal["base_to_adapted", "adapted_to_base"] = "base_to_adapted",
    scales: Sequence[float] = _SCALES,
    progress: bool = True,
) -> KLShares:
    """q_l = ½ v_lᵀ F v of every site: a complete split of the quadratic KL.

    Both directions have the same quadratic; they differ in the divergence that it is held against.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        response: what is said after each prompt; None for the next token alone.
        by: any of 'position', 'head', 'rank'.
        direction: of the divergence along ε.
        scales: ε at which it is measured, beside 1.
        progress: show a bar.

    Raises:
        ArgumentError: another axis or direction, or a scale that is not between 0 and 1.
        ModelStateError: the model has an operation without a forward-mode derivative.
        TokenError, PromptError: a response or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    axes = by_axes(by)
    if not all(0 < scale < 1 for scale in scales):
        raise ArgumentError(f"scales={scales!r}: expected strengths between 0 and 1.")
    asked = ask(lens, prompts, KL(response, direction))
    at = lens.gates(0.0)
    rows = asked.reading.prompts
    pulled = _pulled(asked, joint_tangent(lens, rows, at, torch.ones_like(at)))
    reading = dataclasses.replace(asked.reading, read=Linear(pulled))
    values = site_slopes(lens, reading, at, axes) / 2
    require_finite_sites(lens, values)
    strengths = torch.tensor([*sorted(scales), 1.0], dtype=at.dtype, device=at.device)
    points = strengths[:-1, None].expand(-1, len(at))
    between = asked.at_gates(points, progress=progress, what="along the path")
    return KLShares(
        attribution=labelled(asked, values, axes, method="kl_quadratic", at=0.0),
        scales=strengths,
        divergence=torch.cat([between, asked.ends[1][:, None]], 1),
    )


def _pulled(asked: Asked, v: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, "row *slot vocab"]:
    """F v = p₀ ∘ (v − p₀ᵀv) at each slot that holds a token, zero elsewhere."""
    lens, rows = asked.lens, asked.reading.prompts
    with torch.no_grad():
        p = gated_logits(lens, rows, lens.gates(0.0)).softmax(-1)
    found = p * (v - (p * v).sum(-1, keepdim=True))
    return found if found.ndim == 2 else found * _mask(rows, found)


def _mask(rows: Prompts, like: Tensor) -> Float[Tensor, "row slot 1"]:
    return rows.read_mask.to(like)[..., None]
