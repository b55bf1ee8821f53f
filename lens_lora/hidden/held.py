"""Activations of many texts at hook points: batches of texts of like length, h at each point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core import (
    LoraLens,
    Names,
    Prompts,
    Scale,
)
from lens_lora.core.function.forward import require_finite
from lens_lora.core.function.interventions import positioned, record
from lens_lora.core.function.memory import ROW_TOKENS
from lens_lora.core.model.sites import computed, require_fired
from lens_lora.core.results.tokens import chosen_positions
from lens_lora.texts.batches import by_length

Held = dict[str, list[Float[Tensor, "text token _d"]]]


def positions_in(rows: Prompts, positions: Any) -> Bool[Tensor, "text token"]:
    """The tokens of each text that are meant."""
    chosen = torch.zeros_like(rows.real, device="cpu")
    for row, length, start in zip(chosen, rows.lengths.tolist(), rows.asked_lengths, strict=True):
        row[:length] = torch.from_numpy(chosen_positions(positions, length, start))
    return chosen


def activations_at(
    lens: LoraLens, rows: Prompts, names: Names, scales: Sequence[Scale]
) -> Iterator[tuple[list[int], Held]]:
    """Batches of texts, and h at each hook point at each scale: heads laid flat, NaN at padding."""
    in_full, points = computed(lens, names)
    for number, (index, batch) in enumerate(by_length(rows, ROW_TOKENS)):
        runs = [record(lens, batch, scale, points, in_full) for scale in scales]
        real = batch.real.cpu()
        if number == 0:
            points = require_fired(lens, runs[0].firings, in_full, points)
            points = positioned(lens, batch, runs[0], points, in_full, 0.0)
        held: Held = {}
        for name in points:
            by_run = [run.firings[name][-1].cpu().to(lens.gate_dtype).flatten(2) for run in runs]
            ends = [h.expand(len(real), -1, -1) for h in by_run]
            for h in ends:
                require_finite(h[real], f"the activation at {name}")
            held[name] = [h.masked_fill(~real[..., None], torch.nan) for h in ends]
        yield index, held
