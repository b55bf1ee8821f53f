"""The forward passes of a model within a block of code, by kind and size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad

import lens_lora as ll
from lens_lora.edge_attribution.site_tangents import value_of
from lens_lora.responses.generate import Generation


@contextlib.contextmanager
def passes(lens: ll.LoraLens) -> Iterator[list[tuple[str, int, int]]]:
    """A list of every forward pass within the code: its kind, its rows and the tokens of a row.

    A pass is seen at the model's last block. Its kind is 'dual', 'graph' or 'plain'. Generation has
    batches of its own, and is left out.
    """
    seen: list[tuple[str, int, int]] = []
    generating: list[bool] = []
    run = Generation.run

    def generates(generation: Generation, **options: Any) -> Any:
        generating.append(True)
        try:
            return run(generation, **options)
        finally:
            generating.pop()

    def look(block: Any, args: Any, kwargs: Any) -> None:
        if generating:
            return
        residual = args[0] if args else kwargs["hidden_states"]
        rows, tokens = residual.shape[:2]
        seen.append((_kind_of(residual), rows, tokens))

    handle = lens.model.blocks[-1].register_forward_pre_hook(look, with_kwargs=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Generation, "run", generates)
            yield seen
    finally:
        handle.remove()


def _kind_of(residual: Any) -> str:
    """Whether a pass carries tangents, builds a graph, or does neither.

    Args:
        residual: what its last block reads; a tensor, or a dual number of the package.
    """
    value = value_of(residual)
    if value is not residual or fwad.unpack_dual(value).tangent is not None:
        return "dual"
    if torch.is_grad_enabled() and value.requires_grad:
        return "graph"
    return "plain"
