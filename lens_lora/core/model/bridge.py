"""The host of a TransformerBridge (transformer-lens 3.x, 4.x): its hook points and weights.

1. Each linear component has its own `hook_in` and `hook_out`. The bridge splits a fused projection
   into components of q, k and v. Unprocessed, `hook_in` is the Hugging Face linear's input x; once
   the norm is folded, it is n.
2. The names of modules are those of `families`. Where a family has no entry, they are read from the
   model (`extensions.family_of_bridge`).
3. Under use_split_qkv_input or use_attn_in, q, k and v get copies of the residual stream, [batch,
   pos, head, d_model]. The bridge normalises them after their last hook point, then multiplies each
   by its head's weight. So the copies are read at that hook point and normalised in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, final

from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora import compat
from lens_lora.compat import unwrapped
from lens_lora.core.model import extensions
from lens_lora.core.model.adapted_modules import SiteFactors
from lens_lora.core.model.bases import stored_weight
from lens_lora.core.model.bridge_cache import cache_is_shown
from lens_lora.core.model.bridge_components import (
    COMPONENTS,
    attentions,
    family_of,
    has_fused_attention,
    usual_name,
)
from lens_lora.core.model.hooked_host import COPIED_INPUTS, HookedHost
from lens_lora.core.model.hooks import base_parameter_error, computes
from lens_lora.core.model.host import Ports
from lens_lora.core.model.modules import HOOK_IN, module_at, normalised
from lens_lora.core.model.sites import MLP_KINDS, NORM_READ_BY, USUAL_KINDS, Heads
from lens_lora.core.model.unembedding import Unembedding
from lens_lora.errors import ModelStateError, setting
from lens_lora.families import BridgedFamily
from lens_lora.spans import Temporary

_R = TypeVar("_R")


# The maps of a gated MLP that a bridge with processed weights computes past their hook_in.
_PROCESSED_GATED = ("gate", "up")
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
        _refuse_unknown_copies(model)
        cfg = model.cfg
        n_kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        heads = Heads(cfg.n_heads, n_kv, cfg.d_head)
        family, homes = family_of(model, heads)
        super().__init__(model, family, heads, hf_model)
        self._homes: Mapping[tuple[int, str], str] = homes
        self._is_listed: bool = not isinstance(family, BridgedFamily)
        self.grows: bool = family.grows
        self.keeps_patterns: bool = not has_fused_attention(model)

    def ports(self, layer: int, kind: str) -> Ports:
        """The component's own hook points, or those that replace them under a flag."""
        name = self._component(layer, kind)
        if self._homes and kind not in USUAL_KINDS:
            return self._ports_by_path(layer, name)
        read = f"{name}.hook_in"
        write = f"{name}.hook_out"
        if kind in ("q", "k", "v"):
            copies = self._copies(layer, kind)
            if copies is not None:
                return Ports(copies, write, through=self._norm_per_head(layer, kind))
        if kind in _PROCESSED_GATED and self._computes_gated_mlp(layer):
            return Ports(f"blocks.{layer}.mlp.hook_in", write)
        if kind == "o" and getattr(self.model.cfg, "use_attn_result", False):
            return Ports(read, f"blocks.{layer}.attn.hook_out")
        return Ports(read, write)

    def _ports_by_path(self, layer: int, name: str) -> Ports:
        """Where a module reads and writes that may see the tokens of all rows as one axis."""
        is_in_block = 0 <= layer < self.n_layers
        like = self.block_input(layer) if is_in_block else None
        module = module_at(self.model, name)
        if isinstance(module, nn.Parameter):
            is_stack = module.ndim == 3
            layout = "slots" if is_stack else "rows"
            return Ports(name, name, like=like, layout=layout)
        read = f"{name}{HOOK_IN}"
        if read in self.model.hook_dict:
            return Ports(read, f"{name}.hook_out", like=like)
        return Ports(name, name, like=like)

    def _component(self, layer: int, kind: str) -> str:
        """The name, in the bridge, of a linear map, an embedding or a norm."""
        return self._homes.get((layer, kind)) or usual_name(layer, kind)

    def norm_ports(self, layer: int, kind: str) -> tuple[Ports, ...]:
        """The component's own hook points."""
        if kind == "ln1" and self._copies(layer, "q") is not None:
            raise ModelStateError(
                f"blocks.{layer}.ln1: the adapter changes this norm, and with use_split_qkv_input "
                "or use_attn_in this TransformerBridge normalises each head's input past its hook "
                "points. Turn the flags off."
            )
        is_of_heads = kind in ("q_norm", "k_norm")
        if is_of_heads and not self.keeps_patterns:
            raise ModelStateError(
                f"blocks.{layer}.attn.{kind}: the adapter changes this norm, and with "
                f"{setting('attn', 'sdpa')} its hook points show another layout. Load the model "
                f"with {setting('attn', 'eager')}."
            )
        name = self._component(layer, kind)
        if not self._is_listed:
            through = functools.partial(normalised, self._wrapped(layer, kind))
            return (Ports(f"{name}{HOOK_IN}", f"{name}.hook_out", through=through),)
        layout = "heads_first" if is_of_heads else "rows"
        return (Ports(f"{name}.hook_normalized", f"{name}.hook_out", layout=layout),)

    def block_input(self, layer: int) -> str:
        """`hook_in` of the block, or of the final norm."""
        return f"blocks.{layer}.hook_in" if layer < self.n_layers else "ln_final.hook_in"

    def _copies(self, layer: int, kind: str) -> str | None:
        """The hook point of the copies of the residual that the heads of q, k or v read."""
        if getattr(self.model.cfg, "use_split_qkv_input", False):
            return f"blocks.{layer}.attn.hook_{kind}_input"
        if getattr(self.model.cfg, "use_attn_in", False):
            return f"blocks.{layer}.attn.hook_attn_in"
        return None

    def _norm_per_head(self, layer: int, kind: str) -> Callable[[Tensor], Tensor]:
        """The norm that the bridge applies to the copies; k and v take those of the first heads."""
        attention = self.model.blocks[layer].attn
        heads = self.heads.of(kind)
        return lambda copies: compat.normed_per_head(attention, copies[:, :, :heads])

    def _computes_gated_mlp(self, layer: int) -> bool:
        """Whether the bridge itself computes this MLP, past the hook_in of gate and up.

        It does so for processed gated MLPs.
        """
        mlp = self.model.blocks[layer].mlp
        return compat.uses_processed_weights(mlp) and hasattr(mlp, "gate")

    def embedding_scale(self, kind: str) -> float:
        """√d for Gemma, whose embedding multiplies by it, as PEFT multiplies the update; else 1.

        A factor that only the hook point shows is multiplied in.
        """
        own = float(getattr(self._wrapped(-1, kind), "embed_scale", 1.0))
        return own * compat.scale_at_hook_out(module_at(self.model, self._component(-1, kind)))

    def weight(self, layer: int, kind: str) -> Float[Tensor, "out in"]:
        """The wrapped module's weight, or the one that a processed gated MLP uses instead.

        Of a quantised module, the dequantised weight, made anew at each call.
        """
        if kind in (*_PROCESSED_GATED, "down"):
            processed = self._processed_weight(layer, kind)
            if processed is not None:
                return processed
        linear = self._wrapped(layer, kind)
        if isinstance(linear, nn.Parameter):
            return self._of_parameter(layer, kind, extensions.as_one_map)
        if extensions.quantised_name(linear) is not None:
            return extensions.dequantised(linear)
        with compat.brought_in(linear):
            weight = stored_weight(linear)
        scale = self.known("factor", kind, make=lambda: self.embedding_scale(kind))
        if scale == 1:
            return weight
        return weight * scale

    def _of_parameter(self, layer: int, kind: str, look: Callable[[nn.Module, Tensor], _R]) -> _R:
        """Call `look` with the module that holds a parameter, and the parameter."""
        name, _, parameter = self._component(layer, kind).rpartition(".")
        owner = module_at(self.model, name)
        with compat.brought_in(owner):
            return look(owner, owner.get_parameter(parameter))

    def shape(self, layer: int, kind: str) -> tuple[int, int]:
        """(out, in) of the weight; for a stack of experts, that of each expert's weight."""
        if isinstance(self._wrapped(layer, kind), nn.Parameter):
            return self._of_parameter(layer, kind, extensions.each_shape)
        return super().shape(layer, kind)

    def stack(self, layer: int, kind: str) -> Tensor | None:
        """The parameter of a stack of experts; None for any other kind."""
        weight = self._wrapped(layer, kind)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 3:
            return None
        return self._of_parameter(layer, kind, lambda _, stack: stack.detach())

    def refuse_reading(self, span: Temporary, site: SiteFactors, parameters: Sequence[str]) -> None:
        """Refuse the reading of a component's parameters, by which tools compute.

        The component itself computes by the module that it wraps, but for a processed gated MLP
        (transformer-lens 4): there the MLP's own passes read them.
        """
        component = module_at(self.model, self._component(site.layer, site.kind))
        if not isinstance(component, nn.Module) or unwrapped(component) is component:
            return
        names: list[str] = []
        for parameter in parameters:
            names += _READ_AS[parameter]
        why = functools.partial(base_parameter_error, site.name)
        if site.kind in MLP_KINDS and self._computes_gated_mlp(site.layer):
            is_computing = computes(span, self.model.blocks[site.layer].mlp)
            compat.refuse_reading(span, component, names, why, unless=is_computing)
        else:
            compat.refuse_reading(span, component, names, why)

    def _wrapped(self, layer: int, kind: str) -> Any:
        """The Hugging Face module of a component, or the parameter; None where it has none."""

        def find() -> Any:
            return unwrapped(module_at(self.model, self._component(layer, kind)))

        return self.known("wrapped", layer, kind, make=find)

    def is_quantised(self, layer: int, kind: str) -> bool:
        """Whether the wrapped module is quantised; dequantised, its weight is near the base's."""
        return extensions.quantised_name(self._wrapped(layer, kind)) is not None

    def _processed_weight(self, layer: int, kind: str) -> Float[Tensor, "out in"] | None:
        """The weight that a processed gated MLP holds itself (transformer-lens 3)."""
        name = COMPONENTS.get(kind, kind)
        weight = compat.processed_weight(self.model.blocks[layer].mlp, name)
        if weight is None or not self._computes_gated_mlp(layer):
            return None
        return weight.detach()

    def bias(self, layer: int, kind: str) -> Float[Tensor, " out"] | None:
        """The wrapped module's bias, of any kind."""
        linear = self._wrapped(layer, kind)
        with compat.brought_in(linear):
            bias = getattr(linear, "bias", None)
            return None if bias is None else compat.in_whole(bias.detach()).flatten()

    def norm_parameters(self, layer: int, kind: str) -> tuple[Tensor, Tensor | None] | None:
        """(γ, β) of the wrapped norm; None also where its class has a γ and it has none."""
        norm = self._wrapped(layer, kind)
        if getattr(norm, "weight", None) is None:
            return None
        with compat.brought_in(norm):
            gamma = compat.in_whole(norm.weight.detach())
            beta = getattr(norm, "bias", None)
        if self.family.gamma_offset:
            has_float64 = compat.float64_device(gamma.device) == gamma.device
            wide = gamma.double() if has_float64 else gamma.float()
            gamma = wide + self.family.gamma_offset
        return gamma, None if beta is None else compat.in_whole(beta.detach())

    def reads_folded_norm(self, layer: int, kind: str) -> bool:
        """True where weights were processed and the norm has weight 1 and bias 0."""
        if not self.needs_base():
            return False
        norm = self._wrapped(layer, NORM_READ_BY.get(kind, "ln_final"))
        if norm is None:
            norm = self._wrapped(layer, "ln1")
        gamma = getattr(norm, "weight", None)
        if gamma is not None and bool((gamma + self.family.gamma_offset != 1).any()):
            return False
        beta = getattr(norm, "bias", None)
        return beta is None or not bool(beta.any())

    def is_tied(self) -> bool | None:
        """Whether the wrapped model's config ties the head to the embedding."""
        return bool(getattr(self.model.original_model.config, "tie_word_embeddings", False))

    def unembedding(self) -> Unembedding | None:
        """W_U and b_U; None also where it is not known what follows them before the logits."""
        if not self._is_listed:
            return None
        return super().unembedding()

    def needs_base(self) -> bool:
        """Whether the bridge's compatibility mode processed the weights."""
        return compat.is_processed(self.model)

    def run_cached(
        self,
        tokens: Int[Tensor, "row new"],
        cache: Any,
        mask: Int[Tensor, "row _all"] | None = None,
    ) -> tuple[Float[Tensor, "row _read vocab"], Any]:
        """Run with Hugging Face's own cache, which attention is given by the name that it knows.

        The bridge numbers the positions of padded rows by the mask.
        """
        padded = {} if mask is None else {"attention_mask": mask}
        with cache_is_shown(attentions(self.model)):
            return self.model(
                tokens,
                return_type="logits_and_cache",
                use_cache=True,
                past_key_values=cache,
                **padded,
            )

    def rows_of_cache(self, cache: Any, rows: Int[Tensor, " chosen"]) -> Any:
        """Choose rows of Hugging Face's own cache, which it does itself."""
        cache.batch_select_indices(rows)
        return cache


def _refuse_unknown_copies(model: Any) -> None:
    """Refuse a flag under which a transformer-lens does something else to the copies."""
    is_known = all(compat.can_norm_per_head(attention) for attention in attentions(model))
    for flag in COPIED_INPUTS:
        if getattr(model.cfg, flag, False) and not is_known:
            raise ModelStateError(
                f"cfg.{flag} is on, and lens_lora does not know how this transformer-lens "
                f"normalises each head's input, so it cannot compute z. Turn the flag off "
                f"(bridge.set_{flag}(False)) before you make the lens, or use transformer-lens 3.9 "
                "or later."
            )
