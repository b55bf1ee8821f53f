"""How much an adapter shifts each feature at a hook point, exactly and to first order.

A feature is a direction d in the space of an activation h (`formats/directions.py`), and its value
is d·h.

    shift           d·(h(1) − h(0))
    first order     d·∂h/∂t along the adapter
    write           d·δz_l of each site             by='site', `hidden/feature_writes.py`

1. A forward pass of the base and one of the adapted model give h at the hook point.
2. One dual forward pass, in which every gate moves along `scale`, gives ∂h/∂t.
3. The difference of the activations is projected, rather than each of them. This keeps the digits
   of a small shift in float32.
4. The exact shift minus its first order is the remainder. A noise floor says how much of it may be
   rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import number, one_entry, word
from lens_lora.core import (
    Described,
    Function,
    LoraLens,
    Positions,
    Prompts,
    Scale,
    alone,
    drawing,
    tables,
)
from lens_lora.errors import ArgumentError
from lens_lora.formats.directions import Directions, directions_of
from lens_lora.hidden.feature_writes import FeatureWrites, feature_writes
from lens_lora.hidden.projection import (
    FeatureProjection,
    activation_at,
    positions_label,
    tangent_at,
)
from lens_lora.stream.point_activations import TextsLike, text_rows

_Values = Float[Tensor, "batch feature *position"]


@final
class FeatureShift(Described):
    """How much the adapter shifts each feature at one hook point, exactly and to first order.

    Attributes:
        base: [batch, feature], d·h at ε = 0. By position it is [batch, feature, position], NaN
            where a prompt has no such position. All values below have the same shape.
        shift: d·(h(scale) − h(0)), exact. For an autoencoder, the change of its pre-activations.
        first_order: d·∂h along the adapter, at ε = at·scale.
        noise_floor: σ of a shift from rounding alone, the root mean square over features: [batch],
            or [batch, position].
        activations: an autoencoder's activations at ε = 0 and at ε = scale; None for directions,
            or if the autoencoder has no `encode`.
        name: the hook point of h.
        positions: 'each' if every position has its own values; else the index within each prompt,
            or the tokens that values are means over, in words, such as 'response'.
        str_tokens: each prompt's tokens.
        features: the kind of directions: 'directions' or 'encoder'.
        units: the unit of the values.
        at: where along the way to `scale` the derivative is taken.
        meta: model, adapter, dtype and versions.
    """

    base: Float[Tensor, "batch feature *position"]
    shift: Float[Tensor, "batch feature *position"]
    first_order: Float[Tensor, "batch feature *position"]
    noise_floor: Float[Tensor, " batch *position"]
    activations: tuple[_Values, _Values] | None
    name: str
    positions: int | str
    str_tokens: Annotated[tuple[tuple[str, ...], ...], "batch position"]
    features: str
    units: str
    at: float

    @property
    def remainder(self) -> Float[Tensor, "batch feature *position"]:
        """The shift minus its first order, which comes from the model's nonlinearity."""
        return self.shift - self.first_order

    @property
    def by_position(self) -> bool:
        """Whether every position has its own values."""
        return self.positions == "each"

    def columns(self) -> dict[str, Tensor]:
        """The values by the names that tables give them, in float64 on the CPU."""
        columns = {
            "base": self.base,
            "shift": self.shift,
            "first_order": self.first_order,
            "remainder": self.remainder,
        }
        if self.activations is not None:
            columns["activation_base"], columns["activation_adapted"] = self.activations
        return {name: values.cpu().double() for name, values in columns.items()}

    def of_prompt(self, prompt: int | None) -> dict[str, Float[Tensor, " feature *position"]]:
        """One prompt's values, or the mean over prompts.

        Args:
            prompt: an index; without it the mean over prompts, or by position the only prompt.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and none named.
        """
        if self.by_position:
            prompt = self.only_prompt(prompt, "positions")
        rows = self.prompt_rows(prompt)
        return {name: values[rows].mean(0) for name, values in self.columns().items()}

    def top(self, k: int = 10, prompt: int | None = None, *, sinks: bool = False) -> pd.DataFrame:
        """The k features (and positions) of largest |shift|.

        By position the prompt's first token is left out unless it is the only one: it is a sink,
        whose h is up to hundreds of times the others' and attends to no other token.

        Args:
            k: the number of rows.
            prompt: an index; without it the mean over prompts, or by position the only prompt.
            sinks: whether the first token counts too.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and none named.
        """
        values = self.of_prompt(prompt)
        ranked = values["shift"]
        if self.by_position and ranked.shape[1] > 1 and not sinks:
            ranked = ranked.clone()
            ranked[:, 0] = torch.nan
        order = tables.largest(ranked, k)
        if self.by_position:
            labels = self._places(order, self.only_prompt(prompt))
        else:
            labels = {"feature": order}
        numbers = {name: column.flatten()[order].tolist() for name, column in values.items()}
        return pd.DataFrame(labels | numbers)

    def _places(self, order: Sequence[int], prompt: int) -> dict[str, list[Any]]:
        """Feature, position and token of flat indices into one prompt's [feature, position]."""
        width = self.base.shape[2]
        positions = [index % width for index in order]
        tokens = self.str_tokens[prompt]
        return {
            "feature": [index // width for index in order],
            "position": positions,
            "token": [tokens[position] for position in positions],
        }

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, feature and existing position."""
        where = (~self.shift.isnan()).cpu().nonzero(as_tuple=True)
        prompts, features, *positions = where
        labels: dict[str, Any] = {"prompt": prompts.tolist(), "feature": features.tolist()}
        if self.by_position:
            labels["position"] = positions[0].tolist()
            labels["token"] = tables.tokens_at(
                self.str_tokens, labels["prompt"], labels["position"]
            )
        numbers = {name: values[where].tolist() for name, values in self.columns().items()}
        return pd.DataFrame(labels | numbers)

    def plot(self, k: int = 20, prompt: int | None = None) -> drawing.Figure:
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
    prompts: TextsLike,
    directions: Any,
    name: str | None = None,
    *,
    scale: Scale | None = None,
    at: float = 0.0,
    positions: Positions = -1,
    by: Literal["site"] | None = None,
) -> FeatureShift | FeatureWrites:
    """How much the adapter shifts each feature at a hook point: exactly, and to first order.

    With by='site' it is what each site itself writes to each feature, d·δz_l, without the effects
    of later modules. At a point of the residual stream these are the sites before it that write to
    the stream: a site after the point cannot move it, and q, k, v, gate and up do not write to the
    stream. At any other point it is the site whose output this is. Without a point, all sites that
    write to the stream are listed, wherever the feature is read.

    Cost: three forward passes, a dual one and one of a single token (about 6 F), for any number of
    features; by site one forward pass, and between a block's branches also a backward pass.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`; a tuple (prompts, responses); or what
            `lens.generate` returned. So a tuple of two strings is one text, a prompt and its
            response; two texts go in a list. `meta["responses"]` and the heading of the result say
            whether texts have responses.
        directions: [d], [feature, d], {label: either} or a Contrast, used as they are (normalise
            them to read lengths); or a sparse autoencoder with W_enc (SAELens's, or any with such
            attributes), alone or as (autoencoder, indices).
        name: the hook point where d·h is read; if it has heads, the last two axes are flattened. It
            may be left out for an autoencoder, which has its own, and for a Contrast of one point.
        scale: the sites and their strength, 1 by default: the shift is h(scale) − h(0).
        at: where the derivative is taken, ε = at·scale: 0 is the base, 1 the adapted end. By site,
            the gates at which z is read.
        positions: an index within each prompt, where negative ones count from its own end; a slice,
            indices, 'prompt' or 'response' for the mean over these tokens; None for the mean over
            all tokens except the first, which is a sink; 'each' for every position: values are then
            [batch, feature, position].
        by: 'site' for what each site writes; there is then no `scale`, and `name` may be left out
            for directions of the residual stream.

    Returns:
        A FeatureShift, or by site a FeatureWrites. It also has an autoencoder's activations at both
        ends, because a feature that is off at both ends has no effect, whatever its shift.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names; by site, a point to
            which no site of the adapter writes.
        ModelStateError: a point that never fires, has no positions, or lies between a site's input
            and output; an operation without a forward-mode derivative. By site, a norm that changes
            what a site writes before it is added to the residual stream (o and down of Gemma 2 and
            3, Bloom's embedding).
        ArgumentError: directions of another width, or an autoencoder that is not linear up to its
            pre-activations; by site, a scale, or every position.
        PromptError: a prompt lacks one of these positions.
        NumericsError: an activation is not finite.
    """
    strength = number("at", at)
    f = lens.function(text_rows(lens, prompts))
    features = directions_of(directions, name)
    if name is None:
        name = features.hook_name
    if by is None:
        return _shift(f, features, name, scale, strength, positions)
    word("by", by, ["site"])
    if scale is not None or one_entry(positions) == "each":
        raise ArgumentError(
            "by='site' gives one number for each site, what it writes at the gates `at`; leave out "
            "scale=, and let positions be an index, such as -1, or tokens for a mean."
        )
    return feature_writes(f, features, name, strength, positions)


def _shift(
    f: Function,
    features: Directions,
    name: str | None,
    scale: Scale | None,
    at: float,
    positions: Positions,
) -> FeatureShift:
    """The shift d·(h(scale) − h(0)) at one hook point, and its first order."""
    lens = f.lens
    if scale is None:
        scale = 1.0
    gates = lens.gates(scale)
    if name is None:
        raise ArgumentError("these directions belong to no hook point; name one with name=….")
    lens.require_update([lens.known_point(name)])
    project = FeatureProjection(f.rows, features.at(name), positions)
    _require_width(f, features, name)
    activations: tuple[_Values, _Values] | None = None
    with torch.no_grad():
        base = activation_at(f, name, 0 * gates)
        adapted = activation_at(f, name, gates)
        noisy = activation_at(f, name, gates, with_noise=True)
        if features.encode is not None:
            activations = project.encoded(base), project.encoded(adapted)
    tangent = tangent_at(f, name, gates, at * gates)
    dtype = lens.gate_dtype
    noise = project(noisy.to(dtype) - adapted.to(dtype))
    return FeatureShift(
        base=project(base),
        shift=project(adapted.to(dtype) - base.to(dtype)),
        first_order=project(tangent),
        # Like the noise, the shift is a difference of two rounded runs.
        noise_floor=noise.square().mean(1).sqrt(),
        activations=activations,
        name=name,
        positions=positions_label(positions),
        at=at,
        features=features.kind,
        units=features.units,
        str_tokens=f.str_tokens,
        meta=lens.describe(f.rows),
    )


def _require_width(f: Function, features: Directions, name: str) -> None:
    """Refuse directions of another width than the activation, by a pass of one token."""
    rows = f.rows
    token = Prompts(rows.tokens[:1, :1], torch.ones_like(rows.lengths[:1]))
    h = activation_at(f.of_rows(token), name, 0.0)
    features.at(name, h[0, 0].numel())
