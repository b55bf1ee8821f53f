"""What `formats` makes public, for the tests of every call."""

from __future__ import annotations

from typing import Any

import models

import lens_lora as ll

# --- Calls that show a bar


def _between_with_bar(tiny: Any, folder: Any, **options: Any) -> ll.Adapter:
    base = models.hf_model("llama")
    tuned = models.peft_model("llama", base).merge_and_unload()
    return ll.Adapter.between(base, tuned, **options)


WITH_BAR = {"Adapter.between": _between_with_bar}
