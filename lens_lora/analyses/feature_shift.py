"""Which features does this adapter push? Activations projected onto directions, exactly and to
first order.

    shift           d·(h(1) − h(0))
    first order     d·∂h/∂t along the adapter

1. h of the base and of the adapted model: a forward pass each, kept at the hook point.
2. ∂h by forward mode: one dual pass, every gate moving along `scale`.
3. Differences are projected, not projections subtracted: in float32 that keeps their digits.
4. The exact shift less its first order is the remainder; a noise floor says what of it is rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.analyses.directions import Projection, directions_of
from lens_lora.analyses.hook_points import known_point
from lens_lora.arguments import number
from lens_lora.engine import rounding
from lens_lora.engine.asked import ask_prompts
from lens_lora.engine.dual_pass import dual_forward, tangent_of
from lens_lora.engine.forward import JointInject
from lens_lora.engine.function import require_finite
from lens_lora.errors import ArgumentError, ModelStateError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.attaching import attached
from lens_lora.hooked.gates import Inject, ScaleInject
from lens_lora.hooked.sites import points_without_update
from lens_lora.lens import LoraLens, Scale
from lens_lora.readouts.prompts import Prompts, PromptsLike
from lens_lora.results import drawing
from lens_lora.results.choosing import largest, only_prompt, prompt_rows
from lens_lora.results.measured import Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["FeatureShift", "feature_shift"]


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureShift(Result):
    """How far the adapter moves each feature at one hook point, exactly and to first order.

    Attributes:
        base: [batch, feature], d·h at ε = 0; [batch, feature, position] for every position (NaN
            where a prompt has no such position), and so all values below.
        shift: d·(h(scale) − h(0)), exact. For an autoencoder, its pre-activations' change.
        first_order: d·∂h along the adapter, at ε = at·scale.
        noise_floor: σ of a shift from rounding alone, the mean square over features: [batch], or
            [batch, position].
        activations: an autoencoder's activations at ε = 0 and at ε = scale; None for directions,
            or where the autoencoder has no `encode`.
        name: of the hook point where h is.
        positions: the index within each prompt, or 'each' for one number per position.
        str_tokens: each prompt's tokens.
        features: what the directions are: 'directions', 'encoder'.
        units: of the values.
        at: where along the way to `scale` the derivative is taken.
        meta: model, adapter, dtype and versions.
    """

    base: Float[Tensor, "batch feature *position"]
    shift: Float[Tensor, "batch feature *position"]
    first_order: Float[Tensor, "batch feature *position"]
    noise_floor: Float[Tensor, "batch *position"]
    activations: tuple[Tensor, Tensor] | None
    name: str
    positions: int | Literal["each"]
    str_tokens: tuple[tuple[str, ...], ...]
    features: str
    units: str
    at: float
    meta: Mapping[str, str]

    @property
    def remainder(self) -> Float[Tensor, "batch feature *position"]:
        """shift − first order: what the model's nonlinearity adds."""
        return self.shift - self.first_order

    @property
    def by_position(self) -> bool:
        """Whether every position has its own values."""
        return self.positions == "each"

    def columns(self) -> dict[str, Tensor]:
        """The values by the names that tables give them, in float64 on the CPU."""
        found = {
            "base": self.base,
            "shift": self.shift,
            "first_order": self.first_order,
            "remainder": self.remainder,
        }
        if self.activations is not None:
            found["activation_base"], found["activation_adapted"] = self.activations
        return {name: values.cpu().double() for name, values in found.items()}

    def of_prompt(self, prompt: int | None) -> dict[str, Float[Tensor, "feature *position"]]:
        """One prompt's values, or the mean over prompts.

        Args:
            prompt: an index; without it the mean over prompts, or by position the only prompt.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and none named.
        """
        batch = len(self.base)
        if self.by_position:
            prompt = only_prompt(prompt, batch, "positions")
        rows = prompt_rows(prompt, batch)
        return {name: values[rows].mean(0) for name, values in self.columns().items()}

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k features (and positions) of largest |shift|.

        Args:
            k: how many.
            prompt: an index; without it the mean over prompts, or by position the only prompt.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and none named.
        """
        values = self.of_prompt(prompt)
        order = largest(values["shift"], k)
        width = values["shift"].shape[1] if self.by_position else 1
        columns: dict[str, Any] = {"feature": [i // width for i in order]}
        if self.by_position:
            tokens = self.str_tokens[only_prompt(prompt, len(self.base))]
            columns["position"] = [i % width for i in order]
            columns["token"] = [tokens[i % width] for i in order]
        columns |= {name: v.flatten()[order].tolist() for name, v in values.items()}
        return pd.DataFrame(columns)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, feature and existing position."""
        index = (~self.shift.isnan()).cpu().nonzero()
        columns: dict[str, Any] = {"prompt": index[:, 0].tolist(), "feature": index[:, 1].tolist()}
        if self.by_position:
            columns["position"] = at = index[:, 2].tolist()
            pairs = zip(columns["prompt"], at, strict=True)
            columns["token"] = [self.str_tokens[p][i] for p, i in pairs]
        where = tuple(index.T)
        return pd.DataFrame(columns | {n: v[where].tolist() for n, v in self.columns().items()})

    def plot(self, k: int = 20, prompt: int | None = None) -> Figure:
        """The k features of largest |shift|: bars with their first order, or feature × position.

        Args:
            k: how many.
            prompt: an index; without it the mean over prompts, or by position the only prompt.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and none named.
        """
        return drawing.figure(self, k, prompt)


@alone
def feature_shift(
    lens: LoraLens,
    prompts: PromptsLike,
    directions: Any,
    name: str | None = None,
    *,
    scale: Scale = 1.0,
    at: float = 0.0,
    positions: int | Literal["each"] = -1,
) -> FeatureShift:
    """How far the adapter moves each feature at a hook point: exactly, and to first order.

    Cost: three forward passes, a dual one and one of a single token (about 6 F), however many
    features.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        directions: [feature, d], used as they are (normalise them to read lengths); or a sparse
            autoencoder with W_enc (SAELens's, or any with such attributes).
        name: the hook point where d·h is read; with heads their last two axes are laid flat. An
            autoencoder brings its own.
        scale: which sites, how strongly: the shift is h(scale) − h(0).
        at: where on the way the derivative is taken: ε = at·scale, 0 the base, 1 the adapted end.
        positions: an index within each prompt, negative ones from its own end; 'each' for every
            position: values are [batch, feature, position].

    Returns:
        FeatureShift; an autoencoder's activations at both ends stand beside the pre-activations'
        shift, since a feature that is off at both ends moves nothing downstream of it.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names.
        ModelStateError: a point that never fires, holds no activations by position, or lies
            between a site's input and output; an operation without a forward-mode derivative.
        ArgumentError: directions of another width, an autoencoder that is not linear up to its
            pre-activations, a position outside a prompt.
        NumericsError: non-finite activations.
    """
    asked, features = ask_prompts(lens, prompts), directions_of(directions)
    ready, gates, at = asked.prompts, lens.gates(scale), number("at", at)
    name = _point(lens, name or features.hook_name)
    project = Projection(ready, features, positions)
    with torch.no_grad():
        _require_positions(lens, ready, name)
        base = _activation(lens, ready, name, ScaleInject(lens.plan, 0 * gates))
        adapted = _activation(lens, ready, name, ScaleInject(lens.plan, gates))
        with attached(lens.model, [(lens.embedding_output, rounding.of_embedding(lens))]):
            noisy = _activation(lens, ready, name, ScaleInject(lens.plan, gates))
    with dual_forward():
        moved = _activation(lens, ready, name, JointInject(lens, at * gates, gates), tangent_of)
    noise = project(noisy.to(lens.gate_dtype) - adapted.to(lens.gate_dtype))
    values = {
        "base": project(base),
        "shift": project(adapted.to(lens.gate_dtype) - base.to(lens.gate_dtype)),
        "first_order": project(moved),
    }
    return FeatureShift(
        **values,
        noise_floor=noise.square().mean(1).sqrt(),  # of a difference of two rounded runs
        activations=_activations(project, base, adapted),
        name=name,
        positions="each" if positions == "each" else int(positions),
        str_tokens=asked.str_tokens,
        features=features.kind,
        units=features.units,
        at=at,
        meta=lens.describe(),
    )


def _activation(
    lens: LoraLens,
    prompts: Prompts,
    name: str,
    inject: Inject,
    of: Callable[[Tensor], Tensor] = torch.clone,
) -> Float[Tensor, "batch pos *d"]:
    """The activation (or, of a dual pass, its tangent) at one hook point."""
    kept: list[Tensor] = []

    def keep(tensor: Any, hook: Any) -> None:
        del hook
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            kept.append(of(tensor))

    with lens.injected(inject), attached(lens.model, [(name, keep)]):
        lens.run(prompts)
    if not kept:
        raise ModelStateError(
            f"{name}: the hook point exists but no activation passes it in a forward pass; a flag "
            "of the model or its class bypasses it. Name another point."
        )
    if kept[-1].ndim < 3 or kept[-1].shape[:2] != prompts.tokens.shape:
        raise ModelStateError(
            f"{name} holds a tensor {tuple(kept[-1].shape)} for {tuple(prompts.tokens.shape)} "
            "tokens: no activation by prompt and position."
        )
    require_finite(kept[-1][prompts.real], f"the activation at {name}, or its tangent,")
    return kept[-1]


def _require_positions(lens: LoraLens, prompts: Prompts, name: str) -> None:
    """Refuse a point without an axis of positions, of which one token has one entry."""
    token = Prompts(prompts.tokens[:1, :1], torch.ones_like(prompts.lengths[:1]))
    _activation(lens, token, name, ScaleInject(lens.plan, lens.gates(0.0)))


def _activations(
    project: Projection, base: Tensor, adapted: Tensor
) -> tuple[Tensor, Tensor] | None:
    if project.features.encode is None:
        return None
    with torch.no_grad():
        return project.encoded(base), project.encoded(adapted)


def _point(lens: LoraLens, name: str | None) -> str:
    """A hook point of the model at which the adapted model's activation exists."""
    if name is None:
        raise ArgumentError("directions of no hook point; name one with name=….")
    known_point(lens, name)
    if name in points_without_update(lens.sites):
        raise ModelStateError(
            f"{name}: lies between a site's input and the point at which its update is added, so "
            "it never holds the adapted model's value. Use the site's input or output instead "
            "(lens.sites: read, write)."
        )
    return name
