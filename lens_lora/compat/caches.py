"""Key-value caches of transformer-lens and of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lens_lora.errors import ModelStateError


def cached_tokens(cache: Any) -> int:
    """The number of tokens that a key-value cache of transformers or transformer-lens holds a row.

    The two libraries have no common method for it, and transformer-lens has none at all.

    Raises:
        ModelStateError: a cache of another kind.
    """
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    entries = getattr(cache, "entries", None)
    if entries:
        return int(entries[0].past_keys.shape[1])
    raise ModelStateError(
        f"a cache of the class {type(cache).__name__} does not say how many tokens it holds; run "
        "the model without it (use_past_kv_cache=False)."
    )


def cached_mask(cache: Any) -> Tensor | None:
    """Return which tokens in a cache of transformer-lens are not padding, [row, cached].

    It is None for other caches: transformers' classes hold no mask, and each pass brings a whole
    one.
    """
    mask = getattr(cache, "previous_attention_mask", None)
    return mask if isinstance(mask, Tensor) else None
