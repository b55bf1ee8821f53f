"""What the base ties to an embedding or a head that the adapter changes, as PEFT treats it.

1. Trained rows of an embedding are the tied head's as well, unless it has rows of other tokens.
2. A weight that PEFT writes into the base's own parameter is that of both.
3. A module of `modules_to_save` is a copy: nothing follows it, and it follows nothing.
4. Factors are each module's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.trained import ModuleUpdate, TrainedModule
from lens_lora.errors import UnsupportedAdapterError
from lens_lora.hooked.base_at_hand import BaseAtHand, is_same
from lens_lora.hooked.host import Host
from lens_lora.hooked.site_factors import SiteFactors, site_name

__all__ = ["follower"]

_TIED = {"embed": "unembed", "unembed": "embed"}


def follower(
    site: SiteFactors,
    sites: Mapping[tuple[str, str], SiteFactors],
    base: BaseAtHand,
    host: Host,
) -> SiteFactors | None:
    """The head, or the embedding, that changes with this site; None where none does.

    Args:
        site: whose update may be followed.
        sites: the adapter's own, by kind and part of a sum.
        base: the base's own parameters.
        host: the hooked model.

    Raises:
        UnsupportedAdapterError: the two are tied, and the adapter holds different parameters.
        ModelStateError: whether they are tied, or the base's weight, is not known.
    """
    trained = _followed(site, base)
    if trained is None or not base.is_tied(site):
        return None
    kind = _TIED[site.kind]
    other = sites.get((kind, site.adapter))
    if other is not None and _is_given(other, site, trained):
        return None
    return dataclasses.replace(
        site,
        name=site_name(0, kind) + (f"@{site.adapter}" if site.adapter else ""),
        path=base.head if kind == "unembed" else host.family.embed,
        layer=host.n_layers if kind == "unembed" else -1,
        kind=kind,
        factors=trained,
    )


def _followed(site: SiteFactors, base: BaseAtHand) -> TrainedModule | None:
    """What a tied module would have of this one, turned to its own [out, in]."""
    factors = site.factors
    if site.kind not in _TIED:
        return None
    if isinstance(factors, TrainedModule) and factors.tokens is not None and factors.tied:
        return dataclasses.replace(factors.turned(), bias=None)
    stored = _stored(factors)
    if stored is None or base.has_weight(site, stored):
        return None
    return TrainedModule(stored.T, strength=factors.strength)


def _is_given(other: SiteFactors, site: SiteFactors, trained: TrainedModule) -> bool:
    """Whether the adapter itself holds what the tied module would follow."""
    factors = other.factors
    if isinstance(factors, LoRAFactors) and factors.base_weight is None:
        return False
    if trained.tokens is not None:
        is_right = isinstance(factors, TrainedModule) and _same_rows(factors, trained)
    elif isinstance(factors, TrainedModule) and factors.tokens is None and not factors.tied:
        is_right = True
    else:
        stored = _stored(factors)
        is_right = stored is not None and is_same(stored, cast(Tensor, trained.weight))
    if not is_right:
        raise UnsupportedAdapterError(
            f"{site.name} ({site.module}) and {other.name} ({other.module}): the base ties the one "
            "to the other, and the adapter holds different parameters for the two, which PEFT "
            "cannot both use. It was trained on a base whose head is not tied to its embedding: "
            "build the hooked model from that."
        )
    return True


def _stored(factors: ModuleUpdate) -> Tensor | None:
    """The weight that PEFT writes into the base's own parameter, [out, in]."""
    if isinstance(factors, LoRAFactors) or not factors.tied or factors.tokens is not None:
        return factors.base_weight
    return factors.weight


def _same_rows(one: TrainedModule, other: TrainedModule) -> bool:
    if one.tokens is None or other.tokens is None:
        return False
    same_ids = torch.equal(one.tokens, other.tokens)
    return same_ids and is_same(cast(Tensor, one.weight), cast(Tensor, other.weight))
