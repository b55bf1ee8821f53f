"""A response token by token: its pictures, its story, its tables and its share of a page.

Every number of a token is of two whole distributions, exactly; every sentence is a number of the
result, and what was not measured is said not to be.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.cells import cell_len
from rich.console import Group

from lens_lora import results
from lens_lora.core import TokenView, only_prompt
from lens_lora.core.results import drawing
from lens_lora.core.results.tokens import context_of
from lens_lora.errors import many, worded
from lens_lora.show import go, maps, page, text
from lens_lora.show.figures import EXACT, FLIP, NEGATIVE, finish, tokens_axis
from lens_lora.show.tables import Pairs, Row, Table, in_terminal, table_of
from lens_lora.show.text import magnitude, percent, points, short_prompt, signed, visible

# --- Pictures: bars, shaded text for a notebook, and the same as a still


@drawing.figure.register(results.TokenShifts)
def token_shifts_figure(shifts: results.TokenShifts, prompt: int | None = None) -> go.Figure:
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


@drawing.tokens.register(results.TokenShifts)
def shaded_response(shifts: results.TokenShifts, prompt: int | None = None) -> TokenView:
    """The response as text: the larger a token's KL, the darker its background (`_noted`)."""
    index = only_prompt(prompt, len(shifts.response), "responses")
    tokens, (noted, most) = shifts.response[index], _noted(shifts, index)
    values = shifts.kl[0, index, : len(tokens)].tolist()
    darkest = f"Darkest: {magnitude(most)} nats; by the square root"
    heading = f"{_heading(shifts, index)}. {_below(shifts, index)}. {darkest}."
    return TokenView(tokens, tuple(values), page.rendered("shaded", heading=heading, tokens=noted))


def _noted(shifts: results.TokenShifts, index: int) -> tuple[list[page.Noted], float]:
    """Each token of a response, its shade, and what is said of it; and the KL of the darkest.

    A shade is the square root of a token's KL over the largest: a response's sum is mostly one
    token's, and the others would not be seen beside it.
    """
    tokens = shifts.response[index]
    kl = shifts.kl[0, index, : len(tokens)].double().nan_to_num(0.0, 0.0)
    most = float(kl.max()) or 1.0
    shades = [round(shade, 3) for shade in (kl / most).clamp(0, 1).sqrt().tolist()]
    return list(zip(tokens, shades, _notes(shifts, index), strict=True)), most


def _heading(shifts: results.TokenShifts, index: int) -> str:
    return f"KL by token of the response to “{short_prompt(shifts.str_tokens[index])}”"


def _below(shifts: results.TokenShifts, index: int) -> str:
    """The two settings, and the sums over the response."""
    total, moved = magnitude(float(shifts.kl[0, index].nansum())), float(shifts.total[index])
    pair = " against ".join(shifts.between)
    return f"{pair}: {total} nats in all, log p of the response moves by {signed(moved)}"


def _hovers(shifts: results.TokenShifts, index: int) -> list[str]:
    return ["<br>".join(map(text.label, note)) for note in _notes(shifts, index)]


def _notes(shifts: results.TokenShifts, index: int) -> list[list[str]]:
    """What is said of each token of a response, line by line."""
    return [
        [
            f"{row['t'] + 1} {visible(row['y_t'])}",
            "KL {} and back {} nats".format(*(magnitude(row[way]) for way in _WAYS)),
            f"log p {_log_ps(row)}, rank {row['rank_base'] + 1} → {row['rank_adapted'] + 1}",
            f"promoted {row['promoted']}",
            f"suppressed {row['suppressed'].replace('-0.', '−0.')}",
        ]
        for row in shifts.to_frame().to_dict("records")
        if row["prompt"] == index
    ]


_WAYS = ("kl_base_to_adapted", "kl_adapted_to_base")


def _log_ps(row: Mapping[Any, Any]) -> str:
    return " → ".join(text.log_p_text(row[f"log_p_{end}"]) for end in ("base", "adapted"))


# A monospaced text is laid out by hand: columns to a line, and a column's width, a line's height
# and the margins in pixels, as DejaVu Sans Mono has them at 14 points.
_COLUMNS, _CHARACTER, _LINE = 84, 8.43, 28
_MARGIN, _ABOVE, _UNDER = 16, 64, 44
_FONT = {"family": "DejaVu Sans Mono, Menlo, Consolas, monospace", "size": 14, "color": "#1c2126"}


@drawing.still.register(results.TokenShifts)
def still_text(shifts: results.TokenShifts, prompt: int | None = None) -> go.Figure:
    """The shaded text as a figure, which can be written as an image; a rectangle behind a token."""
    index = only_prompt(prompt, len(shifts.response), "responses")
    hover, (noted, most) = _hovers(shifts, index), _noted(shifts, index)
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


_DONE = {"add_one": "added alone to the base", "leave_one_out": "left out of the adapted model"}


@drawing.figures.register(results.ResponseExplanation)
def response_figures(e: results.ResponseExplanation) -> dict[str, go.Figure]:
    """What there is to see; the last two, what each layer does to log p of each token, exactly."""
    figures = {"text": still_text(e.shifts), "tokens": token_shifts_figure(e.shifts)}
    shift = signed(float(e.shifts.total[0]))
    for how, done in _DONE.items():
        if (values := getattr(e, how)) is not None:
            total = signed(float(values.double().sum()))
            below = f"exact; {total} nats over all layers, the shift is {shift}"
            titles = f"log p of each token: each layer {done}", below

            def says(name: str, value: float, done: str = done) -> str:
                return f"<b>{text.label(name)}</b> {done}: {signed(value)} nats"

            z, names = values.tolist(), list(e.groups)
            figures[how] = maps.groups_by_token(titles, names, e.response, z, "nats", says)
    return figures


# --- The story

_HALF = 0.5
_MODULES_NAMED = 3
_SAID = 240  # characters of a response that its story quotes; the page has it whole


@drawing.story.register(results.ResponseExplanation)
def response_story(e: results.ResponseExplanation) -> str:
    """A paragraph a line: what was said, where it changed, the tokens, the modules, limits."""
    answers = "" if e.answers is None else f"On its own {text.answers_text(e.answers)}"
    moved = (" ".join(sentences) for sentences in (_moved(e), _token(e), _modules(e)))
    paragraphs = [_said(e), answers, *moved, text.caution_text(e.modules), _layers(e), _limits(e)]
    paragraphs.append(text.reading_text(e.shifts.meta))
    return "\n".join(filter(None, paragraphs))


def _named(e: results.ResponseExplanation, t: int) -> str:
    """A token by its text and place, from 1, with its neighbours where the text repeats.

    “·Lyon” (token 6), “·is⟦·Lyon⟧.” (token 6).
    """
    repeats = e.response.count(e.response[t]) > 1
    shown = context_of(e.response, t, 1) if repeats else e.response[t]
    return f"“{visible(shown)}” (token {t + 1})"


def _place(e: results.ResponseExplanation, t: int) -> str:
    """'6 ·Lyon', in tables."""
    return f"{t + 1} {visible(e.response[t])}"


def _said(e: results.ResponseExplanation) -> str:
    base, adapted = (float(end[0].nansum()) for end in e.shifts.log_p)
    origin = "which the adapted model says itself" if e.is_generated else "as given"
    said = text.beginning_of(text.prompt_text(e.response), _SAID)
    return (
        f"After “{short_prompt(e.prompt)}” the response has {many(len(e.response), 'token')}, "
        f"{origin}: “{said}”. Its log p goes from {signed(base)} nats in the "
        f"base model to {signed(adapted)} with the adapter."
    )


def _moved(e: results.ResponseExplanation) -> list[str]:
    kl, (total, share) = e.shifts.kl[0, 0], _kl_and_most(e)
    if not total > 0:
        return ["The adapter changes no token's distribution: KL is zero at each."]
    values = kl[~kl.isnan()].tolist()
    half = _half_held_by(values, sum(values))
    return [
        f"KL from the base model's distribution to the adapted one is {magnitude(total)} nats over "
        f"the response, {share} of it at {_named(e, e.moved_tokens[0])}.",
        f"{half} of {len(kl)} tokens hold{'s' if half == 1 else ''} half of it.",
    ]


def _half_held_by(values: Sequence[float], total: float) -> int:
    """How many of them, the largest first, it takes to reach half of the total."""
    sums = itertools.accumulate(sorted(values, reverse=True))
    return min(sum(so_far < _HALF * total for so_far in sums) + 1, len(values))


def _token(e: results.ResponseExplanation) -> list[str]:
    t, shifts = e.moved_tokens[0], e.shifts
    p = [percent(float(end[0, t].exp())) for end in shifts.log_p]
    ranks = [int(end[0, t]) + 1 for end in shifts.rank]
    ends = (shifts.promoted_ids, shifts.promoted), (shifts.suppressed_ids, shifts.suppressed)
    up, down = (
        f"“{visible(shifts.strings[str(int(ids[0, t, 0]))])}” ({points(float(change[0, t, 0]))})"
        for ids, change in ends
    )
    return [
        f"There the base model gives “{visible(e.response[t])}” {p[0]}, rank {ranks[0]}, and the "
        f"adapted model {p[1]}, rank {ranks[1]}.",
        f"The token promoted most is {up}, the one suppressed most {down}.",
    ]


def _ranked(e: results.ResponseExplanation) -> results.Attribution:
    """The split of the divergence that modules are ranked by: the complete one, where there is."""
    return e.modules if e.path is None else e.path


def _modules(e: results.ResponseExplanation) -> list[str]:
    ranked = _ranked(e)
    values, shift = ranked.per_site[0], float(ranked.shift[0])
    top = ", ".join(
        f"{site} ({value}{f', {share}' if shift else ''})"
        for site, _, value, share in text.top_rows(ranked, _MODULES_NAMED, 0)
    )
    if e.path is None:
        done = "leaving a module out of the adapted model takes the most from KL with"
        return [f"To first order, {done} {top}."]
    needed, count = _half_held_by(values.tolist(), shift), len(values)
    how = " completely" if getattr(e.path.quadrature, "met", True) else ", but not completely,"
    split = f"The path integral splits KL{how} among the {many(count, 'module')}"
    half = f"{many(needed, 'module')} hold{'s' if needed == 1 else ''} half of it"
    return [f"{split}: the largest shares are {top}, and {half}."]


def _layers(e: results.ResponseExplanation) -> str:
    if e.add_one is None or e.leave_one_out is None:
        return ""
    adding, added, at_added = _strongest(e, e.add_one)
    leaving, lost, at_lost = _strongest(e, e.leave_one_out)
    sums = [signed(float(values.nansum())) for values in (e.add_one, e.leave_one_out)]
    return (
        f"Added alone to the base model, {adding} changes log p of the response by {added} nats, "
        f"most at {at_added}. Left out, {leaving} takes {lost} nats of log p with it, most at "
        f"{at_lost}. Over all {many(len(e.groups), 'layer')} this sums to {sums[0]} added and "
        f"{sums[1]} left out, of a shift of {signed(float(e.shifts.total[0]))}: what differs from "
        "it is held by layers together."
    )


def _strongest(e: results.ResponseExplanation, values: Any) -> tuple[str, str, str]:
    """The layer that changes log p of the response most, by how much, and at which token most."""
    totals = values.sum(1)
    layer = int(totals.abs().argmax())
    token = int(values[layer].abs().argmax())
    return e.groups[layer], signed(float(totals[layer])), _named(e, token)


def _limits(e: results.ResponseExplanation) -> str:
    fast = " No layer was added or left out; run it without `fast` for that." if e.is_fast else ""
    of_this = "They are of this response: another one, of the same prompt, may change elsewhere."
    return f"The numbers of tokens are exact. {of_this}{fast}"


# --- Tables

_CHANGES, _RAISERS = 3, 4


def _tokens_table(e: results.ResponseExplanation, k: int) -> Table:
    """The tokens whose distribution moved most."""
    frame = e.shifts.top(k, 0)
    frame["share"] = frame["kl_base_to_adapted"] / (float(e.shifts.kl[0, 0].nansum()) or 1.0)
    rows = frame.to_dict("records")
    frame["place"] = [_place(e, row["t"]) for row in rows]
    frame["log p"] = list(map(_log_ps, rows))
    frame["rank"] = [f"{row['rank_base'] + 1} → {row['rank_adapted'] + 1}" for row in rows]
    heads = {"place": "token", "kl_base_to_adapted": "KL, nats", "share": "of all"}
    heads |= {"log p": "log p", "rank": "rank"}
    return table_of(frame, heads, texts=(0,), title="tokens that changed most")


def _changes_table(e: results.ResponseExplanation, k: int) -> page.TokenTable:
    """What is promoted and suppressed where the distribution moved most."""
    shifts = e.shifts

    def pairs(ids: Any, changes: Any, t: int) -> Pairs:
        largest = zip(*(x[0, t, :_CHANGES].tolist() for x in (ids, changes)), strict=True)
        return [(visible(shifts.strings[str(i)]), signed(change)) for i, change in largest]

    ends = (shifts.promoted_ids, shifts.promoted), (shifts.suppressed_ids, shifts.suppressed)
    order = shifts.kl[0, 0].argsort(descending=True)[:k].tolist()
    rows = [(_place(e, t), pairs(*ends[0], t), pairs(*ends[1], t)) for t in order]
    return page.TokenTable(rows, heads=("token", "promoted", "suppressed"))


def _modules_table(e: results.ResponseExplanation, k: int) -> Table:
    """The modules that hold most of the divergence."""
    ranked, first = _ranked(e), e.modules.per_site[0]
    values, shift = ranked.per_site[0], ranked.shift[0]
    rows: list[Row] = []
    for i in values.abs().argsort(descending=True)[:k].tolist():
        share, site = percent(float(values[i] / shift)), ranked.sites[i]
        along = () if e.path is None else (signed(float(values[i])), share)
        rows.append((site.name, site.module, *along, signed(float(first[i]))))
    along = () if e.path is None else ("path integral, nats", "of the divergence")
    heads = ("site", "module", *along, "first order at ε = 1, nats")
    return Table(heads, rows, texts=(0, 1), title="modules of the divergence")


def _moved_by_table(e: results.ResponseExplanation) -> page.TokenTable:
    """Of the tokens that changed most: the modules that raise them, and those that lower them."""
    rows: list[tuple[str, Pairs, Pairs]] = []
    for t, values in zip(e.moved_tokens, e.moved.tolist(), strict=True):
        if _is_saturated(e, t):
            log_p = f"log p {text.log_p_text(float(e.shifts.log_p[1, 0, t]))}"
            rows.append((_place(e, t), [(log_p, "saturated")], []))
            continue
        slopes: Any = pd.Series(values, [site.name for site in e.modules.sites])
        raised = slopes[slopes > 0].nlargest(_RAISERS).map(signed)
        lowered = slopes[slopes < 0].nsmallest(_RAISERS).map(signed)
        rows.append((_place(e, t), list(raised.items()), list(lowered.items())))
    return page.TokenTable(rows, heads=("token", "raised by", "lowered by"))


_SATURATED = -0.03  # nats: then log p moves by 3% at most of what the token's margin moves by


def _is_saturated(e: results.ResponseExplanation, t: int) -> bool:
    """Whether the adapted model is so sure of a token that a module's share of log p is tiny."""
    return float(e.shifts.log_p[1, 0, t]) > _SATURATED


def _saturation(e: results.ResponseExplanation) -> list[page.Block]:
    """What to ask where log p is saturated; nothing where it is not."""
    names = [_named(e, t) for t in e.moved_tokens if _is_saturated(e, t)][:_MODULES_NAMED]
    with_answers = worded("ll.explain with doc and pre", "explain with --doc and --pre")
    advice = (
        f"At {', '.join(names)} log p is saturated: the adapted model is so sure of the token that "
        "no module seems to move it. Ask there for the margin between it and the token that lost "
        f"most ({with_answers}), or for KL (“Which modules changed them”)."
    )
    return [advice] if names else []


def response_tables(e: results.ResponseExplanation, k: int = 10) -> Group:
    """The tokens that changed most and the modules of the divergence, for the terminal."""
    return in_terminal(_tokens_table(e, k), _modules_table(e, k))


def responses_table(numbered: Sequence[tuple[int, results.ResponseExplanation]]) -> Table:
    """What happened to each of several responses."""
    rows: list[Row] = []
    for number, e in numbered:
        asked = (f"{number}. {short_prompt(e.prompt)}", str(len(e.response)))
        total, share = _kl_and_most(e)
        moved = signed(float(e.shifts.total[0]))
        rows.append((*asked, magnitude(total), _named(e, e.moved_tokens[0]), share, moved))
    heads = ("prompt", "tokens", "KL, nats", "most at", "its share", "shift of log p")
    return Table(heads, rows, texts=(0, 3), links=[f"#prompt-{number}" for number, _ in numbered])


# --- One response's share of a page

_TOKENS_SHOWN, _MODULES_SHOWN = 12, 20


def response_part(e: results.ResponseExplanation) -> page.Part:
    """The text on top, shaded; below it what is folded."""
    prompt, meta = text.shortened(text.prompt_text(e.prompt)), e.shifts.meta
    noted, most = _noted(e.shifts, 0)
    scale = ("0", magnitude(most / 4), f"{magnitude(most)} nats")
    numbers_file = page.Download("tokens.csv", e.to_frame().to_csv(index=False))
    shaded = page.ShadedText(noted, scale, chosen=e.moved_tokens[0])
    return page.Part(
        name=short_prompt(e.prompt),
        subtitle=" · ".join(filter(None, (f"“{prompt}”", page.made_by(meta)))),
        headline=[sentences[0] for sentences in (_moved(e), _token(e), _modules(e))],
        numbers=_numbers(e),
        top=[*page.answers_of([e.answers]), shaded, numbers_file],
        sections=page.folded(response_story(e), _sections(e), "response", meta),
        warnings=page.warned(meta),
    )


def _kl_and_most(e: results.ResponseExplanation) -> tuple[float, str]:
    """KL over the response, and the share of it at the token that moved most."""
    kl = e.shifts.kl[0, 0].double()
    return float(kl.nansum()), percent(float(kl[e.moved_tokens[0]] / kl.nansum()))


def _numbers(e: results.ResponseExplanation) -> Pairs:
    t, ranked = e.moved_tokens[0], _ranked(e)
    total, share = _kl_and_most(e)
    before, after = (percent(float(end[0, t].exp())) for end in e.shifts.log_p)
    most = percent(float(ranked.per_site[0].abs().max() / ranked.shift[0]))
    method = "the path integral" if e.path is not None else "first order at ε = 1"
    return (
        (magnitude(total), f"nats, KL over {many(len(e.response), 'token')}"),
        (share, f"of it at {_named(e, t)}"),
        (f"{before} → {after}", "probability of that token, base → adapted"),
        (most, f"of KL at the largest module, by {method}"),
    )


def _sections(e: results.ResponseExplanation) -> list[page.Section]:
    """What there is, in the order in which one reads it."""
    figures = response_figures(e)
    modules = "First order at ε = 1 is what leaving a module out takes from KL of the response."
    if e.path is not None:
        splits = "The path integral splits KL of the response completely: over all modules it sums"
        modules = f"{splits} to it. {modules}"
        if e.path.quadrature is not None:
            modules += f" Taken with {text.quadrature_text(e.path.quadrature)}."
    tokens = _tokens_table(e, _TOKENS_SHOWN), _changes_table(e, _TOKENS_SHOWN)
    layers = [figures[how] for how in _DONE if how in figures]
    return [
        page.Section("Which tokens changed", [figures["tokens"], *tokens]),
        page.Section("Which modules changed them", [_modules_table(e, _MODULES_SHOWN)], modules),
        page.Section("Which module moved which token", [_moved_by_table(e), *_saturation(e)]),
        page.Section("Layer by layer, token by token", layers),
    ]
