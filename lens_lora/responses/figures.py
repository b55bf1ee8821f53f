"""A response token by token: bars, shaded text for a notebook, and the same as a still."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len

from lens_lora.core import TokenView, drawing, only_prompt
from lens_lora.responses.token_shifts import TokenShifts
from lens_lora.show import go, page, text
from lens_lora.show.figures import EXACT, FLIP, NEGATIVE, finish, tokens_axis
from lens_lora.show.text import magnitude, short_prompt, signed, visible


@drawing.figure.register(TokenShifts)
def token_shifts_figure(shifts: TokenShifts, prompt: int | None = None) -> go.Figure:
    """Above, KL from the first setting to the second; below, the shift of log p of each token."""
    index = only_prompt(prompt, len(shifts.response), "responses")
    tokens = shifts.response[index]
    kl, moved = (rows[index, : len(tokens)].tolist() for rows in (shifts.kl[0], shifts.shift))
    hover = {"hovertext": _hovers(shifts, index), "hoverinfo": "text", "showlegend": False}
    figure = go.make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    signs = [EXACT if value >= 0 else NEGATIVE for value in moved]
    for row, (values, colours) in enumerate(((kl, FLIP), (moved, signs)), start=1):
        figure.add_bar(y=values, marker={"color": colours}, **hover, row=row, col=1)
    titles = _heading(shifts, index), _below(shifts, index)
    ticks = tokens_axis(tokens, first=1).layout
    finish(figure, titles, ("", "KL (nats)"), bargap=0.1, xaxis=ticks, xaxis2=ticks)
    figure.update_xaxes(title_text="token of the response", row=2)
    return figure.update_yaxes(title_text="shift of log p (nats)", zeroline=True, row=2)


@drawing.tokens.register(TokenShifts)
def shaded_response(shifts: TokenShifts, prompt: int | None = None) -> TokenView:
    """The response as text: the larger a token's KL, the darker its background (`noted_tokens`)."""
    index = only_prompt(prompt, len(shifts.response), "responses")
    tokens, (noted, most) = shifts.response[index], noted_tokens(shifts, index)
    values = shifts.kl[0, index, : len(tokens)].tolist()
    darkest = f"Darkest: {magnitude(most)} nats; by the square root"
    heading = f"{_heading(shifts, index)}. {_below(shifts, index)}. {darkest}."
    return TokenView(tokens, tuple(values), page.rendered("shaded", heading=heading, tokens=noted))


def noted_tokens(shifts: TokenShifts, index: int) -> tuple[list[page.Noted], float]:
    """Each token of a response, its shade, and what is said of it; and the KL of the darkest.

    A shade is the square root of a token's KL over the largest: a response's sum is mostly one
    token's, and the others would not be seen beside it.
    """
    tokens = shifts.response[index]
    kl = shifts.kl[0, index, : len(tokens)].double().nan_to_num(0.0, 0.0)
    most = float(kl.max()) or 1.0
    shades = [round(shade, 3) for shade in (kl / most).clamp(0, 1).sqrt().tolist()]
    return list(zip(tokens, shades, _notes(shifts, index), strict=True)), most


def _heading(shifts: TokenShifts, index: int) -> str:
    return f"KL by token of the response to “{short_prompt(shifts.str_tokens[index])}”"


def _below(shifts: TokenShifts, index: int) -> str:
    """The two settings, and the sums over the response."""
    total, moved = magnitude(float(shifts.kl[0, index].nansum())), float(shifts.total[index])
    pair = " against ".join(shifts.between)
    return f"{pair}: {total} nats in all, log p of the response moves by {signed(moved)}"


def _hovers(shifts: TokenShifts, index: int) -> list[str]:
    return ["<br>".join(map(text.label, note)) for note in _notes(shifts, index)]


def _notes(shifts: TokenShifts, index: int) -> list[list[str]]:
    """What is said of each token of a response, line by line."""
    return [
        [
            f"{row['t'] + 1} {visible(row['y_t'])}",
            "KL {} and back {} nats".format(*(magnitude(row[way]) for way in _WAYS)),
            f"log p {log_p_pair(row)}, rank {row['rank_base'] + 1} → {row['rank_adapted'] + 1}",
            f"promoted {row['promoted']}",
            f"suppressed {row['suppressed'].replace('-0.', '−0.')}",
        ]
        for row in shifts.to_frame().to_dict("records")
        if row["prompt"] == index
    ]


_WAYS = ("kl_base_to_adapted", "kl_adapted_to_base")


def log_p_pair(row: Mapping[Any, Any]) -> str:
    """'−6.10 → −0.02', of one row of the table of token shifts."""
    return " → ".join(text.log_p_text(row[f"log_p_{end}"]) for end in ("base", "adapted"))


# A monospaced text is laid out by hand: columns to a line, and a column's width, a line's height
# and the margins in pixels, as DejaVu Sans Mono has them at 14 points.
_COLUMNS, _CHARACTER, _LINE = 84, 8.43, 28
_MARGIN, _ABOVE, _UNDER = 16, 64, 44
_FONT = {"family": "DejaVu Sans Mono, Menlo, Consolas, monospace", "size": 14, "color": "#1c2126"}


@drawing.still.register(TokenShifts)
def still_text(shifts: TokenShifts, prompt: int | None = None) -> go.Figure:
    """The shaded text as a figure, which can be written as an image; a rectangle behind a token."""
    index = only_prompt(prompt, len(shifts.response), "responses")
    hover, (noted, most) = _hovers(shifts, index), noted_tokens(shifts, index)
    pieces = laid_out(shifts.response[index], _COLUMNS)
    lines = 1 + max(line for _, line, _, _ in pieces)
    indices, ys, xs, texts = map(list, zip(*pieces, strict=True))
    shown = [text.label(piece).replace(" ", "\u00a0") for piece in texts]
    said = {"hovertext": [hover[t] for t in indices], "hoverinfo": "text", "showlegend": False}
    look = {"mode": "text", "textposition": "middle right", "textfont": _FONT}
    figure, shapes = go.Figure().add_scatter(x=xs, y=ys, text=shown, **look, **said), []
    for t, line, column, piece in pieces:
        corners = {"x0": column, "x1": column + cell_len(piece)}
        corners |= {"y0": line - 0.42, "y1": line + 0.42}
        shade = {"fillcolor": f"rgba(176,79,196,{0.75 * noted[t][1]:.3f})", "line": {"width": 0}}
        shapes.append({"type": "rect", "layer": "below", **corners, **shade})
    below = f"{_below(shifts, index)}; darkest {magnitude(most)}"
    height, width = _ABOVE + _UNDER + _LINE * (lines + 1), int(_COLUMNS * _CHARACTER) + 2 * _MARGIN
    finish(figure, ("KL by token of the response", below), ("", ""), height, shapes=shapes)
    margin = {"l": _MARGIN, "r": _MARGIN, "t": _ABOVE, "b": _UNDER}
    figure.update_layout(paper_bgcolor="#ffffff", width=width, margin=margin)
    figure.update_xaxes(range=[0, _COLUMNS], visible=False, fixedrange=True)
    return figure.update_yaxes(range=[lines - 0.4, -0.6], visible=False, fixedrange=True)


def laid_out(tokens: Sequence[str], columns: int) -> list[tuple[int, int, int, str]]:
    """Where each token stands: (its index, line, column, text); one that is cut stands twice.

    A line is broken before a token that does not fit, and after a line break, which is shown as ⏎.
    """
    places: list[tuple[int, int, int, str]] = []
    line = column = 0
    for t, token in enumerate(tokens):
        for piece in _pieces(token, columns):
            shown = piece.replace("\n", "⏎")
            if column and column + cell_len(shown) > columns:
                line, column = line + 1, 0
            places.append((t, line, column, shown))
            column += cell_len(shown)
            if piece.endswith("\n"):
                line, column = line + 1, 0
    return places


def _pieces(token: str, columns: int) -> list[str]:
    """A token in pieces, cut after each line break, none wider than a line."""
    shown = "".join(c if c.isprintable() or c == "\n" else "·" for c in token) or "∅"
    rows = [row for row in shown.splitlines(keepends=True) if row]
    half = columns // 2  # a character may be two columns wide
    return [row[i : i + half] for row in rows for i in range(0, len(row), half)]
