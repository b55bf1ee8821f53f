"""Limits that tests set: the one place outside tests/core that knows how the core names them."""

from __future__ import annotations

from typing import Any

import pytest

import lens_lora as ll
from lens_lora.core.function import memory
from lens_lora.core.function.gate_graph import GateGraph


def tokens_at_once(patch: pytest.MonkeyPatch, **tokens: int) -> None:
    """Set how many tokens a pass of some kind has at most: `SLOPE_TOKENS=1`."""
    for name, number in tokens.items():
        patch.setattr(memory, name, number)


def every_block_runs_again(patch: pytest.MonkeyPatch) -> None:
    """Let each backward pass run the blocks again, as where a graph does not fit."""
    patch.setattr(memory, "must_rerun", lambda *_, **__: True)


def blocks_run_again(g: ll.Function) -> bool:
    """Whether a backward pass of g runs the blocks again."""
    return memory.must_rerun(g.lens, g.reading)


def covectors_at_once(patch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by how many covectors go back through a graph of the gates at once."""
    sizes: list[int] = []
    pulled_back = GateGraph.pulled_back

    def counted(graph: GateGraph, values: Any, covectors: Any) -> Any:
        sizes.append(len(covectors))
        return pulled_back(graph, values, covectors)

    patch.setattr(GateGraph, "pulled_back", counted)
    return sizes
