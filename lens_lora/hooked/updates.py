"""An adapter's sites with their updates in the Hugging Face basis, in the order of a forward pass.

1. Shapes are compared with the model's own weights.
2. Each site's update is made plain (plain_update.py); one that changes nothing is left out.
3. What the base ties to an embedding or a head follows it (tied.py). All that one site gets is one
   update.
4. Where norms are folded, readers' A' = A diag(γ) would depend on γ's gate: γ and β are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.trained import TrainedModule
from lens_lora.errors import AdapterError, ModelStateError, UnsupportedAdapterError
from lens_lora.families import NORM_KINDS
from lens_lora.hooked.base_at_hand import BaseAtHand
from lens_lora.hooked.base_weights import BaseWeights
from lens_lora.hooked.basis import Update
from lens_lora.hooked.dense_memory import require_dense_fit
from lens_lora.hooked.host import Host
from lens_lora.hooked.norm_map import NormUpdate
from lens_lora.hooked.plain_update import linear_update, norm_update, summed, token_axis
from lens_lora.hooked.site_factors import SiteFactors, in_order
from lens_lora.hooked.tied import follower

__all__ = ["SiteUpdate", "site_updates"]


@dataclasses.dataclass(frozen=True, eq=False)
class SiteUpdate:
    """A site and what it adds in the Hugging Face basis.

    Attributes:
        site: as the adapter holds it.
        update: for which the base is no longer needed.
    """

    site: SiteFactors
    update: Update | NormUpdate


def site_updates(
    host: Host, sites: Sequence[SiteFactors], base: BaseWeights | None, base_model: str | None
) -> tuple[SiteUpdate, ...]:
    """Every site that differs from the base. No forward pass.

    Args:
        host: the hooked model.
        sites: as the adapter holds them.
        base: the unprocessed base, or None.
        base_model: the base that the adapter names, for errors.

    Raises:
        AdapterError: shapes that do not fit the model's, or nothing differs.
        SiteError: the model has no such module.
        UnsupportedAdapterError: two values for parameters that are tied.
        ModelStateError: the base is needed and was not given, or norms that changed are folded.
        OutOfMemoryError: dense updates that do not fit into memory.
    """
    at_hand = BaseAtHand(host, base)
    by_kind = {(site.kind, site.adapter): site for site in sites}
    found: dict[str, SiteUpdate] = {}
    for site in sites:
        if site.kind not in NORM_KINDS:
            _require_fit(site, at_hand.shape(site), base_model)
    require_dense_fit(host, sites, at_hand)
    for site in sites:
        for each in (site, follower(site, by_kind, at_hand, host)):
            update = None if each is None else _update_of(each, host, at_hand)
            if each is not None and update is not None:
                found[each.name] = _joined(found.get(each.name), SiteUpdate(each, update))
    if not found:
        raise AdapterError(
            "all that the adapter holds are parameters that equal the base model's: it changes "
            "nothing, so there is nothing to explain."
        )
    return tuple(sorted(found.values(), key=lambda one: in_order(one.site)))


def _update_of(site: SiteFactors, host: Host, base: BaseAtHand) -> Update | NormUpdate | None:
    """None where the adapter holds what the base has."""
    if site.kind not in NORM_KINDS:
        return linear_update(site, base)
    is_folded = host.is_norm_folded(site.layer, site.kind)
    if is_folded and not base.is_given:
        raise _folded(site, host)
    update = norm_update(site, base, host.family.gamma_offset)
    if is_folded and update is not None:
        raise _folded(site, host)
    return update


def _joined(one: SiteUpdate | None, other: SiteUpdate) -> SiteUpdate:
    """Under the module that the adapter names there itself."""
    if one is None:
        return other
    site = one.site if one.site.path == one.site.module else other.site
    if isinstance(one.update, NormUpdate) or isinstance(other.update, NormUpdate):
        raise AdapterError(f"{site.name} ({site.module}): the adapter holds two updates of it.")
    return SiteUpdate(site, summed(one.update, other.update))


def _folded(site: SiteFactors, host: Host) -> ModelStateError:
    return ModelStateError(
        f"{site.name} ({site.module}): the adapter changes this norm's γ or β, and this "
        f"{host.class_name} has them folded into the weights that read the norm, whose own updates "
        "would then depend on it. Load the hooked model unprocessed "
        "(from_pretrained_no_processing, or a TransformerBridge before enable_compatibility_mode)."
    )


def _require_fit(site: SiteFactors, ours: tuple[int, int], base_model: str | None) -> None:
    """Refuse shapes that do not fit the model's own weight, [out, in]."""
    theirs = _shape(site, ours)
    if theirs != ours:
        raise AdapterError(
            f"{site.name} ({site.module}): the adapter maps {theirs[1]}→{theirs[0]}, the model "
            f"{ours[1]}→{ours[0]}. Was it trained on another base model? The adapter names "
            f"{base_model!r}."
        )


def _shape(site: SiteFactors, ours: tuple[int, int]) -> tuple[int, ...]:
    """(out, in) as the adapter has them; a side that it leaves open is the model's."""
    factors = site.factors
    if isinstance(factors, LoRAFactors):
        return factors.B.shape[0], ours[1] if factors.width is None else factors.width
    weight, bias = factors.weight, factors.bias
    is_off = weight is not None and weight.ndim != 2
    if is_off or (bias is not None and len(bias) != ours[0]):
        held = [tuple(tensor.shape) for tensor in (weight, bias) if tensor is not None]
        raise AdapterError(
            f"{site.name} ({site.module}): the adapter holds tensors {held}, and the model's "
            f"weight is {ours}. Was it trained on another base model?"
        )
    if weight is None:
        return ours
    if factors.tokens is None:
        return tuple(weight.shape)
    _require_tokens(site, factors, ours)
    theirs = list(weight.shape)
    theirs[token_axis(site.kind)] = ours[token_axis(site.kind)]
    return tuple(theirs)


def _require_tokens(site: SiteFactors, factors: TrainedModule, ours: tuple[int, int]) -> None:
    if site.kind not in ("embed", "pos_embed", "unembed"):
        raise UnsupportedAdapterError(
            f"{site.name} ({site.module}): trained rows are read of embeddings and heads only."
        )
    axis, tokens = token_axis(site.kind), cast(Tensor, factors.tokens)
    rows, held = ours[axis], cast(Tensor, factors.weight).shape[axis]
    if held != len(tokens):
        raise AdapterError(
            f"{site.name} ({site.module}): the adapter holds {held} rows of {len(tokens)} tokens."
        )
    if int(tokens.max()) >= rows:
        raise AdapterError(
            f"{site.name} ({site.module}): the adapter trains the row of token "
            f"{int(tokens.max())}, and the model has {rows} rows. Resize the base model as "
            "it was resized for the training, and build the hooked model from it."
        )
