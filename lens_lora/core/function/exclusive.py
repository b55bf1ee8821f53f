"""A decorator for the public methods of a function: nothing else uses the model in the meantime."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

from lens_lora.core.model import LoraLens, run_alone


@runtime_checkable
class OverALens(Protocol):
    """An object whose methods run the model of a lens."""

    @property
    def lens(self) -> LoraLens:
        """The adapter over the model."""
        ...

    def require_same_model(self) -> None:
        """Check that the model is as it was when the lens was made.

        Raises:
            ModelStateError: naming what changed.
        """
        ...


_P = ParamSpec("_P")
_R = TypeVar("_R")
_Self = TypeVar("_Self", bound=OverALens)


def exclusive(
    method: Callable[Concatenate[_Self, _P], _R],
) -> Callable[Concatenate[_Self, _P], _R]:
    """Let no other call use the model while the method runs, and check the model first.

    Args:
        method: a method of an object that has a lens.
    """

    @functools.wraps(method)
    def run(self: _Self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        def work() -> _R:
            self.require_same_model()
            return method(self, *args, **kwargs)

        return run_alone(self.lens, work)

    return run
