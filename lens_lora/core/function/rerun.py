"""Blocks that keep only their inputs, and run once more in the backward pass.

1. Each block runs under torch's non-reentrant checkpointing: the graph is the same, but what its
   nodes save is thrown away. In the backward pass a block runs again when the first of these
   tensors is needed, so the tensors of one block are held at a time.
2. So hooks within a block fire twice, including a user's own, and must stay on the model until the
   backward pass is done. They see the same numbers, and torch's random numbers are the same.
3. If the second run returns something else, because a hook counts its calls, say, derivatives would
   be wrong. Such a run is refused.

Cost: one more forward pass for each backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lens_lora.compat import replace_forward
from lens_lora.core.model import LoraLens
from lens_lora.core.model.passes import ForwardPass
from lens_lora.errors import ModelStateError, named
from lens_lora.spans import Temporary

# A second run would append to a key-value cache, so there is none.
_CACHES = ("cache", "layer_past", "past_key_value", "past_key_values", "past_kv_cache_entry")


def blocks_rerun(lens: LoraLens) -> AbstractContextManager[None]:
    """Within the block, passes with a graph keep only the inputs of the model's blocks.

    The lens's hooks must stay on until the backward pass is done.
    """

    def replace(span: Temporary) -> None:
        for layer, block in enumerate(lens.model.blocks):
            twice = functools.partial(_run_twice, f"blocks.{layer}", block.forward)
            replace_forward(span, block, twice)

    return Temporary(replace)


def _run_twice(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block's forward, which runs again in the backward pass if there is a graph."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    for cache in _CACHES:
        if cache in kwargs:
            kwargs[cache] = None
    first_residual: Tensor | None = None
    first_pass = ForwardPass.under_way()  # It is over when the block runs again.

    def run_in_first_pass(*args: Any) -> Any:
        if first_pass is None:
            return forward(*args, **kwargs)
        with first_pass.goes_on():
            return forward(*args, **kwargs)

    def run(*args: Any) -> Any:
        nonlocal first_residual
        out = run_in_first_pass(*args)
        residual = out[0] if isinstance(out, tuple) else out
        residual = residual.detach()
        if first_residual is None:
            first_residual = residual
        else:
            _require_same(name, first_residual, residual)
        return out

    # To its end, so that there is an output to compare.
    with set_checkpoint_early_stop(False):
        return checkpoint(run, *args, use_reentrant=False)


def _require_same(name: str, first: Tensor, second: Tensor) -> None:
    """Check that the second run of a block has returned what the first one did.

    Raises:
        ModelStateError: it has not; the error names the block.
    """
    # Token by token, as some tokens have entries that are thousands of times those of others.
    room = torch.finfo(first.dtype).eps ** 0.5 * first.abs().amax(-1)
    is_same = ((first - second).abs().amax(-1) <= room).all()
    if not bool(is_same | first.isnan().any()):
        raise ModelStateError(
            f"{name}: within {named('max_memory')} a block runs again on the way back, and it "
            "returned something else than the first time. A hook of yours depends on how often it "
            "was called, or draws numbers of its own. Make it return the same each time, or allow "
            "more memory."
        )
