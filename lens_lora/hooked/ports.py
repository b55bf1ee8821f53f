"""The hook points of one site: where z is read and where δ is added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

__all__ = ["Layout", "Ports"]

# How the axes lie at a norm of each head: [row, head, pos, d], or [row · pos · head, d].
Layout = Literal["rows", "heads_first", "flat"]


def _as_read(tensor: Tensor) -> Tensor:
    return tensor


class Ports:
    """A site's hook points, and which firing of its read point in one block is the site's.

    Args:
        read: hook point, or module, of z; None for a constant, which needs no z.
        write: hook point, or module, at which δ is added.
        firing: which firing of the read point in one block shows this site's z, from 0; −1 for the
            last one before the write point fires.
        firings: how often the read point fires in one block.
        through: computes z from the tensor that was read, where no hook point shows z itself; it
            is called while the block runs.
        layout: of the axes at both points.
        like: hook point that fires before both and has the axes [row, pos, …]; for `flat`.
        repeats: how often, in all its places, the model adds this site's δ to the same z.
    """

    __slots__ = ("firing", "firings", "layout", "like", "read", "repeats", "through", "write")

    def __init__(
        self,
        read: str | None,
        write: str,
        firing: int = 0,
        firings: int = 1,
        through: Callable[[Tensor], Tensor] = _as_read,
        layout: Layout = "rows",
        like: str | None = None,
        repeats: int = 1,
    ) -> None:
        self.read: str | None = read
        self.write: str = write
        self.firing: int = firing
        self.firings: int = firings
        self.through: Callable[[Tensor], Tensor] = through
        self.layout: Layout = layout
        self.like: str | None = like
        self.repeats: int = repeats

    def in_rows(self, tensor: Tensor, like: Tensor | None = None) -> Tensor:
        """A tensor at one of the points as [row, pos, feature], the heads one after another.

        Args:
            tensor: as the model has it.
            like: what was read at `like`.
        """
        if self.layout == "heads_first":
            return tensor.transpose(1, 2).flatten(2)
        return tensor.reshape(*like.shape[:2], -1) if like is not None else tensor

    def as_at_point(self, rows: Tensor, tensor: Tensor) -> Tensor:
        """The way back from `in_rows`.

        Args:
            rows: [row, pos, feature].
            tensor: as the model has it.
        """
        if self.layout == "heads_first":
            return rows.unflatten(2, (tensor.shape[1], -1)).transpose(1, 2)
        return rows.reshape(tensor.shape)
