"""First order by output token: A_lt = ∂ℓ_t/∂ε_l, ℓ_t = log p(y_t | x, y_<t).

By position says where a module wrote, by token what it changed; Σ_t A_lt is the first order of the
response's log-probability. One row holds all ℓ_t, so there are two ways to the same numbers:

1. Reverse mode: a covector for each token goes back through one graph, in batches; split by
   position, head or rank, a backward pass for each token, the gradients contracted as they come.
2. Forward mode: a tangent for each site, group of sites or part, from its block on.

The cheaper one is taken, by count. Cost: about a forward pass a token in reverse mode; in forward
mode one a tangent that starts in the first block, half of one where they start in every block.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.asked import Asked
from lens_lora.engine.batching import Mode, chosen_mode, graph_groups
from lens_lora.engine.gate_graph import slopes_of_each
from lens_lora.engine.memory import must_rerun
from lens_lora.engine.read import differentiable_tokens
from lens_lora.engine.reverse import joined, token_slopes
from lens_lora.engine.tangent_slopes import (
    TokenTangents,
    all_parts,
    group_slopes,
    tangent_slopes,
)
from lens_lora.errors import ArgumentError
from lens_lora.hooked.sites import Groups, indicator
from lens_lora.readouts.picks import LogProbs

__all__ = ["by_token", "own_tokens_only", "response_tokens"]


def by_token(
    asked: Asked,
    gates: Float[Tensor, "site"],
    axes: tuple[str, ...],
    mode: Mode,
    progress: bool,
    groups: Groups | None = None,
) -> tuple[Float[Tensor, "batch site_or_group *by_and_token"], str]:
    """A_lt of every site (or group) and token, and the mode; see `own_tokens_only`.

    Args:
        asked: about one response a prompt.
        gates: at which the derivative is taken.
        axes: position, head and rank, as far as they are asked for.
        mode: 'auto' takes the cheaper way, by count.
        progress: show a bar.
        groups: of sites, whose sums are asked for; without axes.

    Raises:
        ArgumentError: a readout that is not one response, or too little memory.
        ModelStateError: as for `first_order`.
    """
    _response(asked)
    lens, reading = asked.lens, asked.reading
    way = chosen_mode(mode, lens, int(reading.prompts.slots), _starts(asked, axes, groups))
    if way == "forward":
        tokens = TokenTangents(lens, reading)
        values = (
            tangent_slopes(lens, reading, gates, axes, tokens=tokens, progress=progress)
            if groups is None
            else group_slopes(lens, reading.prompts, gates, groups, tokens, progress=progress)
        )
        if tokens.value is not None and not bool(gates.any()):
            asked.know_base(tokens.value)
        return values, way
    if axes:
        return _split(asked, gates, axes), way
    values = _covectors(asked, gates, progress)
    if groups is not None:
        members = indicator(groups, len(lens.sites)).to(values)
        values = torch.einsum("gs,bst->bgt", members, values)
    return values, way


def _starts(asked: Asked, axes: tuple[str, ...], groups: Groups | None) -> list[int]:
    """The layer at which each tangent of forward mode starts."""
    layers = [site.layer for site in asked.lens.sites]
    if groups is not None:
        return [min(layers[i] for i in of) for of in groups.values()]
    return [layers[part.site] for part in all_parts(asked.lens, asked.reading.prompts, axes)]


def _split(
    asked: Asked, gates: Float[Tensor, "site"], axes: tuple[str, ...]
) -> Float[Tensor, "batch site *by_and_token"]:
    """By reverse mode, as many prompts at a time as there is memory for."""
    lens, groups = asked.lens, graph_groups(asked.lens, asked.reading)
    return joined([token_slopes(lens, some, gates, axes) for some in groups])


def own_tokens_only(
    asked: Asked, values: Float[Tensor, "batch *rest token"]
) -> Float[Tensor, "batch *rest token"]:
    """NaN beyond a response's own tokens.

    Args:
        asked: about one response a prompt.
        values: by token, on the last axis.
    """
    own = asked.reading.prompts.read_mask.to(values.device)
    return torch.where(own.view(len(own), *[1] * (values.ndim - 2), -1), values, torch.nan)


def response_tokens(asked: Asked) -> tuple[tuple[str, ...], ...]:
    """Each prompt's y_1 … y_T as strings.

    Args:
        asked: about one response a prompt.
    """
    read = _response(asked)
    ids = [read.tokens[read.owner == prompt].tolist() for prompt in range(read.batch)]
    return tuple(tuple(asked.lens.decode(row)) for row in ids)


def _response(asked: Asked) -> LogProbs:
    read = asked.reading.read
    if isinstance(read, LogProbs) and read.is_one_response:
        return read
    raise ArgumentError(
        f"by='token' splits the log-probability of one response, and the readout is "
        f"{asked.readout.label}; use AnswerLogProb(response), for a margin once for each answer."
    )


def _covectors(
    asked: Asked, gates: Float[Tensor, "site"], progress: bool
) -> Float[Tensor, "batch site token"]:
    lens, reading = asked.lens, asked.reading
    if must_rerun(lens, reading):
        return _split(asked, gates, ())
    found = slopes_of_each(
        lens,
        reading,
        gates,
        lambda: differentiable_tokens(lens, reading).T,
        progress=progress,
    )
    return found.permute(1, 2, 0)
