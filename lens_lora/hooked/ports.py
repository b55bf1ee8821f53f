"""The hook points of one site: where z is read and where δ is added."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Ports"]


def _as_read(tensor: Tensor) -> Tensor:
    return tensor


class Ports:
    """A site's hook points, and which firing of its read point in one block is the site's.

    Args:
        read: hook point of z; None for a constant, which needs no z.
        write: hook point at which δ is added.
        firing: which firing of the read point in one block shows this site's z, from 0.
        firings: how often the read point fires in one block.
        through: computes z from the tensor that was read, where no hook point shows z itself; it
            is called while the block runs.
    """

    __slots__ = ("firing", "firings", "read", "through", "write")

    def __init__(
        self,
        read: str | None,
        write: str,
        firing: int = 0,
        firings: int = 1,
        through: Callable[[Tensor], Tensor] = _as_read,
    ) -> None:
        self.read: str | None = read
        self.write: str = write
        self.firing: int = firing
        self.firings: int = firings
        self.through: Callable[[Tensor], Tensor] = through
