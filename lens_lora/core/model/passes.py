"""The pass of a model that is under way, and where its tokens stand.

A hook sees a tensor, and not which of its tokens are which. What removes directions at some tokens
only (`directions/passes.py`) therefore watches the model's own forward pass: each `ForwardPass` is
listed while it runs, and hooks ask for the innermost one (`ForwardPass.under_way`).

1. The lens tells which tokens of its rows are the prompt's (`Rows.told`); a pass of the caller's
   own does not.
2. A block that runs again on the way back is in no pass any more. What runs it keeps the pass that
   it was in, and goes on with it (`ForwardPass.goes_on`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Generator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lens_lora.core.readout.prompts import Prompts
from lens_lora.spans import open_spans


class _Passes(threading.local):
    """The passes that are under way in this thread, and what was told of the next ones."""

    def __init__(self) -> None:
        self.under_way: list[ForwardPass] = []
        self.told: list[tuple[nn.Module, Rows]] = []


_PASSES = _Passes()


@dataclasses.dataclass(frozen=True)
class Rows:
    """The tokens of a pass's rows that are the prompt's.

    Attributes:
        prompts: [row], how many tokens each prompt has.
        has_response: whether what follows them is known to be a response.
    """

    prompts: Int[Tensor, " row"]
    has_response: bool

    @classmethod
    def of(cls, prompts: Prompts) -> Rows:
        """Note which tokens are the prompt's, of rows that a lens runs."""
        asked = torch.tensor(prompts.asked_lengths)
        return cls(asked, has_response=prompts.holds_responses)

    @contextlib.contextmanager
    def told(self, model: nn.Module) -> Generator[None]:
        """Within the block, passes of the model run these rows."""
        _PASSES.told.append((ForwardPass.module_of(model), self))
        try:
            yield
        finally:
            _PASSES.told.pop()

    @staticmethod
    def told_of(module: nn.Module) -> Rows | None:
        """The rows that passes of this module run, where the lens has told them."""
        if not _PASSES.told:
            return None
        told_module, rows = _PASSES.told[-1]
        return rows if told_module is module else None


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardPass:
    """A forward pass of a model.

    Attributes:
        module: what runs.
        cached: how many tokens of each row stand in a cache, before those of the pass.
        firsts: [row], where each row's first token stands; None where it is 0.
        rows: what the lens knows of the rows; None in a pass of the caller's.
    """

    module: nn.Module
    cached: int
    firsts: Int[Tensor, " row"] | None
    rows: Rows | None

    @staticmethod
    def module_of(model: Any) -> nn.Module:
        """The module of a pass: a bridge's Hugging Face model, which may be called by itself."""
        return getattr(model, "original_model", model)

    @staticmethod
    def under_way() -> ForwardPass | None:
        """The innermost pass of this thread; None outside of one, or where none is watched."""
        return _PASSES.under_way[-1] if _PASSES.under_way else None

    @contextlib.contextmanager
    def goes_on(self) -> Generator[None]:
        """Within the block, what runs belongs to this pass."""
        _PASSES.under_way.append(self)
        try:
            yield
        finally:
            _PASSES.under_way.pop()


@dataclasses.dataclass(frozen=True, eq=False)
class OpenBlock:
    """A note of what an open block of the caller's leaves out of every pass of a model.

    Attributes:
        model: the hooked model.
        says: what is left out where, for people.
    """

    model: nn.Module
    says: str

    @staticmethod
    def open_on(model: nn.Module) -> list[OpenBlock]:
        """The open blocks of this thread that leave something out, the innermost last."""
        spans = [span.about for span in open_spans()]
        return [about for about in spans if isinstance(about, OpenBlock) and about.model is model]
