"""The map z → δ(z) that an update becomes in the basis of a hooked model.

A Hugging Face linear reads x and writes W x, and the adapter adds ΔW x. A hook point of the model
shows z, and takes δ, which may both be other vectors than x and ΔW x:

1. Before a map that reads a norm, a hook point may show n, where x = γ ⊙ n + β. If the norm was
   folded, γ and β are those of the base. If the model applies them after the hook point, they are
   its own.
2. If value biases were folded into b_O, z of o lacks Rep(b̂_V): x = z + Rep(b̂_V).
3. If LayerNorms were folded, n is centred. If writing weights were centred, δ must be centred too.
4. A flag may repeat the heads of k and v, and an embedding may be multiplied by κ.

`basis_of` collects these facts of a site as a `Basis`, and `map_of` gives them with the update to
`basis.site_map`, which computes. What processing did to a weight is found by `hosts/processed.py`,
which provides the two functions at the end.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

from jaxtyping import Float
from torch import Tensor

from lens_lora.core.model import extensions
from lens_lora.core.model.adapted_modules import SiteFactors
from lens_lora.core.model.base_parameters import BaseParameters
from lens_lora.core.model.bases import Processing
from lens_lora.core.model.basis import Basis, NormMap, NormUpdate, SiteMap, Update, site_map
from lens_lora.core.model.own_parameters import Fact, OwnParameters
from lens_lora.core.provided import declared


def map_of(
    base: BaseParameters, site: SiteFactors, update: Update, *, behind_norm: bool = False
) -> SiteMap:
    """The map z → δ(z) of a linear site in the model's basis. No forward pass.

    Args:
        base: the parameters of the hooked model, and of its base.
        site: the site.
        update: its update in the Hugging Face basis.
        behind_norm: whether z is read behind γ and β, at `ports_behind_norm`.

    Raises:
        ModelStateError: the base is needed and was not given, or is another model's.
    """
    own = base.own
    if own.experts(site.layer, site.kind):
        stack = cast(Tensor, own.stack(site.layer, site.kind))
        return extensions.expert_map(update, own.working_dtype, stack.device)
    basis = basis_of(base, site, behind_norm=behind_norm)
    kappa = own.known(Fact.EMBEDDING_SCALE, site.kind, make=lambda: own.embedding_scale(site.kind))
    scaled = dataclasses.replace(update, scale=update.scale * kappa)
    return site_map(scaled, basis)


def norm_map(own: OwnParameters, site: SiteFactors, update: NormUpdate) -> NormMap:
    """The map of a norm that is not folded; a norm of q and k repeats for every head."""
    gamma, _ = own.norm_affine(site)
    heads = own.heads_at_hooks.of(site.kind)

    def of_every_head(vector: Tensor) -> Tensor:
        return vector.to(gamma.device, own.working_dtype).repeat(max(heads, 1))

    d_beta = None if update.beta is None else of_every_head(update.beta)
    return NormMap(of_every_head(update.gamma), d_beta)


def basis_of(base: BaseParameters, site: SiteFactors, *, behind_norm: bool = False) -> Basis:
    """How z and the output of a site's map differ from the Hugging Face linear's.

    Args:
        base: the parameters of the hooked model, and of its base.
        site: the site.
        behind_norm: whether z is read behind γ and β.
    """
    make = functools.partial(_basis, base, site, behind_norm=behind_norm)
    return base.own.known(Fact.BASIS, site.layer, site.kind, behind_norm, make=make)


def _basis(base: BaseParameters, site: SiteFactors, *, behind_norm: bool) -> Basis:
    own = base.own
    weight = own.weight(site.layer, site.kind)
    processing = processing_of(base, site, weight)
    gamma = None
    beta = None
    if not behind_norm:
        gamma, beta = _affine(base, site, is_folded=processing.folded)
    input_heads = own.heads.n_heads if site.kind == "o" else 0
    kv_copies = own.kv_copies if site.kind in ("k", "v") else 1
    return Basis(
        dtype=own.working_dtype,
        device=weight.device,
        gamma=gamma,
        gamma_is_own=not processing.folded,
        beta=beta,
        centre_read=processing.folded and own.family.norm == "LN",
        centre_write=processing.centred,
        n_heads=input_heads,
        kv_copies=kv_copies,
        d_head=own.heads.d_head,
    )


def _affine(
    base: BaseParameters, site: SiteFactors, *, is_folded: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(γ, β) with x = γ ⊙ z + β; None for 1 and for 0. At o, β is Rep(b̂_V).

    Args:
        base: the parameters of the hooked model, and of its base.
        site: the site.
        is_folded: whether the norm that the map reads was folded into its weight.
    """
    norm_path = base.own.family.norm_path(site.layer, site.kind)
    if is_folded and base.given is not None and norm_path is not None:
        return base.given.affine(norm_path)
    if site.kind == "o":
        return None, folded_value_bias(base, site)
    return base.own.own_affine(site.layer, site.kind) or (None, None)


# --- What `hosts/processed.py` provides


@declared
def processing_of(
    base: BaseParameters, site: SiteFactors, weight: Float[Tensor, "out in"]
) -> Processing:
    """How the model's weight at a site was processed: a norm folded in, what it writes centred.

    Provided by `hosts/processed.py`.

    Raises:
        ModelStateError: the model was processed, and its base is not given or is another one.
    """
    raise NotImplementedError


@declared
def folded_value_bias(base: BaseParameters, site: SiteFactors) -> Float[Tensor, " out"] | None:
    """Rep(b̂_V), [n_heads · d_head], where b̂_V was folded into b_O; None where it was not.

    Provided by `hosts/processed.py`.

    Raises:
        ModelStateError: it was folded, or may have been, and the base was not given.
    """
    raise NotImplementedError
