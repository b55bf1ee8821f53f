"""Feature directions: rows of a tensor, or the encoder of a sparse autoencoder.

An autoencoder is known by its attributes (SAELens's: W_enc [d, feature], W_dec [feature, d], and a
cfg that names its hook point); nothing of SAELens is imported. A feature's direction is its column
of W_enc, since that is what the encoder reads: its pre-activation moves by W_encᵀ Δh, exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import ArgumentError

__all__ = ["Directions", "directions_of"]

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

    Raises:
        ArgumentError: neither, or an autoencoder whose pre-activations are not linear in h.
    """
    if isinstance(source, Tensor):
        if source.ndim != 2 or not source.is_floating_point() or not source.numel():
            raise ArgumentError(
                f"directions are {source.dtype} {tuple(source.shape)}; expected floating-point "
                "[feature, d] (one direction d: d[None])."
            )
        return Directions(source.detach(), "directions", "units of h · d")
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
        rows=W_enc.detach().T,
        kind="encoder",
        units="pre-activation",
        hook_name=_setting(cfg, "hook_name"),
        encode=encode,
        by_head=bool(getattr(source, "hook_z_reshaping_mode", False)),
    )


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
