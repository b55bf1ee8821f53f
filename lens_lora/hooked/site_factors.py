"""An adapter's modules as sites, before they meet the model's basis.

1. A Hugging Face module becomes one site, or three where it fuses q, k and v: row i of the fused
   output belongs to the kind that the family's layout names, and the site takes those rows of B.
2. Parameters that were trained whole are turned to [out, in], as factors are.
3. A module that the model lacks is refused, with the nearest that it has.
"""

from __future__ import annotations

import dataclasses
import difflib

import torch
from torch import Tensor

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.trained import ModuleUpdate, TrainedModule
from lens_lora.errors import AdapterError, SiteError
from lens_lora.families import NORM_KINDS, Family, Place
from lens_lora.hooked.sites import ATTENTION_KINDS, OUTSIDE_KINDS, Heads

__all__ = ["SiteFactors", "fused_rows", "in_order", "no_such_norm", "resolve_sites", "site_name"]

_ORDER = (
    *("embed", "pos_embed", "embed_ln"),
    *("ln1", "q", "k", "v", "q_norm", "k_norm", "o", "ln1_post"),
    *("ln2", "gate", "up", "fc_in", "down", "fc_out", "ln2_post"),
    *("ln_final", "unembed"),
)


@dataclasses.dataclass(frozen=True)
class SiteFactors:
    """A site before it meets the model's basis: its own output rows, in the Hugging Face basis.

    Attributes:
        name: 'blocks.3.attn.q', with the part of a sum behind '@'.
        module: path that the adapter names.
        path: of the module whose rows these are: another one where the base ties it to `module`.
        layer: its number.
        kind: such as 'q'.
        factors: of these rows; of trained parameters [out, in].
        rows: which rows of a fused module; None for all.
        adapter: which part of a sum.
    """

    name: str
    module: str
    path: str
    layer: int
    kind: str
    factors: ModuleUpdate
    rows: Tensor | None
    adapter: str


def site_name(layer: int, kind: str) -> str:
    """'blocks.3.attn.q', or the kind alone outside the blocks.

    Args:
        layer, kind: such as 3 and 'q'.
    """
    if kind in OUTSIDE_KINDS:
        return kind
    if kind in NORM_KINDS and kind not in ("q_norm", "k_norm"):
        return f"blocks.{layer}.{kind}"
    part = "attn" if kind in (*ATTENTION_KINDS, "q_norm", "k_norm") else "mlp"
    return f"blocks.{layer}.{part}.{kind}"


def resolve_sites(
    adapter: Adapter, family: Family, heads: Heads, n_layers: int
) -> tuple[SiteFactors, ...]:
    """Every adapted module as sites, in the order in which a forward pass meets them.

    Args:
        adapter: what was fine-tuned.
        family: how the model's modules are named.
        heads: of the model.
        n_layers: of the model.

    Raises:
        SiteError: a module that the model lacks.
        AdapterError: a fused projection of another size than the model's.
    """
    found: list[SiteFactors] = []
    for key, factors in adapter.modules.items():
        module, _, tag = key.partition("@")
        place = family.place(module)
        has_factors = isinstance(factors, LoRAFactors)
        if (
            place is None
            or (place.layer or 0) >= n_layers
            or (has_factors and place.kinds[0] in NORM_KINDS)
        ):
            raise _unknown_module(module, adapter, family, n_layers)
        factors = _turned(factors, family, place)
        _check_factors(module, factors, place, heads, adapter.base_model)
        for kind in place.kinds:
            layer = _layer(place, kind, n_layers)
            rows = fused_rows(place, kind, heads, _out(factors))
            own = factors if rows is None else factors.rows(rows)
            name = site_name(layer, kind) + (f"@{tag}" if tag else "")
            found.append(SiteFactors(name, module, module, layer, kind, own, rows, tag))
    return tuple(sorted(found, key=in_order))


def in_order(site: SiteFactors) -> tuple[int, int]:
    """Sort key: the order in which a forward pass meets the sites.

    Args:
        site: with its layer and kind.
    """
    return site.layer, _ORDER.index(site.kind)


def _turned(factors: ModuleUpdate, family: Family, place: Place) -> ModuleUpdate:
    """Weights of the base or trained ones as [out, in]; A and B are so already."""
    if not family.stores_transposed(place.kinds[0]):
        return factors
    if isinstance(factors, TrainedModule):
        return factors.turned()
    stored = factors.base_weight
    return factors if stored is None else dataclasses.replace(factors, base_weight=stored.T)


def _out(factors: ModuleUpdate) -> int:
    """The number of output rows."""
    if isinstance(factors, LoRAFactors):
        return len(factors.B)
    held = factors.bias if factors.weight is None else factors.weight
    return 0 if held is None else len(held)


def _layer(place: Place, kind: str, n_layers: int) -> int:
    if place.layer is not None:
        return place.layer
    return n_layers if kind in ("ln_final", "unembed") else -1


def fused_rows(place: Place, kind: str, heads: Heads, out: int) -> Tensor | None:
    """Which output rows of a fused projection belong to a kind; None where it is not fused.

    Layout "blocks" is q|k|v one after another, or gate|up; "interleaved" is (head, 3, d_head).

    Args:
        place, out: of the module in its family, and how many rows it has.
        kind: one of those that it fuses.
        heads: the model's.
    """
    if place.layout == "whole":
        return None
    if place.layout == "interleaved":
        every = torch.arange(out).view(heads.n_heads, len(place.kinds), heads.d_head)
        return every[:, place.kinds.index(kind)].flatten()
    widths = [heads.of(k) * heads.d_head or out // len(place.kinds) for k in place.kinds]
    return torch.arange(out).split(widths)[place.kinds.index(kind)]


def _check_factors(
    module: str, factors: ModuleUpdate, place: Place, heads: Heads, base_model: str | None
) -> None:
    expected = sum(heads.of(kind) for kind in place.kinds) * heads.d_head
    if place.layout != "whole" and expected and _out(factors) != expected:
        raise AdapterError(
            f"{module}: the adapter writes {_out(factors)} features, the model's fused projection "
            f"has {expected}. Was it trained on another base model? The adapter names "
            f"{base_model!r}."
        )


def no_such_norm(site: SiteFactors) -> SiteError:
    """The error for a norm that the family may have, and the model has not.

    Args:
        site: of the norm.
    """
    return SiteError(
        f"{site.name} ({site.module}): the adapter changes this norm, and the model has none there."
    )


def _unknown_module(module: str, adapter: Adapter, family: Family, n_layers: int) -> SiteError:
    known = [
        f"{family.layer.format(l=layer)}.{name}"
        for layer in range(n_layers)
        for name in family.linears
    ]
    near = difflib.get_close_matches(module, known, n=3, cutoff=0.3) or known[:3]
    places = (family.place(key.partition("@")[0]) for key in adapter.modules)
    if any(place is not None and (place.layer or 0) < n_layers for place in places):
        remedy = "use adapter.without(…) to leave a module out on purpose."
    else:
        remedy = (
            f"none of its {len(adapter)} modules exists here, so it is of another architecture (a "
            "UNet, an encoder, another family of language models)."
        )
    return SiteError(
        f"{module}: the model ({family.architectures[0]} naming, {n_layers} layers) has no such "
        f"linear module, embedding or norm that can be adapted here; the nearest are "
        f"{', '.join(near)}. The adapter names the base {adapter.base_model!r}; {remedy}"
    )
