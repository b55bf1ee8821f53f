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
TARGETS = {
    "linears": {},
    "lm_head": {"targets": ["lm_head"]},
    "embedding": None,
    "positions": {"targets": ["wpe"]},
    "lora_bias": {"lora_bias": True},
    "lora_only": {"bias": "lora_only"},
    "dora": {"use_dora": True},
}

EVERY = [
    (family, cls, flags, target)
    for family in models.FAMILIES
    for cls in models.MAKERS
    for flags in ("raw", "processed")
    for target in TARGETS
    if target != "positions" or family in ("gpt2", "gpt_neo")
]


@functools.cache
def hooked(family: str, cls: str, flags: str):
    """The base and its hooked model, built once a process."""
    base = models.hf_model(family)
    return base, models.MAKERS[cls](base, **cases.FLAGS[flags])


def peft_with(family: str, base, target: str):
    config = TARGETS[target]
    if target == "lm_head" and hasattr(base, "embed_out"):
        config = {"targets": ["embed_out"]}  # as transformers 4 calls GPT-NeoX's
    if config is None:
        config = {"targets": [EMBEDDINGS.get(family, "embed_tokens")]}
    peft = models.peft_model(family, base, **config)
    generator = models.seeded(7)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if "magnitude" in name:
                p.mul_(1 + 0.1 * noise)
            if target == "lora_only" and name.endswith("base_layer.bias"):
                p.add_(0.3 * noise)
    return peft
