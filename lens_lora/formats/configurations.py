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
    """The fields of the configuration's own class: those that its model can read."""
    try:
        fields = type(config)().to_dict()
    except (TypeError, ValueError):
        # The class cannot be made without arguments, so every field is taken for a known one.
        fields = config.to_dict()
    return {name.partition(".")[0] for name in _flat(fields)}


def _deciding_fields(config: Any, before: str = "") -> dict[str, Any]:
    """The fields of a configuration that decide logits, flat.

    A configuration within it, such as that of the text of a multimodal model, is read by the same
    rules. Other nested fields, such as those of the rotary embedding, are fields of this one.

    Args:
        config: the configuration.
        before: what the names begin with.
    """
    from transformers import PretrainedConfig

    own: dict[str, Any] = {}
    deciding: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        inner = getattr(config, name, None)
        if isinstance(inner, PretrainedConfig):
            deciding |= _deciding_fields(inner, f"{before}{name}.")
        else:
            own[name] = value
    for name, value in _without_inert(_flat(own)).items():
        deciding[f"{before}{name}"] = value
    return deciding


def _without_inert(fields: Mapping[str, Any]) -> dict[str, Any]:
    """These fields of one configuration without those that do not affect its logits."""
    inert = _fields_of_generation()
    if not fields.get("use_sliding_window", True):
        inert |= {"sliding_window", "max_window_layers"}
    rope_types = ("rope_type", "rope_scaling.type")
    kinds = [value for name, value in fields.items() if name.endswith(rope_types)]
    if all(kind in (None, "default") for kind in kinds):
        # Without scaling of the rotary embedding, it bounds the positions and changes none of them.
        inert.add("max_position_embeddings")
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        outer_name = name.partition(".")[0]
        if outer_name not in inert and not _matches(name, _DECIDES_NO_LOGITS):
            kept[name] = value
    return kept


def _fields_of_generation() -> set[str]:
    """The fields that say how tokens are drawn from logits; older configurations hold them too."""
    from transformers import GenerationConfig

    return set(GenerationConfig().to_dict())


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _flat(fields: Mapping[Any, Any], before: str = "") -> dict[str, Any]:
    """Nested fields in one dictionary, in which an inner field is called 'outer.inner'."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[f"{before}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
