"""The forward pass that is running, for hooks that must know which token is which.

A hook sees a tensor, but not which of its tokens belong to the prompt. So what removes directions
at some tokens only (`directions/passes.py`) watches the model's own forward pass: a `ForwardPass`
is listed while it runs, and hooks ask for the innermost one (`ForwardPass.under_way`).

1. The lens says which tokens of its rows are the prompt's (`Rows.told`). A pass that a caller makes
   does not say it.
2. A block that runs again during a backward pass is no longer inside its forward pass. Whatever
   runs it again remembers that pass, and continues it (`ForwardPass.goes_on`).
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
    """The passes that run in this thread, and the rows that the next passes will have."""

    def __init__(self) -> None:
        self.under_way: list[ForwardPass] = []
        self.told: list[tuple[nn.Module, Rows]] = []


_PASSES = _Passes()


@dataclasses.dataclass(frozen=True)
class Rows:
    """The tokens of a pass's rows that belong to the prompt.

    Attributes:
        prompts: [row], the number of tokens of each prompt.
        has_response: whether the tokens after them are known to be a response.
    """

    prompts: Int[Tensor, " row"]
    has_response: bool

    @classmethod
    def of(cls, prompts: Prompts) -> Rows:
        """Note which tokens belong to the prompt, in rows that a lens runs."""
        lengths = torch.tensor(prompts.asked_lengths)
        return cls(lengths, has_response=prompts.holds_responses)

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
        """The rows that passes of this module run, if the lens has said so."""
        if not _PASSES.told:
            return None
        told_module, rows = _PASSES.told[-1]
        return rows if told_module is module else None


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardPass:
    """A forward pass of a model.

    Attributes:
        module: the module that runs.
        cached: the number of tokens of each row that are in a cache, before those of the pass.
        firsts: [row], the position of each row's first token; None if it is 0 in all rows.
        rows: what the lens knows about the rows; None in a pass that a caller makes.
    """

    module: nn.Module
    cached: int
    firsts: Int[Tensor, " row"] | None
    rows: Rows | None

    @staticmethod
    def module_of(model: Any) -> nn.Module:
        """The module of a pass; for a bridge its Hugging Face model, which may run by itself."""
        return getattr(model, "original_model", model)

    @staticmethod
    def under_way() -> ForwardPass | None:
        """The innermost pass of this thread; None outside a pass, or if passes are not watched."""
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
    """A note that a caller's open block removes something from every pass of a model.

    Attributes:
        model: the hooked model.
        says: what is removed and where, in words.
    """

    model: nn.Module
    says: str

    @staticmethod
    def open_on(model: nn.Module) -> list[OpenBlock]:
        """The open blocks of this thread that remove something, the innermost last."""
        spans = [span.about for span in open_spans()]
        return [about for about in spans if isinstance(about, OpenBlock) and about.model is model]
