"""A TransformerBridge runs with the key-value cache of its Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lens_lora import compat
from lens_lora.compat import add_pre_hook
from lens_lora.spans import Temporary, temporary


@temporary
def cache_is_shown(span: Temporary, attentions: Iterable[Any]) -> None:
    """Within the block, each attention is given the cache by the name that it looks for."""
    span.enter_context(compat.without_warnings(".past_key_values. is deprecated"))
    for attention in attentions:
        add_pre_hook(span, attention, _named_as_before, with_kwargs=True)


def _named_as_before(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Rename the cache: attention of transformers 5.24 is given `cache`, not `past_key_values`."""
    if kwargs.get("past_key_values") is None and kwargs.get("cache") is not None:
        kwargs = {**kwargs, "past_key_values": kwargs["cache"]}
    return args, kwargs
