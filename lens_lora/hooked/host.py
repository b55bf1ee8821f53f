"""A hooked model as this package sees it: where a site reads and writes, and in which basis.

Names, weights and flags differ by class: host_bridge.py, host_hooked_transformer.py.
What is the same for every class is here:

1. Infer from the weights what processing was applied: norms folded, weights centred.
2. Put together the basis of a site (basis.py) for its update (updates.py).
3. Where processing removed something that is needed, take it from the base; without a base, raise
   an error that names it.
"""

from __future__ import annotations

import dataclasses
from typing import NoReturn, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import ModelStateError
from lens_lora.float64 import in_float64
from lens_lora.hooked.base_weights import BaseWeights
from lens_lora.hooked.basis import (
    Basis,
    SiteMap,
    Update,
    site_map,
)
from lens_lora.hooked.host_interface import HostInterface
from lens_lora.hooked.norm_map import NormMap, NormUpdate
from lens_lora.hooked.processing import Processing, infer_processing, is_centred
from lens_lora.hooked.site_factors import SiteFactors, fused_rows
from lens_lora.hooked.sites import WRITER_KINDS, Heads
from lens_lora.hooked.value_bias import Constant, constant_of_v

__all__ = ["Host"]


class Host(HostInterface):
    """A hooked model, as this package sees it: `HostInterface`, and sites in the model's basis."""

    def may_be_centred(self, kind: str) -> bool:
        """Whether processing may have centred what a weight of this kind writes.

        Args:
            kind: such as 'o'.
        """
        return kind == "unembed" or (self.family.norm == "LN" and kind in WRITER_KINDS)

    def is_norm_folded(self, layer: int, kind: str) -> bool:
        """Whether a norm's affine was folded into the weights that read it.

        Args:
            layer, kind: of the norm; only those that linear modules read can be folded.
        """
        reader = {"ln1": "q", "ln2": "up", "ln_final": "unembed"}.get(kind)
        return reader is not None and self.is_folded(layer, reader)

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
        self,
        site: SiteFactors,
        update: Update,
        base: BaseWeights | None,
        *,
        behind_norm: bool = False,
    ) -> SiteMap:
        """δ of a site in this model's basis. No forward pass.

        Args:
            site: as the adapter holds it.
            update: of the site, in the Hugging Face basis.
            base: the unprocessed base, or None.
            behind_norm: z is read behind γ and β, at `ports_behind_norm`.

        Raises:
            ModelStateError: the base is needed and was not given, or is another model's.
        """
        weight = self.weight(site.layer, site.kind)
        done = self._processing(site, weight, base)
        gamma, beta = (None, None) if behind_norm else self._affine(site, base, done.folded)
        scale = update.scale * self.embedding_scale(site.kind)
        return site_map(
            dataclasses.replace(update, scale=scale),
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

    def norm_map(self, site: SiteFactors, update: NormUpdate) -> NormMap:
        """δ of a norm that is not folded; that of q and k repeats for every head.

        Args:
            site: of a norm.
            update: Δγ and Δβ.
        """
        gamma, _ = self.norm_affine(site)
        copies = self.heads_at_hooks.of(site.kind) or 1
        vectors = [
            None if v is None else v.to(gamma.device, self.working_dtype).repeat(copies)
            for v in (update.gamma, update.beta)
        ]
        return NormMap(cast(Tensor, vectors[0]), vectors[1])

    def _processing(
        self, site: SiteFactors, weight: Tensor, base: BaseWeights | None
    ) -> Processing:
        """What was done to the model's weight; the model itself must agree on folded norms."""
        may_be_centred = self.may_be_centred(site.kind)
        norm_path = self.family.norm_path(site.layer, site.kind)
        if base is None:
            if self.needs_base():
                self._require_base(site, norm_path)
            return Processing(folded=False, centred=may_be_centred and is_centred(weight))
        gamma = None if norm_path is None else base.affine(norm_path)[0]
        found = infer_processing(
            site.name,
            weight,
            base.weight(site.path, site.rows) * self.embedding_scale(site.kind),
            gamma,
            centres_reads=self.family.norm == "LN",
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
            total += bias.cpu().double()
        if beta is not None:
            total += (in_float64(base.weight(path, rows)) @ in_float64(beta)).cpu()
        return total

    def constant_of_v(
        self, site: SiteFactors, delta: SiteMap, *, has_bias: bool
    ) -> Constant | None:
        """The part of an update of v that folds as a bias (value_bias.py); None where none does.

        Args:
            site: a site of v.
            delta: its map, from `map_of`.
            has_bias: whether the update changes the bias.
        """
        return constant_of_v(
            delta,
            self.heads_at_hooks,
            norm_folded=self.is_folded(site.layer, "v"),
            has_bias=has_bias,
        )

    def _require_base(self, site: SiteFactors, norm_path: str | None) -> NoReturn:
        needs = norm_path or "the value biases"
        raise ModelStateError(
            f"{site.name}: this {self.class_name} was processed (its norms are folded into its "
            f"weights), so the base model's own {needs} is needed and not at hand. Pass it: "
            "LoraLens(model, adapter, hf_model=AutoModelForCausalLM.from_pretrained(base)), or "
            "load the hooked model unprocessed (from_pretrained_no_processing)."
        )


def _check_folding(site: SiteFactors, expected: bool, found: bool, gamma: Tensor | None) -> None:
    if gamma is None or expected == found or bool((gamma == 1).all()):
        return
    raise ModelStateError(
        f"{site.name}: the model says its norms {'were' if expected else 'were not'} folded, its "
        f"weights say they {'were' if found else 'were not'}. Load the model again from the base."
    )
