"""An adapter's modules as sites of a model, before they meet the model's basis.

1. A Hugging Face module becomes one site, or three if it fuses q, k and v. The family's layout says
   to which of them each row of the fused output belongs, and each site takes its rows of B. A
   module that the model lacks is refused, and the nearest ones are named.
2. Parameters that were trained whole are transposed to [out, in], as factors are.
"""

from __future__ import annotations

import dataclasses
import difflib

import torch
from torch import Tensor

from lens_lora.core.adapter.adapter import Adapter
from lens_lora.core.adapter.factors import LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.core.model.sites import Heads, site_name
from lens_lora.errors import AdapterError, SiteError
from lens_lora.families import NORM_KINDS, Family, Place, outside_layer

# The order in which a forward pass meets the kinds.
_ORDER = (
    *("embed", "pos_embed", "embed_ln"),
    *("ln1", "q", "k", "v", "q_norm", "k_norm", "o", "ln1_post"),
    *("ln2", "gate", "up", "fc_in", "down", "fc_out", "ln2_post"),
    *("ln_final", "unembed"),
)

# For each parameter of a stack of experts, the kind of MLP map that it replaces.
_OF_STACKS = {"gate_up_proj": "up", "up_proj": "up", "down_proj": "down"}


@dataclasses.dataclass(frozen=True)
class SiteFactors:
    """A site in the Hugging Face basis, with the adapter's factors of its own output rows.

    Attributes:
        name: its name, such as 'blocks.3.attn.q', or in a sum of adapters 'blocks.3.attn.q@name'.
        module: the path of the module that the adapter names.
        path: the path of the module that is changed; it differs if the base ties it to `module`.
        layer: the number of the block.
        kind: its kind, such as 'q'.
        factors: the adapter's factors of these rows; trained parameters are [out, in].
        rows: the rows of a fused module that belong to the site; None for all.
        adapter: the name of the part, in a sum of adapters.
        base_model: the base that the adapter names.
    """

    name: str
    module: str
    path: str
    layer: int
    kind: str
    factors: ModuleUpdate
    rows: Tensor | None
    adapter: str
    base_model: str | None

    @property
    def label(self) -> str:
        """The name for errors, such as 'blocks.3.attn.q (model.layers.3.self_attn.q_proj)'."""
        return f"{self.name} ({self.module})"

    def misfit(self, facts: str) -> AdapterError:
        """The error for parameters that do not fit those of the model."""
        return _misfit(self.label, facts, self.base_model)

    @property
    def key(self) -> str:
        """The adapter's own key of the module, which in a sum of adapters ends in '@name'."""
        return f"{self.module}@{self.adapter}" if self.adapter else self.module


def resolve_sites(
    adapter: Adapter, family: Family, heads: Heads, n_layers: int
) -> tuple[SiteFactors, ...]:
    """Turn every adapted module into sites, in the order in which a forward pass meets them.

    Raises:
        SiteError: a module that the model lacks.
        AdapterError: a fused projection of another size than the model's.
    """
    sites: list[SiteFactors] = []
    for key, factors in adapter.modules.items():
        module, _, tag = key.partition("@")
        place = family.place(module)
        if place is None or not _can_hold(place, factors, n_layers):
            raise _unknown_module(module, adapter, family, n_layers)
        factors = _turned(factors, family, place)
        out = _out(factors)
        _require_fused_width(module, place, heads, out, adapter.base_model)
        for kind in place.kinds:
            layer = place.layer
            if layer is None:
                layer = outside_layer(kind, n_layers)
            rows = fused_rows(place, kind, heads, out)
            own_factors = factors if rows is None else factors.rows(rows)
            site = SiteFactors(
                name=site_name(layer, kind, tag),
                module=module,
                path=module,
                layer=layer,
                kind=kind,
                factors=own_factors,
                rows=rows,
                adapter=tag,
                base_model=adapter.base_model,
            )
            sites.append(site)
    return tuple(sorted(sites, key=in_order))


def _require_fused_width(
    module: str, place: Place, heads: Heads, out: int, base_model: str | None
) -> None:
    """Check that factors of a fused projection write as many features as the model's has.

    Raises:
        AdapterError: they write another number.
    """
    expected = _fused_width(place, heads)
    if place.layout != "whole" and expected not in (0, out):
        facts = f"the adapter writes {out} features, the fused projection has {expected}"
        raise _misfit(module, facts, base_model)


def _fused_width(place: Place, heads: Heads) -> int:
    """How many rows a fused projection has; 0 if the heads do not tell."""
    if place.rows:
        return sum(len(rows) for rows in place.rows.values())
    return sum(heads.of(kind) for kind in place.kinds) * heads.d_head


def _can_hold(place: Place, factors: ModuleUpdate, n_layers: int) -> bool:
    """Whether the model has such a layer, and the module can have the update (norms: no LoRA)."""
    if (place.layer or 0) >= n_layers:
        return False
    is_norm = place.kinds[0] in NORM_KINDS
    return not (is_norm and isinstance(factors, LoRAFactors))


def in_order(site: SiteFactors) -> tuple[int, int, str]:
    """A sort key for sites, in the order in which a forward pass meets them.

    A kind that is named by its path ('conv.in', 'mlp.shared_expert.up') takes the place of an o, or
    of the last map of an MLP; a stack of experts that of up or down.
    """
    kind = site.kind
    if kind not in _ORDER:
        by_path = "fc_out" if kind.startswith("mlp.") else "o"
        kind = _OF_STACKS.get(kind.rpartition(".")[2], by_path)
    return site.layer, _ORDER.index(kind), site.kind


def _turned(factors: ModuleUpdate, family: Family, place: Place) -> ModuleUpdate:
    """Transpose base weights and trained weights to [out, in], as A and B are already."""
    if not family.stores_transposed(place.kinds[0]):
        return factors
    if isinstance(factors, TrainedModule):
        return factors.turned()
    if factors.base_weight is None:
        return factors
    return dataclasses.replace(factors, base_weight=factors.base_weight.T)


def _out(factors: ModuleUpdate) -> int:
    """The number of output rows."""
    if isinstance(factors, LoRAFactors):
        return len(factors.B)
    if factors.weight is not None:
        return len(factors.weight)
    return 0 if factors.bias is None else len(factors.bias)


def fused_rows(place: Place, kind: str, heads: Heads, out: int) -> Tensor | None:
    """The output rows of a fused projection that belong to a kind; None if it is not fused.

    With the layout "blocks", q, k and v follow one another, or gate and up. With "interleaved" the
    rows are (head, 3, d_head).
    """
    if place.layout in ("whole", "measured"):
        return place.rows.get(kind)
    rows = torch.arange(out)
    index = place.kinds.index(kind)
    if place.layout == "interleaved":
        return rows.view(heads.n_heads, -1, heads.d_head)[:, index].flatten()
    even = out // len(place.kinds)  # Gate and up have no heads, and share the rows evenly.
    widths = [heads.of(part) * heads.d_head or even for part in place.kinds]
    return rows.split(widths)[index]


def _misfit(where: str, facts: str, base_model: str | None) -> AdapterError:
    return AdapterError(
        f"{where}: {facts}. Was it trained on another base model? The adapter names {base_model!r}."
    )


def _unknown_module(module: str, adapter: Adapter, family: Family, n_layers: int) -> SiteError:
    """The error for a module that the model lacks, with the nearest ones that it has."""
    known = family.linear_paths(n_layers)
    near = difflib.get_close_matches(module, known, n=3, cutoff=0.3) or known[:3]
    fact = (
        f"{module}: the model ({family.architectures[0]} naming, {n_layers} layers) has no such "
        f"linear module, embedding or norm that can be adapted here; the nearest are "
        f"{', '.join(near)}. The adapter names the base {adapter.base_model!r}"
    )
    places = [family.place(key.partition("@")[0]) for key in adapter.modules]
    if any(place is not None and (place.layer or 0) < n_layers for place in places):
        without = "adapter.without_modules(…)"
        return SiteError(
            fact,
            remedy=f"use {without} to leave a module out on purpose.",
            in_shell=f"to leave a module out on purpose, in Python: {without}.save(folder).",
        )
    return SiteError(
        f"{fact}; none of its {len(adapter)} modules exists here, so it is of another architecture "
        "(a UNet, an encoder, another family of language models)."
    )
