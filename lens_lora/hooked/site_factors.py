"""An adapter's modules as sites, before they meet the model's basis.

1. A Hugging Face module becomes one site, or three where it fuses q, k and v: row i of the fused
   output belongs to the kind that the family's layout names, and the site takes those rows of B.
2. A module that the model lacks is refused, with the nearest that it has.
"""

from __future__ import annotations

import dataclasses
import difflib

import torch
from torch import Tensor

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.factors import LoRAFactors
from lens_lora.errors import AdapterError, SiteError
from lens_lora.families import Family, Place
from lens_lora.hooked.sites import ATTENTION_KINDS, EMBEDDING_KINDS, Heads

__all__ = ["SiteFactors", "fused_rows", "resolve_sites", "site_name"]

_ORDER = (*EMBEDDING_KINDS, "q", "k", "v", "o", "gate", "up", "fc_in", "down", "fc_out", "unembed")


@dataclasses.dataclass(frozen=True)
class SiteFactors:
    """A site before it meets the model's basis: its own output rows, in the Hugging Face basis."""

    name: str
    module: str
    layer: int
    kind: str
    factors: LoRAFactors
    rows: Tensor | None
    adapter: str


def site_name(layer: int, kind: str) -> str:
    """'blocks.3.attn.q', or the kind alone outside the blocks.

    Args:
        layer, kind: such as 3 and 'q'.
    """
    if kind in (*EMBEDDING_KINDS, "unembed"):
        return kind
    part = "attn" if kind in ATTENTION_KINDS else "mlp"
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
        if place is None or (place.layer or 0) >= n_layers:
            raise _unknown_module(module, adapter, family, n_layers)
        _check_fused(module, place, heads, factors.B.shape[0], adapter.base_model)
        for kind in place.kinds:
            layer = _layer(place, kind, n_layers)
            rows = fused_rows(place, kind, heads, factors.B.shape[0])
            own = factors if rows is None else factors.rows(rows)
            name = site_name(layer, kind) + (f"@{tag}" if tag else "")
            found.append(SiteFactors(name, module, layer, kind, own, rows, tag))
    return tuple(sorted(found, key=lambda s: (s.layer, _ORDER.index(s.kind))))


def _layer(place: Place, kind: str, n_layers: int) -> int:
    if place.layer is not None:
        return place.layer
    return n_layers if kind == "unembed" else -1


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


def _check_fused(module: str, place: Place, heads: Heads, out: int, base_model: str | None) -> None:
    expected = sum(heads.of(kind) for kind in place.kinds) * heads.d_head
    if place.layout != "whole" and expected and out != expected:
        raise AdapterError(
            f"{module}: the adapter writes {out} features, the model's fused projection has "
            f"{expected}. Was it trained on another base model? The adapter names {base_model!r}."
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
        f"linear module that can be adapted here; the nearest are {', '.join(near)}. The adapter "
        f"names the base {adapter.base_model!r}; {remedy}"
    )
