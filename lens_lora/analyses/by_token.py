"""First order by output token: A_lt = ∂ℓ_t/∂ε_l, ℓ_t = log p(y_t | x, y_<t).

By position says where a module wrote, by token what it changed; Σ_t A_lt is the first order of the
response's log-probability. One row holds all ℓ_t, so there are three ways to the same numbers:

1. Reverse mode, by site only: a covector for each token goes back through one graph, in batches.
2. Reverse mode, split further: a backward pass for each token through one graph.
3. Forward mode, by site only: a tangent for each site.

Cost: about a forward pass a token in reverse mode, half of one a site in forward mode.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.asked import Asked
from lens_lora.engine.batching import Mode, chosen_mode, covectors_at_once
from lens_lora.engine.dual_pass import tangent_of
from lens_lora.engine.forward import Part, part_tangents
from lens_lora.engine.function import read_tokens
from lens_lora.engine.gate_graph import gate_graph
from lens_lora.engine.reverse import token_slopes
from lens_lora.errors import ArgumentError
from lens_lora.readouts.rows import LogProbs

__all__ = ["by_token", "own_tokens_only", "response_tokens"]


def by_token(
    asked: Asked,
    gates: Float[Tensor, "site"],
    axes: tuple[str, ...],
    mode: Mode,
    max_memory: float | None,
    progress: bool,
) -> Float[Tensor, "batch site *by_and_token"]:
    """A_lt of every site and token; beyond a response's own tokens see `own_tokens_only`.

    Args:
        asked: about one response a prompt.
        gates: at which the derivative is taken.
        axes: position, head and rank, as far as they are asked for.
        mode: 'auto' takes the cheaper way, by count.
        max_memory: bytes for the covectors or tangents that go at once.
        progress: show a bar.

    Raises:
        ArgumentError: a readout that is not one response, or forward mode split further.
        ModelStateError: as for `first_order`.
    """
    read = _response(asked)
    count = int(asked.reading.prompts.slots)
    if axes and mode == "forward":
        raise ArgumentError(
            f"by={(*axes, 'token')} in forward mode takes a pass for each part; use mode='reverse'."
        )
    way = "reverse" if axes else chosen_mode(mode, asked.lens, count)
    if axes:
        values = token_slopes(asked.lens, asked.reading, gates, axes)
    elif way == "reverse":
        values = _covectors(asked, gates, max_memory, progress)
    else:
        values = _tangents(asked, read, gates, max_memory, progress)
    return values


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
    asked: Asked, gates: Float[Tensor, "site"], max_memory: float | None, progress: bool
) -> Float[Tensor, "batch site token"]:
    lens, reading = asked.lens, asked.reading
    graph = gate_graph(lens, reading.prompts, gates, lambda: read_tokens(lens, reading).T)
    step = covectors_at_once(lens, reading.prompts, max_memory)
    return graph.slopes_of_each(step, progress=progress).permute(1, 2, 0)


def _tangents(
    asked: Asked,
    read: LogProbs,
    gates: Float[Tensor, "site"],
    max_memory: float | None,
    progress: bool,
) -> Float[Tensor, "batch site token"]:
    def of_tokens(
        rows: Float[Tensor, "batch site slot vocab"],
    ) -> Float[Tensor, "batch site token"]:
        many, logits = read.repeat(rows.shape[1]), rows.flatten(0, 1)
        terms = many.by_token(many.log_probs(logits[many.places(logits.device)]))
        return tangent_of(terms).unflatten(0, rows.shape[:2])

    parts = [Part(index) for index in range(len(asked.lens.sites))]
    return part_tangents(
        asked.lens,
        asked.reading.prompts,
        gates,
        parts,
        of_tokens,
        max_memory=max_memory,
        progress=progress,
    )
