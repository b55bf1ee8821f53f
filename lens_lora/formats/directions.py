"""Directions: what is one wherever one is taken, and updates from which one is taken away.

    [d]  ·  [n, d]  ·  {label: either}  ·  a Contrast or ActivationShift  ·  (autoencoder, indices)

1. A Contrast (any result with `by_point`) has a vector for each hook point. The one of the point in
   question is taken, or its only one.
2. A sparse autoencoder is known by its attributes (SAELens's: W_enc [d, feature], and a cfg that
   names its hook point); nothing of SAELens is imported. A feature's direction is its column of
   W_enc, since that is what the encoder reads: its pre-activation moves by W_encᵀ Δh, exactly.
3. With V an orthonormal basis of the directions, an update without them is

       ΔW − V Vᵀ ΔW,  Δb − V Vᵀ Δb      of what it writes
       ΔW − ΔW V Vᵀ                     of what it reads

   so its rank does not rise. Cut to rank k it is the first k terms of its SVD.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import is_whole, one_entry
from lens_lora.compat import in_float64
from lens_lora.core import LoRAFactors, ModuleUpdate
from lens_lora.core.adapter import Side, Updates, expert_factors, extensions, module_path, plain
from lens_lora.errors import AdapterError, ArgumentError, SiteError
from lens_lora.families import FAMILIES

STREAM = "blocks.0.hook_resid_pre"  # any point of the residual stream
_STREAM = r"blocks\.\d+\.hook_(resid_(pre|mid|post)|in|out)|ln_final\.hook_in"
_ADDED = r"hook_embed|blocks\.\d+\.hook_(attn|mlp)_out"
_WRITE_TO_STREAM = ("o", "down", "fc_out", "embed", "pos_embed")
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
    """Directions, and what else is known of them.

    Attributes:
        rows: [direction, d].
        labels: what each was called, and its index under this label.
        kind: 'directions' or 'encoder'.
        units: the unit of a projection onto them.
        hook_name: where they belong, if that is known.
        encode: h to an autoencoder's own activations.
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
        """One name for each: its label, with the index where several share it."""
        several = len(self.labels) > len({label for label, _ in self.labels})
        return tuple(f"{label} {i}" if several else label for label, i in self.labels)

    def basis(self, *, centred: bool = False) -> Float[Tensor, "d few"]:
        """An orthonormal basis of what they span, in float64 on the CPU.

        Args:
            centred: of a space without the direction of ones; the directions are centred first.
        """
        left, sizes, _ = torch.linalg.svd(self.unit(centred=centred).T, full_matrices=False)
        return left[:, sizes > _DEPENDENT * sizes[0]]

    def unit(self, *, centred: bool = False) -> Float[Tensor, "direction d"]:
        """Each of length 1, in float64 on the CPU; `centred` as for `basis`."""
        rows = self.rows.cpu().double()
        whole = rows.norm(dim=1, keepdim=True)
        rows = rows - rows.mean(1, keepdim=True) if centred else rows
        sizes = rows.norm(dim=1, keepdim=True)
        zeros = (sizes <= _DEPENDENT * whole).flatten().nonzero().flatten().tolist()
        if zeros:
            why = " once its mean is taken off, which this model's residual stream lacks"
            name = repr(self.names[zeros[0]])
            raise ArgumentError(f"direction {name} is zero{why if centred else ''}.")
        return rows / sizes

    def at(self, name: str, width: int | None = None) -> Directions:
        """The same, if they lie in the space of a hook point, which is so wide."""
        home = self.hook_name
        if home not in (None, name) and not (is_residual(str(home)) and is_residual(name)):
            raise ArgumentError(
                f"these directions lie at {home}, and {name} holds another space; name a hook "
                "point of theirs, or pass them as a tensor if they belong there all the same."
            )
        if width not in (None, self.rows.shape[1]):
            fact = f"directions of {self.rows.shape[1]} numbers, and {name} has {width}"
            raise ArgumentError(f"{fact}; are they for another model, or another hook point?")
        return self


def home_points(source: Any) -> tuple[str, ...]:
    """The hook points at which a source of directions has its own; none of a plain tensor."""
    by_point = getattr(source, "by_point", None)
    if isinstance(by_point, Mapping):
        return tuple(by_point)
    is_pair = isinstance(source, tuple) and len(source) == 2
    autoencoder = source[0] if is_pair else source
    name = setting_of(getattr(autoencoder, "cfg", None), "hook_name")
    return () if name is None or not hasattr(autoencoder, "W_enc") else (str(name),)


_DEPENDENT = 1e-10  # of the largest size: what is smaller is rounding


def directions_of(source: Any, name: str | None = None) -> Directions:
    """Whatever is taken for directions, for the hook point of this name.

    Raises:
        ArgumentError: something else, several widths, numbers that are not finite, a hook point
            for which a Contrast has none, an index that an autoencoder lacks, or an autoencoder
            whose pre-activations are not linear in h.
    """
    if isinstance(source, Tensor | Mapping):
        return _of_tensors({"given": source} if isinstance(source, Tensor) else source)
    by_point = getattr(source, "by_point", None)
    if isinstance(by_point, Mapping):
        point = name if name in by_point else next(iter(by_point)) if len(by_point) == 1 else None
        if point is None:
            fact = f"there are directions at {list(by_point)[:4]}, and none at {name!r}"
            raise ArgumentError(f"{fact}; name one of these, or pass one vector of by_point.")
        return dataclasses.replace(_of_tensors({point: by_point[point]}), hook_name=point)
    is_pair = isinstance(source, tuple) and len(source) == 2 and hasattr(source[0], "W_enc")
    return _of_autoencoder(*source) if is_pair else _of_autoencoder(source, None)


def _of_tensors(tensors: Mapping[Any, Any]) -> Directions:
    rows: dict[str, Tensor] = {}
    for label, value in tensors.items():
        is_tensor = isinstance(value, Tensor) and value.is_floating_point()
        if not is_tensor or value.ndim not in (1, 2) or not value.numel():
            shown = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else value
            raise ArgumentError(f"directions are {shown!s}; {_EXPECTED}, of floating point.")
        rows[str(label)] = torch.atleast_2d(_finite(value))
    widths = {value.shape[1] for value in rows.values()}
    if len(widths) != 1:
        raise ArgumentError(f"directions of {sorted(widths) or 'no'} numbers; expected one width.")
    labels = tuple((label, i) for label, value in rows.items() for i in range(len(value)))
    first = next(iter(rows.values()))
    return Directions(torch.cat([value.to(first) for value in rows.values()]), labels)


def _of_autoencoder(source: Any, indices: Any) -> Directions:
    W_enc = getattr(source, "W_enc", None)
    if not isinstance(W_enc, Tensor) or W_enc.ndim != 2:
        raise ArgumentError(f"directions are a {type(source).__name__}; {_EXPECTED}.")
    cfg, count = getattr(source, "cfg", None), W_enc.shape[1]
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
            f"this autoencoder reads head {head} alone; pass a tensor with zeros at other heads."
        )
    encode = getattr(source, "encode", None)
    features: list[Any] = list(range(count))
    if indices is not None:
        plain = one_entry(indices)
        features = [one_entry(i) for i in (plain if isinstance(plain, Iterable) else [plain])]
        if not features or not all(is_whole(i) and 0 <= i < count for i in features):
            raise ArgumentError(f"features {features}: this autoencoder has 0 to {count - 1}.")
        inner = encode
        encode = None if inner is None else lambda h: inner(h)[..., features]
    rows, labels = _finite(W_enc).T[features], tuple(("feature", i) for i in features)
    name, by_head = setting_of(cfg, "hook_name"), getattr(source, "hook_z_reshaping_mode", False)
    return Directions(rows, labels, "encoder", "pre-activation", name, encode, bool(by_head))


def _finite(rows: Tensor) -> Tensor:
    if rows.is_meta or not torch.isfinite(rows).all():
        raise ArgumentError("the directions hold NaN or infinite numbers, or none (device meta).")
    return rows.detach()


def setting_of(cfg: Any, name: str) -> Any:
    """cfg.name, or cfg.metadata's (SAELens 6), or None."""
    for place in (cfg, getattr(cfg, "metadata", None)):
        value = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
        if value is not None:
            return value
    return None


# --- Updates without a direction, and of a lower rank


@extensions.without_direction.provide
def without_direction(
    modules: Updates, directions: Any, side: Side, *, only_of_stream: bool
) -> dict[str, ModuleUpdate]:
    """Updates that write, or read, nothing along a direction: see `Adapter.without_direction`."""
    chosen = _of_stream(modules, side) if only_of_stream else modules
    V = directions_of(directions).basis()
    return {key: _projected(key, update, V, side) for key, update in chosen.items()}


def _of_stream(modules: Updates, side: Side) -> dict[str, ModuleUpdate]:
    """The modules that write to the residual stream, or those that read it.

    Raises:
        SiteError: there are none, or of some module it is not known.
    """
    writes = {key: is_writer(module_path(key)) for key in modules}
    unknown = [key for key in writes if writes[key] is None]
    chosen = {key: update for key, update in modules.items() if writes[key] is (side == "write")}
    if unknown or not chosen:
        first = [*unknown, *writes][0]
        verb = "read" if side == "read" else "write to"
        raise SiteError(
            f"{first} is no module that is known to {verb} the residual stream; name the "
            "modules that the direction belongs to with sites=…, such as '*.down_proj'."
        )
    return chosen


def is_writer(module: str) -> bool | None:
    """Whether a module writes to the residual stream; None where no family has such a module."""
    places = (family.place(module) for family in FAMILIES)
    kinds = next((place.kinds for place in places if place is not None), None)
    return None if kinds is None else kinds[0] in _WRITE_TO_STREAM


def _projected(path: str, update: ModuleUpdate, V: Tensor, side: Side) -> LoRAFactors:
    """The update without what it writes, or reads, along the columns of V, [d, few]."""
    factors = plain(path, update)
    width = len(factors.B) if side == "write" else factors.A.shape[1]
    if width != len(V):
        fact = f"{path} {side}s {width} features, and the direction has {len(V)}"
        raise AdapterError(f"{fact}; name its modules with sites=…, such as '*.down_proj'.")

    def rest(rows: Float[Tensor, "*row d"]) -> Float[Tensor, "*row d"]:
        wide = in_float64(rows)
        return (wide - (wide @ V.to(wide)) @ V.to(wide).T).to(rows)

    if side == "read":
        return dataclasses.replace(factors, A=rest(factors.A))
    bias = None if factors.lora_bias is None else rest(factors.lora_bias)
    return dataclasses.replace(factors, B=rest(factors.B.T).T.contiguous(), lora_bias=bias)


@extensions.truncated.provide
def truncated(modules: Updates, rank: int) -> tuple[dict[str, ModuleUpdate], dict[str, float]]:
    """Each update's best approximation of this rank, and its relative error."""
    updates: dict[str, ModuleUpdate] = {}
    errors: dict[str, float] = {}
    for path, update in modules.items():
        updates[path], errors[path] = _truncated(path, update, rank)
    return updates, errors


def _truncated(path: str, update: ModuleUpdate, rank: int) -> tuple[LoRAFactors, float]:
    """The best approximation of this rank in the Frobenius norm, and its relative error."""
    factors = plain(path, update)
    if factors.experts > 1:
        parts = factors.by_expert()
        cuts, errors = zip(*(_truncated(path, part, rank) for part in parts), strict=True)
        lost = math.hypot(*(p.norm() * error for p, error in zip(parts, errors, strict=True)))
        return expert_factors(cuts), lost / (factors.norm() or 1.0)
    if factors.rank <= rank:
        return factors, 0.0
    (Q_B, R_B), (Q_A, R_A) = map(torch.linalg.qr, (in_float64(factors.B), in_float64(factors.A).T))
    U, sizes, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    A = ((Q_A @ Vt.T[:, :rank]) * sizes[:rank]).T.to(factors.A).contiguous()
    cut = dataclasses.replace(factors, A=A, B=(Q_B @ U[:, :rank]).to(factors.B))
    return cut, float(sizes[rank:].norm()) / (float(sizes.norm()) or 1.0)
