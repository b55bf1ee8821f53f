"""The fields of a Hugging Face configuration that decide what a model computes.

Two models with the same parameters are the same function only if these fields agree: the norm's ε,
the activation function, the rotary embedding, the number of heads, a soft cap. Fields that name a
model, say how it is stored, or how its tokens are drawn, do not affect logits and are left out.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

# Globs of the names of fields that do not affect logits, by subject.
_NAMES_AND_VERSIONS = """
    _name_or_path *architectures *auto_map transformers_version unsloth*
"""
_TOKENS = "*_token_id *_token chat_template"
_STORAGE_AND_OUTPUT = """
    *dtype tie_word_embeddings quantization_config* torchscript pretraining_tp
    *attn_implementation* *experts_implementation* use_cache return_dict*
    output_attentions output_hidden_states output_router_logits output_past
"""
_TRAINING_AND_OTHER_TASKS = """
    *dropout* *pdrop *drop_rate initializer_* gradient_checkpointing router_aux_loss_coef
    *id2label* *label2id* num_labels problem_type task_specific_params* summary_*
"""
_DECIDES_NO_LOGITS = (
    *_NAMES_AND_VERSIONS.split(),
    *_TOKENS.split(),
    *_STORAGE_AND_OUTPUT.split(),
    *_TRAINING_AND_OTHER_TASKS.split(),
)


def differing_fields(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """The fields that decide logits and differ between two configurations, with both values.

    A nested field is called 'outer.inner'; a field that one of the two lacks is None there.
    """
    ours = _deciding_fields(one)
    theirs = _deciding_fields(other)
    differing: dict[str, tuple[Any, Any]] = {}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            differing[name] = (ours.get(name), theirs.get(name))
    return differing


def known_fields(config: Any) -> set[str]:
    """The fields that the configuration's own class has, which are those that its model reads."""
    try:
        fields = type(config)().to_dict()
    except (TypeError, ValueError):  # The class needs arguments, so each of its fields counts.
        fields = config.to_dict()
    return {name.partition(".")[0] for name in _flat(fields)}


def _deciding_fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration that decide logits, flat."""
    fields = _flat(config.to_dict())
    if not fields.get("use_sliding_window", True):
        for inert in ("sliding_window", "max_window_layers"):
            fields.pop(inert, None)
    rope_types = ("rope_type", "rope_scaling.type")
    scaling = [value for name, value in fields.items() if name.endswith(rope_types)]
    if all(kind in (None, "default") for kind in scaling):
        # Without scaling, it bounds the positions and does not change any of them.
        fields.pop("max_position_embeddings", None)
    of_generation = _fields_of_generation()
    deciding: dict[str, Any] = {}
    for name, value in fields.items():
        outer_name = name.partition(".")[0]
        if outer_name not in of_generation and not _matches(name, _DECIDES_NO_LOGITS):
            deciding[name] = value
    return deciding


def _fields_of_generation() -> set[str]:
    """The fields that say how tokens are drawn from logits; older configurations hold them too."""
    from transformers import GenerationConfig

    return set(GenerationConfig().to_dict())


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, glob) for glob in globs)


def _flat(fields: Mapping[Any, Any], before: str = "") -> dict[str, Any]:
    """Nested fields in one dictionary, in which an inner field is called 'outer.inner'."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[f"{before}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
