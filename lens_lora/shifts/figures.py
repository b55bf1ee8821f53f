"""Figures of a response token by token: bars, shaded text for a notebook, and a still of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from rich.cells import cell_len
from torch import Tensor

from lens_lora.arguments import whole
from lens_lora.core import drawing
from lens_lora.shifts.logit_shift import LogitShift
from lens_lora.shifts.token_shifts import TokenShifts
from lens_lora.show import go, page, text
from lens_lora.show.figures import FLIP, bars, finish, sign_colours, tokens_axis
from lens_lora.show.text import magnitude, short_prompt, signed, visible


@drawing.figure.register(TokenShifts)
def token_shifts_figure(shifts: TokenShifts, prompt: int | None = None) -> go.Figure:
    """Two rows of bars: the KL between the two settings, and the shift of log p of each token."""
    index = shifts.only_prompt(prompt, "responses")
    tokens = shifts.response[index]
    kl = shifts.kl[0, index, : len(tokens)].tolist()
    log_p_shifts = shifts.shift[index, : len(tokens)].tolist()
    hover = {"hovertext": _hovers(shifts, index), "hoverinfo": "text", "showlegend": False}
    figure = go.make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    figure.add_bar(y=kl, marker={"color": FLIP}, **hover, row=1, col=1)
    marker = {"color": sign_colours(log_p_shifts)}
    figure.add_bar(y=log_p_shifts, marker=marker, **hover, row=2, col=1)
    titles = _heading(shifts, index), _below(shifts, index)
    ticks = tokens_axis(tokens, first=1).layout
    finish(figure, titles, ("", "KL (nats)"), bargap=0.1, xaxis=ticks, xaxis2=ticks)
    figure.update_xaxes(title_text="token of the response", row=2)
    return figure.update_yaxes(title_text="shift of log p (nats)", zeroline=True, row=2)


@drawing.figure.register(LogitShift)
def logit_shift_figure(
    shift: LogitShift, site: str | None = None, k: int = 10, prompt: int | None = None
) -> go.Figure:
    """Bars of the tokens whose logits rise most, with those whose logits fall most below them."""
    k = whole("k", k, 1)
    raised = shift.promoted(site, k, prompt).to_dict("records")
    lowered = shift.suppressed(site, k, prompt).to_dict("records")
    # If there are few tokens, both lists have all of them.
    raised_ids = {row["id"] for row in raised}
    lowered = [row for row in lowered if row["id"] not in raised_ids]

    # Raised tokens are numbered 1, 2, … from the first, and lowered ones −1, −2, … from the last.
    names = [f"{place} {visible(row['token'])}" for place, row in enumerate(raised, 1)]
    names += reversed([f"−{place} {visible(row['token'])}" for place, row in enumerate(lowered, 1)])
    rows = [*raised, *reversed(lowered)]
    values: list[float] = []
    hover: list[str] = []
    for row in rows:
        token = text.label(repr(row["token"]))
        values.append(row["shift"])
        hover.append(f"{token}, id {row['id']}<br>{signed(row['shift'])} logits")

    count = len(shift.values)
    of_prompt = f"mean of {count} prompts"
    if prompt is not None or count == 1:
        of_prompt = f"prompt {prompt or 0} of {count}"
    heading = f"First-order shift of logits by {site or 'all sites together'}"
    below = f"minus its mean over the tokens · {of_prompt}"
    figure = bars((heading, below), names, values, hover, "logits")
    return figure.update_traces(showlegend=False)


@drawing.tokens.register(TokenShifts)
def shaded_response(shifts: TokenShifts, prompt: int | None = None) -> drawing.TokenView:
    """The response as text: the larger a token's KL, the darker its background (`noted_tokens`)."""
    index = shifts.only_prompt(prompt, "responses")
    tokens = shifts.response[index]
    values = shifts.kl[0, index, : len(tokens)].tolist()
    darkest = f"Darkest: {magnitude(darkest_kl(shifts, index))} nats; by the square root"
    heading = f"{_heading(shifts, index)}. {_below(shifts, index)}. {darkest}."
    shaded = page.rendered("shaded", heading=heading, tokens=noted_tokens(shifts, index))
    return drawing.TokenView(tokens, tuple(values), shaded)


def noted_tokens(shifts: TokenShifts, index: int) -> list[page.NotedToken]:
    """Each token of a response with its shade and notes.

    A shade is the square root of a token's KL over the largest KL. Without the root, a token with
    most of a response's KL would make all others invisible.
    """
    tokens = shifts.response[index]
    shares = _kl_by_token(shifts, index) / darkest_kl(shifts, index)
    roots = shares.clamp(0, 1).sqrt().tolist()
    noted: list[page.NotedToken] = []
    for token, root, note in zip(tokens, roots, _notes(shifts, index), strict=True):
        noted.append(page.NotedToken(token, shade=round(root, 3), note=note))
    return noted


def darkest_kl(shifts: TokenShifts, index: int) -> float:
    """The KL of the darkest token of a response, in nats; 1 if no token has any."""
    return float(_kl_by_token(shifts, index).max()) or 1.0


def _kl_by_token(shifts: TokenShifts, index: int) -> Float[Tensor, " token"]:
    """The KL of each token of a response, in which NaN counts as 0."""
    count = len(shifts.response[index])
    return shifts.kl[0, index, :count].double().nan_to_num(0.0, 0.0)


def _heading(shifts: TokenShifts, index: int) -> str:
    return f"KL by token of the response to “{short_prompt(shifts.str_tokens[index])}”"


def _below(shifts: TokenShifts, index: int) -> str:
    """Say the two settings, and the sums over the response."""
    total = magnitude(float(shifts.kl[0, index].nansum()))
    log_p_shift = signed(float(shifts.total[index]))
    pair = " against ".join(shifts.between)
    return f"{pair}: {total} nats in all, log p of the response moves by {log_p_shift}"


def _hovers(shifts: TokenShifts, index: int) -> list[str]:
    """The text over each token, as lines of HTML."""
    return ["<br>".join(map(text.label, lines)) for lines in _notes(shifts, index)]


def _notes(shifts: TokenShifts, index: int) -> list[list[str]]:
    """The lines of notes about each token of a response."""
    rows = shifts.to_frame().to_dict("records")
    return [_lines_about(row) for row in rows if row["prompt"] == index]


def _lines_about(row: Mapping[Any, Any]) -> list[str]:
    """The token, its divergences, log p and rank at both ends, and what moved most there."""
    there = magnitude(row["kl_base_to_adapted"])
    back = magnitude(row["kl_adapted_to_base"])
    ranks = f"{row['rank_base'] + 1} → {row['rank_adapted'] + 1}"
    return [
        f"{row['t'] + 1} {visible(row['y_t'])}",
        f"KL {there} and back {back} nats",
        f"log p {log_p_pair(row)}, rank {ranks}",
        f"promoted {row['promoted']}",
        f"suppressed {row['suppressed'].replace('-0.', '−0.')}",
    ]


def log_p_pair(row: Mapping[Any, Any]) -> str:
    """Write such as '−6.10 → −0.02' for one row of the table of token shifts."""
    return " → ".join(text.log_p_text(row[f"log_p_{end}"]) for end in ("base", "adapted"))


# The text is monospaced, in DejaVu Sans Mono at 14 points: a line has this many columns.
_COLUMNS = 84
# The width of a column and the height of a line, in pixels.
_COLUMN_WIDTH = 8.43
_LINE_HEIGHT = 28
# Margins in pixels: at the sides, above and below.
_MARGIN = 16
_ABOVE = 64
_UNDER = 44
_FONT = {"family": "DejaVu Sans Mono, Menlo, Consolas, monospace", "size": 14, "color": "#1c2126"}


@drawing.still.register(TokenShifts)
def still_text(shifts: TokenShifts, prompt: int | None = None) -> go.Figure:
    """The shaded text as a figure that can be written as an image, with a rectangle per token."""
    index = shifts.only_prompt(prompt, "responses")
    hover = _hovers(shifts, index)
    noted = noted_tokens(shifts, index)
    pieces = laid_out(shifts.response[index], _COLUMNS)
    figure = go.Figure()
    figure.add_scatter(
        x=[piece.column for piece in pieces],
        y=[piece.line for piece in pieces],
        # A browser would collapse several spaces into one.
        text=[text.label(piece.text).replace(" ", "\u00a0") for piece in pieces],
        hovertext=[hover[piece.token] for piece in pieces],
        hoverinfo="text",
        showlegend=False,
        mode="text",
        textposition="middle right",
        textfont=_FONT,
    )
    shapes: list[dict[str, Any]] = []
    for piece in pieces:
        shapes.append(_background(piece, noted[piece.token].shade))
    lines = 1 + max(piece.line for piece in pieces)
    height = _ABOVE + _UNDER + _LINE_HEIGHT * (lines + 1)
    below = f"{_below(shifts, index)}; darkest {magnitude(darkest_kl(shifts, index))}"
    finish(figure, ("KL by token of the response", below), ("", ""), height, shapes=shapes)
    width = int(_COLUMNS * _COLUMN_WIDTH) + 2 * _MARGIN
    margin = {"l": _MARGIN, "r": _MARGIN, "t": _ABOVE, "b": _UNDER}
    figure.update_layout(paper_bgcolor="#ffffff", width=width, margin=margin)
    figure.update_xaxes(range=[0, _COLUMNS], visible=False, fixedrange=True)
    return figure.update_yaxes(range=[lines - 0.4, -0.6], visible=False, fixedrange=True)


class Piece(NamedTuple):
    """A token, or a part of one, in a text of lines and columns.

    Attributes:
        token: the index of the token.
        line, column: where it begins.
        text: the text that is shown.
    """

    token: int
    line: int
    column: int
    text: str


def _background(piece: Piece, shade: float) -> dict[str, Any]:
    """The rectangle behind a piece of text."""
    return {
        "type": "rect",
        "layer": "below",
        "x0": piece.column,
        "x1": piece.column + cell_len(piece.text),
        "y0": piece.line - 0.42,
        "y1": piece.line + 0.42,
        "fillcolor": f"rgba(176,79,196,{0.75 * shade:.3f})",
        "line": {"width": 0},
    }


def laid_out(tokens: Sequence[str], columns: int) -> list[Piece]:
    """Lay out tokens in lines and columns; a token that is cut gives several pieces.

    A line is broken before a token that does not fit, and after a line break, which is shown as ⏎.

    Args:
        tokens: the tokens of a response.
        columns: the number of columns of a line.
    """
    pieces: list[Piece] = []
    line = 0
    column = 0
    for index, token in enumerate(tokens):
        for part in _parts(token, columns):
            piece_text = part.replace("\n", "⏎")
            if column and column + cell_len(piece_text) > columns:
                line += 1
                column = 0
            pieces.append(Piece(index, line, column, piece_text))
            column += cell_len(piece_text)
            if part.endswith("\n"):
                line += 1
                column = 0
    return pieces


def _parts(token: str, columns: int) -> list[str]:
    """A token in parts, cut after each line break, none wider than a line."""
    characters: list[str] = []
    for character in token:
        is_visible = character.isprintable() or character == "\n"
        characters.append(character if is_visible else "·")
    visible_token = "".join(characters) or "∅"
    # A character may be two columns wide.
    longest = columns // 2
    parts: list[str] = []
    for row in visible_token.splitlines(keepends=True):
        parts += [row[first : first + longest] for first in range(0, len(row), longest)]
    return parts
