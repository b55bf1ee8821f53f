"""TransformerBridge (transformer-lens 3.x, 4.x): hook names and weights.

Each linear component has its own `hook_in` and `hook_out`; fused projections are split by the
bridge into q, k, v components of their own. Unprocessed, `hook_in` is the Hugging Face linear's
input x; once the norm is folded it is n.

Under use_split_qkv_input or use_attn_in, q, k and v get copies of the residual, [batch, pos, head,
d_model]. The bridge normalises them after their last hook point, then multiplies each by its head's
weight. So the copies are read at that hook point and normalised in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora.errors import ModelStateError
from lens_lora.families import find_family
from lens_lora.float64 import float64_device
from lens_lora.hooked.attaching import add_pre_hook
from lens_lora.hooked.fused_attention import has_fused_attention
from lens_lora.hooked.host import Host
from lens_lora.hooked.ports import Ports
from lens_lora.hooked.quantised import dequantised, quantised_name
from lens_lora.hooked.score_caps import refuse_unused_caps
from lens_lora.hooked.site_factors import SiteFactors, no_such_norm
from lens_lora.hooked.sites import ATTENTION_KINDS, Heads
from lens_lora.offloaded import brought_in
from lens_lora.temporary import Temporary, without_warnings

__all__ = ["BridgeHost"]

_COPIED_INPUTS = ("use_split_qkv_input", "use_attn_in")
_FLAGS = (*_COPIED_INPUTS, "use_attn_result")
# Bloom's position biases are made for each row; OPT flattens positions and counts them back.
_FIXED_BATCH = ("BloomForCausalLM", "OPTForCausalLM")
_PROCESSED_GATED = ("gate", "up")
_COMPONENTS = {"gate": "gate", "up": "in", "fc_in": "in", "down": "out", "fc_out": "out"}


@final
class BridgeHost(Host):
    """A TransformerBridge.

    Args:
        model: the bridge.

    Raises:
        ModelStateError: a family that is not supported, a flag whose effect is not known, or
            attention that is another function than Hugging Face's.
    """

    class_name: ClassVar[str] = "TransformerBridge"
    pass_overhead: ClassVar[float] = 0.4

    def __init__(self, model: Any) -> None:
        _refuse_unknown_copies(model)
        refuse_unused_caps(model)
        cfg = model.cfg
        n_kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        family = find_family(type(model.original_model).__name__)
        super().__init__(model, family, Heads(cfg.n_heads, n_kv, cfg.d_head))

    @property
    def grows(self) -> bool:
        """False for families that make position data for each row (Bloom, OPT)."""
        return type(self.model.original_model).__name__ not in _FIXED_BATCH

    @property
    def keeps_patterns(self) -> bool:
        """False where attention is Hugging Face's own, by a fused kernel."""
        return not has_fused_attention(self.model)

    def _component(self, layer: int, kind: str) -> tuple[str, Any]:
        if kind in ("embed", "pos_embed", "unembed"):
            return kind, getattr(self.model, kind)
        part = "attn" if kind in ATTENTION_KINDS else "mlp"
        name = _COMPONENTS.get(kind, kind)
        component = getattr(getattr(self.model.blocks[layer], part), name)
        return f"blocks.{layer}.{part}.{name}", component

    def ports(self, layer: int, kind: str) -> Ports:
        """The component's own hook points, or those that replace them under a flag."""
        name, _ = self._component(layer, kind)
        copies = self._copies(layer, kind) if kind in ("q", "k", "v") else None
        if copies is not None:
            return Ports(copies, f"{name}.hook_out", through=self._norm_per_head(layer, kind))
        if kind in _PROCESSED_GATED and self._computes_gated_mlp(layer):
            return Ports(f"blocks.{layer}.mlp.hook_in", f"{name}.hook_out")
        if kind == "o" and getattr(self.model.cfg, "use_attn_result", False):
            return Ports(f"{name}.hook_in", f"blocks.{layer}.attn.hook_out")
        return Ports(f"{name}.hook_in", f"{name}.hook_out")

    def _copies(self, layer: int, kind: str) -> str | None:
        """The hook point of the copies of the residual that the heads of q, k or v read."""
        if getattr(self.model.cfg, "use_split_qkv_input", False):
            return f"blocks.{layer}.attn.hook_{kind}_input"
        if getattr(self.model.cfg, "use_attn_in", False):
            return f"blocks.{layer}.attn.hook_attn_in"
        return None

    def _norm_per_head(self, layer: int, kind: str) -> Callable[[Tensor], Tensor]:
        """What the bridge does to the copies before the weight; k and v take the first heads'."""
        attn, heads = self.model.blocks[layer].attn, self.heads.of(kind)

        def normalised(copies: Tensor) -> Tensor:
            own = copies[:, :, :heads]
            is_before_norm = attn._captured_pre_ln_residual is not None
            return attn._apply_ln1_per_head(own) if is_before_norm else own

        return normalised

    def _computes_gated_mlp(self, layer: int) -> bool:
        """Processed gated MLPs are computed by the bridge itself, past gate's and up's hook_in."""
        mlp = self.model.blocks[layer].mlp
        return bool(getattr(mlp, "_use_processed_weights", False)) and hasattr(mlp, "gate")

    def block_input(self, layer: int) -> str:
        """`hook_in` of the block, or of the final norm."""
        return f"blocks.{layer}.hook_in" if layer < self.n_layers else "ln_final.hook_in"

    def embedding_output(self) -> str:
        """The hook point after the token embedding."""
        return "embed.hook_out"

    def embedding_scale(self, kind: str) -> float:
        """√d for Gemma, whose embedding multiplies by it; PEFT multiplies the update by it too."""
        if kind != "embed":
            return 1.0
        return float(getattr(self.model.embed.original_component, "embed_scale", 1.0))

    def weight(self, layer: int, kind: str) -> Float[Tensor, "out in"]:
        """The wrapped module's weight, or the one that a processed gated MLP uses instead.

        Of a quantised module, the dequantised weight, made anew at each call.
        """
        if kind in _PROCESSED_GATED or kind == "down":
            held = self._held(layer, kind)
            if held is not None:
                return held
        _, component = self._component(layer, kind)
        linear = component.original_component
        if quantised_name(linear) is not None:
            return dequantised(linear)
        with brought_in(linear):
            weight = linear.weight.detach()
        is_transposed = type(linear).__name__ == "Conv1D" or isinstance(linear, nn.Embedding)
        weight = weight.T if is_transposed else weight
        return weight * self.embedding_scale(kind) if kind == "embed" else weight

    def is_quantised(self, layer: int, kind: str) -> bool:
        """Whether the wrapped module is one of bitsandbytes."""
        return quantised_name(self._component(layer, kind)[1].original_component) is not None

    def _held(self, layer: int, kind: str) -> Float[Tensor, "out in"] | None:
        """The weight that a processed gated MLP holds itself (transformer-lens 3)."""
        held = getattr(self.model.blocks[layer].mlp, f"_processed_W_{_COMPONENTS.get(kind)}", None)
        if held is not None and self._computes_gated_mlp(layer):
            return held.detach()
        return None

    def bias(self, layer: int, kind: str) -> Float[Tensor, "out"] | None:
        """The wrapped module's bias, of any kind."""
        _, component = self._component(layer, kind)
        with brought_in(component.original_component):
            bias = getattr(component.original_component, "bias", None)
            return None if bias is None else bias.detach().flatten()

    def norm_affine(self, site: SiteFactors) -> tuple[Tensor, Tensor | None]:
        """The wrapped norm's own.

        Raises:
            SiteError: the model has no such norm.
        """
        norm: Any = getattr(self._norm(site.layer, site.kind)[1], "original_component", None)
        if not hasattr(norm, "weight"):
            raise no_such_norm(site)
        with brought_in(norm):
            bias, gamma = getattr(norm, "bias", None), norm.weight.detach()
        offset = self.family.gamma_offset
        if offset:
            has_float64 = float64_device(gamma.device) == gamma.device
            gamma = (gamma.double() if has_float64 else gamma.float()) + offset
        return gamma, None if bias is None else bias.detach()

    def _norm(self, layer: int, kind: str) -> tuple[str, Any]:
        if kind in ("ln_final", "embed_ln"):
            return kind, getattr(self.model, kind, None)
        block = self.model.blocks[layer]
        if kind in ("q_norm", "k_norm"):
            return f"blocks.{layer}.attn.{kind}", getattr(block.attn, kind, None)
        return f"blocks.{layer}.{kind}", getattr(block, kind, None)

    def norm_ports(self, layer: int, kind: str) -> tuple[Ports, ...]:
        """The component's own hook points.

        Raises:
            ModelStateError: a flag under which the bridge normalises past them.
        """
        if kind == "ln1" and self._copies(layer, "q") is not None:
            raise ModelStateError(
                f"blocks.{layer}.ln1: the adapter changes this norm, and with use_split_qkv_input "
                "or use_attn_in this TransformerBridge normalises each head's input past its hook "
                "points. Turn the flags off."
            )
        if kind in ("q_norm", "k_norm") and not self.keeps_patterns:
            raise ModelStateError(
                f"blocks.{layer}.attn.{kind}: the adapter changes this norm, and with attn='sdpa' "
                "its hook points show another layout. Load the model with attn='eager'."
            )
        name, _ = self._norm(layer, kind)
        layout = "heads_first" if kind in ("q_norm", "k_norm") else "rows"
        return (Ports(f"{name}.hook_normalized", f"{name}.hook_out", layout=layout),)

    def ports_behind_norm(self, layer: int, kind: str) -> Ports:
        """The usual ones: `hook_in` shows what the linear itself reads."""
        return self.ports(layer, kind)

    def is_tied(self) -> bool | None:
        """As the wrapped model's config says."""
        return bool(getattr(self.model.original_model.config, "tie_word_embeddings", False))

    def base_bias(self, site: SiteFactors) -> Float[Tensor, "out"] | None:
        """An unprocessed bridge wraps the base itself, so its bias is the base's."""
        return self.bias(site.layer, site.kind)

    def run_cached(
        self, tokens: Int[Tensor, "row new"], cache: Any
    ) -> tuple[Float[Tensor, "row _read vocab"], Any]:
        """Hugging Face's own cache, which the bridge's attention is shown by the name it knows."""
        with Temporary(self._show_cache):
            return self.model(
                tokens, return_type="logits_and_cache", use_cache=True, past_key_values=cache
            )

    def _show_cache(self, span: Temporary) -> None:
        without_warnings(span, ".past_key_values. is deprecated")
        for block in self.model.blocks:
            add_pre_hook(block.attn, _named_as_before, span, with_kwargs=True)

    def unembedding(self) -> tuple[Float[Tensor, "vocab d_model"], Tensor | None] | None:
        """(W_U, bias); None where a soft-cap follows."""
        if self.is_capped:
            return None
        last = self.n_layers
        return self.weight(last, "unembed"), self.bias(last, "unembed")

    def own_affine(self, layer: int, kind: str) -> tuple[Tensor, Tensor | None] | None:
        """None: `hook_in` shows what the linear itself reads."""
        del layer, kind
        return None

    def is_folded(self, layer: int, kind: str) -> bool:
        """True where weights were processed and the norm has weight 1 and bias 0."""
        if kind == "unembed":
            norm = self.model.ln_final.original_component
        else:
            block = self.model.blocks[layer]
            own = "ln1" if kind in ATTENTION_KINDS else "ln2"
            norm = getattr(block, own, block.ln1).original_component
        if not self.needs_base():
            return False
        bias = getattr(norm, "bias", None)
        gamma = norm.weight + self.family.gamma_offset
        return bool((gamma == 1).all()) and (bias is None or not bool(bias.any()))

    def state(self) -> tuple[tuple[str, Any], ...]:
        """The flags that move hook points, and whether weights were processed."""
        flags = tuple((f"cfg.{flag}", getattr(self.model.cfg, flag, False)) for flag in _FLAGS)
        return (*flags, ("processed weights", self.needs_base()))

    def needs_base(self) -> bool:
        """Whether the bridge's compatibility mode processed the weights."""
        return bool(getattr(self.model, "_weights_processed", False))

    def may_have_folded_value_bias(self) -> bool:
        """Only if the bridge says that weights were processed."""
        return self.needs_base()


def _named_as_before(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Attention of transformers 5.24 is given `cache`; the bridge looks for `past_key_values`."""
    del module
    if kwargs.get("past_key_values") is None and kwargs.get("cache") is not None:
        kwargs = {**kwargs, "past_key_values": kwargs["cache"]}
    return args, kwargs


def _refuse_unknown_copies(model: Any) -> None:
    """Refuse a flag under which a transformer-lens does something else to the copies."""
    for flag in _COPIED_INPUTS:
        if getattr(model.cfg, flag, False) and not all(
            hasattr(block.attn, "_apply_ln1_per_head") for block in model.blocks
        ):
            raise ModelStateError(
                f"cfg.{flag} is on, and lens_lora does not know how this transformer-lens "
                f"normalises each head's input, so it cannot compute z. Turn the flag off "
                f"(bridge.set_{flag}(False)) before you make the lens, or use transformer-lens 3.9 "
                "or later."
            )
