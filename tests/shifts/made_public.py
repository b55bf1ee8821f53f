"""What `shifts` makes public, for the tests of every result and of every call."""

from __future__ import annotations

import math

import torch
from results_by_hand import HEADER, META, two_prompts
from shared_questions import MARGIN, MARGIN_OF_WORDS, PROMPT, QUIET, RESPONSE

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


# --- Calls, and the numbers that come back

CALLS = {
    "kl_shares": lambda lens, t: ll.kl_shares(lens, t, **QUIET).divergence,
    "token_shifts": lambda lens, t: ll.token_shifts(lens, t, RESPONSE).kl,
    "logit_shift": lambda lens, t: ll.logit_shift(lens, t, **QUIET),
    "joint": lambda lens, t: ll.logit_shift(lens, t, by_site=False),
    "tangents": lambda lens, t: ll.tangents(lens, t),
    "gradients": lambda lens, t: ll.gradients(lens, t, MARGIN),
}


# --- Calls that show a bar

WITH_BAR = {
    "kl_shares": lambda t, folder, **o: ll.kl_shares(
        t.lens, PROMPT, scales=[0.01 * s for s in range(1, 100)], **o
    ),
    "logit_shift": lambda t, folder, **o: ll.logit_shift(t.lens, PROMPT, **o),
}


# --- Calls that show none, as they are short

WITHOUT_BAR = {
    "gradients": lambda t: ll.gradients(t.lens, PROMPT, MARGIN_OF_WORDS),
    "tangents": lambda t: ll.tangents(t.lens, PROMPT),
    "token_shifts": lambda t: ll.token_shifts(t.lens, PROMPT, "w5 w6"),
}
