"""Every family as each class, raw or processed, under an adapter of every kind of target."""

from __future__ import annotations

import functools

import cases
import models
import torch

import lens_lora as ll

EXACT = 1e-9
ROUND_OFF = 1e-10
MARGIN = ll.Margin(5, 9)
# (family, class) → how far the bare hooked model itself is from Hugging Face, at most.
HOST_ERROR = {
    ("bloom", "HookedTransformer"): 1e-8,
    ("gptj", "HookedTransformer"): 1e-7,
}
# The token embedding of families that do not call it embed_tokens.
EMBEDDINGS = {
    "gpt2": "wte",
    "gpt_neo": "wte",
    "gptj": "wte",
    "neox": "embed_in",
    "bloom": "word_embeddings",
}
# The norms of families that do not call each of them norm.
NORMS = {
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gpt_neo": ["ln_1", "ln_2", "ln_f"],
    "gptj": ["ln_1", "ln_2", "ln_f"],
    "neox": ["layernorm", "layer_norm"],
    "phi": ["layernorm", "layer_norm"],
    "bloom": ["layernorm", "ln_f"],
    "opt": ["layer_norm"],
}
# Families whose linear modules have biases.
BIASED = ("gpt2", "neox", "qwen2", "gpt_neo", "gptj", "bloom", "opt", "phi")
# What an adapter adapts, as options of `models.peft_model`; None where the family decides.
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
# Targets that train parameters whole, beside factors.
TRAINED = ("modules_to_save", "norms", "token_rows", "bias_all")
# Targets that are compared with base parameters, which a HookedTransformer does not keep.
COMPARED = ("lora_only", "modules_to_save", "token_rows", "bias_all")


def has(family: str, target: str) -> bool:
    """Whether the family has such modules or parameters."""
    if target == "positions":
        return family in ("gpt2", "gpt_neo")
    if target == "bias_all":
        return family in BIASED
    return True


def _is_tested(family: str, target: str) -> bool:
    """Rows of tokens and biases are tested on the families of `models.CORE`."""
    of_core_alone = target in ("token_rows", "bias_all")
    return has(family, target) and (family in models.CORE or not of_core_alone)


EVERY = [
    (family, cls, flags, target)
    for family in models.FAMILIES
    for cls in models.MAKERS
    for flags in ("raw", "processed")
    for target in TARGETS
    if _is_tested(family, target)
]


def base_for(base, flags: str, target: str):
    """The base, where the lens needs it; else None."""
    return base if flags != "raw" or target in COMPARED else None


@functools.cache
def hooked(family: str, cls: str, flags: str):
    """The base and its hooked model, built once a process."""
    base = models.hf_model(family)
    return base, models.MAKERS[cls](base, **cases.FLAGS[flags])


def _config(family: str, base, target: str) -> dict:
    """The options of `models.peft_model` for a target."""
    # transformers 4's GPT-NeoX has embed_out.
    head = "embed_out" if hasattr(base, "embed_out") else "lm_head"
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
        seen = sorted(set(models.tokens().flatten().tolist()))
        return {"trainable_token_indices": seen[:5]}
    return dict(TARGETS[target])


def peft_with(family: str, base, target: str):
    """The base under an adapter of this target, with whatever it trains at random values."""
    peft = models.peft_model(family, base, **_config(family, base, target))
    generator = models.seeded(7)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * noise)
            if _is_trained_whole(name, parameter, target):
                parameter.add_(0.3 * noise)
    return peft


def _is_trained_whole(name: str, parameter: torch.nn.Parameter, target: str) -> bool:
    """Whether the adapter trains this parameter itself, and not factors beside it."""
    if target == "lora_only":
        return name.endswith("base_layer.bias")
    return target in TRAINED and "lora_" not in name and parameter.requires_grad
