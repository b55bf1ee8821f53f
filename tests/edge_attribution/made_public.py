"""What `edge_attribution` makes public, for the tests of every result."""

from __future__ import annotations

import torch
from results_by_hand import HEADER, SITES

import lens_lora as ll


def edges(*, by_position: bool = True) -> ll.results.Edges:
    """Four sites in layers 0 and 2, of which the last one writes to the logits alone."""
    readers = ("blocks.0.attn", "blocks.0.mlp", "blocks.2.attn", "blocks.2.mlp", "logits")
    exists = torch.tensor([[0, 1, 1, 1, 1]] * 2 + [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    values = torch.arange(-20.0, 20.0).view(2, 4, 5) * exists
    return ll.results.Edges(
        values=values[..., None].expand(-1, -1, -1, 4).clone() / 4 if by_position else values,
        groups={site.name: (i,) for i, site in enumerate(SITES)},
        readers=readers,
        exists=exists,
        at=0.0,
        by=("position",) if by_position else (),
        **HEADER,
    )


RESULTS = [edges]
