"""PEFT's methods and variants of LoRA: which of them are plain s·B·A, and which are refused.

Each refusal has its remedy. Torch is not imported here, so that a wrong folder is reported at once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lens_lora.errors import UnsupportedAdapterError

MERGED = "ll.Adapter.between(base, peft_model.merge_and_unload())"
# A command reads folders, so there the difference is saved first.
MERGED_FOLDER = f"{MERGED}.save(folder)"

_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# Variants of LoRA that are read from the file.
_READ_VARIANTS = ("use_dora",)
# Variants of LoRA whose ΔW is measured by running them over the base.
_MEASURED = ("velora_config", "monteclora_config", "use_bdlora")
# Initialisations that leave the base's weights as they are.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# The values of these fields that are read. Any other field in `_REMEDIES` must be empty.
_READ_VALUES = {"bias": (None, "none", "lora_only", "all"), "init_lora_weights": _HARMLESS_INITS}
_REMEDIES = {
    "bias": "PEFT knows bias='none', 'lora_only' and 'all'.",
    "alora_invocation_tokens": "aLoRA depends on the position; train a plain LoRA.",
    "use_qalora": "QA-LoRA pools the input of A; train with use_qalora=False.",
    "layer_replication": "Replicated layers change the base model; train without them.",
    "megatron_config": "Megatron's parallel linears are not read; save a plain LoRA.",
    "init_lora_weights": (
        "Its B·A is relative to base weights that the initialisation changed. Save it converted, "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...), or compare the merged "
        f"model with the base that training began from: {MERGED}."
    ),
}
# Methods of PEFT that change no weight, beside those that learn a prompt.
_WITHOUT_DELTA = {
    "ADAPTION_PROMPT": "it adds what attention reads from a learned prompt",
    "CARTRIDGE": "it puts learned keys and values before the prompt's",
    "LILY": "its router weighs the updates by all tokens that are run together",
    "POLY": "it mixes its LoRAs by the `task_ids` that each call passes",
    "SHADOW": "a second network, run beside the model, corrects the hidden states",
    "XLORA": "it weighs its LoRAs by the input",
}


def is_plain_lora(config: Any) -> bool:
    """Whether ΔW = s·B·A, or DoRA's, is read from the file alone, without the base."""
    return _method(config) == "LORA" and _measured_variant(config) is None


def refuse_variants(config: Any) -> None:
    """Refuse adapters that cannot be read from their files alone.

    Raises:
        UnsupportedAdapterError: another method than LoRA, or a variant of LoRA that s·B·A would
            misread, or whose ΔW is measured over the base.
    """
    refuse_without_delta(config)
    if not is_plain_lora(config):
        variant = _measured_variant(config) or _named(config)
        raise UnsupportedAdapterError(
            f"{variant}: its ΔW is measured over the base",
            remedy="ll.load_adapter(folder, base=AutoModelForCausalLM.from_pretrained(…)).",
            in_shell="name the base with --model.",
        )


def refuse_without_delta(config: Any) -> None:
    """Refuse a method that changes no weight, and variants of LoRA that change more than ΔW.

    Raises:
        UnsupportedAdapterError: naming the method, or the field and a remedy.
    """
    reason = _WITHOUT_DELTA.get(_method(config))
    if reason is None and getattr(config, "is_prompt_learning", False):
        reason = "it learns a prompt, which the model reads"
    if reason is not None:
        raise UnsupportedAdapterError(f"{_named(config)}: {reason}, so it has no ΔW to explain.")
    if _method(config) == "LORA":
        _refuse_values(config)
        _refuse_unknown_variants(config)


def classifier_note(config: Any) -> str:
    """The sentence to add to an error if the adapter is for a classifier; otherwise ''."""
    task = getattr(config.task_type, "value", config.task_type)
    if task not in _CLASSIFIERS:
        return ""
    return f" It adapts a classifier ({task}), not a language model: it has no logits of tokens."


def _refuse_values(config: Any) -> None:
    """Refuse values of the fields of LoRA that are known to change more than ΔW."""
    for field, remedy in _REMEDIES.items():
        value = getattr(config, field, None)
        is_read = not value
        if field in _READ_VALUES:
            is_read = value in _READ_VALUES[field]
        if not is_read:
            raise UnsupportedAdapterError(
                f"{field}={value!r}.", remedy=f"{remedy}{classifier_note(config)}"
            )


def _refuse_unknown_variants(config: Any) -> None:
    """Refuse what the installed PEFT marks as a variant of LoRA, if it is switched on."""
    for field in dataclasses.fields(config):
        if not field.metadata.get("is_lora_variant"):
            continue
        value = getattr(config, field.name)
        if value and field.name not in (*_READ_VARIANTS, *_MEASURED):
            raise UnsupportedAdapterError(
                f"{field.name}={value!r} makes this a LoRA variant that plain s·B·A would misread.",
                remedy=f"Train a plain one, or merge and compare: {MERGED}.",
                in_shell=f"Train a plain one, or give the folder that {MERGED_FOLDER} writes.",
            )


def _method(config: Any) -> str:
    return getattr(config.peft_type, "value", config.peft_type)


def _named(config: Any) -> str:
    return f"an adapter of the method {_method(config)}"


def _measured_variant(config: Any) -> str | None:
    """The variant whose ΔW is measured over the base, as 'use_bdlora=True'; None for others."""
    for field in _MEASURED:
        value = getattr(config, field, None)
        if value:
            return f"{field}={value!r}"
    return None
