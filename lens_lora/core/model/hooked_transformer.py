"""The host of a HookedTransformer (transformer-lens 2.x, 3.x): its hook points, weights and norms.

`ln1.hook_normalized` fires three times a block, for q, k and v in that order. It shows n before the
affine for RMS norms and, from 3.x on, for LayerNorm; after it for LayerNorm of 2.x. This is
measured once per class. Where a norm follows attention and MLP (Gemma 2, 3), no hook point lies
before that norm; δ is then added to the output of the module itself.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from typing import Any, ClassVar, cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora.compat import in_float64, parameters_in, refuse_reading
from lens_lora.core.model.adapted_modules import SiteFactors
from lens_lora.core.model.hooked_host import COPIED_INPUTS, HookedHost
from lens_lora.core.model.hooks import base_parameter_error, computes
from lens_lora.core.model.host import Ports
from lens_lora.core.model.lengths import context_of_copy
from lens_lora.core.model.modules import module_at
from lens_lora.core.model.sites import NORM_READ_BY, OUTSIDE_KINDS, Heads, site_name
from lens_lora.errors import ModelStateError
from lens_lora.families import find_family
from lens_lora.spans import Temporary

# The class of key-value caches, in transformer-lens 3 and in 2.
_CACHES = ("TransformerLensKeyValueCache", "HookedTransformerKeyValueCache")
# Where each weight stands, in the model or in a block; those of attention have an axis of heads.
_WEIGHTS = {
    "embed": "embed.W_E",
    "pos_embed": "pos_embed.W_pos",
    "unembed": "unembed.W_U",
    **{kind: f"attn.W_{kind.upper()}" for kind in "qkvo"},
    "gate": "mlp.W_gate",
    **dict.fromkeys(("up", "fc_in"), "mlp.W_in"),
    **dict.fromkeys(("down", "fc_out"), "mlp.W_out"),
}


@final
class HookedTransformerHost(HookedHost):
    """A HookedTransformer.

    Raises:
        ModelStateError: a family that is not supported, refactored attention, several devices.
    """

    class_name: ClassVar[str] = "HookedTransformer"
    # It copies the weights that it uses, and W_U is the largest of them.
    pass_overhead: ClassVar[float] = 1.4
    embedding_output: ClassVar[str] = "embed"
    flags: ClassVar[tuple[str, ...]] = (*COPIED_INPUTS, "ungroup_grouped_query_attention")
    says_folded_biases: ClassVar[bool] = False

    def __init__(self, model: Any, hf_model: nn.Module | None = None) -> None:
        cfg = model.cfg
        family = find_family(getattr(cfg, "original_architecture", None))
        heads = Heads(cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads, cfg.d_head)
        super().__init__(model, family, heads, hf_model)
        if getattr(cfg, "ungroup_grouped_query_attention", False):
            self.kv_copies: int = heads.n_heads // heads.n_kv
        if getattr(cfg, "n_devices", 1) > 1:
            raise ModelStateError(
                f"this HookedTransformer is spread over {cfg.n_devices} devices (n_devices), where "
                "it moves activations but not all that it computes with. Put it on one device "
                "(n_devices=1), or take a TransformerBridge over several: ll.load(name, adapter, "
                "device_map='balanced'), with transformer-lens 3 or newer."
            )
        self._refuse_refactored()
        if hf_model is not None:
            _refuse_longer_context(cfg, hf_model)

    def _refuse_refactored(self) -> None:
        """Refuse refactored attention, where the rows of each head in W_O are orthonormal."""
        for layer, block in enumerate(self.model.blocks):
            heads = in_float64(_parameter_of(block.attn, "W_O"))
            gram = heads @ heads.transpose(1, 2)
            width = gram.shape[-1]
            identity = torch.eye(width, dtype=gram.dtype, device=gram.device)
            distance = float((gram - identity).abs().amax())
            if width > 1 and distance < 1e-4:
                raise ModelStateError(
                    f"blocks.{layer}.attn: refactor_factored_attn_matrices was applied, which "
                    "mixes W_Q with W_K and W_V with W_O, so their ΔW cannot be added. Load the "
                    "model without it."
                )

    def ports(self, layer: int, kind: str) -> Ports:
        """Hook points of TransformerLens, or the module itself where none lies at its output."""
        if kind == "embed" and getattr(self.model.cfg, "post_embedding_ln", False):
            raise ModelStateError(
                "embed: this HookedTransformer normalises inside its embedding, with no place "
                "between the two for δ; use a TransformerBridge, or adapter.without_modules(…)."
            )
        if kind == "unembed" and hasattr(self.model.unembed, "hook_out"):  # transformer-lens 3
            return Ports("unembed.hook_in", "unembed.hook_out")
        if kind in ("embed", "pos_embed", "unembed"):
            return Ports(kind, kind)
        return self._block_ports(f"blocks.{layer}", kind)

    def _block_ports(self, block: str, kind: str) -> Ports:
        if kind in ("q", "k", "v"):
            return Ports(
                f"{block}.ln1.hook_normalized",
                f"{block}.attn.hook_{kind}",
                firing="qkv".index(kind),
                firings=3,
            )
        if kind == "o":
            write = "attn" if self.family.post_norm else "hook_attn_out"
            return Ports(f"{block}.attn.hook_z", f"{block}.{write}")
        if kind in ("down", "fc_out"):
            write = "mlp" if self.family.post_norm else "hook_mlp_out"
            return Ports(f"{block}.mlp.hook_post", f"{block}.{write}")
        write = "hook_pre_linear" if kind == "up" else "hook_pre"
        return Ports(f"{block}.ln2.hook_normalized", f"{block}.mlp.{write}")

    def _norm(self, layer: int, kind: str) -> tuple[str, Any]:
        """The name of a norm, and the norm itself; None where the model has none."""
        name = "embed.ln" if kind == "embed_ln" else site_name(layer, kind)
        return name, module_at(self.model, name)

    def norm_parameters(self, layer: int, kind: str) -> tuple[Tensor, Tensor | None] | None:
        """The parameters (w, b) of a norm that is not folded."""
        _, norm = self._norm(layer, kind)
        if not hasattr(norm, "w"):
            return None
        bias = getattr(norm, "b", None)
        beta = None if bias is None else bias.detach()
        return norm.w.detach(), beta

    def norm_ports(self, layer: int, kind: str) -> tuple[Ports, ...]:
        """Where a norm shows n and δ is added: at its module, or at the hook point behind it.

        ln1 runs three times a block. A Hugging Face norm that attention and MLP share is ln1 and
        ln2 here.
        """
        block = f"blocks.{layer}"
        name, _ = self._norm(layer, kind)
        read = f"{name}.hook_normalized"
        if kind in ("q_norm", "k_norm"):
            like = f"{block}.attn.hook_{kind[0]}"
            return (Ports(read, name, layout="flat", like=like),)
        if kind == "ln1_post":
            return (Ports(read, f"{block}.hook_attn_out"),)
        if kind == "ln2_post":
            return (Ports(read, f"{block}.hook_mlp_out"),)
        if kind == "ln1" and self.family.ln1 == self.family.ln2:
            return tuple(self._norm_port(layer, place, repeats=4) for place in ("ln1", "ln2"))
        runs = 3 if kind == "ln1" else 1
        return (self._norm_port(layer, kind, repeats=runs),)

    def _norm_port(self, layer: int, kind: str, repeats: int) -> Ports:
        name, norm = self._norm(layer, kind)
        read = f"{name}.hook_normalized"
        firings = 3 if kind == "ln1" else 1
        write = self.embedding_output if kind == "embed_ln" else name
        if not fires_after_affine(type(norm)):
            return Ports(read, write, firing=-1, firings=firings, repeats=repeats)
        gamma = norm.w.detach()
        beta = norm.b.detach()
        if bool((gamma == 0).any()):
            raise ModelStateError(
                f"{name}: the adapter changes this norm, some of its γ are 0, and transformer-lens "
                "2 has no hook point before γ. Use transformer-lens 3 or later."
            )
        if write == name:
            write = read
        return Ports(
            read,
            write,
            firing=-1,
            firings=firings,
            through=lambda y: (y - beta) / gamma,
            repeats=repeats,
        )

    def ports_behind_norm(self, layer: int, kind: str) -> Ports:
        """At the norm's module, where `hook_normalized` does not show its output."""
        ports = self.ports(layer, kind)
        if kind == "unembed":
            return ports
        name, norm = self._norm(layer, NORM_READ_BY[kind])
        if fires_after_affine(type(norm)):
            return ports
        return dataclasses.replace(ports, read=name)

    def is_tied(self) -> bool | None:
        """False if W_E and W_U differ; None if they are equal, as they may then be tied or not."""
        embed = self.weight(-1, "embed").T / self.embedding_scale("embed")
        head = self.weight(self.n_layers, "unembed")
        eps = torch.finfo(head.dtype).eps
        is_equal = embed.shape == head.shape and torch.allclose(embed, head, 4 * eps, 0.0)
        if is_equal:
            return None
        return False

    def block_input(self, layer: int) -> str:
        """The block's `hook_resid_pre`, or the scale of the final norm."""
        if layer < self.n_layers:
            return f"blocks.{layer}.hook_resid_pre"
        return "ln_final.hook_scale"

    def embedding_scale(self, kind: str) -> float:
        """√d_model for Gemma's token embedding, as W_E contains that factor; else 1."""
        is_scaled = kind == "embed" and self.family.gamma_offset
        return self.model.cfg.d_model**0.5 if is_scaled else 1.0

    def _parameter(self, layer: int, kind: str) -> tuple[nn.Module, str]:
        """The module that holds a weight, and the weight's name there."""
        path, _, name = _WEIGHTS[kind].rpartition(".")
        owner = self.model if kind in OUTSIDE_KINDS else self.model.blocks[layer]
        return owner.get_submodule(path), name

    def weight(self, layer: int, kind: str) -> Float[Tensor, "out in"]:
        """The parameter of this kind, turned to [out, in]; a grouped model's own heads only."""
        parameter = _parameter_of(*self._parameter(layer, kind))
        if kind in ("q", "k", "v"):
            return parameter.transpose(1, 2).flatten(0, 1)
        return parameter.flatten(0, -2).T

    def refuse_reading(self, span: Temporary, site: SiteFactors, parameters: Sequence[str]) -> None:
        """Refuse to read parameters such as W_Q and b_Q, except within the module's own passes."""
        module, weight = self._parameter(site.layer, site.kind)
        by_parameter = {"weight": weight, "bias": _bias_name(weight)}
        names = [by_parameter[parameter] for parameter in parameters]
        why = functools.partial(base_parameter_error, site.name)
        refuse_reading(span, module, names, why, unless=computes(span, module))

    def bias(self, layer: int, kind: str) -> Float[Tensor, " out"] | None:
        """The parameter b_V, b_O or b_U."""
        module, weight = self._parameter(layer, kind)
        return _parameter_of(module, _bias_name(weight)).flatten()

    def base_lacks_bias(self, kind: str) -> bool:
        """True for the head of an unprocessed model whose b_U is zero."""
        if kind != "unembed" or self.needs_base():
            return False
        b_U = _parameter_of(self.model.unembed, "b_U")
        return not bool(b_U.any())

    def run_cached(
        self,
        tokens: Int[Tensor, "row new"],
        cache: Any,
        mask: Int[Tensor, "row _all"] | None = None,
    ) -> tuple[Float[Tensor, "row _read vocab"], Any]:
        """Run with TransformerLens's own cache.

        The mask is given, as without one pad tokens would be taken for padding. The cache keeps
        that of earlier tokens.
        """
        if cache is None:
            known = vars(importlib.import_module("transformer_lens.HookedTransformer"))
            name = next(name for name in _CACHES if name in known)
            cache = known[name].init_cache(self.model.cfg, tokens.device, len(tokens))
        if mask is None:
            mask = torch.ones_like(tokens)
        of_new = mask[:, -tokens.shape[1] :]
        return self.model(tokens, past_kv_cache=cache, attention_mask=of_new), cache

    def rows_of_cache(self, cache: Any, rows: Int[Tensor, " chosen"]) -> Any:
        """Choose rows of the keys and values of each layer, and of the mask."""
        for entry in cache.entries:
            entry.past_keys = entry.past_keys[rows.to(entry.past_keys.device)]
            entry.past_values = entry.past_values[rows.to(entry.past_values.device)]
        mask = cache.previous_attention_mask
        cache.previous_attention_mask = mask[rows.to(mask.device)]
        return cache

    def own_affine(self, layer: int, kind: str) -> tuple[Tensor, Tensor | None] | None:
        """(w, b) of the norm that a map reads, unless its hook point fires after them."""
        kind_of_norm = NORM_READ_BY.get(kind)
        if kind_of_norm is None:
            return None
        _, norm = self._norm(layer, kind_of_norm)
        affine = self.norm_parameters(layer, kind_of_norm)
        if affine is None or fires_after_affine(type(norm)):
            return None
        return affine

    def reads_folded_norm(self, layer: int, kind: str) -> bool:
        """Whether the weights were processed: then all norms are folded, else none."""
        return self.needs_base()

    def needs_base(self) -> bool:
        """Whether norms were folded: what is left of them only normalises ('LNPre', 'RMSPre')."""
        return str(self.model.cfg.normalization_type).endswith("Pre")


def _refuse_longer_context(cfg: Any, hf_model: Any) -> None:
    """Refuse a model that takes prompts so long that it computes another function than its base."""
    longest = context_of_copy(hf_model, cfg)
    if cfg.n_ctx > longest:
        raise ModelStateError(
            f"this HookedTransformer takes prompts of up to {cfg.n_ctx} tokens (cfg.n_ctx), and "
            f"beyond {longest:.0f} tokens its base has other rotary frequencies or a window of "
            "attention, which this HookedTransformer lacks.",
            remedy=f"Set model.cfg.n_ctx = {longest:.0f}, so that longer prompts are refused, or "
            "take a TransformerBridge.",
            in_shell="Take --class TransformerBridge.",
        )


def _bias_name(weight: str) -> str:
    """'b_Q' of 'W_Q'."""
    return f"b{weight.removeprefix('W')}"


def _parameter_of(module: nn.Module, name: str) -> Tensor:
    """A parameter, also while reading it is refused; grouped heads of K and V without copies."""
    parameters = parameters_in(module)
    if name not in parameters:
        name = f"_{name}"
    return cast("Tensor", parameters[name]).detach()


@functools.cache
def fires_after_affine(norm_type: type[nn.Module]) -> bool:
    """Whether `hook_normalized` of this class is the norm's output after its affine; measured."""
    from transformer_lens import HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=1, d_model=4, n_ctx=4, d_head=4, n_heads=1, d_vocab=4, act_fn="relu", device="cpu"
    )
    norm: Any = norm_type(cfg)
    normalized: list[Tensor] = []
    norm.hook_normalized.add_hook(lambda tensor, hook: normalized.append(tensor))
    with torch.no_grad():
        norm.w.fill_(2.0)
        out = norm(torch.tensor([[[1.0, -2.0, 3.0, 0.5]]]))
    return bool(torch.allclose(out.double(), normalized[0].double()))
