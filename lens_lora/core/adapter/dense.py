"""A dense ΔW as two factors, one of which takes no memory.

Any ΔW [out, in] is its own product with the identity of its smaller side. But the identity would be
as large as a square ΔW. J, the identity with its rows in reverse order, need not be stored, as its
rows are windows of one vector with a single 1:

    J[i, j] = window[i + j],    window = (0, …, 0, 1, 0, …, 0) of 2n − 1 numbers

So J is a view of that vector. ΔW = J (JΔW), where JΔW is ΔW with its rows in reverse order.

A view is a tensor like any other, so code that does not know J computes with it as with any matrix.
Code that knows it (`applied`) reverses an axis instead of computing a product. Converting J to
another dtype or device would write out all of it, so `converted` makes another view.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def reversal(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "size size"]:
    """Make J, the identity with its rows in reverse order, as a view of 2 · size − 1 numbers."""
    window = torch.zeros(2 * size - 1, dtype=dtype, device=device)
    window[size - 1] = 1
    return window.as_strided((size, size), (1, 1))


def is_reversal(matrix: Tensor) -> bool:
    """Whether a matrix is a J from `reversal`, which its strides show; a single entry never is.

    `LoRAFactors` writes out any other matrix whose rows overlap in memory.
    """
    is_square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 1
    return is_square and matrix.stride() == (1, 1)


def written_out(matrix: Tensor) -> Tensor:
    """A copy of the matrix, if its rows overlap in memory and it is not J; else the matrix."""
    if not is_reversal(matrix):
        return matrix
    size = len(matrix)
    window = matrix.as_strided((2 * size - 1,), (1,))
    is_one = int(window.count_nonzero()) == 1 and bool(window[size - 1] == 1)
    return matrix if is_one else matrix.clone(memory_format=torch.contiguous_format)


def converted(
    matrix: Float[Tensor, "row column"], dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "row column"]:
    """The matrix in this dtype and on this device; J stays a view."""
    if is_reversal(matrix):
        return reversal(len(matrix), dtype, device)
    return matrix.to(dtype).to(device)


def applied(
    x: Float[Tensor, "*token column"], matrix: Float[Tensor, "row column"]
) -> Float[Tensor, "*token row"]:
    """Apply a matrix M to each token, x Mᵀ; for J no product is computed."""
    return x.flip(-1) if is_reversal(matrix) else x @ matrix.T


def stored_bytes(tensor: Tensor) -> int:
    """The bytes that a tensor takes; J is a view of few numbers."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def as_dense(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factors from a file with J in place of an identity; None if neither factor is one.

    In a file the identity, or J, is written out.
    """
    if A.ndim != 2 or B.ndim != 2:
        return None
    if len(B) == len(A) and _is_permutation(B):
        is_identity = bool(B[0, 0])
        change = A.flip(0) if is_identity else A
        return change, reversal(len(B), B.dtype, B.device)
    if A.shape[1] == len(A) and _is_permutation(A):
        is_identity = bool(A[0, 0])
        change = B.flip(1) if is_identity else B
        return reversal(len(A), A.dtype, A.device), change
    return None


def _is_permutation(matrix: Tensor) -> bool:
    """Whether a square matrix is the identity or J."""
    size = len(matrix)
    if matrix.shape != (size, size) or size == 0:
        return False
    if is_reversal(matrix):
        return True
    if int(matrix.count_nonzero()) != size:
        return False
    straight = bool((matrix.diagonal() == 1).all())
    return straight or bool((matrix.flip(0).diagonal() == 1).all())
