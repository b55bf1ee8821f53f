"""From a result to its pictures and words: the only place below `show` that imports it.

A method of a result is one line, `return drawing.figure(self, prompt)`. Each name here is a generic
function, dispatched on the type of the result; modules of `show` register what they draw, and are
imported at the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lens_lora.errors import LensLoraError
from lens_lora.results.token_view import TokenView

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = [
    "Drawing",
    "figure",
    "figures",
    "html",
    "modules",
    "path",
    "positions",
    "report",
    "still",
    "story",
    "text",
    "tokens",
]

_Drawn = TypeVar("_Drawn")
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Drawing(Generic[_Drawn]):
    """One way to show results, by the type of the result.

    Args:
        name: of the way, for errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._generic: Any = functools.singledispatch(self._missing)

    def register(self, kind: type) -> Callable[[_Function], _Function]:
        """A decorator: the function draws results of this type.

        Args:
            kind: the class of results.
        """

        def registered(function: _Function) -> _Function:
            self._generic.register(kind, function)
            return function

        return registered

    def __call__(self, result: object, *args: Any, **kwargs: Any) -> _Drawn:
        """What the registered function draws.

        Raises:
            LensLoraError: nothing is registered for this type.
        """
        import lens_lora.show.registered  # noqa: F401  # pyright: ignore[reportUnusedImport]

        return self._generic(result, *args, **kwargs)

    def _missing(self, result: object, *args: Any, **kwargs: Any) -> _Drawn:
        del args, kwargs
        raise LensLoraError(
            f"{type(result).__name__} has no {self.name}; register one with "
            f"lens_lora.results.drawing.{self.name}.register({type(result).__name__})."
        )


figure: Drawing[Figure] = Drawing("figure")
figures: Drawing[dict[str, Figure]] = Drawing("figures")
positions: Drawing[Figure] = Drawing("positions")
modules: Drawing[Figure] = Drawing("modules")
path: Drawing[Figure] = Drawing("path")
still: Drawing[Figure] = Drawing("still")
tokens: Drawing[TokenView] = Drawing("tokens")
text: Drawing[str] = Drawing("text")
html: Drawing[str] = Drawing("html")
story: Drawing[str] = Drawing("story")
report: Drawing[str] = Drawing("report")
