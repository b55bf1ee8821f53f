"""HookedTransformer (transformer-lens 2.x, 3.x): hook names, weights and norms.

`ln1.hook_normalized` fires three times a block, for q, k and v in that order. RMS norms and, from
3.x on, LayerNorm fire before the affine; LayerNorm of 2.x fires after it: this is measured, once.
With a norm after attention and MLP (Gemma 2, 3) no hook point lies before that norm; δ then goes
to the output of the module itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from lens_lora.errors import ModelStateError
from lens_lora.families import Family
from lens_lora.hooked.host import Ports, find_family, is_capped
from lens_lora.hooked.sites import Heads

_FLAGS = ("use_split_qkv_input", "use_attn_in", "ungroup_grouped_query_attention")


class HookedTransformerView:
    """See `HookedView`."""

    class_name = "HookedTransformer"
    grows = True

    def __init__(self, model: Any) -> None:
        cfg = model.cfg
        self.model: Any = model
        self.family: Family = find_family(getattr(cfg, "original_architecture", None))
        self.heads: Heads = Heads(cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads, cfg.d_head)
        self.keeps_rows: bool = not self.family.routed
        self.kv_copies: int = 1
        if getattr(cfg, "ungroup_grouped_query_attention", False):
            self.kv_copies = self.heads.n_heads // self.heads.n_kv
        self.n_layers: int = cfg.n_layers
        self._refuse_refactored()

    def _refuse_refactored(self) -> None:
        """A refactored attention's W_O is a rotation: every head's rows are orthonormal."""
        for layer, block in enumerate(self.model.blocks):
            heads = block.attn.W_O.detach().double()
            gram = heads @ heads.transpose(1, 2)
            identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            if gram.shape[-1] > 1 and bool(((gram - identity).abs().amax() < 1e-4).item()):
                raise ModelStateError(
                    f"blocks.{layer}.attn: refactor_factored_attn_matrices was applied, which "
                    "mixes W_Q with W_K and W_V with W_O, so no ΔW of theirs can be added. Load "
                    "the model without it."
                )

    def ports(self, layer: int, kind: str) -> Ports:
        if kind == "embed" and getattr(self.model.cfg, "post_embedding_ln", False):
            raise ModelStateError(
                "embed: this HookedTransformer normalises inside its embedding, with no place "
                "between the two for δ; use a TransformerBridge, or adapter.without(…)."
            )
        if kind in ("embed", "pos_embed", "unembed"):
            return Ports(kind, kind)
        block = f"blocks.{layer}"
        if kind in ("q", "k", "v"):
            read = f"{block}.ln1.hook_normalized"
            return Ports(read, f"{block}.attn.hook_{kind}", "qkv".index(kind), 3)
        if kind == "o":
            write = "attn" if self.family.post_norm else "hook_attn_out"
            return Ports(f"{block}.attn.hook_z", f"{block}.{write}")
        if kind in ("down", "fc_out"):
            write = "mlp" if self.family.post_norm else "hook_mlp_out"
            return Ports(f"{block}.mlp.hook_post", f"{block}.{write}")
        write = "hook_pre_linear" if kind == "up" else "hook_pre"
        return Ports(f"{block}.ln2.hook_normalized", f"{block}.mlp.{write}")

    def block_input(self, layer: int) -> str:
        return f"blocks.{layer}.hook_resid_pre" if layer < self.n_layers else "ln_final.hook_scale"

    def embedding_output(self) -> str:
        return "embed"

    def embedding_scale(self, kind: str) -> float:
        is_scaled = kind == "embed" and self.family.gamma_offset
        return self.model.cfg.d_model**0.5 if is_scaled else 1.0

    def weight(self, layer: int, kind: str) -> Tensor:
        outside = {"embed": ("embed", "W_E"), "pos_embed": ("pos_embed", "W_pos")}
        name, parameter = outside.get(kind, ("unembed", "W_U"))
        if kind in ("embed", "pos_embed", "unembed"):
            return getattr(getattr(self.model, name), parameter).detach().T
        block = self.model.blocks[layer]
        if kind == "o":
            return block.attn.W_O.detach().flatten(0, 1).T
        if kind in ("q", "k", "v"):
            return _stored(block.attn, f"W_{kind.upper()}").transpose(1, 2).flatten(0, 1)
        name = {"gate": "W_gate", "up": "W_in", "fc_in": "W_in"}.get(kind, "W_out")
        return getattr(block.mlp, name).detach().T

    def bias(self, layer: int, kind: str) -> Tensor | None:
        """Of 'v' and 'o'."""
        attn = self.model.blocks[layer].attn
        return attn.b_O.detach() if kind == "o" else _stored(attn, f"b_{kind.upper()}").flatten()

    def unembedding(self) -> tuple[Tensor, Tensor | None] | None:
        if is_capped(self.model):
            return None
        return self.weight(self.n_layers, "unembed"), self.model.unembed.b_U.detach()

    def own_affine(self, layer: int, kind: str) -> tuple[Tensor, Tensor | None] | None:
        if kind not in ("q", "k", "v", "gate", "up", "fc_in"):
            return None
        norm: Any = getattr(
            self.model.blocks[layer], "ln1" if kind in ("q", "k", "v") else "ln2", None
        )
        if not hasattr(norm, "w"):
            return None
        if fires_after_affine(type(norm)):
            return None
        bias = getattr(norm, "b", None)
        return norm.w.detach(), None if bias is None else bias.detach()

    def is_folded(self, layer: int, kind: str) -> bool:
        del layer, kind
        return self.needs_base()

    def state(self) -> tuple[tuple[str, Any], ...]:
        return tuple((f"cfg.{flag}", getattr(self.model.cfg, flag, False)) for flag in _FLAGS)

    def needs_base(self) -> bool:
        return str(self.model.cfg.normalization_type).endswith("Pre")


def _stored(attn: nn.Module, name: str) -> Tensor:
    """A grouped-query model keeps its own heads under '_W_K'; 'W_K' repeats them."""
    return getattr(attn, f"_{name}", getattr(attn, name)).detach()


@functools.cache
def fires_after_affine(norm_type: type[nn.Module]) -> bool:
    """Whether this norm class's `hook_normalized` sees its output, affine included: measured."""
    from transformer_lens import HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=1, d_model=4, n_ctx=4, d_head=4, n_heads=1, d_vocab=4, act_fn="relu", device="cpu"
    )
    norm: Any = norm_type(cfg)
    seen: list[Tensor] = []
    norm.hook_normalized.add_hook(lambda tensor, hook: seen.append(tensor))
    with torch.no_grad():
        norm.w.fill_(2.0)
        out = norm(torch.tensor([[[1.0, -2.0, 3.0, 0.5]]]))
    return bool(torch.allclose(out.double(), seen[0].double()))
