"""What `banks` makes public, for the tests of every call."""

from __future__ import annotations

from typing import Any

import torch
from shared_questions import MARGIN, MARGIN_OF_WORDS, PROMPT, QUIET
from torch import Tensor

import lens_lora as ll

# --- Calls, and the numbers that come back


def _bank_of(lens: ll.LoraLens, tokens: Tensor) -> Any:
    return ll.bank(lens.model, tokens, MARGIN, hf_model=lens._hf_model, **QUIET)


CALLS = {
    "bank": lambda lens, t: _bank_of(lens, t).first_order(lens.adapter, by="rank", exact=True),
    "scan": lambda lens, t: torch.tensor(
        _bank_of(lens, t).scan([lens.adapter], **QUIET)["value"].to_numpy(), device="cpu"
    ),
}


# --- Calls that show a bar

WITH_BAR = {
    "bank": lambda t, folder, **o: ll.bank(t.lens.model, PROMPT, MARGIN_OF_WORDS, **o),
}
