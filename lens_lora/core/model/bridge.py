"""The host of a TransformerBridge (transformer-lens 3.x, 4.x).

A bridge puts a component around each module of a Hugging Face model. What its host is asked is
answered in

    bridge_components.py   which component is the map of a layer and kind
    bridge_points.py       where maps and norms read and write
    bridge_gated_mlp.py    what is different in an MLP that the bridge computes by itself
    bridge_cache.py        passes that go on from a key-value cache

and here: its parameters are those of the modules within the components. If compatibility mode
processed the weights, it rewrote them in place.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora import compat
from lens_lora.compat import unwrapped
from lens_lora.core.model import extensions
from lens_lora.core.model.adapted_modules import SiteFactors
from lens_lora.core.model.bases import stored_weight
from lens_lora.core.model.bridge_cache import run_with_cache
from lens_lora.core.model.bridge_components import Components, has_fused_attention
from lens_lora.core.model.bridge_gated_mlp import computes_gated_mlp, held_weight
from lens_lora.core.model.bridge_points import BridgePoints, refuse_unknown_copies
from lens_lora.core.model.hooked_host import COPIED_INPUTS, HookedHost
from lens_lora.core.model.hooks import base_parameter_error, computes
from lens_lora.core.model.host import Ports
from lens_lora.core.model.own_parameters import Fact
from lens_lora.core.model.sites import MLP_KINDS, NORM_READ_BY, Heads
from lens_lora.core.model.unembedding import Unembedding
from lens_lora.spans import Temporary

# Under which names tools read a component's parameters.
_READ_AS = {"weight": ("weight", "W_E", "W_U", "W_pos"), "bias": ("bias", "b_U")}


@final
class BridgeHost(HookedHost):
    """A TransformerBridge.

    Raises:
        ModelStateError: a family that is not supported, a flag whose effect is not known, or
            attention that is another function than Hugging Face's.
    """

    class_name: ClassVar[str] = "TransformerBridge"
    pass_overhead: ClassVar[float] = 0.4
    embedding_output: ClassVar[str] = "embed.hook_out"
    flags: ClassVar[tuple[str, ...]] = (*COPIED_INPUTS, "use_attn_result")

    def __init__(self, model: Any, hf_model: nn.Module | None = None) -> None:
        refuse_unknown_copies(model)
        cfg = model.cfg
        n_kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        heads = Heads(cfg.n_heads, n_kv, cfg.d_head)
        components = Components.of(model, heads)
        super().__init__(model, components.family, heads, hf_model)
        self.grows: bool = components.family.grows
        self.keeps_patterns: bool = not has_fused_attention(model)
        self._components = components
        self._points = BridgePoints(components, heads, self.keeps_patterns)

    # --- Hook points

    def ports(self, layer: int, kind: str) -> Ports:
        """The component's own hook points, or those that replace them under a flag."""
        return self._points.ports(layer, kind)

    def norm_ports(self, layer: int, kind: str) -> tuple[Ports, ...]:
        """The component's own hook points."""
        return self._points.norm_ports(layer, kind)

    def block_input(self, layer: int) -> str:
        """`hook_in` of the block, or of the final norm."""
        return self._points.block_input(layer)

    # --- What it holds

    def _wrapped(self, layer: int, kind: str) -> Any:
        """The Hugging Face module of a component, or the parameter; None where it has none."""
        find = functools.partial(self._components.wrapped, layer, kind)
        return self.known(Fact.WRAPPED, layer, kind, make=find)

    def weight(self, layer: int, kind: str) -> Float[Tensor, "out in"]:
        """The wrapped module's weight, or the one that a processed gated MLP uses instead.

        Of a quantised module, the dequantised weight, made anew at each call. Of a stack of
        experts, the weights of all of them side by side.
        """
        held_by_mlp = held_weight(self.model, layer, kind)
        if held_by_mlp is not None:
            return held_by_mlp
        wrapped = self._wrapped(layer, kind)
        if isinstance(wrapped, nn.Parameter):
            owner, name = self._components.owner_of(layer, kind)
            with compat.brought_in(owner):
                return extensions.as_one_map(owner, owner.get_parameter(name))
        if self.is_quantised(layer, kind):
            return extensions.dequantised(wrapped)
        with compat.brought_in(wrapped):
            weight = stored_weight(wrapped)
        kappa = self.known(Fact.EMBEDDING_SCALE, kind, make=lambda: self.embedding_scale(kind))
        if kappa == 1:
            return weight
        return weight * kappa

    def is_quantised(self, layer: int, kind: str) -> bool:
        """Whether the wrapped module stores its weight quantised."""
        return extensions.quantised_name(self._wrapped(layer, kind)) is not None

    def shape(self, layer: int, kind: str) -> tuple[int, int]:
        """(out, in) of the weight; for a stack of experts, that of each expert's weight."""
        if not isinstance(self._wrapped(layer, kind), nn.Parameter):
            return super().shape(layer, kind)
        owner, name = self._components.owner_of(layer, kind)
        with compat.brought_in(owner):
            return extensions.expert_shape(owner, owner.get_parameter(name))

    def stack(self, layer: int, kind: str) -> Tensor | None:
        """The parameter of a stack of experts; None for any other kind."""
        wrapped = self._wrapped(layer, kind)
        if not isinstance(wrapped, nn.Parameter) or wrapped.ndim != 3:
            return None
        owner, name = self._components.owner_of(layer, kind)
        with compat.brought_in(owner):
            return owner.get_parameter(name).detach()

    def bias(self, layer: int, kind: str) -> Float[Tensor, " out"] | None:
        """The wrapped module's bias, of any kind."""
        linear = self._wrapped(layer, kind)
        with compat.brought_in(linear):
            bias = getattr(linear, "bias", None)
            if bias is None:
                return None
            return compat.in_whole(bias.detach()).flatten()

    def norm_parameters(self, layer: int, kind: str) -> tuple[Tensor, Tensor | None] | None:
        """(γ, β) of the wrapped norm; None also where its class has a γ and it has none."""
        norm = self._wrapped(layer, kind)
        if getattr(norm, "weight", None) is None:
            return None
        with compat.brought_in(norm):
            gamma = compat.in_whole(norm.weight.detach())
            bias = getattr(norm, "bias", None)
        if self.family.gamma_offset:
            has_float64 = compat.float64_device(gamma.device) == gamma.device
            wide = gamma.double() if has_float64 else gamma.float()
            gamma = wide + self.family.gamma_offset
        beta = None if bias is None else compat.in_whole(bias.detach())
        return gamma, beta

    def embedding_scale(self, kind: str) -> float:
        """√d for Gemma, whose embedding multiplies by it, as PEFT multiplies the update; else 1.

        A factor that only the hook point shows is multiplied in.
        """
        of_module = float(getattr(self._wrapped(-1, kind), "embed_scale", 1.0))
        at_hook_point = compat.scale_at_hook_out(self._components.at(-1, kind))
        return of_module * at_hook_point

    def unembedding(self) -> Unembedding | None:
        """W_U and b_U; None also where it is not known what follows them before the logits."""
        if not self._components.is_listed:
            return None
        return super().unembedding()

    # --- How it differs from its base

    def needs_base(self) -> bool:
        """Whether the bridge's compatibility mode processed the weights."""
        return compat.is_processed(self.model)

    def reads_folded_norm(self, layer: int, kind: str) -> bool:
        """True where weights were processed and the norm has weight 1 and bias 0."""
        if not self.needs_base():
            return False
        norm = self._wrapped(layer, NORM_READ_BY.get(kind, "ln_final"))
        if norm is None:  # A parallel block has one norm, which its MLP reads as well.
            norm = self._wrapped(layer, "ln1")
        gamma = getattr(norm, "weight", None)
        if gamma is not None and bool((gamma + self.family.gamma_offset != 1).any()):
            return False
        beta = getattr(norm, "bias", None)
        return beta is None or not bool(beta.any())

    def is_tied(self) -> bool | None:
        """Whether the wrapped model's config ties the head to the embedding."""
        return bool(getattr(self.model.original_model.config, "tie_word_embeddings", False))

    # --- Passes

    def run_cached(
        self,
        tokens: Int[Tensor, "row new"],
        cache: Any,
        mask: Int[Tensor, "row _all"] | None = None,
    ) -> tuple[Float[Tensor, "row _read vocab"], Any]:
        """Run with Hugging Face's own cache."""
        return run_with_cache(self.model, tokens, cache, mask)

    def rows_of_cache(self, cache: Any, rows: Int[Tensor, " chosen"]) -> Any:
        """Choose rows of Hugging Face's own cache, which it does itself."""
        cache.batch_select_indices(rows)
        return cache

    # --- What tools must not read

    def refuse_reading(self, span: Temporary, site: SiteFactors, parameters: Sequence[str]) -> None:
        """Refuse to read a component's parameters, from which tools compute.

        A pass does not read them, as the wrapped module computes. A processed gated MLP of
        transformer-lens 4 does, and may while it computes.
        """
        component = self._components.at(site.layer, site.kind)
        if not isinstance(component, nn.Module) or unwrapped(component) is component:
            return
        names: list[str] = []
        for parameter in parameters:
            names += _READ_AS[parameter]
        why = functools.partial(base_parameter_error, site.name)
        if site.kind in MLP_KINDS and computes_gated_mlp(self.model, site.layer):
            is_computing = computes(span, self.model.blocks[site.layer].mlp)
            compat.refuse_reading(span, component, names, why, unless=is_computing)
        else:
            compat.refuse_reading(span, component, names, why)
