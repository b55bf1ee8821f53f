"""Examples of a direction among tokens, and which tokens a mean is over.

Shared by what holds activations in memory and what reads them from a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lens_lora.arguments import is_whole, one_entry, whole, word
from lens_lora.errors import ArgumentError

__all__ = ["Positions", "Sign", "chosen_positions", "context_of", "require_sign", "strongest"]

Positions = Literal["response"] | int | slice | Sequence[int] | None
Sign = Literal[1, -1]


def chosen_positions(positions: Positions, length: int, start: int) -> NDArray[np.bool_]:
    """[token]: which of a text's own tokens are meant.

    Args:
        positions: None for all, 'response', an index, a slice, or indices; negative ones count from
            the end, and those beyond the text are not there.
        length: of the text in tokens.
        start: the first token of its response.

    Raises:
        ArgumentError: anything else.
    """
    at, found = np.arange(length), np.zeros(length, bool)
    if positions is None:
        return ~found
    if isinstance(positions, str):
        word("positions", positions, ("response",))
        return at >= start
    if isinstance(positions, slice):
        found[positions] = True
        return found
    plain = one_entry(positions)
    several = plain if isinstance(plain, Iterable) else [plain]
    if not all(is_whole(one_entry(index)) for index in several):
        raise ArgumentError(
            f"positions={positions!r}: expected None, 'response', an index, a slice, or indices."
        )
    indices = np.array([whole("positions", index) for index in several], dtype=np.int64)
    inside = indices[(indices >= -length) & (indices < length)]
    found[inside] = True
    return found


def context_of(tokens: Sequence[str], at: int, width: int) -> str:
    """The tokens around one, which stands in ⟦ ⟧.

    Args:
        tokens: of the text.
        at: its position.
        width: how many on either side.
    """
    before, after = tokens[max(at - width, 0) : at], tokens[at + 1 : at + 1 + width]
    return f"{''.join(before)}⟦{tokens[at]}⟧{''.join(after)}"


def require_sign(sign: int) -> int:
    """The sign, if it is one.

    Args:
        sign: 1 or −1.

    Raises:
        ArgumentError: anything else.
    """
    if one_entry(sign) not in (1, -1) or isinstance(sign, bool):
        raise ArgumentError(f"sign={sign!r}: expected 1 or -1.")
    return int(sign)


def strongest(values: NDArray[np.floating], sign: int, k: int) -> NDArray[np.intp]:
    """Indices of the k values of this sign of largest magnitude, the largest first.

    Args:
        values: of any tokens; NaN is left out.
        sign: 1 or −1.
        k: how many.
    """
    towards = np.nan_to_num(values * sign, nan=0.0)
    order = np.argsort(-towards, kind="stable")[:k]
    return order[towards[order] > 0]
