"""Feature directions, and activations projected onto them.

A feature is a direction d in the space of an activation h; its value is d·h. Directions are rows of
a tensor, or the encoder of a sparse autoencoder.

An autoencoder is known by its attributes (SAELens's: W_enc [d, feature], W_dec [feature, d], and a
cfg that names its hook point); nothing of SAELens is imported. A feature's direction is its column
of W_enc, since that is what the encoder reads: its pre-activation moves by W_encᵀ Δh, exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.arguments import is_whole, one_entry
from lens_lora.errors import ArgumentError
from lens_lora.readouts.prompts import Prompts

__all__ = ["Directions", "Projection", "directions_of"]

_LINEAR_INPUTS = (None, "none")


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
    """Directions, and what else is known of them.

    Attributes:
        rows: [feature, d].
        kind: 'directions' or 'encoder'.
        units: of a projection onto them.
        hook_name: where they belong, if that is known.
        encode: an autoencoder's own activations of h.
        by_head: whether `encode` takes h as [..., head, d_head].
    """

    rows: Float[Tensor, "feature d"]
    kind: str
    units: str
    hook_name: str | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    by_head: bool = False


def directions_of(source: Any) -> Directions:
    """A tensor [feature, d] as it is, or an autoencoder's encoder.

    Args:
        source: the tensor, or a sparse autoencoder with W_enc [d, feature].

    Raises:
        ArgumentError: neither, numbers that are not finite, or an autoencoder whose
            pre-activations are not linear in h.
    """
    if isinstance(source, Tensor):
        if source.ndim != 2 or not source.is_floating_point() or not source.numel():
            raise ArgumentError(
                f"directions are {source.dtype} {tuple(source.shape)}; expected floating-point "
                "[feature, d] (one direction d: d[None])."
            )
        return Directions(_finite(source), "directions", "units of h · d")
    W_enc = getattr(source, "W_enc", None)
    if not isinstance(W_enc, Tensor) or W_enc.ndim != 2:
        raise ArgumentError(
            f"directions are a {type(source).__name__}; expected a tensor [feature, d] or a sparse "
            "autoencoder with W_enc [d, feature]."
        )
    cfg = getattr(source, "cfg", None)
    _require_linear(cfg)
    encode: Callable[[Tensor], Tensor] | None = getattr(source, "encode", None)
    return Directions(
        rows=_finite(W_enc).T,
        kind="encoder",
        units="pre-activation",
        hook_name=_setting(cfg, "hook_name"),
        encode=encode,
        by_head=bool(getattr(source, "hook_z_reshaping_mode", False)),
    )


def _finite(rows: Tensor) -> Tensor:
    if not torch.isfinite(rows).all():
        raise ArgumentError("the directions hold NaN or infinite numbers.")
    return rows.detach()


def _require_linear(cfg: Any) -> None:
    """Refuse an encoder that normalises its input, or reads one head of it."""
    normalised = _setting(cfg, "normalize_activations")
    if normalised not in _LINEAR_INPUTS:
        raise ArgumentError(
            f"this autoencoder normalises its input (normalize_activations={normalised!r}), so its "
            "pre-activations are not linear in h. If the factor is a constant, fold it first "
            "(sae.fold_activation_norm_scaling_factor); else pass directions: sae.W_enc.T."
        )
    head = _setting(cfg, "hook_head_index")
    if head is not None:
        raise ArgumentError(
            f"this autoencoder reads head {head} alone; pass its directions as a tensor with zeros "
            "at the other heads."
        )


def _setting(cfg: Any, name: str) -> Any:
    """cfg.name, or cfg.metadata's (SAELens 6), or None."""
    for place in (cfg, getattr(cfg, "metadata", None)):
        value = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
        if value is not None:
            return value
    return None


class Projection:
    """d·h at the positions that are wanted: [batch, feature], or [batch, feature, position].

    Args:
        prompts: of h.
        features: the directions.
        positions: an index within each prompt, or 'each'.

    Raises:
        ArgumentError: a position outside a prompt, or something that is none.
    """

    def __init__(
        self, prompts: Prompts, features: Directions, positions: int | Literal["each"]
    ) -> None:
        self.prompts: Prompts = prompts
        self.features: Directions = features
        self._index = None if positions == "each" else _indices(prompts, positions)

    def __call__(self, h: Float[Tensor, "batch pos *d"]) -> Float[Tensor, "batch feature *pos"]:
        """d·h, at float32 or better; NaN at padding where every position is wanted.

        Args:
            h: the activation; axes after `pos` are flattened to d.

        Raises:
            ArgumentError: the directions are of another width than h.
        """
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
        """The autoencoder's activations, in its own dtype and computed on its own device.

        Args:
            h: the activation, with its heads as an axis of their own or flattened.
        """
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


def _indices(prompts: Prompts, index: object) -> Int[Tensor, "batch"]:
    """The position in each prompt."""
    index = one_entry(index)
    if not is_whole(index):
        raise ArgumentError(
            f"positions={index!r}: expected an index, such as -1, or in feature_shift 'each'."
        )
    lengths = prompts.lengths
    outside = ((index >= lengths) | (index < -lengths)).nonzero().flatten().tolist()
    if outside:
        raise ArgumentError(
            f"positions={index}: prompt {outside[0]} has {int(lengths[outside[0]])} tokens."
        )
    return index % lengths
