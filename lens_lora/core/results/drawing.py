"""How a result finds its pictures and its words: by its class, among what is registered.

    @drawing.figure.register(PairEffects)
    def pairs_figure(effects: PairEffects, prompt: int | None = None) -> Figure: ...

1. Each lower-case name here is a generic function of a result, such as `figure`; a method of a
   result is one line, `return drawing.figure(self, prompt)`.
2. What draws a class registers for it. Python takes the function of the class itself, or of the
   nearest of its base classes that has one.
3. The package's own modules that register are imported when a result is first drawn: those of the
   folder in which its class stands, and those of the folders of its base classes. Which these are
   is written in `lens_lora/registered.py`. Plotly is imported by the first figure alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from lens_lora.core import registry
from lens_lora.errors import LensLoraError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


_Drawn = TypeVar("_Drawn")
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Drawing(Generic[_Drawn]):
    """One way to show results, such as a figure; each class of results registers its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._generic: Any = functools.singledispatch(self._missing)

    def register(self, kind: type) -> Callable[[_Function], _Function]:
        """A decorator: the function draws results of this class, and of its subclasses.

        Args:
            kind: the class of results.
        """
        return self._generic.register(kind)

    def __call__(self, result: object, *args: Any, **kwargs: Any) -> _Drawn:
        """Draw the result with the function that is registered for its class.

        Args:
            result: what is drawn.
            args, kwargs: given to that function as they are.

        Raises:
            LensLoraError: no function is registered for the class, nor for a base class.
        """
        for kind in type(result).__mro__:
            for folder in registry.folders_of(kind.__module__):
                registry.import_each(registry.DRAWERS.get(folder, ()))
        return self._generic(result, *args, **kwargs)

    def _missing(self, result: object, *args: Any, **kwargs: Any) -> _Drawn:
        del args, kwargs
        kind = type(result).__name__
        decorator = f"lens_lora.core.results.drawing.{self.name}.register({kind})"
        raise LensLoraError(
            f"{kind} has no {self.name}",
            remedy=f"register one with {decorator}.",
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


# Beside each stands the method of a result that asks for it.
figure: Drawing[Figure] = Drawing("figure")  # `plot`
figures: Drawing[dict[str, Figure]] = Drawing("figures")  # `figures` of an explanation
positions: Drawing[Figure] = Drawing("positions")  # `plot_positions`
graph: Drawing[Figure] = Drawing("graph")  # `plot_graph`
labelled: Drawing[Figure] = Drawing("labelled")  # `picture` of a `Labelled`
modules: Drawing[Figure] = Drawing("modules")  # `plot_modules`
path: Drawing[Figure] = Drawing("path")  # `plot_path`
still: Drawing[Figure] = Drawing("still")  # `plot_text`
tokens: Drawing[TokenView] = Drawing("tokens")  # `token_view`
text: Drawing[str] = Drawing("text")  # `str(result)`
html: Drawing[str] = Drawing("html")  # what a notebook shows
body: Drawing[str] = Drawing("body")  # what `str(result)` says below its heading
story: Drawing[str] = Drawing("story")  # `story`
report: Drawing[str] = Drawing("report")  # `report` and `save_report`
