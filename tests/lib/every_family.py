"""A lens over every family, class and processing that the host library can build."""

from __future__ import annotations

import cases
import models
from targets import hooked

import lens_lora as ll

EVERY = [(f, c, p) for f in models.FAMILIES for c in models.MAKERS for p in ("raw", "processed")]


def lens_of(family: str, cls: str, flags: str) -> ll.LoraLens | None:
    """None where the host library cannot build the model, or builds it wrongly (refused)."""
    base, model = hooked(family, cls, flags)
    if isinstance(model, Exception):
        assert (family, cls) == ("phi", "HookedTransformer")
        return None
    adapter = ll.Adapter.from_peft(models.peft_model(family, base))
    try:
        return ll.LoraLens(model, adapter, hf_model=base if cases.FLAGS[flags] else None)
    except ll.ModelStateError:
        assert (family, flags) == ("mixtral", "processed") and not models.has_bridge()
        return None
