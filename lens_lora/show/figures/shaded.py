"""A response's shaded text as a still picture: a plotly figure, which can be written as an image.

A monospaced text is laid out by hand: a rectangle behind each token, its text in its own place.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import plotly.graph_objects as go

from lens_lora.analyses.token_shifts import TokenShifts
from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt
from lens_lora.show.figures.style import style, title
from lens_lora.show.figures.token_shifts import below, hover, shades
from lens_lora.show.text import label, magnitude

__all__ = ["laid_out", "still_text"]

_COLUMNS, _CHARACTER, _LINE = 84, 8.43, 28
_MARGIN, _ABOVE, _BELOW = 16, 64, 44
_SHADE = "rgba(176,79,196,{:.3f})"
_INK = "#1c2126"
_FONT = "DejaVu Sans Mono, Menlo, Consolas, monospace"


@drawing.still.register(TokenShifts)
def still_text(shifts: TokenShifts, prompt: int | None = None) -> go.Figure:
    """The larger a token's KL, the darker the rectangle behind it.

    Args:
        shifts: to be drawn.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: no such prompt, or several and none named.
    """
    index = only_prompt(prompt, len(shifts.response), "responses")
    tokens, (dark, most) = shifts.response[index], shades(shifts, index)
    pieces = laid_out(tokens, _COLUMNS)
    lines = 1 + max(line for _, line, _, _ in pieces)
    figure = go.Figure(
        go.Scatter(
            x=[column for _, _, column, _ in pieces],
            y=[line for _, line, _, _ in pieces],
            text=[label(text).replace(" ", "\u00a0") for _, _, _, text in pieces],
            hovertext=[hover(shifts, index, t) for t, _, _, _ in pieces],
            mode="text",
            textposition="middle right",
            textfont={"family": _FONT, "size": 14, "color": _INK},
            hoverinfo="text",
            showlegend=False,
        )
    )
    for t, line, column, text in pieces:
        figure.add_shape(
            type="rect",
            x0=column,
            x1=column + width(text),
            y0=line - 0.42,
            y1=line + 0.42,
            line={"width": 0},
            layer="below",
            fillcolor=_SHADE.format(0.75 * dark[t]),
        )
    style(figure, _ABOVE + _BELOW + _LINE * (lines + 1))
    figure.update_layout(
        title=title(
            "KL by token of the response", f"{below(shifts, index)}; darkest {magnitude(most)}"
        ),
        paper_bgcolor="#ffffff",
        width=int(_COLUMNS * _CHARACTER) + 2 * _MARGIN,
        margin={"l": _MARGIN, "r": _MARGIN, "t": _ABOVE, "b": _BELOW},
    )
    figure.update_xaxes(range=[0, _COLUMNS], visible=False, fixedrange=True)
    figure.update_yaxes(range=[lines - 0.4, -0.6], visible=False, fixedrange=True)
    return figure


def laid_out(tokens: Sequence[str], columns: int) -> list[tuple[int, int, int, str]]:
    """Where each token stands: (its index, line, column, text); one that is cut stands twice.

    A line is broken before a token that does not fit, and after a line break, which is shown as ⏎.

    Args:
        tokens: of the response.
        columns: characters of a line.
    """
    found: list[tuple[int, int, int, str]] = []
    line = column = 0
    for t, token in enumerate(tokens):
        for piece in _pieces(token, columns):
            text = piece.replace("\n", "⏎")
            if column and column + width(text) > columns:
                line, column = line + 1, 0
            found.append((t, line, column, text))
            column += width(text)
            if piece.endswith("\n"):
                line, column = line + 1, 0
    return found


def _pieces(token: str, columns: int) -> list[str]:
    """A token in pieces, cut after each line break, none wider than a line."""
    shown = "".join(c if c.isprintable() or c == "\n" else "·" for c in token) or "∅"
    rows = [row for row in shown.splitlines(keepends=True) if row]
    half = columns // 2  # a character may be two columns wide
    return [row[i : i + half] for row in rows for i in range(0, len(row), half)]


def width(text: str) -> int:
    """In columns of a monospaced font, in which Chinese, Japanese and Korean take two.

    Args:
        text: of one line.
    """
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(bool(unicodedata.combining(c)) for c in text)
