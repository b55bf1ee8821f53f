"""Which features does this adapter push, and which of its sites write them?

A feature is a direction d in the space of an activation h (`formats/directions.py`); its value is
d·h.

    shift           d·(h(1) − h(0))              `feature_shift`, at one hook point
    first order     d·∂h/∂t along the adapter
    write           d·δz_l                       by='site', before any later module has
                                                 seen it, of sites that write to the point

1. h of the base and of the adapted model: a forward pass each, kept at the hook point.
2. ∂h by forward mode: one dual pass, every gate moving along `scale`.
3. Differences are projected, not projections subtracted: in float32 that keeps their digits.
4. The exact shift less its first order is the remainder; a noise floor says what of it is rounding.
5. δz_l of the sites that write to the point: one forward pass at the gates `at`. To a point of the
   residual stream write o, down and embeddings before it; what stands behind it cannot move it, and
   is left out. Between the two branches of a block (resid_mid) a site counts if the activation
   depends on its gate, which a backward pass of one prompt shows. To any other point writes a site
   whose own output is held there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.arguments import is_whole, number, one_entry, word
from lens_lora.core import (
    Described,
    Inject,
    LoraLens,
    OfSites,
    Prompts,
    PromptsLike,
    Scale,
    ScaleInject,
    alone,
    attached,
    chosen_sites,
    only_prompt,
    prompt_rows,
    tangent_of,
)
from lens_lora.core.function.asked import Asked, ask_prompts, of_stream
from lens_lora.core.function.derivatives import JointInject
from lens_lora.core.function.duals import dual_forward
from lens_lora.core.function.forward import require_finite, run_without_logits
from lens_lora.core.function.memory import rows_of_duals, rows_of_pass
from lens_lora.core.model.lens import stream_writers
from lens_lora.core.model.sites import known_point
from lens_lora.core.results import base as results_base
from lens_lora.core.results import drawing
from lens_lora.errors import ArgumentError, ModelStateError, SiteError
from lens_lora.formats.directions import STREAM, Directions, directions_of, is_residual, is_stream

# --- How far each feature moves at a hook point.


_Values = Float[Tensor, "batch feature *position"]
_Positions = int | Literal["each"]


@final
class FeatureShift(Described):
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
        name: the hook point where h is.
        positions: the index within each prompt, or 'each' for one number per position.
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
    positions: int | Literal["each"]
    str_tokens: Annotated[tuple[tuple[str, ...], ...], "batch position"]
    features: str
    units: str
    at: float

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
        names = ("base", "shift", "first_order", "remainder")
        numbers = {name: getattr(self, name) for name in names}
        if self.activations is not None:
            numbers["activation_base"], numbers["activation_adapted"] = self.activations
        return {name: values.cpu().double() for name, values in numbers.items()}

    def of_prompt(self, prompt: int | None) -> dict[str, Float[Tensor, " feature *position"]]:
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

    def top(self, k: int = 10, prompt: int | None = None, *, sinks: bool = False) -> pd.DataFrame:
        """The k features (and positions) of largest |shift|.

        By position the prompt's first token is left out, a sink whose h is up to hundreds of times
        the others' and sees no other token, unless it is the only one.

        Args:
            k: how many.
            prompt: an index; without it the mean over prompts, or by position the only prompt.
            sinks: count the first token, too.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and none named.
        """
        values = self.of_prompt(prompt)
        ranked = values["shift"]
        if self.by_position and ranked.shape[1] > 1 and not sinks:
            ranked = ranked.clone()
            ranked[:, 0] = torch.nan
        order = results_base.largest(ranked, k)
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
        where = (~self.shift.isnan()).cpu().nonzero(as_tuple=True)
        names = ("prompt", "feature", "position")
        columns: dict[str, Any] = dict(zip(names, (axis.tolist() for axis in where), strict=False))
        if self.by_position:
            places = columns["prompt"], columns["position"]
            columns["token"] = results_base.tokens_at(self.str_tokens, *places)
        return pd.DataFrame(columns | {n: v[where].tolist() for n, v in self.columns().items()})

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
    prompts: PromptsLike,
    directions: Any,
    name: str | None = None,
    *,
    scale: Scale | None = None,
    at: float = 0.0,
    positions: int | Literal["each"] = -1,
    by: Literal["site"] | None = None,
) -> FeatureShift | FeatureWrites:
    """How far the adapter moves each feature at a hook point: exactly, and to first order.

    With by='site', what each site writes to each feature itself, d·δz_l, without what later modules
    make of it. At a point of the residual stream these are the sites before it that write to the
    stream: a site behind the point cannot move it, and q, k, v, gate and up do not write to the
    stream. At any other point it is the site whose output it holds. Without a point, all sites that
    write to the stream are listed, wherever the feature is read.

    Cost: three forward passes, a dual one and one of a single token (about 6 F), however many
    features; by site one forward pass, and between a block's branches a backward one.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        directions: [d], [feature, d], {label: either} or a Contrast, used as they are (normalise
            them to read lengths); or a sparse autoencoder with W_enc (SAELens's, or any with such
            attributes), alone or as (autoencoder, indices).
        name: the hook point where d·h is read; with heads their last two axes are laid flat. An
            autoencoder brings its own, as a Contrast of one point does.
        scale: the sites and their strength, 1 by default: the shift is h(scale) − h(0).
        at: where on the way the derivative is taken: ε = at·scale, 0 the base, 1 the adapted end.
            By site, the gates at which z is read.
        positions: an index within each prompt, negative ones from its own end; 'each' for every
            position: values are [batch, feature, position].
        by: 'site' for what each site writes; there is then no `scale`, and `name` may be left out
            for directions of the residual stream.

    Returns:
        FeatureShift, or by site FeatureWrites. An autoencoder's activations at both ends stand
        beside the pre-activations' shift, since a feature that is off at both ends moves nothing
        downstream of it.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names; by site, a point to
            which no site of the adapter writes.
        ModelStateError: a point that never fires, holds no activations by position, or lies
            between a site's input and output; an operation without a forward-mode derivative. By
            site, a norm that changes what a site writes before it joins the residual stream (o and
            down of Gemma 2 and 3, Bloom's embedding).
        ArgumentError: directions of another width, an autoencoder that is not linear up to its
            pre-activations, a position outside a prompt; by site, a scale, or every position.
        NumericsError: non-finite activations.
    """
    asked, features = ask_prompts(lens, prompts), directions_of(directions, name)
    at = number("at", at)
    if by is not None:
        word("by", by, ["site"])
        if scale is not None or one_entry(positions) == "each":
            raise ArgumentError(
                "by='site' is what each site writes at one position, at the gates `at`; leave out "
                "scale=, and give positions an index, such as -1."
            )
        return _by_site(asked, features, name or features.hook_name, at, positions)
    gates = lens.gates(1.0 if scale is None else scale)
    name = name or features.hook_name
    if name is None:
        raise ArgumentError("these directions belong to no hook point; name one with name=….")
    lens.plan.require_update([known_point(lens, name)])
    project = Projection(asked.prompts, features.at(name), positions)
    run = functools.partial(_activation, lens, asked.prompts, name)
    token = Prompts(asked.prompts.tokens[:1, :1], torch.ones_like(asked.prompts.lengths[:1]))
    encoded = None
    with torch.no_grad():
        # Along an axis of positions, one token has one entry.
        probe = _activation(lens, token, name, ScaleInject(lens.plan, lens.gates(0.0)))
        features.at(name, probe[0, 0].numel())
        base = run(ScaleInject(lens.plan, 0 * gates))
        adapted = run(ScaleInject(lens.plan, gates))
        with attached(lens.model, of_stream(lens)):
            noisy = run(ScaleInject(lens.plan, gates))
        if features.encode is not None:
            encoded = project.encoded(base), project.encoded(adapted)
    with dual_forward():
        tangent = run(JointInject(lens, at * gates, gates), tangent_of)
    noise = project(noisy.to(lens.gate_dtype) - adapted.to(lens.gate_dtype))
    return FeatureShift(
        base=project(base),
        shift=project(adapted.to(lens.gate_dtype) - base.to(lens.gate_dtype)),
        first_order=project(tangent),
        noise_floor=noise.square().mean(1).sqrt(),  # of a difference of two rounded runs
        activations=encoded,
        name=name,
        positions="each" if positions == "each" else int(positions),
        at=at,
        **_labels(asked, features),
    )


def _labels(asked: Asked, features: Directions) -> dict[str, Any]:
    said = {"features": features.kind, "units": features.units}
    return {**said, "str_tokens": asked.str_tokens, "meta": asked.describe()}


def _activation(
    lens: LoraLens,
    prompts: Prompts,
    name: str,
    inject: Inject,
    keep: Callable[[Tensor], Tensor] = torch.clone,
) -> Float[Tensor, "batch pos *d"]:
    """The activation at one hook point, or what `keep` makes of it: its tangent, in a dual pass.

    In groups of prompts, where all of them are beyond the bound of the lens.
    """
    rows = prompts.batch
    is_dual = keep is not torch.clone
    fitting = (rows_of_duals if is_dual else rows_of_pass)(lens, prompts) or rows
    groups = [prompts.cut(first, min(first + fitting, rows)) for first in range(0, rows, fitting)]
    return torch.cat([_activation_of(lens, group, name, inject, keep) for group in groups])


def _activation_of(
    lens: LoraLens,
    prompts: Prompts,
    name: str,
    inject: Inject,
    keep: Callable[[Tensor], Tensor],
) -> Float[Tensor, "batch pos *d"]:
    kept: list[Tensor] = []

    def hook_fn(tensor: Any, hook: Any) -> None:
        del hook
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            kept.append(keep(tensor))

    with lens.injected(inject), attached(lens.model, [(name, hook_fn)]):
        run_without_logits(lens, prompts)
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


# --- Which site writes to which feature.


@final
class FeatureWrites(OfSites):
    """What each site writes to each feature: d·δz_l, before any later module has seen it.

    Attributes:
        values: [batch, site, feature], at one position.
        positions: the index within each prompt.
        at: the gates at which z was read.
        name: the hook point where the features are read, to which all of `sites` write; '' for the
            residual stream as a whole.
        str_tokens, features, units, meta: see `FeatureShift`.
    """

    values: Float[Tensor, "batch site feature"]
    positions: int
    str_tokens: Annotated[tuple[tuple[str, ...], ...], "batch"]
    features: str
    units: str
    at: float
    name: str = ""

    def top(self, site: str | None = None, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k pairs of site and feature of largest |d·δz|, of one site or of all.

        Args:
            site: its name; without it, all sites.
            k: how many.
            prompt: an index; without it, the mean over prompts.

        Raises:
            SiteError: no site that writes has this name.
            ArgumentError: no such prompt.
        """
        chosen = list(chosen_sites(self.sites, site))
        values = self.of_prompt(prompt)[chosen]
        order, width = results_base.largest(values, k), values.shape[1]
        columns: dict[str, Any] = {"site": [self.sites[chosen[i // width]].name for i in order]}
        columns["feature"] = [i % width for i in order]
        return pd.DataFrame(columns | {"write": values.flatten()[order].tolist()})

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site and feature."""
        batch, _, features = self.values.shape
        sites = results_base.site_labels(self.sites)
        axes = {"prompt": range(batch)}, sites, {"feature": range(features)}
        return results_base.long_table({"write": self.values}, *axes).drop(columns="module")

    def plot(self, k: int = 20, prompt: int | None = None) -> drawing.Figure:
        """Site × feature, of the k features that are written most.

        Args:
            k: how many features.
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return drawing.figure(self, k, prompt)

    def of_prompt(self, prompt: int | None) -> Float[Tensor, "site feature"]:
        """One prompt's values in float64, or the mean over prompts.

        Args:
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return self.values[prompt_rows(prompt, len(self.values))].cpu().double().mean(0)


def _by_site(
    asked: Asked, features: Directions, name: str | None, at: float, positions: _Positions
) -> FeatureWrites:
    """d·δz_l at the gates `at`. One forward pass."""
    lens = asked.lens
    if name is not None:
        lens.plan.require_update([known_point(lens, name)])
    writers = _writers_to(asked, name)
    if not writers:
        where = "the residual stream" if name is None else name
        raise SiteError(
            f"no site of this adapter writes to {where}: to the stream write o, down and "
            "embeddings before a point, to another point the site whose output it holds. Leave "
            "out by='site': the shift includes what the other sites do."
        )
    d_model = int(lens.model.cfg.d_model)
    gates, rows = lens.gates(at), asked.prompts.batch
    scaled = ScaleInject(lens.plan, gates)
    if name is None or is_residual(name):
        features = features.at(name or STREAM, d_model)

    def writes(prompts: Prompts) -> Tensor:
        project = Projection(prompts, features, positions)
        written: dict[int, Tensor] = {}

        def inject(index: int, out: Tensor, z: Tensor) -> Tensor | None:
            injection = lens.plan.injections[index]
            if injection.site in writers:
                weight = 1.0 if injection.partner is None else float(gates[injection.partner])
                delta = injection.map(z)
                features.at(name or STREAM, delta[0, 0].numel())
                write = weight * project(delta)
                written[injection.site] = written.get(injection.site, 0.0) + write
            return scaled(index, out, z)

        with torch.no_grad(), lens.injected(inject):
            run_without_logits(lens, prompts)
        return torch.stack([written[i].to(lens.device) for i in writers], 1)

    fitting = rows_of_pass(lens, asked.prompts) or rows
    groups = (asked.prompts.cut(i, min(i + fitting, rows)) for i in range(0, rows, fitting))
    values = torch.cat([writes(group) for group in groups])
    require_finite(values, "a site's δz")
    return FeatureWrites(
        values=values,
        sites=tuple(lens.sites[i] for i in writers),
        positions=int(positions),
        at=at,
        name=name or "",
        **_labels(asked, features),
    )


_BY_SHIFT = "Use feature_shift(…, scale={site: 1.0}), which is exact"
# The kinds of sites whose outputs, and nothing else, are added to the stream at such points.
_ADDED_BY = {
    "hook_attn_out": ("o",),
    "hook_mlp_out": ("down", "fc_out"),
    "hook_embed": ("embed",),
}


def _writers_to(asked: Asked, name: str | None) -> list[int]:
    """The sites whose δz is a part of what this point holds; of the stream without a point."""
    lens = asked.lens
    if name is None:
        return stream_writers(lens, _BY_SHIFT)
    if is_stream(name):
        return _writers_before(asked, name)
    points = lens.model.hook_dict
    own = [i for i, site in enumerate(lens.sites) if points.get(site.write) is points[name]]
    if own or not is_residual(name):
        return own
    block, _, point = name.rpartition(".")
    return [
        site
        for site in stream_writers(lens, _BY_SHIFT)
        if lens.sites[site].kind in _ADDED_BY[point]
        and (not block or block == f"blocks.{lens.sites[site].layer}")
    ]


def _writers_before(asked: Asked, name: str) -> list[int]:
    """The sites that write to the residual stream before one of its points."""
    writers = stream_writers(asked.lens, _BY_SHIFT)
    block, point = name.rsplit(".", 1)
    if block == "ln_final":
        return writers
    own = int(block.removeprefix("blocks."))
    of_own_block = {site for site in writers if asked.lens.sites[site].layer == own}
    if point == "hook_resid_mid":
        of_own_block &= _moving(asked, name)
    elif point not in ("hook_resid_post", "hook_out"):
        of_own_block = set()
    return [s for s in writers if asked.lens.sites[s].layer < own or s in of_own_block]


def _moving(asked: Asked, name: str) -> set[int]:
    """The sites on whose gates the activation at a point depends, on the first prompt.

    One forward and one backward pass.
    """
    lens, row = asked.lens, asked.prompts.row(0)
    lens.plan.check_backward(once=False)  # hooks are off by then, and a block would run without
    gates = lens.gates(0.5).requires_grad_()
    with torch.enable_grad():
        h = _activation(lens, row, name, ScaleInject(lens.plan, gates))
        if not h.requires_grad:
            return set()
        covector = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).to(h)
        (slopes,) = torch.autograd.grad((h * covector).sum(), gates)
    return set(slopes.nonzero().flatten().tolist())


# --- Activations projected onto directions.


class Projection:
    """d·h at the positions that are wanted: [batch, feature], or [batch, feature, position]."""

    def __init__(self, prompts: Prompts, features: Directions, positions: _Positions) -> None:
        self._real, self._features = prompts.real, features
        self._index = None if positions == "each" else _indices(prompts, positions)

    def __call__(self, h: Float[Tensor, "batch pos *d"]) -> Float[Tensor, "batch feature *pos"]:
        """d·h, at float32 or better; NaN at padding where every position is wanted."""
        rows, h = self._features.rows, h.flatten(2)
        dtype = torch.promote_types(torch.promote_types(h.dtype, rows.dtype), torch.float32)
        return self._laid_out(self._read(h).to(dtype) @ rows.to(h.device, dtype).T)

    def encoded(self, h: Float[Tensor, "batch pos *d"]) -> Float[Tensor, "batch feature *pos"]:
        """The autoencoder's activations, in its own dtype and computed on its own device."""
        rows, encode = self._features.rows, self._features.encode
        assert encode is not None
        read = self._read(h if self._features.by_head else h.flatten(2))
        return self._laid_out(encode(read.to(rows)).to(h.device))

    def _read(self, h: Tensor) -> Tensor:
        if self._index is None:
            return h
        return h[torch.arange(len(h), device=h.device), self._index.to(h.device)]

    def _laid_out(self, values: Tensor) -> Tensor:
        if self._index is not None:
            return values
        padding = ~self._real.to(values.device)[:, None]
        return values.transpose(1, 2).masked_fill(padding, float("nan"))


def _indices(prompts: Prompts, index: object) -> Int[Tensor, " batch"]:
    """The position in each prompt."""
    index = one_entry(index)
    if not is_whole(index):
        raise ArgumentError(f"positions={index!r}: expected an index, such as -1, or 'each'.")
    lengths = prompts.lengths
    outside = ((index >= lengths) | (index < -lengths)).nonzero().flatten().tolist()
    if outside:
        raise ArgumentError(
            f"positions={index}: prompt {outside[0]} has {int(lengths[outside[0]])} tokens."
        )
    return index % lengths
