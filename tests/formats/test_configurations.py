"""Which fields of a configuration decide logits, also in a configuration within another one."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from lens_lora.formats.configurations import differing_fields


def of_text(**fields: Any) -> transformers.PretrainedConfig:
    """The configuration of a small language model."""
    return transformers.LlamaConfig(
        hidden_size=16, num_attention_heads=4, num_hidden_layers=2, **fields
    )


def multimodal(**fields: Any) -> transformers.PretrainedConfig:
    """A configuration of images and text, whose text has these fields."""
    return transformers.LlavaConfig(text_config=of_text(**fields).to_dict())


CHANGES = {
    "how a cache is used": {"use_cache": False},
    "how weights begin": {"initializer_range": 0.5},
    "whether weights are tied": {"tie_word_embeddings": True},
    "how tokens are drawn": {"eos_token_id": 5},
    "how many positions there may be": {"max_position_embeddings": 77},
}


@pytest.mark.parametrize("make", [of_text, multimodal])
@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_a_field_that_decides_no_logits_is_left_out(make: Any, changed: dict[str, Any]):
    assert differing_fields(make(), make(**changed)) == {}


@pytest.mark.parametrize(("make", "before"), [(of_text, ""), (multimodal, "text_config.")])
def test_a_field_that_decides_logits_is_named_with_both_values(make: Any, before: str):
    differing = differing_fields(make(rms_norm_eps=1e-6), make(rms_norm_eps=1e-5))
    assert differing == {f"{before}rms_norm_eps": (1e-6, 1e-5)}


@pytest.mark.parametrize(("make", "before"), [(of_text, ""), (multimodal, "text_config.")])
def test_the_number_of_positions_counts_where_the_rotary_embedding_is_scaled(
    make: Any, before: str
):
    scaled = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    one = make(**scaled, max_position_embeddings=64)
    other = make(**scaled, max_position_embeddings=128)
    assert differing_fields(one, other)[f"{before}max_position_embeddings"] == (64, 128)
