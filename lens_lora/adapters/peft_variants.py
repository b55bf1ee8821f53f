"""What is not plain LoRA: kinds and variants that s·B·A would misread, each with its remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lens_lora.errors import UnsupportedAdapterError

__all__ = ["classifier_note", "refuse_other_kinds", "refuse_variants"]

_MERGED = "ll.Adapter.between(base, peft_model.merge_and_unload())"
_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_READ_VARIANTS = ("use_dora",)
_Refusal = tuple[str, Callable[[Any], bool], str]
_REFUSALS: tuple[_Refusal, ...] = (
    (
        "bias",
        lambda v: v not in (None, "none", "lora_only", "all"),
        "PEFT knows bias='none', 'lora_only' and 'all'.",
    ),
    (
        "target_parameters",
        bool,
        "No hook point of transformer-lens shows an expert's own input (the tokens routed to it), "
        "so LoRA on bare expert parameters cannot be laid over it; target linear modules.",
    ),
    ("alora_invocation_tokens", bool, "aLoRA depends on the position; train a plain LoRA."),
    ("use_qalora", bool, "QA-LoRA pools the input of A; train with use_qalora=False."),
    ("layer_replication", bool, "Replicated layers change the base model; train without them."),
    ("megatron_config", bool, "Megatron's parallel linears are not read; save a plain LoRA."),
    (
        "init_lora_weights",
        lambda v: v not in _HARMLESS_INITS,
        "Its B·A is relative to base weights that the initialisation changed. Save it converted, "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...), or compare the merged "
        f"model with the base that training began from: {_MERGED}.",
    ),
)


def refuse_other_kinds(config: Any, source: str) -> None:
    """Refuse every method but LoRA.

    Args:
        config: PEFT's config of the adapter.
        source: the adapter's file or model, for the message.

    Raises:
        UnsupportedAdapterError: naming the method, and what can be done with it.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind == "LORA":
        return
    if getattr(config, "is_prompt_learning", False) or kind in ("ADAPTION_PROMPT", "CARTRIDGE"):
        remedy = "It changes what the model reads, not a weight, so it has no ΔW to explain."
    else:
        remedy = f"Merge it and compare with the base: {_MERGED}."
    raise UnsupportedAdapterError(f"{source}: a {kind} adapter; only LoRA is read. {remedy}")


def refuse_variants(config: Any, source: str) -> None:
    """Refuse other methods, and each LoRA variant that plain s·B·A would misread.

    Args:
        config: PEFT's config of the adapter.
        source: the adapter's file or model, for the message.

    Raises:
        UnsupportedAdapterError: naming the field, its value and the remedy.
    """
    refuse_other_kinds(config, source)
    for field, is_unsupported, remedy in _REFUSALS:
        value = getattr(config, field, None)
        if is_unsupported(value):
            raise UnsupportedAdapterError(
                f"{source}: {field}={value!r}. {remedy}{classifier_note(config)}"
            )
    for field in dataclasses.fields(config):
        is_variant = field.metadata.get("is_lora_variant") and field.name not in _READ_VARIANTS
        if is_variant and getattr(config, field.name):
            raise UnsupportedAdapterError(
                f"{source}: {field.name}={getattr(config, field.name)!r} makes this a LoRA "
                "variant that plain s·B·A would misread. Train a plain LoRA, or merge it and "
                f"compare with the base: {_MERGED}."
            )


def classifier_note(config: Any) -> str:
    """What is said of an adapter of a classifier, which has another head; else nothing.

    Args:
        config: PEFT's config of the adapter.
    """
    task = getattr(config.task_type, "value", config.task_type)
    if task not in _CLASSIFIERS:
        return ""
    return f" It adapts a classifier ({task}), not a language model: it has no logits of tokens."
