"""A dense ΔW as two factors, of which one takes no memory.

Any ΔW [out, in] is a product with the identity on its smaller side, which would be as large as ΔW
where that is square. J, the identity with its rows in reverse, need not be stored: its rows are
windows of one vector with a single 1,

    J[i, j] = window[i + j],    window = (0, …, 0, 1, 0, …, 0) of 2n − 1 numbers,

so that J is a view of that vector. ΔW = J (JΔW), and JΔW is ΔW with its rows in reverse.

A view is a tensor like any other: what does not know of J computes with it as with a matrix. What
does (`applied`) reverses an axis in place of a product. A conversion to another dtype or device
would write all of J out; `converted` makes another view.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def reversal(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "size size"]:
    """J: the identity of this size with its rows in reverse, as a view of 2 · size − 1 numbers."""
    window = torch.zeros(2 * size - 1, dtype=dtype, device=device)
    window[size - 1] = 1
    return window.as_strided((size, size), (1, 1))


def is_reversal(matrix: Tensor) -> bool:
    """Whether this is a J that `reversal` made, by its strides; of one entry none is.

    `LoRAFactors` writes out any other matrix whose rows overlap in memory.
    """
    is_square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 1
    return is_square and matrix.stride() == (1, 1)


def written_out(matrix: Tensor) -> Tensor:
    """A copy of a matrix whose rows overlap in memory and that is no J; any other as it is."""
    if not is_reversal(matrix):
        return matrix
    size = len(matrix)
    window = matrix.as_strided((2 * size - 1,), (1,))
    is_one = int(window.count_nonzero()) == 1 and bool(window[size - 1] == 1)
    return matrix if is_one else matrix.clone(memory_format=torch.contiguous_format)


def converted(
    matrix: Float[Tensor, "row column"], dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "row column"]:
    """The matrix in this dtype and on this device; a J stays a view."""
    if is_reversal(matrix):
        return reversal(len(matrix), dtype, device)
    return matrix.to(dtype).to(device)


def applied(
    x: Float[Tensor, "*token column"], matrix: Float[Tensor, "row column"]
) -> Float[Tensor, "*token row"]:
    """Apply a matrix M to each token, x Mᵀ; a J without computing a product."""
    return x.flip(-1) if is_reversal(matrix) else x @ matrix.T


def stored_bytes(tensor: Tensor) -> int:
    """The memory that a tensor takes; a J is a view of few numbers."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def as_dense(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
    """The factors of a file with a J in place of an identity; None where neither is one.

    A file holds the identity or J written out.
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
