"""A Hugging Face model that no lens could be made of has its own modules again.

A TransformerBridge puts components of its own into the model that it wraps, and sets how its
attention is computed. Where the bridge then turns out to be unusable, or the adapter does not fit
it, the model is left as it was: with the components of an earlier lens, which goes on working, or
with none, so that the next attempt begins with the model alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from torch import nn

from lens_lora.compat import modules_in


@contextlib.contextmanager
def as_before_on_error(model: nn.Module) -> Generator[None]:
    """Within the block, an error leaves the model with the modules and settings that it has now.

    Args:
        model: the Hugging Face model.
    """
    modules = list(model.modules())
    # In these dictionaries a bridge replaces modules, and sets settings and forwards.
    dictionaries: list[dict[str, Any]] = []
    for module in modules:
        dictionaries.append(vars(module))
        dictionaries.append(modules_in(module))
        config = getattr(module, "config", None)
        if hasattr(config, "__dict__"):
            dictionaries.append(vars(config))
    before = [dict(dictionary) for dictionary in dictionaries]
    try:
        yield
    except BaseException:
        for dictionary, entries in zip(dictionaries, before, strict=True):
            dictionary.clear()
            dictionary.update(entries)
        raise
