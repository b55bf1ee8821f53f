"""Every family as each class, raw or processed, under an adapter of every kind of target."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import cases
import models
import torch
from peft import PeftModel
from transformers import PreTrainedModel

import lens_lora as ll

EXACT = 1e-9
ROUND_OFF = 1e-10
MARGIN = ll.Margin(5, 9)
# How far the bare hooked model itself is from Hugging Face's, at most, by family and class.
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


@dataclasses.dataclass(frozen=True)
class _Modules:
    """What PEFT's options call the modules of a base.

    Attributes:
        linears: every linear module of the blocks.
        embedding: the token embedding.
        head: the unembedding.
        norms: every norm.
        saves_embedding: whether the embedding is trained whole beside the head.
    """

    linears: list[str]
    embedding: str
    head: str
    norms: list[str]
    saves_embedding: bool

    @classmethod
    def of(cls, family: str, base: PreTrainedModel) -> _Modules:
        # transformers 4's GPT-NeoX has embed_out.
        head = "embed_out" if hasattr(base, "embed_out") else "lm_head"
        return cls(
            linears=models.LINEARS[family],
            embedding=EMBEDDINGS.get(family, "embed_tokens"),
            head=head,
            norms=NORMS.get(family, ["norm"]),
            saves_embedding=family != "bloom",
        )


def _head_embedding_and_one_linear(modules: _Modules) -> dict[str, Any]:
    """Train the head, the embedding and one linear module whole; adapt the other linear modules."""
    *adapted, trained_linear = modules.linears
    trained = [modules.head]
    if modules.saves_embedding:
        trained.append(modules.embedding)
    trained.append(trained_linear)
    return {"targets": adapted, "modules_to_save": trained}


def _five_token_rows(modules: _Modules) -> dict[str, Any]:
    """Train the embedding's rows of five tokens that `models.tokens` has."""
    del modules
    ids = sorted(set(models.tokens().flatten().tolist()))
    return {"trainable_token_indices": ids[:5]}


# What an adapter adapts: a function from the base's modules to the options of `models.peft_model`.
TARGETS: dict[str, Callable[[_Modules], dict[str, Any]]] = {
    "linears": lambda modules: {},
    "lm_head": lambda modules: {"targets": [modules.head]},
    "embedding": lambda modules: {"targets": [modules.embedding]},
    "positions": lambda modules: {"targets": ["wpe"]},
    "lora_bias": lambda modules: {"lora_bias": True},
    "lora_only": lambda modules: {"bias": "lora_only"},
    "dora": lambda modules: {"use_dora": True},
    "modules_to_save": _head_embedding_and_one_linear,
    "norms": lambda modules: {"modules_to_save": modules.norms},
    "token_rows": _five_token_rows,
    "bias_all": lambda modules: {"bias": "all"},
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
    """Whether tests of every target have this one; of token rows and biases, in `models.CORE`."""
    if target in ("token_rows", "bias_all") and family not in models.CORE:
        return False
    return has(family, target)


# Every family, class, processing and target that is tested.
EVERY = [
    (family, cls, flags, target)
    for family in models.FAMILIES
    for cls in models.MAKERS
    for flags in ("raw", "processed")
    for target in TARGETS
    if _is_tested(family, target)
]


def base_for(base: PreTrainedModel, flags: str, target: str) -> PreTrainedModel | None:
    """The base, where the lens needs it; else None."""
    is_processed = flags != "raw"
    return base if is_processed or target in COMPARED else None


@functools.cache
def hooked(family: str, cls: str, flags: str) -> tuple[PreTrainedModel, Any]:
    """The base and its hooked model, built once a process."""
    base = models.hf_model(family)
    return base, models.MAKERS[cls](base, **cases.FLAGS[flags])


def peft_with(family: str, base: PreTrainedModel, target: str) -> PeftModel:
    """The base under an adapter of this target, with whatever it trains at random values."""
    options = TARGETS[target](_Modules.of(family, base))
    peft = models.peft_model(family, base, **options)
    generator = models.seeded(7)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_magnitude_of_dora = "magnitude" in name
            if is_magnitude_of_dora:
                parameter.mul_(1 + 0.1 * noise)
            if _is_trained_whole(name, parameter, target):
                parameter.add_(0.3 * noise)
    return peft


def _is_trained_whole(name: str, parameter: torch.nn.Parameter, target: str) -> bool:
    """Whether the adapter trains this parameter itself, and not factors beside it."""
    if target == "lora_only":
        return name.endswith("base_layer.bias")
    return target in TRAINED and "lora_" not in name and parameter.requires_grad
