"""A response token by token: how far each distribution moved, as bars and as shaded text."""

from __future__ import annotations

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_lora.analyses.token_shifts import TokenShifts
from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt
from lens_lora.results.token_view import TokenView
from lens_lora.show.figures.parts import NEGATIVE, token_ticks
from lens_lora.show.figures.style import EXACT, FLIP, style, title
from lens_lora.show.page.render import shaded_text
from lens_lora.show.text import label, magnitude, prompt_text, signed, visible

__all__ = ["shaded_response", "token_shifts_figure"]

_HEIGHT = 420


@drawing.figure.register(TokenShifts)
def token_shifts_figure(shifts: TokenShifts, prompt: int | None = None) -> go.Figure:
    """Above, KL from the first setting to the second; below, the shift of log p of each token.

    Args:
        shifts: to be drawn.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: no such prompt, or several and none named.
    """
    index = only_prompt(prompt, len(shifts.response), "responses")
    tokens = shifts.response[index]
    apart, moved = (of[index, : len(tokens)].tolist() for of in (shifts.kl[0], shifts.shift))
    hover = [_hover(shifts, index, t) for t in range(len(tokens))]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for row, (values, colours) in enumerate(
        ((apart, FLIP), (moved, [EXACT if v >= 0 else NEGATIVE for v in moved])), start=1
    ):
        bar = go.Bar(
            y=values, marker={"color": colours}, hovertext=hover, hoverinfo="text", showlegend=False
        )
        figure.add_trace(bar, row=row, col=1)
    style(figure, _HEIGHT)
    figure.update_layout(title=title(_heading(shifts, index), _below(shifts, index)), bargap=0.1)
    figure.update_yaxes(title_text="KL (nats)", row=1, col=1)
    figure.update_yaxes(
        title_text="shift of log p (nats)", zeroline=True, zerolinecolor="#777777", row=2, col=1
    )
    token_ticks(figure, tokens)
    return figure


@drawing.tokens.register(TokenShifts)
def shaded_response(shifts: TokenShifts, prompt: int | None = None) -> TokenView:
    """The response as text: the larger a token's KL, the darker its background.

    Args:
        shifts: to be drawn.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: no such prompt, or several and none named.
    """
    index = only_prompt(prompt, len(shifts.response), "responses")
    tokens = shifts.response[index]
    values = shifts.kl[0, index, : len(tokens)].tolist()
    most = max((v for v in values if math.isfinite(v)), default=0.0) or 1.0
    shades = [
        (token, round(min(max(v / most, 0.0), 1.0), 3), _hover(shifts, index, t, "\n"))
        for t, (token, v) in enumerate(zip(tokens, values, strict=True))
    ]
    heading = (
        f"{_heading(shifts, index)}. {_below(shifts, index)}. Darkest: {magnitude(most)} nats."
    )
    return TokenView(tokens, tuple(values), shaded_text(heading, shades))


def _heading(shifts: TokenShifts, index: int) -> str:
    return f"KL by token of the response to “{prompt_text(shifts.str_tokens[index])}”"


def _below(shifts: TokenShifts, index: int) -> str:
    total = float(shifts.kl[0, index].nansum())
    return (
        f"{shifts.between[0]} against {shifts.between[1]}: {magnitude(total)} nats in all, "
        f"log p of the response moves by {signed(float(shifts.total[index]))}"
    )


def _hover(shifts: TokenShifts, index: int, t: int, line: str = "<br>") -> str:
    row = shifts._row(index, t)
    text = [
        f"{t} {visible(row['y_t'])}",
        f"KL {magnitude(row['kl_base_to_adapted'])} and back "
        f"{magnitude(row['kl_adapted_to_base'])} nats",
        f"log p {row['log_p_base']:.2f} → {row['log_p_adapted']:.2f}, "
        f"rank {row['rank_base'] + 1} → {row['rank_adapted'] + 1}",
        f"promoted {row['promoted']}",
        f"suppressed {row['suppressed']}",
    ]
    return line.join(text if line == "\n" else map(label, text))
