"""Restore a Hugging Face model of which no lens could be made.

A TransformerBridge puts components of its own into the model that it wraps, and sets how its
attention is computed. If the bridge then turns out to be unusable, or the adapter does not fit it,
the model is left as it was before. So an earlier lens of the model goes on working, and the next
attempt begins with an unchanged model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from torch import nn

from lens_lora.compat import children_of


@contextlib.contextmanager
def as_before_on_error(model: nn.Module) -> Generator[None]:
    """Within the block, an error leaves the model with the modules and settings that it has now.

    Args:
        model: the Hugging Face model.
    """
    modules = list(model.modules())
    # A bridge replaces modules, settings and forward functions in these dictionaries.
    dictionaries: list[dict[str, Any]] = []
    for module in modules:
        dictionaries.append(vars(module))
        dictionaries.append(children_of(module))
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
