"""What `explanations` makes public, for the tests of every result and of every call."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from results_by_hand import HEADER, META, explanation, two_prompts
from shared_questions import PROMPT, QUIET, RESPONSE

import lens_lora as ll

TOKENS = HEADER["str_tokens"]


def response_explanation(
    tokens: tuple[str, str] = (" a", " b"), *, fast: bool = False
) -> ll.results.ResponseExplanation:
    """One response of two tokens; four sites in layers 0 and 2."""
    nats = torch.tensor([[[-1.0, -2.0]], [[-0.5, -1.0]]])
    ids = torch.tensor([[[0], [1]]])
    changes = torch.tensor([[[0.25], [0.5]]])
    shifts = ll.results.TokenShifts(
        response=(tokens,),
        log_p=nats,
        entropy=-nats,
        rank=torch.tensor([[[3, 9]], [[0, 0]]]),
        kl=torch.tensor([[[1.0, 2.0]], [[0.5, 1.5]]]),
        promoted=changes,
        suppressed=-changes,
        promoted_ids=ids,
        suppressed_ids=ids,
        strings={"0": tokens[0], "1": tokens[1]},
        between=("ε = 0", "ε = 1"),
        str_tokens=TOKENS[:1],
        meta=META,
    )
    modules = dataclasses.replace(
        two_prompts(),
        values=torch.tensor([[1.0, 0.5, 1.2, 0.3]]),
        base=torch.zeros(1),
        adapted=torch.tensor([3.0]),
        str_tokens=TOKENS[:1],
    )
    interventions: dict[str, Any] = {}
    if not fast:
        interventions = {
            "path": dataclasses.replace(modules, method="path", at=math.nan),
            "add_one": torch.tensor([[0.1, 0.2], [0.3, 0.6]]),
            "leave_one_out": torch.tensor([[0.1, 0.0], [0.1, 0.1]]),
            "groups": ("layer 0", "layer 2"),
        }
    moved = torch.tensor([[0.4, -0.1, 0.2, 0.0], [0.1, 0.0, 0.2, 0.3]])
    return ll.results.ResponseExplanation(False, shifts, modules, moved, (1, 0), **interventions)


def readout_explanation(
    explained: ll.results.Explanation | None = None,
) -> ll.results.ReadoutExplanation:
    """Of one prompt: the parts of an explained margin, and first order by head and by rank."""
    e = explanation() if explained is None else explained
    whole = e.first_order.per_site
    by_head = dataclasses.replace(
        e.first_order,
        values=torch.stack([whole, torch.zeros_like(whole)], -1),
        by=("head",),
        heads=(1, 0, 0, 0),
    )
    by_rank = dataclasses.replace(
        e.first_order, values=torch.stack([whole / 4, whole * 3 / 4], -1), by=("rank",)
    )
    return ll.results.ReadoutExplanation(
        first_order=e.first_order,
        by_head=by_head,
        by_rank=by_rank,
        adapted_end=e.adapted_end,
        second_order=e.second_order,
        reliability=e.reliability,
        coupling=e.coupling,
        add_one=e.add_one,
        leave_one_out=e.leave_one_out,
        path=e.path,
        faithfulness=e.faithfulness,
        null=e.null,
    )


def explanations() -> ll.results.Explanations:
    return ll.results.Explanations((explanation(), explanation(fast=True)))


RESULTS = [response_explanation, readout_explanation, explanations]


# --- Calls, and the numbers that come back

CALLS = {
    "explain": lambda lens, t: ll.explain(lens, t[:1], 5, 9, **QUIET).margin,
    "explain_all": lambda lens, t: (
        ll.explain(lens, torch.cat([t, t]), 5, 9, fast=True, **QUIET)[-1].margin
    ),
    "explain a response": lambda lens, t: (
        ll.explain(lens, t[:1], response=RESPONSE, **QUIET).leave_one_out
    ),
    "explain a readout": lambda lens, t: (
        ll.explain(lens, t, readout=ll.Logit(3), **QUIET).faithfulness
    ),
}


# --- Calls that show a bar

WITH_BAR = {
    "explain": lambda t, folder, **o: ll.explain(t.lens, PROMPT, "w8", "w9", null=2, **o),
}
