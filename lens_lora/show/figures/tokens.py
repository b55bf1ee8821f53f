"""An attribution over the prompt's own tokens, drawn by circuitsvis.

1. Sum the attribution over everything but the position.
2. Colour each token by its sum, on a scale that is symmetric about zero.
3. Keep the page whole: circuitsvis's script is written into it, and nothing is fetched.

Tokens are escaped first: circuitsvis writes them into the page as HTML.
"""

from __future__ import annotations

import dataclasses
import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_lora.errors import ArgumentError, LensLoraError
from lens_lora.show.text import chosen_prompt, method_text, signed

if TYPE_CHECKING:
    from lens_lora.results.attribution import Attribution

__all__ = ["TokenView", "token_view"]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenView:
    """A prompt's tokens, coloured: shown by a notebook, or saved as a page.

    Attributes:
        tokens: of the prompt.
        values: the attribution at each, summed over sites, in the readout's units.
        html: the picture, whole: it works offline.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    html: str

    def save(self, path: str | Path) -> Path:
        """Write it as a page of its own."""
        path = Path(path)
        path.write_text(
            f"<!doctype html>\n<meta charset='utf-8'>\n<title>tokens</title>\n{self.html}\n",
            encoding="utf-8",
        )
        return path

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        pairs = zip(self.tokens, self.values, strict=True)
        return "TokenView(" + ", ".join(f"{token!r} {signed(v)}" for token, v in pairs) + ")"


def token_view(attribution: Attribution, prompt: int = 0) -> TokenView:
    """What each token of a prompt contributes, through all sites: blue up, red down.

    Args:
        attribution: with by='position' (and any other axis).

    Raises:
        ArgumentError: the attribution was not split by position, or has no such prompt.
        LensLoraError: circuitsvis is not installed.
    """
    if "position" not in attribution.by:
        raise ArgumentError(
            f"the attribution is split by {attribution.by or 'nothing'}, not by position; compute "
            'it with first_order(..., by="position").'
        )
    index = chosen_prompt(prompt, len(attribution.base))
    tokens = attribution.str_tokens[index]
    others = [a for a, name in enumerate(attribution.by, start=1) if name != "position"]
    values = attribution.values[index].double().sum([0, *others])[: len(tokens)].tolist()
    reach = max(map(abs, values), default=0.0) or 1.0
    drawn = _circuitsvis().colored_tokens(
        [html.escape(token) for token in tokens], values, min_value=-reach, max_value=reach
    )
    # The div is written as if it closed itself, which HTML does not know: it would swallow the
    # rest of the page.
    picture = drawn.local_src.replace("/>", "></div>", 1)
    return TokenView(tokens, tuple(values), f"<div>{_caption(attribution, values)}{picture}</div>")


def _caption(attribution: Attribution, values: list[float]) -> str:
    text = (
        f"{attribution.readout}, {method_text(attribution.method, attribution.at)}: each token "
        f"through all sites, {signed(sum(values))} {attribution.units} in all. Blue pushes up, "
        "red down."
    )
    return f"<p style='color:#777;font:13px sans-serif'>{html.escape(text)}</p>"


def _circuitsvis() -> Any:
    try:
        from circuitsvis import tokens  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise LensLoraError(
            "token_view draws with circuitsvis, which is not installed; pip install circuitsvis, "
            "or use attribution.plot_positions(), which needs nothing more."
        ) from error
    return tokens
