"""The plan: an adapter laid over one hooked model. Sites, their ports, their δ.

1. Resolve each adapted module to sites, check shapes against the model's own weights.
2. Infer from the weights what processing was applied (folded norms, centring, value biases).
3. Build each site's δ in the model's basis, or refuse and name what is missing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.factors import LoRAFactors, dense_factors
from lens_lora.errors import AdapterError, ModelStateError
from lens_lora.hooked.basis import BaseWeights, SiteMap, infer_processing, site_map
from lens_lora.hooked.host import HookedView, Ports, model_dtype, refuse_dropout, view_of
from lens_lora.hooked.sites import (
    WRITER_KINDS,
    Heads,
    Site,
    SiteFactors,
    check_shapes,
    fused_rows,
    resolve_sites,
)
from lens_lora.hooked.value_bias import (
    Constant,
    constant_of_v,
    through_o,
    through_update_of_o,
    without_constant,
)

__all__ = ["Injection", "Plan", "make_plan"]


@dataclasses.dataclass(frozen=True)
class Injection:
    """What one site adds at one place: gate_site · gate_partner · δ.

    With a partner, both sites hold the same δ, each in its own rank space and each adding half of
    it, so that each can split what is its own.
    """

    site: int
    ports: Ports
    map: SiteMap
    partner: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that the hooks need. Each site has an injection of its own; v may have more."""

    view: HookedView
    sites: tuple[Site, ...]
    maps: tuple[SiteMap, ...]
    injections: tuple[Injection, ...]
    state: tuple[tuple[str, Any], ...]

    def check_state(self) -> None:
        """Refuse a model whose flags, weights or mode changed since the plan was made.

        Raises:
            ModelStateError: naming what changed.
        """
        for (name, then), (_, now) in zip(self.state, self.view.state(), strict=True):
            if then != now:
                raise ModelStateError(
                    f"{name} was {then} when the lens was made and is {now}; make a new LoraLens, "
                    "or set it back."
                )
        refuse_dropout(self.view.model)


def make_plan(model: Any, adapter: Adapter, hf_model: nn.Module | None) -> Plan:
    """Lay the adapter over the model. No forward pass; reads weights only.

    Raises:
        SiteError, AdapterError: the adapter does not fit the model.
        ModelStateError: the model's state needs `hf_model`, or rules exactness out.
    """
    view = view_of(model)
    base = None if hf_model is None else BaseWeights(hf_model, view.family)
    factors = resolve_sites(adapter, view.family, view.heads, view.n_layers)
    sites, ports, maps = [], [], []
    for site in factors:
        weight = view.weight(site.layer, site.kind)
        check_shapes(site, weight, adapter.base_model)
        port, delta = view.ports(site.layer, site.kind), _map(view, base, site, weight)
        ports.append(port)
        maps.append(delta)
        sites.append(
            Site(
                site.name,
                site.module,
                site.layer,
                site.kind,
                port.read or port.write,
                port.write,
                delta.A.shape[0],
                site.adapter,
            )
        )
    maps, injections = _inject(view, base, factors, ports, maps)
    return Plan(view, tuple(sites), maps, injections, view.state())


def _inject(
    view: HookedView,
    base: BaseWeights | None,
    factors: tuple[SiteFactors, ...],
    ports: list[Ports],
    maps: list[SiteMap],
) -> tuple[tuple[SiteMap, ...], tuple[Injection, ...]]:
    """Each site at its own ports, and v's constant part at o where value biases are folded."""
    extra: list[Injection] = []
    heads = heads_at_hooks(view)
    for v, site in enumerate(factors):
        constant = _constant(view, site, maps[v]) if site.kind == "v" else None
        if constant is None or _folded_value_bias(view, base, site) is None:
            continue
        maps[v] = without_constant(maps[v], constant)
        at_o = Ports(None, view.ports(site.layer, "o").write)
        W_O = view.weight(site.layer, "o")
        extra.append(Injection(v, at_o, through_o(constant, W_O, heads)))
        for o, other in enumerate(factors):
            if other.kind == "o" and other.layer == site.layer:
                of_v, of_o = through_update_of_o(constant, maps[o], heads)
                extra += [Injection(v, at_o, of_v, o), Injection(o, at_o, of_o, v)]
    own = [Injection(i, port, maps[i]) for i, port in enumerate(ports)]
    return tuple(maps), (*own, *extra)


def heads_at_hooks(view: HookedView) -> Heads:
    """The heads as the hook points show them: a flag may repeat those of k and v."""
    return dataclasses.replace(view.heads, n_kv=view.heads.n_kv * view.kv_copies)


def _constant(view: HookedView, site: SiteFactors, delta: SiteMap) -> Constant | None:
    has_bias = site.factors.lora_bias is not None or site.factors.trained_bias is not None
    folded = view.is_folded(site.layer, "v")
    return constant_of_v(delta, heads_at_hooks(view), norm_folded=folded, has_bias=has_bias)


def _map(view: HookedView, base: BaseWeights | None, site: SiteFactors, weight: Tensor) -> SiteMap:
    layer_norm = view.family.norm == "LN"
    centres_writes = site.kind == "unembed" or (layer_norm and site.kind in WRITER_KINDS)
    norm_path = view.family.norm_path(site.layer, site.kind)
    if base is None:
        if view.needs_base():
            _require_base(view, site, norm_path)
        folded = False
        centred = centres_writes and is_centred(weight)
    else:
        gamma = None if norm_path is None else base.affine(norm_path)[0]
        done = infer_processing(
            site.name,
            weight,
            base.weight(site.module, site.rows) * view.embedding_scale(site.kind),
            gamma,
            centres_reads=layer_norm,
            centres_writes=centres_writes,
        )
        folded = norm_path is not None and view.is_folded(site.layer, site.kind)
        centred = done.centred
        _check_folding(site, folded, done.folded, gamma)
    if folded and base is not None and norm_path is not None:
        gamma, beta = base.affine(norm_path)
    else:
        gamma, beta = view.own_affine(site.layer, site.kind) or (None, None)
    if site.kind == "o":
        beta = _folded_value_bias(view, base, site)
    scale = view.embedding_scale(site.kind)
    update = base_update(site, _base_weight(view, base, site, weight / scale, centred))
    return site_map(
        update.A,
        update.B,
        update.scale * update.strength * scale,
        bias=_bias_change(view, base, site),
        gamma=gamma,
        gamma_is_own=not folded,
        beta=beta,
        centre_read=folded and layer_norm,
        centre_write=centred,
        n_heads=view.heads.n_heads if site.kind == "o" else 0,
        kv_copies=view.kv_copies if site.kind in ("k", "v") else 1,
        d_head=view.heads.d_head,
        dtype=_working_dtype(view.model),
        device=weight.device,
    )


def base_update(site: SiteFactors, weight: Tensor | None) -> LoRAFactors:
    """The site's ΔW as plain factors; DoRA's dense one with an identity on its smaller side.

    Raises:
        ModelStateError: ΔW depends on the base model's weight, which is not at hand.
        AdapterError: the adapter holds a base weight that is not the model's.
    """
    factors = site.factors
    if factors.base_weight is not None and weight is not None:
        _check_base_weight(site, factors.base_weight, weight)
    if not factors.needs_base_weight:
        return dataclasses.replace(factors, base_weight=None)
    if weight is None:
        raise ModelStateError(
            f"{site.name}: DoRA's ΔW depends on the base model's own weight, and this model's were "
            f"centred; pass it: LoraLens(model, adapter, hf_model=…)."
        )
    dense = factors.materialise(weight.double())
    return dense_factors(dense)


def _check_base_weight(site: SiteFactors, held: Tensor, weight: Tensor) -> None:
    """Entry by entry, to one rounding of the coarser dtype."""
    held = held if held.shape == weight.shape else held.T
    coarser = max(held.dtype, weight.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    limits = torch.finfo(coarser)
    if held.shape != weight.shape or not torch.allclose(
        held.to(weight.device, coarser).double(),
        weight.to(coarser).double(),
        rtol=limits.eps,
        atol=limits.smallest_normal * limits.eps,
    ):
        raise AdapterError(
            f"{site.name} ({site.module}): the adapter's file holds a base weight that is not the "
            "model's: the embedding was resized or trained. Resize the base model in the same way "
            "and build the hooked model from it."
        )


def _base_weight(
    view: HookedView, base: BaseWeights | None, site: SiteFactors, own: Tensor, centred: bool
) -> Tensor | None:
    """W of the Hugging Face base, [out, in]; the model's own where nothing was done to it."""
    if base is not None:
        return base.weight(site.module, site.rows)
    return None if centred else own


def _bias_change(
    view: HookedView, base: BaseWeights | None, site: SiteFactors
) -> Float[Tensor, "out"] | None:
    """Δb = strength · (s·lora_bias + trained_bias − the base's)."""
    factors, change = site.factors, None
    if factors.lora_bias is not None:
        change = factors.scale * factors.lora_bias.double()
    if factors.trained_bias is not None:
        if base is not None:
            own = base.bias(site.module, site.rows)
        elif view.class_name == "TransformerBridge":
            own = view.bias(site.layer, site.kind)
        else:
            raise ModelStateError(
                f"{site.name}: the adapter holds a trained bias, so the base model's own is "
                "needed; pass it: LoraLens(model, adapter, hf_model=…)."
            )
        trained = factors.trained_bias.double()
        trained = trained if own is None else trained - own.double().to(trained.device)
        change = trained if change is None else change + trained
    return None if change is None else change * factors.strength


def _check_folding(site: SiteFactors, expected: bool, found: bool, gamma: Tensor | None) -> None:
    if gamma is None or expected == found or bool((gamma == 1).all()):
        return
    raise ModelStateError(
        f"{site.name}: the model says its norms {'were' if expected else 'were not'} folded, its "
        f"weights say they {'were' if found else 'were not'}. Load the model again from the base."
    )


def _require_base(view: HookedView, site: SiteFactors, norm_path: str | None) -> NoReturn:
    needs = norm_path or "the value biases"
    raise ModelStateError(
        f"{site.name}: this {view.class_name} was processed (its norms are folded into its "
        f"weights), so the base model's own {needs} is needed and not at hand. Pass it: "
        "LoraLens(model, adapter, hf_model=AutoModelForCausalLM.from_pretrained(base)), or load "
        "the hooked model unprocessed (from_pretrained_no_processing)."
    )


def is_centred(weight: Tensor) -> bool:
    """Whether every column of a writing weight, [out, in], sums to nothing over the residual."""
    eps = torch.finfo(weight.dtype).eps
    weight = weight.double()
    return bool((weight.mean(0).abs().max() <= 8 * eps * weight.abs().max()).item())


def _folded_value_bias(
    view: HookedView, base: BaseWeights | None, site: SiteFactors
) -> Tensor | None:
    """Rep(b̂_V) where b̂_V was folded into b_O: [n_heads · d_head], or None where it was not."""
    own = view.bias(site.layer, "v")
    if own is not None and bool((own != 0).any()):
        return None
    if base is None:
        b_O = view.bias(site.layer, "o")
        if b_O is None or bool((b_O == 0).all()) or not _may_have_processed(view):
            return None
        if not view.family.value_bias and not view.is_folded(site.layer, "v"):
            return None
        _require_base(view, site, None)
    path = view.family.path(site.layer, "v")
    rows = _value_rows(view, base, path)
    bias = base.bias(path, rows)
    norm_path = view.family.norm_path(site.layer, "v")
    folded = view.is_folded(site.layer, "v")
    beta = base.affine(norm_path)[1] if norm_path and folded else None
    total = torch.zeros(view.heads.n_kv * view.heads.d_head, dtype=torch.float64)
    if bias is not None:
        total += bias.double().cpu()
    if beta is not None:
        total += (base.weight(path, rows).double() @ beta.double()).cpu()
    if not bool(total.any()):
        return None
    heads = total.view(view.heads.n_kv, view.heads.d_head)
    return heads.repeat_interleave(view.heads.n_heads // view.heads.n_kv, dim=0).flatten()


def _may_have_processed(view: HookedView) -> bool:
    return view.class_name == "HookedTransformer" or view.needs_base()


def _value_rows(view: HookedView, base: BaseWeights, path: str) -> Tensor | None:
    place = view.family.place(path)
    out = base.weight(path).shape[0]
    return None if place is None else fused_rows(place, "v", view.heads, out)


def _working_dtype(model: nn.Module) -> torch.dtype:
    """δ is computed in the model's dtype or better: never below float32."""
    return torch.promote_types(model_dtype(model), torch.float32)
