"""Are the settings in a merged GGUF file those of the base model?

llama.cpp computes with sizes, counts of heads, the rotary base and the norm's ε of the file. Each
is compared with the base's configuration; a field that is not known here is undecided, by its name.

The rest follows from the architecture's name, whatever the base's configuration says: the
activation, and attention to the whole text. A base that differs there is undecided, and so is an
architecture with settings of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lens_lora.formats.gguf_layout import COMPUTED, GGUFFile, Layout
from lens_lora.ship.gguf_tokenizer import Finding

# ε and the rotary base are stored in float32.
_FLOAT32 = 1e-6
_CONTEXT = "context_length"
# A field of each architecture that says no more than the tensors' shapes do.
_SAID_BY_SHAPES = ("vocab_size",)
_DEFAULT_ROTARY_BASE = 10000.0
# What llama.cpp computes between up and down, by architecture. Others have settings of their own:
# windows and caps of logits in gemma2 and gemma3, a part of each head that is turned in phi3.
_ACTIVATIONS = {
    "llama": ("silu",),
    "qwen2": ("silu",),
    "qwen3": ("silu",),
    "gemma": ("gelu", "gelu_pytorch_tanh"),
}


def settings_findings(file: GGUFFile, config: Any, layout: Layout) -> Iterator[Finding]:
    """Yield each setting that is not the base's, or cannot be compared.

    Args:
        file: a merged model's.
        config: the base's configuration.
        layout: the base's, in GGUF.
    """
    before = f"{layout.architecture}."
    expected = _expected(config)
    for name, value in expected.items():
        found = file.field(before + name)
        if found is None:
            found = _without_field(name, expected)
        if found is None:
            yield Finding("failed", f"the field {before}{name} is missing, the base's is {value!r}")
        elif not isinstance(found, int | float):
            yield Finding("undecided", f"the field {before}{name}, which is a list")
        elif not math.isclose(found, value, rel_tol=_FLOAT32):
            outcome = "undecided" if name == _CONTEXT else "failed"
            yield Finding(outcome, f"{before}{name} is {found!r}, the base's {value!r}")
    yield from _other_rotation(file, config)
    yield from _of_the_architecture(config, layout)
    for name in file.fields:
        short = name.removeprefix(before)
        if name.startswith(before) and short not in expected and short not in _SAID_BY_SHAPES:
            yield Finding("undecided", f"the field {name}")


def _expected(config: Any) -> dict[str, float]:
    """The settings of a decoder that is laid out as Llama is, as GGUF names them."""
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return {
        "block_count": int(config.num_hidden_layers),
        _CONTEXT: int(config.max_position_embeddings),
        "embedding_length": int(config.hidden_size),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": heads,
        "attention.head_count_kv": int(getattr(config, "num_key_value_heads", None) or heads),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": width,
        "rope.freq_base": _rotary_base(config),
    }


def _without_field(name: str, expected: dict[str, float]) -> float | None:
    """The value that llama.cpp takes where the file has no such field; None where it needs one."""
    heads = expected["attention.head_count"]
    if name == "rope.freq_base":
        return _DEFAULT_ROTARY_BASE
    if name == "attention.head_count_kv":
        return heads
    if name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        return expected["embedding_length"] // heads
    return None


def _other_rotation(file: GGUFFile, config: Any) -> Iterator[Finding]:
    """Frequencies of the rotary embedding that are not those of its base alone."""
    kind = _rotary_kind(config)
    if kind != "default":
        yield Finding("undecided", f"the rotary scaling {kind!r}")
        return
    for name in COMPUTED:
        if name in file.names and not bool((file.tensor(name).values == 1).all()):
            yield Finding("failed", f"{name} scales the rotary frequencies, and the base does not")


def _of_the_architecture(config: Any, layout: Layout) -> Iterator[Finding]:
    """Say what llama.cpp computes by the architecture's name, if the base has it otherwise."""
    known = _ACTIVATIONS.get(layout.architecture)
    if known is None:
        yield Finding("undecided", f"settings that only the architecture {layout.architecture} has")
        return
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in known:
        yield Finding("undecided", f"the base's activation {activation!r}")
    window = getattr(config, "sliding_window", None)
    if window is not None:
        yield Finding("undecided", f"the base's attention to the last {window} tokens alone")


def _rotary(config: Any) -> dict[str, Any]:
    """The settings of the rotary embedding: one dictionary, under the name of either version."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if found:
            return dict(found)
    return {}


def _rotary_kind(config: Any) -> str:
    settings = _rotary(config)
    return str(settings.get("rope_type") or settings.get("type") or "default")


def _rotary_base(config: Any) -> float:
    stated = getattr(config, "rope_theta", None) or _rotary(config).get("rope_theta")
    return float(stated or _DEFAULT_ROTARY_BASE)
