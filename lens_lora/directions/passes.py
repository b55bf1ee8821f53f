"""Watch a model's forward passes to know which token is the first of each row.

A hook sees a tensor, and not which of the prompt's tokens it holds. So the arguments of the model's
own forward pass are read: the cache of earlier tokens, and the attention mask, which shows padding
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
    """A model's forward method that registers each pass while it runs."""

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
        signature = inspect.signature(self.before)
        arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
        # Arguments that the signature gathers under ** are put beside the others.
        arguments |= arguments.get("kwargs", {})
        arguments |= arguments.get("model_kwargs", {})
        cache = arguments.get("past_key_values")
        if cache is None:
            cache = arguments.get("past_kv_cache")
        cached = cached_tokens(cache)
        rows = Rows.told_of(self.module)
        if rows is not None:
            return ForwardPass(self.module, cached, firsts=None, rows=rows)
        firsts = self._firsts(arguments, cached_mask(cache))
        return ForwardPass(self.module, cached, firsts, rows=None)

    def _firsts(
        self, arguments: dict[str, Any], earlier: Int[Tensor, "row cached"] | None
    ) -> Int[Tensor, " row"] | None:
        """The position of each row's first token, counted from the first one in the cache.

        Args:
            arguments: the arguments of the pass.
            earlier: the attention mask of the cached tokens, if the cache keeps it; the mask of
                the pass then covers only its own tokens.
        """
        mask = arguments.get("attention_mask")
        if mask is not None:
            _require_mask_of_tokens(mask)
        elif earlier is None or not earlier.numel():
            self._require_no_left_padding(arguments)
            return None
        of_all_tokens = [part.cpu().int() for part in (earlier, mask) if part is not None]
        # The index of the first one in each row.
        return torch.cat(of_all_tokens, 1).argmax(1)

    def _require_no_left_padding(self, arguments: dict[str, Any]) -> None:
        """Refuse padding on the left, which a HookedTransformer masks by itself."""
        tokenizer = getattr(self.module, "tokenizer", None)
        side = arguments.get("padding_side")
        if not isinstance(side, str):
            side = getattr(tokenizer, "padding_side", "right")
        if side == "left" and _may_be_padded(arguments.get("input"), tokenizer):
            raise ModelStateError(
                "rows of this pass are padded on the left, so it is not known which token is the "
                "first of each row, at which no direction is removed",
                remedy=f"Pad on the right, pass attention_mask=, or {_REMEDY}.",
            )


def _require_mask_of_tokens(mask: object) -> None:
    """Refuse an attention mask that does not show for each token whether it is padding."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return
    form = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ModelStateError(
        f"the attention mask of this pass is {form} and not [row, token], so it does not show "
        "which token is the first of each row, at which no direction is removed",
        remedy=f"Pass a mask of ones and zeros, [row, token], or {_REMEDY}.",
    )


def _may_be_padded(rows: Any, tokenizer: Any) -> bool:
    """Whether rows that are passed to a HookedTransformer may begin with padding.

    Several rows may; a single row does if it begins with the pad token. If the pad token is also
    the BOS, a row without padding begins with one of them, so a padded row begins with two.
    """
    if not isinstance(rows, Tensor):
        return isinstance(rows, list | tuple) and len(rows) > 1
    if rows.ndim > 1 and len(rows) > 1:
        return True
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return False
    is_bos = pad == getattr(tokenizer, "bos_token_id", None)
    count = 2 if is_bos else 1
    return bool((rows.flatten()[:count] == pad).all())
