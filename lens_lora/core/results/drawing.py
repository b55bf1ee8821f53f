"""From a result to its pictures and words: the only place below `show` that imports it.

A method of a result is one line, `return drawing.figure(self, prompt)`. Each lower-case name here
is a generic function, dispatched on the type of the result; modules of `show` register what they
draw, and are imported at the first call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from lens_lora.errors import LensLoraError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


_Drawn = TypeVar("_Drawn")
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Drawing(Generic[_Drawn]):
    """One way to show results, by the type of the result."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._generic: Any = functools.singledispatch(self._missing)

    def register(self, kind: type) -> Callable[[_Function], _Function]:
        """A decorator: the function draws results of this type."""
        return self._generic.register(kind)

    def __call__(self, result: object, *args: Any, **kwargs: Any) -> _Drawn:
        """What the registered function draws."""
        import lens_lora.show.registered  # noqa: F401  # pyright: ignore[reportUnusedImport]

        return self._generic(result, *args, **kwargs)

    def _missing(self, result: object, *args: Any, **kwargs: Any) -> _Drawn:
        del args, kwargs
        raise LensLoraError(
            f"{type(result).__name__} has no {self.name}; register one with "
            f"lens_lora.core.results.drawing.{self.name}.register({type(result).__name__})."
        )


@final
@dataclasses.dataclass(frozen=True, eq=False)
class TokenView:
    """A prompt's tokens, coloured: shown by a notebook, or saved as a page.

    Attributes:
        tokens: the prompt's tokens.
        values: the attribution at each, summed over sites, in the readout's units.
        html: the whole picture, which works without a network.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    html: str

    def save(self, path: str | Path) -> Path:
        """Write it as a page of its own; returns the path.

        Args:
            path: the page to write.
        """
        path = Path(path)
        head = "<!doctype html>\n<meta charset='utf-8'>\n<title>tokens</title>"
        path.write_text(f"{head}\n{self.html}\n", encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        pairs = zip(self.tokens, self.values, strict=True)
        return "TokenView(" + ", ".join(f"{token!r} {value:+.3g}" for token, value in pairs) + ")"


figure: Drawing[Figure] = Drawing("figure")
figures: Drawing[dict[str, Figure]] = Drawing("figures")
positions: Drawing[Figure] = Drawing("positions")
graph: Drawing[Figure] = Drawing("graph")
labelled: Drawing[Figure] = Drawing("labelled")
modules: Drawing[Figure] = Drawing("modules")
path: Drawing[Figure] = Drawing("path")
spread: Drawing[Figure] = Drawing("spread")
still: Drawing[Figure] = Drawing("still")
tokens: Drawing[TokenView] = Drawing("tokens")
text: Drawing[str] = Drawing("text")
html: Drawing[str] = Drawing("html")
story: Drawing[str] = Drawing("story")
report: Drawing[str] = Drawing("report")
