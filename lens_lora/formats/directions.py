"""Directions in the space of an activation, in every form that callers may pass.

    [d]  ·  [n, d]  ·  {label: either}  ·  a Contrast or ActivationShift  ·  (autoencoder, indices)

1. A Contrast (any result with `by_point`) has a vector for each hook point. The vector of the hook
   point in question is used, or the only one that there is.
2. A sparse autoencoder is recognised by its attributes (SAELens's: W_enc [d, feature], and a cfg
   that names its hook point); SAELens itself is not imported. A feature's direction is its column
   of W_enc, because the encoder reads that: its pre-activation moves by W_encᵀ Δh, exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import is_whole, one_entry
from lens_lora.errors import ArgumentError

# A hook point of the residual stream; all of its hook points have the same space.
STREAM = "blocks.0.hook_resid_pre"
_STREAM = r"blocks\.\d+\.hook_(resid_(pre|mid|post)|in|out)|ln_final\.hook_in"
_ADDED = r"hook_embed|blocks\.\d+\.hook_(attn|mlp)_out"
# A size below this share of the largest one is rounding.
_ROUNDING = 1e-10
_EXPECTED = (
    "expected a tensor [d] or [direction, d], {label: tensor}, a Contrast, or a sparse autoencoder "
    "with W_enc [d, feature], alone or as (autoencoder, indices)"
)


def is_stream(name: str) -> bool:
    """Whether this hook point is the residual stream, whose size the final norm divides by."""
    return re.fullmatch(_STREAM, name) is not None


def is_residual(name: str) -> bool:
    """Whether a hook point holds the residual stream, or what is added to it."""
    return is_stream(name) or re.fullmatch(_ADDED, name) is not None


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
    """Directions, with their labels and the hook point that they belong to.

    Attributes:
        rows: the directions, [direction, d].
        labels: the label of each direction, and its index among those with this label.
        kind: 'directions' or 'encoder'.
        units: the unit of a projection onto them.
        hook_name: the hook point that they belong to; None if it is not known.
        encode: maps h to an autoencoder's own activations; None for plain directions.
        by_head: whether `encode` takes h as [..., head, d_head].
    """

    rows: Float[Tensor, "direction d"]
    labels: tuple[tuple[str, int], ...]
    kind: str = "directions"
    units: str = "units of h · d"
    hook_name: str | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    by_head: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """One name for each direction: its label, with the index where several share it."""
        labels = [label for label, _ in self.labels]
        if len(set(labels)) == len(labels):
            return tuple(labels)
        return tuple(f"{label} {index}" for label, index in self.labels)

    def basis(self, *, centred: bool = False) -> Float[Tensor, "d few"]:
        """An orthonormal basis of the space that they span, in float64 on the CPU.

        Args:
            centred: whether the space lacks the direction of ones; the directions are then centred
                first.
        """
        left, sizes, _ = torch.linalg.svd(self.unit(centred=centred).T, full_matrices=False)
        return left[:, sizes > _ROUNDING * sizes[0]]

    def unit(self, *, centred: bool = False) -> Float[Tensor, "direction d"]:
        """Each direction with length 1, in float64 on the CPU.

        Args:
            centred: whether the mean of each direction's entries is taken off first.

        Raises:
            ArgumentError: a direction of zeros.
        """
        rows = self.rows.cpu().double()
        whole = rows.norm(dim=1, keepdim=True)
        why = ""
        if centred:
            rows = rows - rows.mean(1, keepdim=True)
            why = " once its mean is taken off, which this model's residual stream lacks"
        sizes = rows.norm(dim=1, keepdim=True)
        zeros = (sizes <= _ROUNDING * whole).flatten().nonzero().flatten().tolist()
        if zeros:
            raise ArgumentError(f"direction {self.names[zeros[0]]!r} is zero{why}.")
        return rows / sizes

    def at(self, name: str, width: int | None = None) -> Directions:
        """The same directions, if they lie in the space of a hook point.

        Args:
            name: the hook point.
            width: the width of its activations; None if it is not known.

        Raises:
            ArgumentError: they lie elsewhere, or have another width.
        """
        home = self.hook_name
        if home not in (None, name) and not (is_residual(str(home)) and is_residual(name)):
            raise ArgumentError(
                f"these directions lie at {home}, and {name} holds another space; name a hook "
                "point of their space, or pass them as a tensor if they belong there all the same."
            )
        if width not in (None, self.rows.shape[1]):
            fact = f"directions of {self.rows.shape[1]} numbers, and {name} has {width}"
            raise ArgumentError(f"{fact}; are they for another model, or another hook point?")
        return self


def home_points(source: Any) -> tuple[str, ...]:
    """The hook points for which a source has directions; none for a plain tensor."""
    by_point = getattr(source, "by_point", None)
    if isinstance(by_point, Mapping):
        return tuple(by_point)
    is_pair = isinstance(source, tuple) and len(source) == 2
    autoencoder = source[0] if is_pair else source
    name = setting_of(getattr(autoencoder, "cfg", None), "hook_name")
    if name is None or not hasattr(autoencoder, "W_enc"):
        return ()
    return (str(name),)


def directions_of(source: Any, name: str | None = None) -> Directions:
    """Read directions from any form in which a caller may pass them.

    Args:
        source: one of the forms that the head of this file lists.
        name: the hook point in question; of a Contrast, the vector at this hook point is used.

    Raises:
        ArgumentError: another form, several widths, numbers that are not finite, a hook point for
            which a Contrast has no vector, an index that an autoencoder lacks, or an autoencoder
            whose pre-activations are not linear in h.
    """
    if isinstance(source, Tensor):
        return _of_tensors({"the direction": source})
    if isinstance(source, Mapping):
        return _of_tensors(source)
    by_point = getattr(source, "by_point", None)
    if isinstance(by_point, Mapping):
        return _at_point(by_point, name)
    if isinstance(source, tuple) and len(source) == 2 and hasattr(source[0], "W_enc"):
        return _of_autoencoder(*source)
    return _of_autoencoder(source, None)


def _at_point(by_point: Mapping[str, Any], name: str | None) -> Directions:
    """The direction at this hook point, or the only one that there is."""
    if name is not None and name in by_point:
        point = name
    elif len(by_point) == 1:
        (point,) = by_point
    else:
        fact = f"there are directions at {list(by_point)[:4]}, and none at {name!r}"
        raise ArgumentError(f"{fact}; name one of these, or pass one vector of by_point.")
    return dataclasses.replace(_of_tensors({point: by_point[point]}), hook_name=point)


def _of_tensors(tensors: Mapping[Any, Any]) -> Directions:
    rows: dict[str, Tensor] = {}
    for label, value in tensors.items():
        is_tensor = isinstance(value, Tensor) and value.is_floating_point()
        if not is_tensor or value.ndim not in (1, 2) or not value.numel():
            described = value
            if isinstance(value, Tensor):
                described = f"{value.dtype} {list(value.shape)}"
            raise ArgumentError(f"directions are {described!s}; {_EXPECTED}, of floating point.")
        rows[str(label)] = torch.atleast_2d(_finite(value))
    widths = {value.shape[1] for value in rows.values()}
    if len(widths) != 1:
        raise ArgumentError(f"directions of {sorted(widths) or 'no'} numbers; expected one width.")
    labels: list[tuple[str, int]] = []
    for label, value in rows.items():
        labels += [(label, index) for index in range(len(value))]
    first = next(iter(rows.values()))
    return Directions(torch.cat([value.to(first) for value in rows.values()]), tuple(labels))


def _of_autoencoder(source: Any, indices: Any) -> Directions:
    W_enc = getattr(source, "W_enc", None)
    if not isinstance(W_enc, Tensor) or W_enc.ndim != 2:
        raise ArgumentError(f"directions are a {type(source).__name__}; {_EXPECTED}.")
    cfg = getattr(source, "cfg", None)
    _require_linear_encoder(cfg)
    encode = getattr(source, "encode", None)
    features = list(range(W_enc.shape[1]))
    if indices is not None:
        features = _checked_features(indices, W_enc.shape[1])
        if encode is not None:
            encode = functools.partial(_encoded, encode, features)
    return Directions(
        rows=_finite(W_enc).T[features],
        labels=tuple(("feature", index) for index in features),
        kind="encoder",
        units="pre-activation",
        hook_name=setting_of(cfg, "hook_name"),
        encode=encode,
        by_head=bool(getattr(source, "hook_z_reshaping_mode", False)),
    )


def _encoded(encode: Callable[[Tensor], Tensor], features: list[int], h: Tensor) -> Tensor:
    """The activations of some of an autoencoder's features."""
    return encode(h)[..., features]


def _require_linear_encoder(cfg: Any) -> None:
    """Refuse an autoencoder whose pre-activations are not linear in the whole of h."""
    normalised = setting_of(cfg, "normalize_activations")
    if normalised not in (None, "none"):
        raise ArgumentError(
            f"this autoencoder normalises its input (normalize_activations={normalised!r}), so its "
            "pre-activations are not linear in h. If the factor is a constant, fold it first "
            "(sae.fold_activation_norm_scaling_factor); else pass directions: sae.W_enc.T."
        )
    head = setting_of(cfg, "hook_head_index")
    if head is not None:
        raise ArgumentError(
            f"this autoencoder reads only head {head}; pass a tensor with zeros at other heads."
        )


def _checked_features(indices: Any, count: int) -> list[int]:
    """The indices of the features that a caller asks for, checked against their count."""
    plain = one_entry(indices)
    listed = list(plain) if isinstance(plain, Iterable) else [plain]
    features: list[Any] = [one_entry(index) for index in listed]
    if not features or not all(is_whole(i) and 0 <= i < count for i in features):
        raise ArgumentError(f"features {features}: this autoencoder has 0 to {count - 1}.")
    return features


def _finite(rows: Tensor) -> Tensor:
    if rows.is_meta or not torch.isfinite(rows).all():
        raise ArgumentError("the directions hold NaN or infinite numbers, or none (device meta).")
    return rows.detach()


def setting_of(cfg: Any, name: str) -> Any:
    """A setting of an autoencoder, or None: cfg.name, or that of cfg.metadata (SAELens 6).

    Args:
        cfg: an object, or a mapping.
        name: the name of the setting.
    """
    for place in (cfg, getattr(cfg, "metadata", None)):
        value = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
        if value is not None:
            return value
    return None
