"""The model families, as data: which Hugging Face module is which site, and which norm it reads.

A path is `layer.format(l=…)` plus the module's own name. Fused projections list the kinds that
their output rows hold and how those rows lie: in blocks (q|k|v) or interleaved (head, 3, d_head).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

__all__ = ["FAMILIES", "Family", "Place"]

Layout = Literal["whole", "blocks", "interleaved"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a Hugging Face linear module sits: its layer, and the kinds its output rows hold."""

    layer: int
    kinds: tuple[str, ...]
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Family:
    """One naming scheme of Hugging Face causal language models."""

    architectures: tuple[str, ...]
    layer: str
    linears: Mapping[str, tuple[str, ...]]
    ln1: str
    ln2: str
    norm: Literal["LN", "RMS"]
    fused: Layout = "blocks"

    def place(self, module: str) -> Place | None:
        """The place of a module path, or None where this family has no such linear."""
        pattern = re.escape(self.layer).replace(re.escape("{l}"), r"(\d+)")
        match = re.fullmatch(rf"{pattern}\.(.+)", module)
        if match is None or match[2] not in self.linears:
            return None
        kinds = self.linears[match[2]]
        return Place(int(match[1]), kinds, self.fused if len(kinds) > 1 else "whole")

    def path(self, layer: int, kind: str) -> str:
        """The module path that holds the rows of `kind` in `layer`."""
        name = next(name for name, kinds in self.linears.items() if kind in kinds)
        return f"{self.layer.format(l=layer)}.{name}"

    def norm_path(self, layer: int, kind: str) -> str | None:
        """The norm whose output the linear reads; None for o, down and fc_out."""
        name = {"q": self.ln1, "k": self.ln1, "v": self.ln1}.get(kind)
        if kind in ("gate", "up", "fc_in"):
            name = self.ln2
        return None if name is None else f"{self.layer.format(l=layer)}.{name}"


FAMILIES: tuple[Family, ...] = (
    Family(
        architectures=("GPT2LMHeadModel",),
        layer="transformer.h.{l}",
        linears={
            "attn.c_attn": ("q", "k", "v"),
            "attn.c_proj": ("o",),
            "mlp.c_fc": ("fc_in",),
            "mlp.c_proj": ("fc_out",),
        },
        ln1="ln_1",
        ln2="ln_2",
        norm="LN",
    ),
    Family(
        architectures=("GPTNeoXForCausalLM",),
        layer="gpt_neox.layers.{l}",
        linears={
            "attention.query_key_value": ("q", "k", "v"),
            "attention.dense": ("o",),
            "mlp.dense_h_to_4h": ("fc_in",),
            "mlp.dense_4h_to_h": ("fc_out",),
        },
        ln1="input_layernorm",
        ln2="post_attention_layernorm",
        norm="LN",
        fused="interleaved",
    ),
    Family(
        architectures=("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"),
        layer="model.layers.{l}",
        linears={
            "self_attn.q_proj": ("q",),
            "self_attn.k_proj": ("k",),
            "self_attn.v_proj": ("v",),
            "self_attn.o_proj": ("o",),
            "mlp.gate_proj": ("gate",),
            "mlp.up_proj": ("up",),
            "mlp.down_proj": ("down",),
        },
        ln1="input_layernorm",
        ln2="post_attention_layernorm",
        norm="RMS",
    ),
)
