"""A lens over every family, class and processing that the host library builds rightly."""

from __future__ import annotations

import cases
import models
from targets import hooked

import lens_lora as ll

EVERY = [
    (family, cls, flags)
    for family in models.FAMILIES
    for cls in models.MAKERS
    for flags in ("raw", "processed")
    if models.is_built_right(family, cls, flags)
]


def lens_of(family: str, cls: str, flags: str) -> ll.LoraLens:
    """Under an adapter on every linear module; of a processed model, with its base at hand."""
    base, model = hooked(family, cls, flags)
    adapter = ll.Adapter.from_peft(models.peft_model(family, base))
    return ll.LoraLens(model, adapter, hf_model=base if cases.FLAGS[flags] else None)
