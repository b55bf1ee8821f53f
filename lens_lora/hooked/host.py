"""A hooked model as this package sees it: where a site reads and writes, and in which basis.

Names, weights and flags differ by class: host_bridge.py, host_hooked_transformer.py.
What is the same for every class is here:

1. Infer from the weights what processing was applied: norms folded, weights centred.
2. Put together the basis of a site (basis.py) and its update, ΔW and Δb.
3. Where processing removed something that is needed, take it from the base; without a base, raise
   an error that names it.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import ModelStateError
from lens_lora.families import Family
from lens_lora.hooked.base_weights import BaseWeights, base_update
from lens_lora.hooked.basis import (
    Basis,
    Processing,
    SiteMap,
    Update,
    infer_processing,
    is_centred,
    site_map,
)
from lens_lora.hooked.ports import Ports
from lens_lora.hooked.site_factors import SiteFactors, fused_rows
from lens_lora.hooked.sites import WRITER_KINDS, Heads
from lens_lora.hooked.value_bias import Constant, constant_of_v

__all__ = ["Host"]


class Host(abc.ABC):
    """A hooked model, as this package sees it.

    Args:
        model: the hooked model.
        family: how its Hugging Face modules are named.
        heads: those of the weights.
        kv_copies: how often a flag of the model repeats each head of k and v before its hook point.

    Attributes:
        class_name: the class's name in errors and saved results.
        pass_overhead: memory of a forward pass beside that of its rows, measured, in sizes of W_U.
        keeps_rows: whether a batch keeps its rows throughout; experts take tokens out of it.
    """

    class_name: ClassVar[str]
    pass_overhead: ClassVar[float]

    def __init__(self, model: Any, family: Family, heads: Heads, kv_copies: int = 1) -> None:
        self.model: Any = model
        self.family: Family = family
        self.heads: Heads = heads
        self.kv_copies: int = kv_copies
        self.n_layers: int = model.cfg.n_layers
        self.keeps_rows: bool = not family.routed

    @property
    @abc.abstractmethod
    def grows(self) -> bool:
        """Whether rows may be added to the batch of a single prompt at a block's input.

        They may if the other inputs of a block (masks, positions) are the same for each row.
        """

    @abc.abstractmethod
    def ports(self, layer: int, kind: str) -> Ports:
        """Where z is read and δ is added."""

    @abc.abstractmethod
    def block_input(self, layer: int) -> str:
        """The first hook point of a block, or of what comes after the last."""

    @abc.abstractmethod
    def embedding_output(self) -> str:
        """The hook point, or module, of the token embedding's output."""

    @abc.abstractmethod
    def embedding_scale(self, kind: str) -> float:
        """κ, the factor that the model's own embedding has and Hugging Face's weight lacks."""

    @abc.abstractmethod
    def weight(self, layer: int, kind: str) -> Float[Tensor, "out in"]:
        """The model's own weight of this kind, heads flattened."""

    @abc.abstractmethod
    def bias(self, layer: int, kind: str) -> Float[Tensor, "out"] | None:
        """The model's own bias of v or o, heads flattened."""

    @abc.abstractmethod
    def base_bias(self, site: SiteFactors) -> Float[Tensor, "out"] | None:
        """The bias that the unprocessed base has at this site, as the model itself holds it.

        Raises:
            ModelStateError: this class does not keep it.
        """

    @abc.abstractmethod
    def unembedding(self) -> tuple[Float[Tensor, "vocab d_model"], Tensor | None] | None:
        """(W_U, bias), or None where something follows them before the logits."""

    @abc.abstractmethod
    def own_affine(self, layer: int, kind: str) -> tuple[Tensor, Tensor | None] | None:
        """(γ, β) between the recorded z and the linear, where the model still holds them."""

    @abc.abstractmethod
    def is_folded(self, layer: int, kind: str) -> bool:
        """Whether the affine of the norm that this kind reads was folded into the weights."""

    @abc.abstractmethod
    def state(self) -> tuple[tuple[str, Any], ...]:
        """What must not change after the lens is made: (name, value) pairs."""

    @abc.abstractmethod
    def needs_base(self) -> bool:
        """Whether the weights were processed, so that the base is needed for what was removed."""

    @abc.abstractmethod
    def may_have_folded_value_bias(self) -> bool:
        """Whether value biases may have been folded into b_O; True if the model does not say."""

    @property
    def is_capped(self) -> bool:
        """Whether logits pass a soft-cap after the unembedding."""
        cap = getattr(self.model.cfg, "output_logits_soft_cap", None)
        return cap is not None and cap > 0

    @property
    def heads_at_hooks(self) -> Heads:
        """The heads as the hook points show them: a flag may repeat those of k and v."""
        return dataclasses.replace(self.heads, n_kv=self.heads.n_kv * self.kv_copies)

    @property
    def working_dtype(self) -> torch.dtype:
        """The dtype of δ: the model's, never below float32."""
        own = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return torch.promote_types(own, torch.float32)

    def map_of(
        self, site: SiteFactors, weight: Float[Tensor, "out in"], base: BaseWeights | None
    ) -> SiteMap:
        """δ of a site in this model's basis. No forward pass.

        Args:
            site: as the adapter holds it.
            weight: the model's own at this site, as `weight` gives it.
            base: the unprocessed base, or None.

        Raises:
            ModelStateError: the base is needed and was not given, or is another model's.
            AdapterError: the adapter holds a base weight that differs from the model's.
        """
        done = self._processing(site, weight, base)
        gamma, beta = self._affine(site, base, done.folded)
        kappa = self.embedding_scale(site.kind)
        update = base_update(site, _base_weight(site, weight, base, done.centred, kappa))
        scale = update.scale * update.strength * kappa
        return site_map(
            Update(update.A, update.B, scale, self._bias_change(site, base)),
            Basis(
                dtype=self.working_dtype,
                device=weight.device,
                gamma=gamma,
                gamma_is_own=not done.folded,
                beta=beta,
                centre_read=done.folded and self.family.norm == "LN",
                centre_write=done.centred,
                n_heads=self.heads.n_heads if site.kind == "o" else 0,
                kv_copies=self.kv_copies if site.kind in ("k", "v") else 1,
                d_head=self.heads.d_head,
            ),
        )

    def _processing(
        self, site: SiteFactors, weight: Tensor, base: BaseWeights | None
    ) -> Processing:
        """What was done to the model's weight; the model itself must agree on folded norms."""
        layer_norm = self.family.norm == "LN"
        may_be_centred = site.kind == "unembed" or (layer_norm and site.kind in WRITER_KINDS)
        norm_path = self.family.norm_path(site.layer, site.kind)
        if base is None:
            if self.needs_base():
                self._require_base(site, norm_path)
            return Processing(folded=False, centred=may_be_centred and is_centred(weight))
        gamma = None if norm_path is None else base.affine(norm_path)[0]
        found = infer_processing(
            site.name,
            weight,
            base.weight(site.module, site.rows) * self.embedding_scale(site.kind),
            gamma,
            centres_reads=layer_norm,
            centres_writes=may_be_centred,
        )
        folded = norm_path is not None and self.is_folded(site.layer, site.kind)
        _check_folding(site, folded, found.folded, gamma)
        return Processing(folded, found.centred)

    def _affine(
        self, site: SiteFactors, base: BaseWeights | None, folded: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(γ, β) with x = γ ⊙ z + β; at o, β is Rep(b̂_V)."""
        norm_path = self.family.norm_path(site.layer, site.kind)
        if folded and base is not None and norm_path is not None:
            gamma, beta = base.affine(norm_path)
        else:
            gamma, beta = self.own_affine(site.layer, site.kind) or (None, None)
        return gamma, self.folded_value_bias(site, base) if site.kind == "o" else beta

    def _bias_change(
        self, site: SiteFactors, base: BaseWeights | None
    ) -> Float[Tensor, "out"] | None:
        """Δb = strength · (s·lora_bias + trained_bias − the base's)."""
        factors, change = site.factors, None
        if factors.lora_bias is not None:
            change = factors.scale * factors.lora_bias.double()
        if factors.trained_bias is not None:
            own = self.base_bias(site) if base is None else base.bias(site.module, site.rows)
            trained = factors.trained_bias.double()
            trained = trained if own is None else trained - own.double().to(trained.device)
            change = trained if change is None else change + trained
        return None if change is None else change * factors.strength

    def folded_value_bias(
        self, site: SiteFactors, base: BaseWeights | None
    ) -> Float[Tensor, "out"] | None:
        """Rep(b̂_V) where b̂_V was folded into b_O: [n_heads · d_head]; None where it was not.

        Args:
            site: a site of v or o.
            base: the unprocessed base, or None.

        Raises:
            ModelStateError: b̂_V was folded, or may have been, and the base was not given.
        """
        own = self.bias(site.layer, "v")
        if own is not None and bool((own != 0).any()):
            return None
        if base is None:
            b_O = self.bias(site.layer, "o")
            if b_O is None or bool((b_O == 0).all()) or not self.may_have_folded_value_bias():
                return None
            if not self.family.value_bias and not self.is_folded(site.layer, "v"):
                return None
            self._require_base(site, None)
        total = self._value_bias(site.layer, base)
        if not bool(total.any()):
            return None
        heads = total.view(self.heads.n_kv, self.heads.d_head)
        return heads.repeat_interleave(self.heads.n_heads // self.heads.n_kv, dim=0).flatten()

    def _value_bias(self, layer: int, base: BaseWeights) -> Float[Tensor, "kv_out"]:
        """b̂_V = b_V + W_V β, with β where the norm was folded; in float64."""
        path, norm_path = self.family.path(layer, "v"), self.family.norm_path(layer, "v")
        place = self.family.place(path)
        out = base.weight(path).shape[0]
        rows = None if place is None else fused_rows(place, "v", self.heads, out)
        bias = base.bias(path, rows)
        folded = self.is_folded(layer, "v")
        beta = base.affine(norm_path)[1] if norm_path and folded else None
        total = torch.zeros(self.heads.n_kv * self.heads.d_head, dtype=torch.float64)
        if bias is not None:
            total += bias.double().cpu()
        if beta is not None:
            total += (base.weight(path, rows).double() @ beta.double()).cpu()
        return total

    def constant_of_v(self, site: SiteFactors, delta: SiteMap) -> Constant | None:
        """The part of an update of v that folds as a bias (value_bias.py); None where none does.

        Args:
            site: a site of v.
            delta: its map, from `map_of`.
        """
        return constant_of_v(
            delta,
            self.heads_at_hooks,
            norm_folded=self.is_folded(site.layer, "v"),
            has_bias=site.factors.lora_bias is not None or site.factors.trained_bias is not None,
        )

    def _require_base(self, site: SiteFactors, norm_path: str | None) -> NoReturn:
        needs = norm_path or "the value biases"
        raise ModelStateError(
            f"{site.name}: this {self.class_name} was processed (its norms are folded into its "
            f"weights), so the base model's own {needs} is needed and not at hand. Pass it: "
            "LoraLens(model, adapter, hf_model=AutoModelForCausalLM.from_pretrained(base)), or "
            "load the hooked model unprocessed (from_pretrained_no_processing)."
        )


def _base_weight(
    site: SiteFactors, own: Tensor, base: BaseWeights | None, centred: bool, kappa: float
) -> Tensor | None:
    """W of the Hugging Face base, [out, in]; the model's own where nothing was done to it."""
    if base is not None:
        return base.weight(site.module, site.rows)
    return None if centred else own / kappa


def _check_folding(site: SiteFactors, expected: bool, found: bool, gamma: Tensor | None) -> None:
    if gamma is None or expected == found or bool((gamma == 1).all()):
        return
    raise ModelStateError(
        f"{site.name}: the model says its norms {'were' if expected else 'were not'} folded, its "
        f"weights say they {'were' if found else 'were not'}. Load the model again from the base."
    )
