"""A model's forward passes, watched: which of their tokens is the first of each row.

Hooks see a tensor, and not which of its tokens are which. So the arguments of the model's own
forward pass are read: what stands in a cache already, and the attention mask, which tells padding
on the left.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lens_lora.compat import SharedForward, cached_mask, cached_tokens
from lens_lora.core import ForwardPass, Rows
from lens_lora.errors import ModelStateError

_REMEDY = "use lens.logits or lens.generate, or begin the block with sinks=True"


class Watched(SharedForward):
    """A model's forward pass, listed as under way while it runs."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        functools.update_wrapper(self, type(module).forward)
        self.__wrapped__: Any = self.before  # where `inspect.signature` looks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass."""
        with self._begun(args, kwargs).goes_on():
            return self.before(*args, **kwargs)

    def _begun(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardPass:
        """The pass that begins with these arguments."""
        given = dict(inspect.signature(self.before).bind_partial(*args, **kwargs).arguments)
        # Arguments that the signature gathers under ** stand beside the others.
        given |= given.get("kwargs", {})
        given |= given.get("model_kwargs", {})
        cache = given.get("past_key_values")
        if cache is None:
            cache = given.get("past_kv_cache")
        cached = cached_tokens(cache)
        rows = Rows.told_of(self.module)
        if rows is not None:
            return ForwardPass(self.module, cached, firsts=None, rows=rows)
        firsts = self._firsts(given, cached_mask(cache))
        return ForwardPass(self.module, cached, firsts, rows=None)

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
