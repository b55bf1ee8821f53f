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
from lens_lora.show.page.render import Noted, shaded_text
from lens_lora.show.text import label, magnitude, short_prompt, signed, visible

__all__ = ["below", "heading", "hover", "noted", "shaded_response", "shades", "token_shifts_figure"]

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
    hovers = [hover(shifts, index, t) for t in range(len(tokens))]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for row, (values, colours) in enumerate(
        ((apart, FLIP), (moved, [EXACT if v >= 0 else NEGATIVE for v in moved])), start=1
    ):
        bar = go.Bar(
            y=values,
            marker={"color": colours},
            hovertext=hovers,
            hoverinfo="text",
            showlegend=False,
        )
        figure.add_trace(bar, row=row, col=1)
    style(figure, _HEIGHT)
    figure.update_layout(title=title(heading(shifts, index), below(shifts, index)), bargap=0.1)
    figure.update_yaxes(title_text="KL (nats)", row=1, col=1)
    figure.update_yaxes(title_text="shift of log p (nats)", zeroline=True, row=2, col=1)
    figure.update_xaxes(title_text="token of the response", row=2, col=1)
    token_ticks(figure, tokens)
    return figure


@drawing.tokens.register(TokenShifts)
def shaded_response(shifts: TokenShifts, prompt: int | None = None) -> TokenView:
    """The response as text: the larger a token's KL, the darker its background, by its square root.

    Args:
        shifts: to be drawn.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: no such prompt, or several and none named.
    """
    index = only_prompt(prompt, len(shifts.response), "responses")
    tokens, (_, most) = shifts.response[index], shades(shifts, index)
    values = shifts.kl[0, index, : len(tokens)].tolist()
    text = (
        f"{heading(shifts, index)}. {below(shifts, index)}. Darkest: {magnitude(most)} nats; by "
        "the square root."
    )
    return TokenView(tokens, tuple(values), shaded_text(text, noted(shifts, index)))


def noted(shifts: TokenShifts, index: int) -> list[Noted]:
    """Each token of a response, its shade, and what is said of it, line by line.

    Args:
        shifts: to be drawn.
        index: of the prompt.
    """
    dark, _ = shades(shifts, index)
    return [
        (token, shade, _lines(shifts, index, t))
        for t, (token, shade) in enumerate(zip(shifts.response[index], dark, strict=True))
    ]


def shades(shifts: TokenShifts, index: int) -> tuple[list[float], float]:
    """How dark each token is, from 0 to 1, and the KL of the darkest.

    By the square root of its KL: a response's sum is mostly one token's, and the others would not
    be seen beside it.

    Args:
        shifts: to be drawn.
        index: of the prompt.
    """
    values = shifts.kl[0, index, : len(shifts.response[index])].tolist()
    most = max((v for v in values if math.isfinite(v)), default=0.0) or 1.0
    return [round(math.sqrt(min(max(v / most, 0.0), 1.0)), 3) for v in values], most


def heading(shifts: TokenShifts, index: int) -> str:
    """What is shown.

    Args:
        shifts: to be drawn.
        index: of the prompt.
    """
    return f"KL by token of the response to “{short_prompt(shifts.str_tokens[index])}”"


def below(shifts: TokenShifts, index: int) -> str:
    """The two settings, and the sums over the response.

    Args:
        shifts: to be drawn.
        index: of the prompt.
    """
    total = float(shifts.kl[0, index].nansum())
    return (
        f"{shifts.between[0]} against {shifts.between[1]}: {magnitude(total)} nats in all, "
        f"log p of the response moves by {signed(float(shifts.total[index]))}"
    )


def hover(shifts: TokenShifts, index: int, t: int) -> str:
    """What is said of a token, for a figure.

    Args:
        shifts: to be drawn.
        index: of the prompt.
        t: of the token.
    """
    return "<br>".join(map(label, _lines(shifts, index, t)))


def _lines(shifts: TokenShifts, index: int, t: int) -> list[str]:
    row = shifts._row(index, t)
    return [
        f"{t} {visible(row['y_t'])}",
        f"KL {magnitude(row['kl_base_to_adapted'])} and back "
        f"{magnitude(row['kl_adapted_to_base'])} nats",
        f"log p {_two(row['log_p_base'])} → {_two(row['log_p_adapted'])}, "
        f"rank {row['rank_base'] + 1} → {row['rank_adapted'] + 1}",
        f"promoted {row['promoted']}",
        f"suppressed {row['suppressed'].replace('-0.', '−0.')}",
    ]


def _two(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
