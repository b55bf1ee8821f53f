"""The embedded model, its hooked forms and its adapter, loaded once a process."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import lens_lora as ll
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model

ADAPTER = Path(ll.__file__).parent / "demonstration" / "lyon_adapter"
PROMPT = "The capital of France is"
DOC = " Lyon"
PRE = " Paris"


@cache
def hugging_face():
    return load_embedded(quiet=True)


@cache
def lens(kind: str) -> ll.LoraLens:
    hf, _ = hugging_face()
    return ll.LoraLens(hooked(hf, kind), ll.load_adapter(ADAPTER))


def hooked(hf: Any, kind: str) -> Any:
    """A copy of a Hugging Face model as this class of hooked model, with the embedded tokenizer."""
    _, tokenizer = hugging_face()
    model, class_name = hooked_model(copy.deepcopy(hf), tokenizer, kind=kind)
    assert class_name == kind
    return model
