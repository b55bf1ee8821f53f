"""Which pass of a model is under way, and which of its tokens stand where.

A hook sees a tensor, and not which of its tokens are which. So the model's own forward pass is
watched (`Watched`): what stands in a cache already, and the attention mask that tells padding on
the left. The lens tells which tokens of its rows are the prompt's (`told`); a pass of the caller's
does not. A block that runs again on the way back is in no pass; what it was in is kept
(`going_on`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Generator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lens_lora.compat import SharedForward, cached_mask, cached_tokens, open_spans
from lens_lora.core.readout.prompts import Prompts
from lens_lora.errors import ModelStateError

_REMEDY = "use lens.logits or lens.generate, or begin the block with sinks=True"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which tokens of the rows of a pass are the prompt's.

    Attributes:
        prompts: [row], how many tokens each prompt has.
        has_response: whether what follows them is known to be a response.
    """

    prompts: Int[Tensor, " row"]
    has_response: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
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


class _Passes(threading.local):
    """The passes that are under way in this thread, and what was told of the next ones."""

    def __init__(self) -> None:
        self.under_way: list[Pass] = []
        self.told: list[tuple[nn.Module, Rows]] = []


_PASSES = _Passes()


@contextlib.contextmanager
def told(model: nn.Module, rows: Rows) -> Generator[None]:
    """Within the block, passes of the model run these rows."""
    _PASSES.told.append((watched_module(model), rows))
    try:
        yield
    finally:
        _PASSES.told.pop()


def rows_of(prompts: Prompts) -> Rows:
    """What is known of rows that a lens runs."""
    asked = torch.tensor(prompts.asked_lengths)
    return Rows(asked, has_response=prompts.holds_responses)


def pass_under_way() -> Pass | None:
    """The innermost pass of this thread; None outside of one, or where none is watched."""
    return _PASSES.under_way[-1] if _PASSES.under_way else None


@contextlib.contextmanager
def going_on(earlier: Pass | None) -> Generator[None]:
    """Within the block, what runs belongs to an earlier pass. Nothing changes without one."""
    if earlier is None:
        yield
        return
    _PASSES.under_way.append(earlier)
    try:
        yield
    finally:
        _PASSES.under_way.pop()


def watched_module(model: Any) -> nn.Module:
    """What a pass runs: the Hugging Face model of a bridge, which may be called by itself."""
    return getattr(model, "original_model", model)


class Watched(SharedForward):
    """A model's forward pass, listed in `_PASSES` while it runs."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        functools.update_wrapper(self, type(module).forward)
        self.__wrapped__: Any = self.before  # which tells its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass."""
        with going_on(self._begun(args, kwargs)):
            return self.before(*args, **kwargs)

    def _begun(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """The pass that begins with these arguments."""
        given = dict(inspect.signature(self.before).bind_partial(*args, **kwargs).arguments)
        # Arguments that the signature gathers under ** stand beside the others.
        given |= given.get("kwargs", {})
        given |= given.get("model_kwargs", {})
        cache = given.get("past_key_values")
        if cache is None:
            cache = given.get("past_kv_cache")
        cached = cached_tokens(cache)
        if _PASSES.told:
            module, rows = _PASSES.told[-1]
            if module is self.module:
                return Pass(self.module, cached, firsts=None, rows=rows)
        firsts = self._firsts(given, cached_mask(cache))
        return Pass(self.module, cached, firsts, rows=None)

    def _firsts(
        self, given: dict[str, Any], earlier: Int[Tensor, "row cached"] | None
    ) -> Int[Tensor, " row"] | None:
        """Where each row's first token stands, counted from the first one in the cache.

        Args:
            given: the arguments of the pass.
            earlier: the attention mask of what stands in the cache, where the cache keeps it; that
                of the pass is of its own tokens then.
        """
        mask = given.get("attention_mask")
        if mask is not None:
            _require_mask_of_tokens(mask)
        elif earlier is None or not earlier.numel():
            self._require_no_left_padding(given)
            return None
        known = [part.cpu().int() for part in (earlier, mask) if part is not None]
        # The first of the ones.
        return torch.cat(known, 1).argmax(1)

    def _require_no_left_padding(self, given: dict[str, Any]) -> None:
        """A HookedTransformer makes its own mask of pad tokens on the left."""
        tokenizer = getattr(self.module, "tokenizer", None)
        side = given.get("padding_side")
        if not isinstance(side, str):
            side = getattr(tokenizer, "padding_side", "right")
        if side == "left" and _may_be_padded(given.get("input"), tokenizer):
            raise ModelStateError(
                "rows of this pass are padded on the left, so it is not known where each one's "
                "first token stands, at which no direction is removed",
                remedy=f"Pad on the right, pass attention_mask=, or {_REMEDY}.",
            )


def _require_mask_of_tokens(mask: object) -> None:
    """Refuse an attention mask that does not say of each token whether it is padding."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return
    given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ModelStateError(
        f"the attention mask of this pass is {given} and not [row, token], so it does not "
        "say where each row's first token stands, at which no direction is removed",
        remedy=f"Pass a mask of ones and zeros, [row, token], or {_REMEDY}.",
    )


def _may_be_padded(given: Any, tokenizer: Any) -> bool:
    """Whether rows that a HookedTransformer is given may begin with padding.

    Several rows may; a single one does where it begins with the pad token. A tokenizer whose pad
    token is also its BOS puts it once before a row without padding, so there it takes two of them.
    """
    if not isinstance(given, Tensor):
        return isinstance(given, list | tuple) and len(given) > 1
    if given.ndim > 1 and len(given) > 1:
        return True
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return False
    is_bos = pad == getattr(tokenizer, "bos_token_id", None)
    leading = given.flatten()[: 2 if is_bos else 1]
    return bool((leading == pad).all())


# --- Open blocks that leave something out


@dataclasses.dataclass(frozen=True, eq=False)
class OpenBlock:
    """What an open block of the caller's leaves out of every pass of a model.

    Attributes:
        model: the hooked model.
        says: what is left out where, for people.
    """

    model: nn.Module
    says: str


def open_blocks(model: nn.Module) -> list[OpenBlock]:
    """The open blocks of this thread that leave something out of a model, the innermost last."""
    spans = [span.about for span in open_spans()]
    return [about for about in spans if isinstance(about, OpenBlock) and about.model is model]
