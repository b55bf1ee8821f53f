"""How does a TransformerBridge go on from a key-value cache?

Its Hugging Face model keeps the cache. One thing must be mended for it to be used: transformers
5.24 gives attention the cache as `cache`, and attention of a bridge looks for `past_key_values`. So
a hook before each attention gives it the cache under the second name as well.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora import compat
from lens_lora.compat import add_pre_hook
from lens_lora.core.model.bridge_components import attentions
from lens_lora.spans import Temporary, temporary


def run_with_cache(
    bridge: Any, tokens: Int[Tensor, "row new"], cache: Any, mask: Int[Tensor, "row _all"] | None
) -> tuple[Float[Tensor, "row _read vocab"], Any]:
    """(logits, cache) of the tokens that follow those in the cache; None to begin one.

    Args:
        bridge: the bridge, which numbers the positions of padded rows by the mask.
        tokens: the tokens of each row.
        cache: what an earlier call gave.
        mask: 0 at padding on the left, 1 elsewhere; None where nothing is padded.
    """
    padded = {} if mask is None else {"attention_mask": mask}
    with _cache_is_shown(bridge):
        return bridge(
            tokens,
            return_type="logits_and_cache",
            use_cache=True,
            past_key_values=cache,
            **padded,
        )


@temporary
def _cache_is_shown(span: Temporary, bridge: Any) -> None:
    """Within the block, each attention is given the cache by the name that it looks for."""
    span.enter_context(compat.without_warnings(".past_key_values. is deprecated"))
    for attention in attentions(bridge):
        add_pre_hook(span, attention, _named_as_before, with_kwargs=True)


def _named_as_before(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Name the cache `past_key_values` where attention is given `cache` alone."""
    if kwargs.get("past_key_values") is None and kwargs.get("cache") is not None:
        kwargs = {**kwargs, "past_key_values": kwargs["cache"]}
    return args, kwargs
