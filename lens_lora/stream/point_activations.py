"""Activations of many texts at hook points, in batches of texts of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core import (
    AnswerLike,
    ChosenPositions,
    Generated,
    LoraLens,
    Names,
    Prompts,
    PromptsLike,
    Recording,
    Scale,
)
from lens_lora.errors import require_finite
from lens_lora.texts.batches import by_length

# The activations h of a batch of texts by hook point, one tensor for each scale.
ActivationsAtScales = dict[str, list[Float[Tensor, "text token _d"]]]


# Texts, or texts with the responses to them.
TextsLike = PromptsLike | tuple[PromptsLike, AnswerLike] | Generated


def text_rows(lens: LoraLens, texts: TextsLike) -> Prompts:
    """The texts as rows of tokens, each with its response if it has one.

    Args:
        lens: the adapter over the model.
        texts: strings, conversations, ids, or `Prompts`; a tuple (prompts, responses); or what
            `LoraLens.generate` returned, whose tokens are the responses.

    Raises:
        TokenError, PromptError: a text or response that does not fit the model.
    """
    if isinstance(texts, Generated):
        return lens.prompts(texts.prompts, texts)
    if isinstance(texts, tuple) and len(texts) == 2 and not isinstance(texts[1], Mapping):
        prompts, responses = cast("tuple[PromptsLike, AnswerLike]", texts)
        return lens.prompts(prompts, responses)
    return lens.function(cast("PromptsLike", texts)).prompts


def positions_in(rows: Prompts, positions: Any) -> Bool[Tensor, "text token"]:
    """The tokens of each text at these positions.

    Args:
        rows: the texts.
        positions: positions in any form that `core/readout/positions.py` describes.

    Raises:
        ArgumentError: anything that does not describe positions.
    """
    positions_of_text = ChosenPositions.of(positions)
    chosen = torch.zeros_like(rows.real, device="cpu")
    starts = rows.asked_lengths
    for text, length in enumerate(rows.lengths.tolist()):
        mask = positions_of_text.mask(length, starts[text])
        chosen[text, :length] = torch.from_numpy(mask)
    return chosen


def activations_at(
    lens: LoraLens, rows: Prompts, names: Names, scales: Sequence[Scale]
) -> Iterator[tuple[list[int], ActivationsAtScales]]:
    """Yield the indices of each batch of texts, with h at each hook point and scale.

    The axis of heads is flattened, and padding is NaN.

    Cost: one forward pass of every text for each scale.

    Args:
        lens: the adapter over the model.
        rows: the texts.
        names: hook points by name, glob or predicate.
        scales: the gates of each run, for all texts together or [text, site].

    Raises:
        SiteError: a hook point that the model lacks, or gates of another number of texts.
        ModelStateError: a hook point that is named in full never fires or has no positions, or
            globs match only such points.
        NumericsError: an activation is not finite.
    """
    f = lens.function(rows)
    named = lens.points(names).computed()
    in_full = named.in_full
    points = named.wanted
    gates_of_runs = [lens.gates_of_rows(scale, rows.batch) for scale in scales]
    is_first_batch = True
    for index, batch in by_length(rows, f.passes.tokens_at_once()):
        passes = f.of_rows(batch).passes
        runs: list[Recording] = []
        for gates in gates_of_runs:
            # Texts are run in another order than that in which they were passed.
            gates_of_batch = gates if gates.ndim == 1 else gates[index]
            runs.append(passes.record(points, gates_of_batch, in_full))
        if is_first_batch:
            # The first batch shows which of the points that globs match have activations.
            points = named.fired(runs[0].firings)
            points = passes.positioned(runs[0], points, in_full)
            is_first_batch = False
        yield index, {name: _at_point(lens, batch, name, runs) for name in points}


def _at_point(
    lens: LoraLens, batch: Prompts, name: str, runs: Sequence[Recording]
) -> list[Float[Tensor, "text token _d"]]:
    """The activation at the last firing of one hook point, in each run."""
    real = batch.real.cpu()
    activations: list[Tensor] = []
    for run in runs:
        h = run.firings[name][-1].cpu().to(lens.gate_dtype).flatten(2)
        # Some points have one row for all texts.
        h = h.expand(batch.batch, -1, -1)
        require_finite(h[real], f"the activation at {name}")
        activations.append(h.masked_fill(~real[..., None], torch.nan))
    return activations
