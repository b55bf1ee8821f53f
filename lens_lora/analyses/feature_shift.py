"""Which features does this adapter push? Activations projected onto directions.

    feature_shift    d·(h(1) − h(0)), and d·∂h/∂t along the adapter: at one hook point
    feature_writes   d·δz_l: what each site that writes to the residual stream adds by itself

1. h of the base and of the adapted model: a forward pass each, kept at the hook point.
2. ∂h by forward mode: one dual pass, every gate moving along `scale`.
3. Differences are projected, not projections subtracted: in float32 that keeps their digits.

The exact shift less its first order is the remainder; a noise floor says what of it is rounding.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor

from lens_lora.analyses.directions import Directions, directions_of
from lens_lora.analyses.feature_effects import FeatureShift, FeatureWrites
from lens_lora.engine.forward import JointInject, dual_forward
from lens_lora.engine.function import require_finite
from lens_lora.engine.noise import roundings
from lens_lora.errors import ArgumentError, ModelStateError, SiteError
from lens_lora.hooked.gates import Inject, ScaleInject, attached
from lens_lora.hooked.sites import WRITER_KINDS, points_without_update
from lens_lora.lens import LoraLens, Scale
from lens_lora.readouts.prompts import Prompts, PromptsLike

__all__ = ["feature_shift", "feature_writes"]


def feature_shift(
    lens: LoraLens,
    prompts: PromptsLike,
    directions: Any,
    hook_name: str | None = None,
    *,
    scale: Scale = 1.0,
    at: float = 0.0,
    position: int | None = -1,
) -> FeatureShift:
    """How far the adapter moves each feature at a hook point: exactly, and to first order.

    Cost: three forward passes, a dual one and one of a single token (about 6 F), however many
    features.

    Args:
        directions: [feature, d], used as they are (normalise them to read lengths); or a sparse
            autoencoder with W_enc (SAELens's, or any with such attributes).
        hook_name: where d·h is read; with heads their last two axes are laid flat. An autoencoder
            brings its own.
        scale: which sites, how strongly: the shift is h(scale) − h(0).
        at: where on the way the derivative is taken: ε = at·scale, 0 the base, 1 the adapted end.
        position: an index within each prompt, negative ones from its own end; None for every
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
    ready, features = lens.prompts(prompts), directions_of(directions)
    name = _point(lens, hook_name or features.hook_name)
    gates = lens.gates(scale)
    project = _Projection(ready, features, position)
    with torch.no_grad():
        _require_positions(lens, ready, name)
        base = _activation(lens, ready, name, ScaleInject(lens.plan, 0 * gates))
        adapted = _activation(lens, ready, name, ScaleInject(lens.plan, gates))
        with attached(lens.model, [(lens.embedding_output, roundings(lens))]):
            noisy = _activation(lens, ready, name, ScaleInject(lens.plan, gates))
    with dual_forward():
        moved = _activation(lens, ready, name, JointInject(lens, at * gates, gates), _tangent)
    noise = project(noisy.to(lens.gate_dtype) - adapted.to(lens.gate_dtype))
    values = {
        "base": project(base),
        "shift": project(adapted.to(lens.gate_dtype) - base.to(lens.gate_dtype)),
        "first_order": project(moved),
    }
    return FeatureShift(
        **values,
        noise_floor=2**0.5 * noise.square().mean(1).sqrt(),
        activations=_activations(project, base, adapted),
        name=name,
        positions="each" if position is None else position,
        str_tokens=tuple(map(tuple, lens.str_tokens(ready))),
        features=features.kind,
        units=features.units,
        at=at,
        meta=lens.describe(),
    )


def feature_writes(
    lens: LoraLens,
    prompts: PromptsLike,
    directions: Any,
    *,
    at: float = 0.0,
    position: int = -1,
) -> FeatureWrites:
    """d·δz_l: what each site that writes to the residual stream writes to each feature.

    It is the direct part alone: what later modules make of it is in `feature_shift`. q, k, v, gate
    and up write to no residual stream, and are left out. One forward pass.

    Args:
        directions: as in `feature_shift`, of the residual stream's width.
        at: the gates at which z is read: 0 in the base model, 1 in the adapted one.
        position: an index within each prompt, negative ones from its own end.

    Raises:
        SiteError: the adapter has no site that writes to the residual stream.
        ModelStateError: the model normalises what they write (Gemma 2 and 3).
        ArgumentError: as `feature_shift`.
    """
    ready, features = lens.prompts(prompts), directions_of(directions)
    writers = [i for i, site in enumerate(lens.sites) if site.kind in WRITER_KINDS]
    if not writers:
        raise SiteError(
            "no site of this adapter writes to the residual stream (o, down, an embedding); "
            "feature_shift sees what the others do."
        )
    if lens.plan.view.family.post_norm:
        raise ModelStateError(
            "this model normalises what attention and MLP write before it joins the residual "
            "stream, so δz is in another space; feature_shift with scale={site: 1} is exact."
        )
    project = _Projection(ready, features, position)
    deltas = _Deltas(lens, lens.gates(at), project)
    with torch.no_grad(), lens.injected(deltas):
        lens.run(ready)
    values = torch.stack([deltas.found[i] for i in writers], 1)
    require_finite(values, "a site's δz")
    return FeatureWrites(
        values=values,
        sites=tuple(lens.sites[i] for i in writers),
        positions=position,
        str_tokens=tuple(map(tuple, lens.str_tokens(ready))),
        features=features.kind,
        units=features.units,
        at=at,
        meta=lens.describe(),
    )


class _Projection:
    """d·h at the positions that are wanted: [batch, feature], or [batch, feature, position]."""

    def __init__(self, prompts: Prompts, features: Directions, position: int | None) -> None:
        self.prompts, self.features = prompts, features
        self._index = None if position is None else _indices(prompts, position)

    def __call__(self, h: Float[Tensor, "batch pos *d"]) -> Float[Tensor, "batch feature *pos"]:
        rows = self.features.rows
        flat = h.flatten(2)
        if flat.shape[-1] != rows.shape[-1]:
            raise ArgumentError(
                f"directions of {rows.shape[-1]} numbers, and activations of {flat.shape[-1]}; an "
                "autoencoder of another model, or of another hook point?"
            )
        dtype = torch.promote_types(torch.promote_types(flat.dtype, rows.dtype), torch.float32)
        return self._laid_out(self._at(flat).to(dtype) @ rows.to(flat.device, dtype).T)

    def encoded(self, h: Float[Tensor, "batch pos *d"]) -> Float[Tensor, "batch feature *pos"]:
        """The autoencoder's activations, in its own dtype and on its own device."""
        rows, encode = self.features.rows, self.features.encode
        assert encode is not None
        at = self._at(h if self.features.by_head else h.flatten(2))
        return self._laid_out(encode(at.to(rows)).to(h.device))

    def _at(self, h: Tensor) -> Tensor:
        if self._index is None:
            return h
        return h[torch.arange(len(h), device=h.device), self._index.to(h.device)]

    def _laid_out(self, values: Tensor) -> Tensor:
        if self._index is not None:
            return values
        real = self.prompts.real.to(values.device)[:, None]
        return values.transpose(1, 2).masked_fill(~real, float("nan"))


class _Deltas:
    """Runs at the gates, and keeps each writer's projected ∂(its output)/∂ε."""

    def __init__(self, lens: LoraLens, gates: Float[Tensor, "site"], project: _Projection) -> None:
        self._injections, self._sites, self._gates = lens.plan.injections, lens.sites, gates
        self._scaled, self._project = ScaleInject(lens.plan, gates), project
        self.found: dict[int, Tensor] = {}

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = self._injections[index]
        if self._sites[injection.site].kind in WRITER_KINDS:
            weight = 1.0 if injection.partner is None else float(self._gates[injection.partner])
            written = weight * self._project(injection.map(z))
            self.found[injection.site] = self.found.get(injection.site, 0.0) + written
        return self._scaled(index, out, z)


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


def _tangent(dual: Tensor) -> Tensor:
    primal, tangent = fwad.unpack_dual(dual)
    return torch.zeros_like(primal) if tangent is None else tangent.clone()


def _activations(
    project: _Projection, base: Tensor, adapted: Tensor
) -> tuple[Tensor, Tensor] | None:
    if project.features.encode is None:
        return None
    with torch.no_grad():
        return project.encoded(base), project.encoded(adapted)


def _point(lens: LoraLens, name: str | None) -> str:
    """A hook point of the model at which the adapted model's activation exists."""
    known = list(lens.model.hook_dict)
    if name is None:
        raise ArgumentError("directions of no hook point; name one with hook_name=….")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        raise SiteError(f"the model has no hook point {name!r}; the nearest are {near}.")
    if name in points_without_update(lens.sites):
        raise ModelStateError(
            f"{name}: lies between a site's input and the point at which its update is added, so "
            "it never holds the adapted model's value. Use the site's input or output instead "
            "(lens.sites: read, write)."
        )
    return name


def _indices(prompts: Prompts, position: int) -> Tensor:
    """[batch], the position in each prompt."""
    lengths = prompts.lengths
    outside = ((position >= lengths) | (position < -lengths)).nonzero().flatten().tolist()
    if outside:
        raise ArgumentError(
            f"position={position}: prompt {outside[0]} has {int(lengths[outside[0]])} tokens."
        )
    return position % lengths
