"""The common part of the hosts of TransformerLens's two classes: the bases of sites, and the base.

What differs between the two (names, weights, norms, flags) is in `bridge` and `hooked_transformer`.
What the rest of the package asks of a host is `Host`, in `host`.

1. Put together the basis of a site (`Basis`) for its update. What processing did to its weight,
   such as folding a norm, is told by `processing_of`.
2. Where processing removed something that is needed, take it from the base, `hf_model`; without
   one, raise an error that names it.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora.compat import float32_products, wraps_nothing
from lens_lora.core.model import extensions
from lens_lora.core.model.adapted_modules import SiteFactors
from lens_lora.core.model.bases import BaseWeights, Processing
from lens_lora.core.model.basis import (
    Basis,
    NormMap,
    NormUpdate,
    SiteMap,
    Update,
    site_map,
)
from lens_lora.core.model.host import Ports
from lens_lora.core.model.lengths import Rotary
from lens_lora.core.model.modules import modules_of
from lens_lora.core.model.own_parameters import OwnParameters
from lens_lora.core.model.sites import Heads
from lens_lora.core.provided import declared
from lens_lora.errors import ModelStateError
from lens_lora.families import HEADS, Family
from lens_lora.spans import Temporary

# Flags under which q, k and v read copies of the residual stream.
COPIED_INPUTS = ("use_split_qkv_input", "use_attn_in")


class HookedHost(OwnParameters):
    """A hooked model: where each site reads and writes, its weights, flags and norms.

    Attributes:
        pass_overhead: the memory of a forward pass beyond that of its rows, measured, in sizes of
            W_U.
        embedding_output: the hook point, or module, of the token embedding's output.
        flags: the fields of the configuration that change what hook points show.
        base: the unprocessed base, where `hf_model` was given.
        grows: whether rows may be added to the batch of a single prompt at a block's input. They
            may if the other inputs of a block (masks, positions) are the same for each row.
        keeps_patterns: whether attention makes its pattern, [head, query, key] in each row.
        keeps_rows: whether a batch keeps its rows throughout; experts take tokens out of it.
    """

    pass_overhead: ClassVar[float]
    embedding_output: ClassVar[str]
    flags: ClassVar[tuple[str, ...]] = ()
    grows: bool = True
    keeps_patterns: bool = True

    def __init__(
        self, model: Any, family: Family, heads: Heads, hf_model: nn.Module | None = None
    ) -> None:
        super().__init__(model, family, heads)
        self.base: BaseWeights | None = None if hf_model is None else BaseWeights(hf_model, family)
        self.keeps_rows: bool = not family.routed

    @property
    def modules(self) -> Mapping[nn.Module, str]:
        """Every module and its name, as `modules_of` lists them; the model is walked once."""
        return self.known("modules", make=lambda: modules_of(self.model))

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm between the residual stream and the head; None where the model has none."""
        norm = getattr(self.model, "ln_final", None)
        return None if norm is None or wraps_nothing(norm) else norm

    @property
    def after_the_stream(self) -> tuple[nn.Module, ...]:
        """The modules that project the residual stream to the width of the head, as in OPT-350m."""
        projection = getattr(self.model, "project_out", None)
        return () if projection is None else (projection,)

    @property
    def head(self) -> str:
        """The path of the base's language-model head."""
        return HEADS[0] if self.base is None else self.base.head

    @property
    def rotary(self) -> Rotary:
        """The rotary embeddings whose table depends on how many positions a pass has."""
        return self.known("rotary", make=lambda: Rotary.of(self.model))

    # --- Hook points

    @abc.abstractmethod
    def ports(self, layer: int, kind: str) -> Ports:
        """Where z is read and δ is added."""

    @abc.abstractmethod
    def norm_ports(self, layer: int, kind: str) -> tuple[Ports, ...]:
        """Where a norm shows n and δ is added; several where the model runs it twice."""

    def ports_behind_norm(self, layer: int, kind: str) -> Ports:
        """Where z is read and δ is added, with z read behind the norm's γ and β."""
        return self.ports(layer, kind)

    @abc.abstractmethod
    def block_input(self, layer: int) -> str:
        """The first hook point of a block, or of what comes after the last."""

    # --- Its state and its passes

    @abc.abstractmethod
    def refuse_reading(self, span: Temporary, site: SiteFactors, parameters: Sequence[str]) -> None:
        """Until the span ends, only passes of the model may read these parameters of a site."""

    def state(self) -> tuple[tuple[str, Any], ...]:
        """The settings that must not change after the lens is made, as (name, value) pairs."""
        flags = [(f"cfg.{flag}", getattr(self.model.cfg, flag, False)) for flag in self.flags]
        products = "torch's precision of float32 products", float32_products()
        return (*flags, ("processed weights", self.needs_base()), products)

    @abc.abstractmethod
    def run_cached(
        self,
        tokens: Int[Tensor, "row new"],
        cache: Any,
        mask: Int[Tensor, "row _all"] | None = None,
    ) -> tuple[Float[Tensor, "row _read vocab"], Any]:
        """(logits, cache) of the tokens that follow those in the cache; None to begin one.

        The hooks on the model see the new tokens only.
        """

    @abc.abstractmethod
    def rows_of_cache(self, cache: Any, rows: Int[Tensor, " chosen"]) -> Any:
        """A cache of these rows, which may repeat. The old cache is used up."""

    # --- The base's parameters, of `hf_model`, or of the model itself where it has them

    def base_weight(self, site: SiteFactors, update: str) -> Float[Tensor, "out in"]:
        """W at a site, on which an update depends that is no plain product of factors.

        Args:
            site: the site.
            update: what depends on the weight, for the error.

        Raises:
            ModelStateError: the model's own is quantised, or was processed and no base was given.
        """
        if self.base is not None:
            return self.base.weight(site.path, site.rows)
        weight = self.weight(site.layer, site.kind)
        is_processed = self.needs_base()
        if is_processed or self.is_centred(site.kind, weight):
            change = "processed" if is_processed else "centred"
            raise self.needs(
                site,
                f"{update} depends on the base model's own weight, and this model's was {change}",
            )
        return weight / self.embedding_scale(site.kind)

    def base_bias(self, site: SiteFactors) -> Float[Tensor, " out"] | None:
        """The base's bias b at a site; None where it has none.

        Raises:
            ModelStateError: no base was given, and the model may not have kept it.
        """
        if self.base is not None:
            return self.base.bias(site.path, site.rows)
        if self.may_have_folded_biases():
            raise self.needs(
                site,
                "the adapter holds a trained bias, and this "
                f"{self.class_name} does not keep the base model's own, which it replaces",
            )
        return self.bias(site.layer, site.kind)

    def base_affine(self, site: SiteFactors) -> tuple[Tensor, Tensor | None]:
        """(γ, β) of a norm that is a site.

        Raises:
            SiteError: the model has no such norm.
        """
        if self.base is None:
            return self.norm_affine(site)
        return self.base.affine(site.path)

    def ties_head(self, site: SiteFactors) -> bool:
        """Whether the base's head is tied to its embedding.

        Raises:
            ModelStateError: it cannot be told from the hooked model alone.
        """
        tied = self.is_tied() if self.base is None else self.base.is_tied
        if tied is None:
            raise self.needs(
                site,
                "if the base's head is tied to its embedding, PEFT changes both, and a "
                f"{self.class_name} does not say whether it is",
            )
        return tied

    def needs(self, site: SiteFactors, why: str, otherwise: str = "") -> ModelStateError:
        """The error where something of the base is needed and no base was given."""
        return ModelStateError(
            f"{site.label}: {why}. Pass the base: LoraLens(model, adapter, "
            f"hf_model=AutoModelForCausalLM.from_pretrained(base)){otherwise}."
        )

    # --- What processing did to the model

    def folded_value_bias(self, site: SiteFactors) -> Float[Tensor, " out"] | None:
        """Rep(b̂_V) where b̂_V was folded into b_O: [n_heads · d_head]; None where it was not.

        Raises:
            ModelStateError: b̂_V was folded, or may have been, and the base was not given.
        """
        return folded_value_bias(self, site)

    def required_base(self, site: SiteFactors, parameter: str) -> BaseWeights:
        """The unprocessed base, for a parameter of it that processing removed.

        Raises:
            ModelStateError: no base was given.
        """
        if self.base is not None:
            return self.base
        raise self.needs(
            site,
            f"this {self.class_name} was processed (its norms are folded into its weights), so the "
            f"base model's own {parameter} must be at hand",
            ", or load the hooked model unprocessed (from_pretrained_no_processing)",
        )

    # --- δ in this model's basis

    def map_of(self, site: SiteFactors, update: Update, *, behind_norm: bool = False) -> SiteMap:
        """The map z → δ(z) of a site in this model's basis. No forward pass.

        Args:
            site: the site.
            update: its update in the Hugging Face basis.
            behind_norm: whether z is read behind γ and β, at `ports_behind_norm`.

        Raises:
            ModelStateError: the base is needed and was not given, or is another model's.
        """
        if self.experts(site.layer, site.kind):
            stack = cast(Tensor, self.stack(site.layer, site.kind))
            return extensions.expert_map(update, self.working_dtype, stack.device)
        basis = self.basis_of(site, behind_norm)
        factor = self.known("factor", site.kind, make=lambda: self.embedding_scale(site.kind))
        scaled = dataclasses.replace(update, scale=update.scale * factor)
        return site_map(scaled, basis)

    def basis_of(self, site: SiteFactors, behind_norm: bool = False) -> Basis:
        """How z and the output of a site's map differ from the Hugging Face linear's."""
        make = functools.partial(self._basis, site, behind_norm)
        return self.known("basis", site.layer, site.kind, behind_norm, make=make)

    def _basis(self, site: SiteFactors, behind_norm: bool) -> Basis:
        weight = self.weight(site.layer, site.kind)
        processing = processing_of(self, site, weight)
        gamma = None
        beta = None
        if not behind_norm:
            gamma, beta = self._affine(site, processing.folded)
        input_heads = self.heads.n_heads if site.kind == "o" else 0
        kv_copies = self.kv_copies if site.kind in ("k", "v") else 1
        return Basis(
            dtype=self.working_dtype,
            device=weight.device,
            gamma=gamma,
            gamma_is_own=not processing.folded,
            beta=beta,
            centre_read=processing.folded and self.family.norm == "LN",
            centre_write=processing.centred,
            n_heads=input_heads,
            kv_copies=kv_copies,
            d_head=self.heads.d_head,
        )

    def _affine(self, site: SiteFactors, folded: bool) -> tuple[Tensor | None, Tensor | None]:
        """(γ, β) with x = γ ⊙ z + β; None for 1 and for 0. At o, β is Rep(b̂_V)."""
        norm_path = self.family.norm_path(site.layer, site.kind)
        if folded and self.base is not None and norm_path is not None:
            return self.base.affine(norm_path)
        gamma, beta = self.own_affine(site.layer, site.kind) or (None, None)
        if site.kind == "o":
            beta = self.folded_value_bias(site)
        return gamma, beta

    def norm_map(self, site: SiteFactors, update: NormUpdate) -> NormMap:
        """The map of a norm that is not folded; a norm of q and k repeats for every head."""
        device = self.norm_affine(site)[0].device
        heads = self.heads_at_hooks.of(site.kind)

        def of_every_head(vector: Tensor) -> Tensor:
            return vector.to(device, self.working_dtype).repeat(max(heads, 1))

        beta = None if update.beta is None else of_every_head(update.beta)
        return NormMap(of_every_head(update.gamma), beta)


# --- What `hosts/processed.py` provides


@declared
def processing_of(
    host: HookedHost, site: SiteFactors, weight: Float[Tensor, "out in"]
) -> Processing:
    """How the model's weight at a site was processed: a norm folded in, what it writes centred.

    Raises:
        ModelStateError: the model was processed, and its base is not given or is another one.
    """
    raise NotImplementedError


@declared
def folded_value_bias(host: HookedHost, site: SiteFactors) -> Float[Tensor, " out"] | None:
    """Rep(b̂_V) where value biases were folded into b_O; None where they were not.

    Raises:
        ModelStateError: they may have been folded, and the base was not given.
    """
    raise NotImplementedError
