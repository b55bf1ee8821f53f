"""Where the residual stream of each family runs, and how errors of edges are measured."""

from __future__ import annotations

import torch
from peft_edges import Branch, Stream

import lens_lora as ll

# Against central differences.
DIFFERENCES = 1e-7
_LLAMA = Stream(
    layer="model.layers.{l}",
    final="model.norm",
    attn=Branch("self_attn", "input_layernorm", "self_attn"),
    mlp=Branch("mlp", "post_attention_layernorm", "mlp"),
)
_POST_NORM = Stream(
    layer="model.layers.{l}",
    final="model.norm",
    attn=Branch("self_attn", "", "post_attention_layernorm"),
    mlp=Branch("mlp", "", "post_feedforward_layernorm"),
)
_SHARED = {"is_parallel": True, "layer": "model.layers.{l}"}
STREAMS = {
    **dict.fromkeys(("llama", "qwen3", "mixtral", "Qwen3-MoE", "gpt-oss"), _LLAMA),
    "gpt2": Stream(
        layer="transformer.h.{l}",
        final="transformer.ln_f",
        attn=Branch("attn", "ln_1", "attn"),
        mlp=Branch("mlp", "ln_2", "mlp"),
    ),
    "neox": Stream(
        layer="gpt_neox.layers.{l}",
        final="gpt_neox.final_layer_norm",
        attn=Branch("attention", "input_layernorm", "attention"),
        mlp=Branch("mlp", "post_attention_layernorm", "mlp"),
        is_parallel=True,
    ),
    "gemma2": Stream(
        layer="model.layers.{l}",
        final="model.norm",
        attn=Branch("self_attn", "input_layernorm", "post_attention_layernorm"),
        mlp=Branch("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "phi": Stream(
        final="model.final_layernorm",
        attn=Branch("self_attn", "input_layernorm", "self_attn"),
        mlp=Branch("mlp", "input_layernorm", "mlp"),
        **_SHARED,
    ),
    "OLMo 2": _POST_NORM,
    "Cohere": Stream(
        final="model.norm",
        attn=Branch("self_attn", "input_layernorm", "self_attn"),
        mlp=Branch("mlp", "input_layernorm", "mlp"),
        **_SHARED,
    ),
    "Falcon": Stream(
        layer="transformer.h.{l}",
        final="transformer.ln_f",
        attn=Branch("self_attention", "input_layernorm", "self_attention"),
        mlp=Branch("mlp", "input_layernorm", "mlp"),
        is_parallel=True,
    ),
}


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


def by_module(edges: ll.results.Edges, modules: list[str]) -> torch.Tensor:
    """The sites of a fused projection summed, as PEFT has one gate for them."""
    rows = [[site.module == module for site in edges.sites] for module in modules]
    return torch.stack([edges.values[:, row].sum(1) for row in rows], 1)
