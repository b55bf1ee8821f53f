"""What `shifts` makes public, for the tests of every result."""

from __future__ import annotations

import math

import torch
from results_by_hand import HEADER, META, two_prompts

import lens_lora as ll

TOKENS = HEADER["str_tokens"]


def token_shifts() -> ll.results.TokenShifts:
    """Two responses, of two tokens and of one."""
    nats = torch.tensor([[-1.0, -2.0], [-3.0, math.nan]])
    each = torch.stack([nats, nats / 2])
    ids = torch.tensor([[[0], [1]], [[1], [0]]])
    changes = torch.full((2, 2, 1), 0.25)
    return ll.results.TokenShifts(
        response=((" a", " b"), (" c",)),
        log_p=each,
        entropy=-each,
        rank=torch.tensor([[[0, 3], [5, -1]]] * 2),
        kl=-each,
        promoted=changes,
        suppressed=-changes,
        promoted_ids=ids,
        suppressed_ids=ids,
        strings={"0": "a", "1": "b"},
        between=("base", "adapted"),
        str_tokens=TOKENS,
        meta=META,
    )


def kl_shares() -> ll.results.KLShares:
    """Two prompts, at two strengths."""
    scales = torch.tensor([0.1, 1.0])
    divergence = torch.tensor([[0.01, 1.0], [0.02, 3.0]])
    return ll.results.KLShares(two_prompts(), scales, divergence, two_prompts().per_site)


RESULTS = [token_shifts, kl_shares]
