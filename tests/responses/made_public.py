"""What `responses` makes public, for the tests of every call."""

from __future__ import annotations

import torch
from shared_questions import PROMPT, QUIET

# --- Calls, and the numbers that come back

CALLS = {
    "generate": lambda lens, t: torch.stack(
        lens.generate(t, 4, eos_token_id=(), **QUIET).ids
    ).double(),
}


# --- Calls that show a bar

WITH_BAR = {
    "LoraLens.generate": lambda t, folder, **o: t.lens.generate(PROMPT, 12, eos_token_id=(), **o),
}
