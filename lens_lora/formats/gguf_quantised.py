"""Weights as Q4_K, a type of GGUF to which llama.cpp quantises and the gguf package does not.

A weight is quantised by ggml's own library and read back by the gguf package. A row is cut into
blocks of 256 weights. If its length is not a multiple of 256, llama.cpp falls back to a type whose
blocks fit, and so does this module:

    Q4_K  →  Q5_0 (blocks of 32)  →  F16
"""

from __future__ import annotations

import torch
from torch import Tensor

from lens_lora import compat
from lens_lora.errors import ModelStateError
from lens_lora.formats.gguf_layout import BLOCKS, require_gguf, rounded_to

Q4_K = "Q4_K"
# The package that brings ggml's library.
PACKAGE = "llama-cpp-py-sync"
# The types for a weight that is to be Q4_K, in the order in which llama.cpp tries them.
_FALLBACK = (Q4_K, "Q5_0", "F16")


def can_quantise() -> bool:
    """Whether ggml's library is installed."""
    return compat.ggml_library() is not None


def type_of_rows(width: int) -> str:
    """The type in which llama.cpp stores rows that are to be Q4_K.

    Args:
        width: the length of a row.
    """
    return next(kind for kind in _FALLBACK if width % BLOCKS[kind].entries == 0)


def rounded_to_q4_k(exact: Tensor) -> Tensor:
    """A weight as it is read from a file in which llama.cpp stored it as Q4_K; float32.

    Args:
        exact: [row, in].

    Raises:
        ModelStateError: the gguf package or ggml's library is not installed.
    """
    kind = type_of_rows(exact.shape[-1])
    if kind != Q4_K:
        return rounded_to(kind, exact)
    gguf = require_gguf()
    stored_as = gguf.GGMLQuantizationType[kind]
    block = BLOCKS[kind]
    values = exact.detach().cpu().to(torch.float32).contiguous().numpy()
    bytes_of_row = values.shape[-1] // block.entries * block.bytes
    data = compat.quantised_by_ggml(values, int(stored_as), bytes_of_row)
    if data is None:
        raise ModelStateError(
            f"only llama.cpp's library rounds a weight to {kind}, and it is not installed",
            remedy=f"pip install {PACKAGE}.",
        )
    return torch.from_numpy(gguf.quants.dequantize(data, stored_as).copy()).reshape(exact.shape)
