"""What the calls of all folders' `made_public.py` ask, of ids and of text."""

from __future__ import annotations

import torch
from torch import Tensor

import lens_lora as ll

QUIET = {"progress": False}

# Of ids, for calls whose numbers are compared.
MARGIN = ll.Margin(5, 9)
RESPONSE = torch.tensor([5, 9], device="cpu")

# Of text, for calls with and without a bar.
PROMPT = "w5 w6 w7"
LONG = " ".join(["w5"] * 30)
MARGIN_OF_WORDS = ll.Margin("w8", "w9")


def directions(lens: ll.LoraLens) -> Tensor:
    """Two directions of the residual stream."""
    return torch.eye(16, dtype=lens.dtype, device="cpu")[:2]
