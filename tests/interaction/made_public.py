"""What `interaction` makes public, for the tests of every result and of every call."""

from __future__ import annotations

from typing import Any

import torch
from results_by_hand import HEADER, META, SITES
from shared_questions import LONG, MARGIN, MARGIN_OF_WORDS, PROMPT
from torch import Tensor

import lens_lora as ll

# --- Results, made by hand


def together() -> ll.results.Together:
    """Two adapters, whose interaction was split by two groups of modules."""
    return ll.results.Together(
        adapters=("lyon", "<b>osaka</b>"),
        alone=torch.tensor([[1.0, 2.0], [0.5, -1.0]]),
        added=torch.tensor([[0.5, 1.5], [1.0, -0.5]]),
        first=("lyon",),
        second=("<b>osaka</b>",),
        interaction=torch.tensor([[-0.5], [0.5]]),
        noise_floor=torch.full((2,), 1e-6),
        parts=torch.tensor([[[[-0.5, 0.0], [0.25, -0.25]]], [[[0.5, 0.0], [0.0, 0.0]]]]),
        groups=("q", "down"),
        nodes=9,
        allowed=torch.full((2, 1), 1e-3),
        group_error=torch.full((2, 1), 1e-4),
        quadrature=ll.results.Quadrature(3, 1e-3, 2e-4, 1e-4, True),
        **HEADER,
    )


def reconciled() -> ll.results.Reconciled:
    """Two behaviours, of which the first holds once a module is left out."""
    held = torch.tensor([[0.2, 0.9], [0.9, 0.8], [0.5, 0.5], [0.3, 0.7]])
    return ll.results.Reconciled(
        left_out=("model.layers.0.mlp.down_proj",),
        behaviours=("lyon", "<b>osaka</b>"),
        readouts=("margin(' Lyon' − ' Paris')", "margin(' Osaka' − ' Tokyo')"),
        held=held,
        held_out=held / 2,
        sizes=(0, 1, 2),
        along=torch.tensor([[0.2, 0.9], [0.9, 0.8], [1.0, 0.3]]),
        strength=0.5,
        sites=SITES,
        meta=META,
    )


RESULTS = [together, reconciled]


# --- Calls, and the numbers that come back


def _halves(lens: ll.LoraLens) -> dict[str, ll.Adapter]:
    """The adapter's first modules as one adapter, and the others as another."""
    paths = list(lens.adapter.modules)
    half = len(paths) // 2
    return {
        "first": lens.adapter.only(*paths[:half]),
        "second": lens.adapter.only(*paths[half:]),
    }


def _parts_of_together(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    found = ll.together(
        lens, _halves(lens), tokens, MARGIN, group="kind", max_nodes=9, progress=False
    )
    return found.parts


def _reconciled_along(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    behaviours = {"first": (tokens, MARGIN), "second": (tokens, ll.Logit(3))}
    return ll.reconcile(lens, _halves(lens), behaviours, "second", progress=False).along


CALLS = {"together": _parts_of_together, "reconcile": _reconciled_along}


# --- Calls that show a bar


def _together_with_bar(tiny: Any, folder: Any, **options: Any) -> ll.results.Together:
    halves = _attention_and_mlps(tiny.lens)
    prompts = [LONG] * 10
    return ll.together(
        tiny.lens, halves, prompts, MARGIN_OF_WORDS, group="site", max_nodes=9, **options
    )


def _reconcile_with_bar(tiny: Any, folder: Any, **options: Any) -> ll.results.Reconciled:
    behaviours = {"attention": (PROMPT, MARGIN_OF_WORDS), "MLPs": (PROMPT, ll.Logit(3))}
    halves = _attention_and_mlps(tiny.lens)
    return ll.reconcile(tiny.lens, halves, behaviours, "MLPs", draws=20, **options)


def _attention_and_mlps(lens: ll.LoraLens) -> dict[str, ll.Adapter]:
    return {"attention": lens.adapter.only("*attn*"), "MLPs": lens.adapter.only("*mlp*")}


WITH_BAR = {"together": _together_with_bar, "reconcile": _reconcile_with_bar}
