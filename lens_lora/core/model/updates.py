"""The update of each site in the Hugging Face basis: A, B and Δb, or Δγ and Δβ.

1. Shapes are checked against the model's own weights, and dense updates against free memory.
2. The update of each site is written in a plain form:

       factors           s·B·A,  Δb = s·b_B + (b' − b)
       DoRA              ΔW = m/‖W₀ + sBA‖_row ⊙ (W₀ + sBA) − W
       trained module    ΔW = W' − W, one factor the identity,  Δb = b' − b
       trained rows t    ΔW = Σ_t (W'_t − W_t) at row t: one factor selects the rows
       norm              Δγ = γ' − γ,  Δβ = β' − β

   W, b, γ and β are those of the base (`BaseParameters`). W₀ = W, unless PEFT
   writes an embedding of the file into the base: then ΔW is s·B·A plus W₀ − W. Parameters that
   equal the base to one rounding of the coarser dtype are no update, and a site without an update
   is left out.
3. If the base ties its head to its embedding, an update of one may also be an update of the other,
   as in PEFT. All updates of one site are joined into one.
4. If norms are folded, A' = A diag(γ) of the maps behind them would depend on the gate of γ, so
   updates of γ and β are refused.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora import errors
from lens_lora.compat import float64_device, in_float64
from lens_lora.core.adapter.factors import LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.core.model.adapted_modules import SiteFactors, in_order
from lens_lora.core.model.bases import is_same
from lens_lora.core.model.basis import NormUpdate, Update
from lens_lora.core.model.gauge import svd_turn
from lens_lora.core.model.hooked_host import HookedHost
from lens_lora.core.model.own_parameters import Fact
from lens_lora.core.model.sites import site_name
from lens_lora.errors import AdapterError, ModelStateError, UnsupportedAdapterError
from lens_lora.families import NORM_KINDS, outside_layer

_TIED = {"embed": "unembed", "unembed": "embed"}
# A dense update is held twice while it is transformed to the model's basis.
_COPIES = 2


@dataclasses.dataclass(frozen=True, eq=False)
class SiteUpdate:
    """A site as the adapter holds it, and what it adds in the Hugging Face basis.

    Attributes:
        site: the site, with the adapter's own factors.
        update: what these add to the base's module.
    """

    site: SiteFactors
    update: Update | NormUpdate

    @property
    def norm(self) -> NormUpdate | None:
        """The change of a norm's parameters; None for a linear map."""
        return self.update if isinstance(self.update, NormUpdate) else None

    @property
    def linear(self) -> Update:
        """The low-rank update of a linear map.

        Raises:
            TypeError: the site is a norm, whose change is `norm`.
        """
        if isinstance(self.update, NormUpdate):
            raise TypeError(f"{self.site.name} is a norm, and its update has no ranks.")
        return self.update

    def svd(
        self,
    ) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"], Float[Tensor, " rank"]]:
        """The SVD sBA = UΣVᵀ of a linear map, as ΣVᵀ, U and σ, in float64 on the CPU.

        Directions whose σ is zero are zero in ΣVᵀ and in U.
        """
        update = self.linear
        turn = svd_turn(update)
        reads = turn.to_svd @ update.A.double()
        writes = update.scale * update.B.double() @ turn.from_svd.to(update.B.device)
        return reads.cpu(), writes.cpu(), turn.sigma.cpu()


def site_updates(host: HookedHost, sites: Sequence[SiteFactors]) -> tuple[SiteUpdate, ...]:
    """The updates of all sites that differ from the base. No forward pass.

    Raises:
        AdapterError: shapes do not fit those of the model, or no site differs from the base.
        SiteError: the model has no such module.
        UnsupportedAdapterError: there are two values for parameters that are tied.
        ModelStateError: the base is needed and was not given, or norms that changed are folded.
        OutOfMemoryError: dense updates do not fit into memory.
    """
    by_kind = {(site.kind, site.adapter): site for site in sites}
    _require_fit(host, sites)
    _require_memory(host, sites)
    updates: dict[str, SiteUpdate] = {}
    for site in sites:
        changed_together = [site]
        tied = follower(site, by_kind, host)
        if tied is not None:
            changed_together.append(tied)
        for each in changed_together:
            update = _update_of(each, host)
            if update is not None:
                updates[each.name] = _joined(updates.get(each.name), SiteUpdate(each, update))
    if not updates:
        raise AdapterError(
            "all that the adapter holds are parameters that equal the base model's: it changes "
            "nothing, so there is nothing to explain."
        )
    return tuple(sorted(updates.values(), key=lambda update: in_order(update.site)))


def _update_of(site: SiteFactors, host: HookedHost) -> Update | NormUpdate | None:
    """The update of a site; None if the adapter's parameters equal the base's."""
    if site.kind not in NORM_KINDS:
        return _linear_update(site, host)
    if not host.is_folded(site.layer, site.kind):
        return _norm_update(site, host)
    # Without the base it is not known whether the norm changes.
    if host.base.given is None or _norm_update(site, host) is not None:
        raise ModelStateError(
            f"{site.label}: the adapter changes this norm's γ or β, and this {host.class_name} has "
            "them folded into the weights that read the norm, whose own updates would then depend "
            "on it. Load the hooked model unprocessed (from_pretrained_no_processing, or a "
            "TransformerBridge before enable_compatibility_mode)."
        )
    return None


def _joined(earlier: SiteUpdate | None, later: SiteUpdate) -> SiteUpdate:
    """Join two updates of one site, under the module that the adapter itself names."""
    if earlier is None:
        return later
    is_named = earlier.site.path == earlier.site.module
    site = earlier.site if is_named else later.site
    if isinstance(earlier.update, NormUpdate) or isinstance(later.update, NormUpdate):
        raise AdapterError(f"{site.label}: the adapter holds two updates of it.")
    return SiteUpdate(site, _summed(earlier.update, later.update))


def _summed(*updates: Update) -> Update:
    """The sum of several updates of one map, whose ranks follow one another."""
    device = float64_device(updates[0].A.device)
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    biases: list[Tensor] = []
    for update in updates:
        reads.append(in_float64(update.A).to(device))
        writes.append(in_float64(update.B).to(device) * update.scale)
        if update.bias is not None:
            biases.append(update.bias.to(device))
    bias = torch.stack(biases).sum(0) if biases else None
    return Update(torch.cat(reads), torch.cat(writes, 1), scale=1.0, bias=bias)


# --- Shapes


def _require_fit(host: HookedHost, sites: Sequence[SiteFactors]) -> None:
    """Check shapes against the model's own weights, [out, in]."""
    for site in sites:
        if site.kind in NORM_KINDS:
            continue
        measure = functools.partial(host.shape, site.layer, site.kind)
        out, width = host.known(Fact.SHAPE, site.layer, site.kind, make=measure)
        for held_out, held_width in _shapes(site, (out, width)):
            if (held_out, held_width) != (out, width):
                maps = f"{held_width}→{held_out}, the model {width}→{out}"
                raise site.misfit(f"the adapter maps {maps}")
        experts = host.experts(site.layer, site.kind)
        held_experts = _experts_of(site.factors)
        if experts != held_experts:
            counts = f"{held_experts} experts, the model's stack {experts}"
            raise site.misfit(f"the adapter's factors are of {counts}")


def _experts_of(update: ModuleUpdate) -> int:
    """The number of experts that share the ranks; 0 for a single map."""
    experts = update.experts if isinstance(update, LoRAFactors) else 0
    return experts if experts > 1 else 0


def _shapes(site: SiteFactors, ours: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The shape (out, in) that each of the adapter's tensors implies.

    A side that a tensor does not determine is that of the model.

    Args:
        site: the site, with the adapter's tensors.
        ours: (out, in) of the model's weight.
    """
    model_out, model_width = ours
    factors = site.factors
    if isinstance(factors, LoRAFactors):
        yield len(factors.B), factors.width or model_width
        return
    if factors.bias is not None:
        yield len(factors.bias), model_width
    if factors.weight is None:
        return
    out, width = factors.weight.reshape(len(factors.weight), -1).shape
    if factors.tokens is None:
        yield out, width
        return
    _require_tokens(site, factors.weight, factors.tokens, ours)
    if site.kind == "unembed":
        yield model_out, width
    else:
        yield out, model_width


def _require_tokens(
    site: SiteFactors, weight: Tensor, tokens: Int[Tensor, " row"], ours: tuple[int, int]
) -> None:
    if site.kind not in (*_TIED, "pos_embed"):
        raise UnsupportedAdapterError(
            f"{site.label}: trained rows are read of embeddings and heads only."
        )
    axis = _token_axis(site.kind)
    last = int(tokens.max())
    if weight.shape[axis] != len(tokens):
        raise AdapterError(
            f"{site.label}: the adapter holds {weight.shape[axis]} rows of {len(tokens)} tokens."
        )
    if last >= ours[axis]:
        raise AdapterError(
            f"{site.label}: the adapter trains the row of token {last}, and the model has "
            f"{ours[axis]} rows. Resize the base model as it was resized for the training, and "
            "build the hooked model from it."
        )


def _token_axis(kind: str) -> int:
    """The axis of tokens in a weight [out, in]."""
    return 0 if kind == "unembed" else 1


# --- Memory


def _require_memory(host: HookedHost, sites: Sequence[SiteFactors]) -> None:
    """Check that dense updates fit into the free memory of each device, before any is made.

    ΔW [out, in] of DoRA, and of a module trained whole, has full rank. It takes at least 4 · out ·
    in bytes for each module, several times the size of the adapter. If the model was processed, or
    the bias changes as well, the other factor is not a view (`adapter/dense.py`), and takes
    min(out, in)² more numbers.
    """
    dense = [site for site in sites if _is_dense(site)]
    needed: Counter[torch.device] = Counter()
    for site in dense:
        weight = host.weight(site.layer, site.kind)
        entries = weight.numel()
        if host.needs_base() or _has_bias(site.factors):
            entries += min(weight.shape) ** 2
        needed[weight.device] += _COPIES * max(4, weight.dtype.itemsize) * entries
    for device, size in needed.items():
        free = free_bytes(device)
        if free is not None and size > free:
            raise errors.OutOfMemoryError(
                f"DoRA and modules that were trained whole have a dense ΔW: for these {len(dense)} "
                f"modules about {size:.3g} bytes on {device}, where {free:.3g} are free. Take some "
                "of the modules, adapter.only('*.layers.1?.*'), or fine-tune by a plain LoRA."
            )


def free_bytes(device: torch.device) -> float | None:
    """The bytes that are free on a device; None if it does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        return float(psutil.virtual_memory().available)
    return None


def _is_dense(site: SiteFactors) -> bool:
    factors = site.factors
    if isinstance(factors, LoRAFactors):
        return factors.needs_base_weight
    return site.kind not in NORM_KINDS and factors.weight is not None and factors.tokens is None


def _has_bias(factors: ModuleUpdate) -> bool:
    bias = factors.lora_bias if isinstance(factors, LoRAFactors) else factors.bias
    return bias is not None


# --- Updates of linear modules, embeddings and heads


def _linear_update(site: SiteFactors, host: HookedHost) -> Update | None:
    """ΔW and Δb of a linear map; None if nothing differs from the base."""
    factors = site.factors
    if isinstance(factors, LoRAFactors):
        update = _of_factors(site, factors, host)
    else:
        update = _of_trained(site, factors, host)
    bias = _bias_change(site, host)
    if update is not None:
        return dataclasses.replace(update, bias=bias)
    if bias is None:
        return None
    out, width = host.weight(site.layer, site.kind).shape
    return Update(torch.zeros(0, width), torch.zeros(out, 0), 1.0, bias)


def _of_factors(site: SiteFactors, factors: LoRAFactors, host: HookedHost) -> Update:
    """The update s·BA, or DoRA's dense ΔW; plus W₀ − W if the file holds another W₀."""
    is_dora = factors.needs_base_weight
    stored = _unlike_base(site, factors.base_weight, host)
    reads = factors.A
    if not factors.width:  # A constant does not say how wide the input is.
        reads = reads.new_zeros(factors.rank, host.weight(site.layer, site.kind).shape[1])
    scale = factors.scale * factors.strength
    update = Update(reads, factors.B, scale, experts=_experts_of(factors))
    if stored is None and not is_dora:
        return update

    needed_for = "DoRA's ΔW" if is_dora else "ΔW of a stored weight"
    base = host.base.weight(site, needed_for)
    W = in_float64(base)
    if is_dora:
        W0 = W if stored is None else stored.to(W)
        # A dense ΔW is kept in the base's dtype, where it is half as large as in float64.
        kept_dtype = torch.promote_types(base.dtype, torch.float32)
        update = _dense(factors.materialise(W0).to(kept_dtype))
    if stored is None:
        return update
    return _summed(update, _dense(factors.strength * _difference(stored, W)))


def holds_another_base(site: SiteFactors, host: HookedHost) -> bool:
    """Whether W₀ − W is a part of the update, in addition to the factors."""
    if not isinstance(site.factors, LoRAFactors):
        return False
    return _unlike_base(site, site.factors.base_weight, host) is not None


def _of_trained(site: SiteFactors, trained: TrainedModule, host: HookedHost) -> Update | None:
    """ΔW of a weight, or of rows of it, that was trained whole; None if it equals the base's."""
    weight = trained.weight
    if weight is None:
        return None
    if trained.tokens is not None:
        stored = _unlike_base(site, trained.base_weight, host)
        if stored is None:
            return _of_rows(site, weight, trained.tokens, trained.strength, host)
        weight = stored.index_copy(_token_axis(site.kind), trained.tokens, weight.to(stored))
    if _unlike_base(site, weight, host) is None:
        return None
    W = host.base.weight(site, "ΔW of a trained weight")
    return _dense(trained.strength * _difference(weight, W))


def _of_rows(
    site: SiteFactors, rows: Tensor, tokens: Int[Tensor, " row"], strength: float, host: HookedHost
) -> Update | None:
    """One factor selects the rows, the other is their change; dense where they are many."""
    W = host.base.weight(site, "ΔW of trained rows")
    axis = _token_axis(site.kind)
    tokens = tokens.to(W.device)
    before = W.index_select(axis, tokens)
    if is_same(rows, before):
        return None
    change = strength * _difference(rows, before)
    if len(tokens) > W.shape[1 - axis]:
        return _dense(torch.zeros_like(W, dtype=change.dtype).index_copy(axis, tokens, change))
    select = change.new_zeros(len(tokens), W.shape[axis])
    select[torch.arange(len(tokens)), tokens] = 1
    if axis == 1:
        return Update(select, change, 1.0)
    return Update(change, select.T, 1.0)


def _bias_change(site: SiteFactors, host: HookedHost) -> Float[Tensor, " out"] | None:
    """Δb = strength · (s·b_B + b' − b); None where the bias stays."""
    factors = site.factors
    if isinstance(factors, LoRAFactors):
        changes = [_trained_bias_change(site, factors.trained_bias, host)]
        if factors.lora_bias is not None:
            changes.insert(0, factors.scale * in_float64(factors.lora_bias))
    elif factors.bias is None and factors.tokens is not None:
        changes = [_lost_bias(site, host)]
    else:
        changes = [_trained_bias_change(site, factors.bias, host)]
    present = [change for change in changes if change is not None]
    if not present:
        return None
    return sum(present[1:], present[0]) * factors.strength


def _trained_bias_change(
    site: SiteFactors, trained: Tensor | None, host: HookedHost
) -> Float[Tensor, " out"] | None:
    """The change b' − b of a trained bias; None where it is the base's, or was not trained."""
    if trained is None:
        return None
    bias = host.base.bias(site)
    if bias is None:
        raise site.misfit("the adapter holds a trained bias, the base model has none there")
    if is_same(trained, bias):
        return None
    wide = in_float64(trained)
    return wide - in_float64(bias).to(wide.device)


def _lost_bias(site: SiteFactors, host: HookedHost) -> Float[Tensor, " out"] | None:
    """−b of a head whose rows were trained: PEFT's layer of trained rows has no bias."""
    bias = host.base.bias(site) if site.kind == "unembed" else None
    if bias is None or not bool(bias.any()):
        return None
    return -in_float64(bias)


def _unlike_base(site: SiteFactors, held: Tensor | None, host: HookedHost) -> Tensor | None:
    """The weight that the adapter's file holds, [out, in], if it is not the base's.

    A centred weight of the model is enough to tell, if no base was given.

    Raises:
        AdapterError: it has another size.
        ModelStateError: the model's own was processed, and no base was given.
    """
    if held is None:
        return None
    weight = host.weight(site.layer, site.kind)
    if held.shape != weight.shape:
        raise AdapterError(
            f"{site.label}: the adapter holds a weight {tuple(held.shape)}, the model's is "
            f"{tuple(weight.shape)}: it was resized, or is another model's. Resize the base model "
            "in the same way, and build the hooked model from it."
        )
    if host.base.given is None and not host.needs_base() and host.is_centred(site.kind, weight):
        centred = in_float64(weight) / host.embedding_scale(site.kind)
        is_base = _is_centred_to(held, centred, host.working_dtype)
    else:
        is_base = is_same(held, host.base.weight(site, "whether its stored weight is the base's"))
    return None if is_base else held


def _is_centred_to(
    held: Float[Tensor, "out in"], centred: Float[Tensor, "out in"], dtype: torch.dtype
) -> bool:
    """Whether a stored weight, once it is centred, is this one up to rounding.

    Args:
        held: the stored weight.
        centred: the model's own weight, which processing centred, in float64.
        dtype: the dtype in which the model computes δ.
    """
    wide = in_float64(held)
    difference = (wide - wide.mean(0, keepdim=True)).to(centred.device) - centred
    eps = max(torch.finfo(held.dtype).eps, torch.finfo(dtype).eps)
    room = 4 * eps * wide.abs().amax(0, keepdim=True).to(centred.device)
    return bool((difference.abs() <= room).all())


def _difference(held: Tensor, base: Tensor) -> Tensor:
    """Subtract the base from a stored tensor, on the base's device, in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(held.dtype, base.dtype), torch.float32)
    return held.to(base.device, dtype) - base.to(dtype)


def _dense(delta: Float[Tensor, "out in"]) -> Update:
    factors = LoRAFactors.dense(delta)
    return Update(factors.A, factors.B, 1.0)


# --- Updates of norms


def _norm_update(site: SiteFactors, host: HookedHost) -> NormUpdate | None:
    """Δγ and Δβ of a norm; None if nothing differs from the base."""
    trained = cast(TrainedModule, site.factors)
    gamma, beta = host.base.affine(site)
    weight = trained.weight
    if weight is not None:
        weight = weight + host.family.gamma_offset
    d_gamma = _vector_change(site, weight, gamma)
    d_beta = _vector_change(site, trained.bias, beta)
    if d_gamma is None and d_beta is None:
        return None
    if d_gamma is None:
        d_gamma = torch.zeros_like(gamma)
    if d_beta is not None:
        d_beta = d_beta * trained.strength
    return NormUpdate(d_gamma * trained.strength, d_beta)


def _vector_change(site: SiteFactors, held: Tensor | None, base: Tensor | None) -> Tensor | None:
    """The difference of a norm's vector from the base's; None if there is none."""
    if held is None:
        return None
    if base is None or held.shape != base.shape:
        size = "none" if base is None else f"{tuple(base.shape)}"
        raise site.misfit(
            f"the adapter holds a norm's vector {tuple(held.shape)}, the model's is {size}"
        )
    return None if is_same(held, base) else _difference(held, base)


# --- What the base ties to an embedding or a head


def follower(
    site: SiteFactors, sites: Mapping[tuple[str, str], SiteFactors], host: HookedHost
) -> SiteFactors | None:
    """The tied head or embedding that changes together with this site; None if there is none.

    1. Trained rows of an embedding change the tied head as well, unless that has rows of other
       tokens.
    2. A weight that PEFT writes into the base's own parameter changes both.
    3. A module of `modules_to_save` is a copy: nothing follows it, and it follows nothing.
    4. Factors belong to one module alone.

    Args:
        site: a site, such as an embedding or a head.
        sites: the adapter's own sites, by kind and part of a sum.
        host: the hooked model.

    Raises:
        UnsupportedAdapterError: the two are tied, and the adapter holds different parameters.
        ModelStateError: whether they are tied, or the base's weight, is not known.
    """
    shared = _shared_parameters(site, host)
    if shared is None or not host.base.ties_head(site):
        return None
    kind = _TIED[site.kind]
    other = sites.get((kind, site.adapter))
    if other is not None and _holds(other, site, shared):
        return None
    path = host.base.head if kind == "unembed" else host.family.embed
    return dataclasses.replace(
        site,
        name=site_name(0, kind, site.adapter),
        path=path,
        layer=outside_layer(kind, host.n_layers),
        kind=kind,
        factors=shared,
    )


def _shared_parameters(site: SiteFactors, host: HookedHost) -> TrainedModule | None:
    """The parameters that a tied module shares with this site, in the tied module's [out, in].

    None if nothing is shared.
    """
    factors = site.factors
    if site.kind not in _TIED:
        return None
    if isinstance(factors, TrainedModule) and factors.tokens is not None and factors.tied:
        return dataclasses.replace(factors.turned(), bias=None)
    stored = _unlike_base(site, _written_to_base(factors), host)
    return None if stored is None else TrainedModule(stored.T, strength=factors.strength)


def _holds(other: SiteFactors, site: SiteFactors, shared: TrainedModule) -> bool:
    """Whether the adapter holds an update of the tied module itself, which must then agree."""
    factors = other.factors
    if isinstance(factors, LoRAFactors) and factors.base_weight is None:
        return False
    if shared.tokens is None and _is_copy(factors):
        return True
    if shared.tokens is None:
        own_weight = _written_to_base(factors)
    else:
        own_weight = _rows_of_tokens(factors, shared.tokens)
    if own_weight is None or not is_same(own_weight, cast(Tensor, shared.weight)):
        raise UnsupportedAdapterError(
            f"{site.label} and {other.label}: the base ties the one to the other, and the adapter "
            "holds different parameters for the two, which PEFT cannot both use. It was trained on "
            "a base whose head is not tied to its embedding: build the hooked model from that."
        )
    return True


def _is_copy(factors: ModuleUpdate) -> bool:
    """Whether it is a whole module of its own, from `modules_to_save`, which is tied to nothing."""
    return isinstance(factors, TrainedModule) and factors.tokens is None and not factors.tied


def _rows_of_tokens(factors: ModuleUpdate, tokens: Int[Tensor, " row"]) -> Tensor | None:
    """The trained rows of these tokens; None if no rows, or those of other tokens, were trained."""
    if not isinstance(factors, TrainedModule) or factors.tokens is None:
        return None
    return factors.weight if torch.equal(factors.tokens, tokens) else None


def _written_to_base(factors: ModuleUpdate) -> Tensor | None:
    """The weight that PEFT writes into the base's own parameter, [out, in]."""
    if isinstance(factors, LoRAFactors) or not factors.tied or factors.tokens is not None:
        return factors.base_weight
    return factors.weight
