"""An attribution over the prompt's own tokens, drawn by circuitsvis.

1. Sum the attribution over everything but the position.
2. Colour each token by its sum, on a scale that is symmetric about zero.
3. Keep the page whole: circuitsvis's script is written into it, and nothing is fetched.

Tokens are escaped first: circuitsvis writes them into the page as HTML.
"""

from __future__ import annotations

from typing import Any

from markupsafe import escape

from lens_lora.errors import LensLoraError
from lens_lora.results import drawing
from lens_lora.results.attribution import Attribution
from lens_lora.results.choosing import only_prompt
from lens_lora.results.token_view import TokenView
from lens_lora.show.figures.attribution import require_positions
from lens_lora.show.page.render import captioned
from lens_lora.show.text import key_text, signed

__all__ = ["TokenView", "token_view"]


@drawing.tokens.register(Attribution)
def token_view(attribution: Attribution, prompt: int | None = None) -> TokenView:
    """What each token of a prompt contributes, through all sites: blue up, red down.

    Args:
        attribution: with by='position' (and any other axis).
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: the attribution was not split by position; no such prompt, or several and
            none named.
        LensLoraError: circuitsvis is not installed.
    """
    require_positions(attribution)
    index = only_prompt(prompt, len(attribution.base), "positions")
    tokens = attribution.str_tokens[index]
    others = [a for a, name in enumerate(attribution.by, start=1) if name != "position"]
    values = attribution.values[index].cpu().double().nansum([0, *others])[: len(tokens)].tolist()
    reach = max(map(abs, values), default=0.0) or 1.0
    drawn = _circuitsvis().colored_tokens(
        [str(escape(token)) for token in tokens], values, min_value=-reach, max_value=reach
    )
    # The div is written as if it closed itself, which HTML does not know: it would swallow the
    # rest of the page.
    picture = drawn.local_src.replace("/>", "></div>", 1)
    return TokenView(tokens, tuple(values), captioned(_caption(attribution, values), picture))


def _caption(attribution: Attribution, values: list[float]) -> str:
    return (
        f"{attribution.readout}, {key_text(attribution.key)}: each token "
        f"through all sites, {signed(sum(values))} {attribution.units} in all. Blue pushes up, "
        "red down."
    )


def _circuitsvis() -> Any:
    try:
        from circuitsvis import tokens  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise LensLoraError(
            "token_view draws with circuitsvis, which is not installed; pip install circuitsvis, "
            "or use attribution.plot_positions(), which needs nothing more."
        ) from error
    return tokens
