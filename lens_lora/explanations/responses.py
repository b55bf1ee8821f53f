"""The explanation of a whole response to one prompt, given or generated.

1. Each token's distribution at base and adapted model, exactly (`token_shifts`).
2. Which modules hold the divergence of the whole response: first order of KL at ε = 1, which is
   roughly by how much KL falls if the module is left out.
3. The same of log p of the tokens that changed most, one by one: which module moved which token.
4. Unless fast: the path integral of KL, a complete split of it among modules; and exactly, log p of
   every token with each layer alone added to the base model, and left out of the adapted one.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.core import Evaluations, Function, first_order
from lens_lora.explanations.explanation import ResponseExplanation
from lens_lora.explanations.steps import PATH_NODES, PATH_TOLERANCE, answer_tokens, step
from lens_lora.path.path_attribution import path_attribution
from lens_lora.responses.answers import AnswerLike, AnswerLogProb
from lens_lora.responses.generate import side_by_side
from lens_lora.responses.kl import KL
from lens_lora.shifts.token_shifts import token_shifts

# Modules are listed for so many tokens, those that changed most.
_TOKENS_MOVED = 8
# The steps of the progress bar: the quick ones, and those that `_in_full` adds.
_QUICK_STEPS = 4
_SLOW_STEPS = 2


def explained_response(
    f: Function, response: AnswerLike, *, is_generated: bool, fast: bool
) -> ResponseExplanation:
    """The explanation of a response to one prompt.

    Args:
        f: the logits after the prompt.
        response: the response.
        is_generated: whether the adapted model generated it itself.
        fast: leave out the path integral, and layers added and left out.
    """
    lens = f.lens
    progress = f.progress
    log_p = Evaluations(f.about(AnswerLogProb(response)))
    kl = Evaluations(f.about(KL(response)))
    max_tokens = answer_tokens(fast=fast)
    steps = _QUICK_STEPS
    if not fast:
        steps += _SLOW_STEPS
    with tqdm(total=steps, desc="explain", leave=False, disable=not progress) as bar:
        with step(bar, "what both models answer"):
            (answers,) = side_by_side(lens, f.prompts, max_tokens, response, progress=progress)
        with step(bar, "each token's distribution"):
            shifts = token_shifts(lens, f.prompts, response)
        with step(bar, "modules of the divergence"):
            modules = first_order.of(kl, at=1.0)
        with step(bar, "modules of the tokens that changed most"):
            # There is one response, to one prompt.
            kl_of_tokens = shifts.kl[0, 0]
            changed_most = kl_of_tokens.argsort(descending=True)[:_TOKENS_MOVED].tolist()
            slopes = log_p.with_progress(False).slopes_of_tokens(changed_most, at=1.0)[:, 0]
        quick = ResponseExplanation(
            is_generated=is_generated,
            shifts=shifts,
            modules=modules,
            moved=slopes,
            moved_tokens=tuple(changed_most),
            answers=answers,
        )
        return quick if fast else _in_full(log_p, kl, quick, bar)


def _in_full(
    log_p: Function, kl: Function, quick: ResponseExplanation, bar: tqdm
) -> ResponseExplanation:
    """Add what needs many passes to a quick explanation: the path integral, and interventions."""
    with step(bar, "path integral"):
        path = path_attribution.of(kl, tol=PATH_TOLERANCE, max_nodes=PATH_NODES)
    groups = log_p.lens.sites.grouped("layer")
    with step(bar, "each layer added and left out"):
        add_one, leave_one_out = _layers_by_token(log_p, log_p.lens.sites.indicator(groups))
    return dataclasses.replace(
        quick,
        path=path,
        groups=tuple(groups),
        add_one=add_one,
        leave_one_out=leave_one_out,
    )


def _layers_by_token(
    g: Function, members: Float[Tensor, "group site"]
) -> tuple[Float[Tensor, "group token"], Float[Tensor, "group token"]]:
    """Exact effects on log p of each token: ℓ_t(e_G) − ℓ_t(0), and ℓ_t(1) − ℓ_t(1 − e_G).

    Cost: two forward passes, and two for each group.
    """
    count = len(members)
    off = torch.zeros_like(members[:1])
    on = torch.ones_like(off)
    points = torch.cat([off, on, members, 1 - members])
    values = g.token_values(points)[:, 0]
    base, adapted, alone, without = values.split([1, 1, count, count])
    return alone - base, adapted - without
