"""Every family as each class, raw or processed, under an adapter of every kind of target."""

from __future__ import annotations

import functools

import cases
import models
import torch

import lens_lora as ll

EXACT, ROUND_OFF = 1e-9, 1e-10
MARGIN = ll.Margin(5, 9)
# (family, class) → how far the bare hooked model itself is from Hugging Face, at most.
HOST_ERROR = {
    ("bloom", "HookedTransformer"): 1e-8,
    ("gptj", "HookedTransformer"): 1e-7,
}
EMBEDDINGS = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj"), "wte"),
    "neox": "embed_in",
    "bloom": "word_embeddings",
}
NORMS = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj"), ["ln_1", "ln_2", "ln_f"]),
    **dict.fromkeys(("neox", "phi"), ["layernorm", "layer_norm"]),
    "bloom": ["layernorm", "ln_f"],
    "opt": ["layer_norm"],
}
BIASED = ("gpt2", "neox", "qwen2", "gpt_neo", "gptj", "bloom", "opt", "phi")
TARGETS = {
    "linears": {},
    "lm_head": {"targets": ["lm_head"]},
    "embedding": None,
    "positions": {"targets": ["wpe"]},
    "lora_bias": {"lora_bias": True},
    "lora_only": {"bias": "lora_only"},
    "dora": {"use_dora": True},
    "modules_to_save": None,
    "norms": None,
    "token_rows": None,
    "bias_all": {"bias": "all"},
}
TRAINED = ("modules_to_save", "norms", "token_rows", "bias_all")
# What is compared with base parameters that a HookedTransformer does not keep as they were.
COMPARED = ("lora_only", "modules_to_save", "token_rows", "bias_all")


def has(family: str, target: str) -> bool:
    """Whether the family has such modules or parameters."""
    if target == "positions":
        return family in ("gpt2", "gpt_neo")
    return target != "bias_all" or family in BIASED


EVERY = [
    (family, cls, flags, target)
    for family in models.FAMILIES
    for cls in models.MAKERS
    for flags in ("raw", "processed")
    for target in TARGETS
    if has(family, target) and (family in models.CORE or target not in ("token_rows", "bias_all"))
]


def base_for(base, flags: str, target: str):
    """The base, where the lens needs it."""
    return base if flags != "raw" or target in COMPARED else None


@functools.cache
def hooked(family: str, cls: str, flags: str):
    """The base and its hooked model, built once a process."""
    base = models.hf_model(family)
    return base, models.MAKERS[cls](base, **cases.FLAGS[flags])


def _config(family: str, base, target: str) -> dict:
    head = "embed_out" if hasattr(base, "embed_out") else "lm_head"  # transformers 4's GPT-NeoX
    embedding = EMBEDDINGS.get(family, "embed_tokens")
    if target == "lm_head":
        return {"targets": [head]}
    if target == "embedding":
        return {"targets": [embedding]}
    if target == "modules_to_save":
        *others, last = models.LINEARS[family]
        outside = [head] if family == "bloom" else [head, embedding]
        return {"targets": others, "modules_to_save": [*outside, last]}
    if target == "norms":
        return {"modules_to_save": NORMS.get(family, ["norm"])}
    if target == "token_rows":
        return {"trainable_token_indices": sorted(set(models.tokens().flatten().tolist()))[:5]}
    return dict(TARGETS[target])


def peft_with(family: str, base, target: str):
    """The base under an adapter of this target, whatever is trained at random values."""
    peft = models.peft_model(family, base, **_config(family, base, target))
    generator = models.seeded(7)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if "magnitude" in name:
                p.mul_(1 + 0.1 * noise)
            is_whole = target in TRAINED and "lora_" not in name and p.requires_grad
            if is_whole or (target == "lora_only" and name.endswith("base_layer.bias")):
                p.add_(0.3 * noise)
    return peft
