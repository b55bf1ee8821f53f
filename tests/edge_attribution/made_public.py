"""What `edge_attribution` makes public, for the tests of every result and of every call."""

from __future__ import annotations

import torch
from results_by_hand import HEADER, SITES
from shared_questions import LONG, MARGIN, MARGIN_OF_WORDS, PROMPT, QUIET

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


# --- Calls, and the numbers that come back

CALLS = {
    "edges": lambda lens, t: ll.edges(lens, t, MARGIN, "head", **QUIET),
    "patch_edges": lambda lens, t: ll.patch_edges(
        lens, t, MARGIN, [(lens.sites[0].name, "logits")], "leave_one_out", **QUIET
    ),
}


# --- Calls that show a bar

WITH_BAR = {
    "edges": lambda t, folder, **o: ll.edges(t.lens, [LONG] * 600, MARGIN_OF_WORDS, **o),
    "patch_edges": lambda t, folder, **o: ll.patch_edges(
        t.deep, PROMPT, MARGIN_OF_WORDS, [(site.name, "logits") for site in t.deep.sites], **o
    ),
}
