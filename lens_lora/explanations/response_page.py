"""An explained response: its pictures, its tables and its share of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from jaxtyping import Float
from rich.console import Group
from torch import Tensor

from lens_lora.core import drawing
from lens_lora.errors import many, worded
from lens_lora.explanations.explanation import ResponseExplanation
from lens_lora.explanations.response_words import (
    MODULES_NAMED,
    kl_and_most,
    modules_texts,
    moved_texts,
    named_token,
    placed_token,
    ranked_attribution,
    response_story,
    token_texts,
)
from lens_lora.shifts.figures import darkest_kl, log_p_pair, noted_tokens
from lens_lora.show import go, page, text
from lens_lora.show.tables import Pairs, Row, Table, in_terminal, table_of
from lens_lora.show.text import magnitude, percent, short_prompt, signed, visible
from lens_lora.views import maps
from lens_lora.views.attribution_words import quadrature_text

_DONE = {"add_one": "added alone to the base", "leave_one_out": "left out of the adapted model"}
# How many tokens are named that were promoted at a token of the response, and that were suppressed.
_CHANGES = 3
# How many modules are named that raise a token, and that lower it.
_RAISERS = 4
# Of how many tokens and modules, the largest first, the page has rows.
_TOKENS_SHOWN = 12
_MODULES_SHOWN = 20
# In nats: above it log p moves by 3 % at most of what the token's margin moves by.
_SATURATED = -0.03


# --- Figures


@drawing.figures.register(ResponseExplanation)
def response_figures(e: ResponseExplanation) -> dict[str, go.Figure]:
    """The figures by name; 'add_one' and 'leave_one_out' are of layers, and exact."""
    figures = {"text": e.shifts.plot_text(), "tokens": e.shifts.plot()}
    if e.add_one is not None:
        figures["add_one"] = _layers_figure(e, e.add_one, _DONE["add_one"])
    if e.leave_one_out is not None:
        figures["leave_one_out"] = _layers_figure(e, e.leave_one_out, _DONE["leave_one_out"])
    return figures


def _layers_figure(
    e: ResponseExplanation, values: Float[Tensor, "group token"], done: str
) -> go.Figure:
    """The map of what each layer does to log p of each token; `done` says by which intervention."""
    shift = signed(float(e.shifts.total[0]))
    total = signed(float(values.double().sum()))
    heading = f"log p of each token: each layer {done}"
    below = f"exact; {total} nats over all layers, the shift is {shift}"

    def hover(name: str, value: float) -> str:
        return f"<b>{text.label(name)}</b> {done}: {signed(value)} nats"

    layers = list(e.groups)
    cells = values.tolist()
    return maps.groups_by_token((heading, below), layers, e.response, cells, "nats", hover)


# --- Tables


def _tokens_table(e: ResponseExplanation, k: int) -> Table:
    """The tokens whose distribution moved most."""
    frame = e.shifts.top(k, 0)
    total = float(e.shifts.kl[0, 0].nansum()) or 1.0
    rows = frame.to_dict("records")
    frame["place"] = [placed_token(e, row["t"]) for row in rows]
    frame["share"] = frame["kl_base_to_adapted"] / total
    frame["log p"] = [log_p_pair(row) for row in rows]
    frame["rank"] = [f"{row['rank_base'] + 1} → {row['rank_adapted'] + 1}" for row in rows]
    heads = {
        "place": "token",
        "kl_base_to_adapted": "KL, nats",
        "share": "of all",
        "log p": "log p",
        "rank": "rank",
    }
    return table_of(frame, heads, texts=(0,), title="tokens that changed most")


def _changes_table(e: ResponseExplanation, k: int) -> page.TokenTable:
    """The tokens promoted and suppressed at the places where the distribution moved most."""
    shifts = e.shifts

    def largest_changes(ids: Tensor, changes: Tensor, t: int) -> Pairs:
        tokens = ids[0, t].tolist()
        sizes = changes[0, t].tolist()
        pairs: list[tuple[str, str]] = []
        for token, size in zip(tokens, sizes, strict=True):
            pairs.append((visible(shifts.strings[str(token)]), signed(size)))
        return pairs[:_CHANGES]

    rows: list[page.TokenRow] = []
    for t in shifts.kl[0, 0].argsort(descending=True)[:k].tolist():
        promoted = largest_changes(shifts.promoted_ids, shifts.promoted, t)
        suppressed = largest_changes(shifts.suppressed_ids, shifts.suppressed, t)
        rows.append(page.TokenRow(placed_token(e, t), promoted, suppressed))
    return page.TokenTable(rows, heads=("token", "promoted", "suppressed"))


def _modules_table(e: ResponseExplanation, k: int) -> Table:
    """The modules that hold most of the divergence."""
    ranked = ranked_attribution(e)
    values = ranked.per_site[0]
    first_order = e.modules.per_site[0]
    heads = ["site", "module", "first order at ε = 1, nats"]
    if e.path is not None:
        heads[2:2] = ["path integral, nats", "of the divergence"]
    rows: list[Row] = []
    for i in values.abs().argsort(descending=True)[:k].tolist():
        site = ranked.sites[i]
        cells = [site.name, site.module]
        if e.path is not None:
            share = percent(float(values[i] / ranked.shift[0]))
            cells += [signed(float(values[i])), share]
        cells.append(signed(float(first_order[i])))
        rows.append(tuple(cells))
    return Table(tuple(heads), rows, texts=(0, 1), title="modules of the divergence")


def _moved_by_table(e: ResponseExplanation) -> page.TokenTable:
    """The modules that raise each of the tokens that changed most, and those that lower it."""
    rows: list[page.TokenRow] = []
    for t, values in zip(e.moved_tokens, e.moved.tolist(), strict=True):
        if _is_saturated(e, t):
            log_p = f"log p {text.log_p_text(float(e.shifts.log_p[1, 0, t]))}"
            rows.append(page.TokenRow(placed_token(e, t), [(log_p, "saturated")], []))
            continue
        slopes: Any = pd.Series(values, [site.name for site in e.modules.sites])
        raised = slopes[slopes > 0].nlargest(_RAISERS).map(signed)
        lowered = slopes[slopes < 0].nsmallest(_RAISERS).map(signed)
        row = page.TokenRow(placed_token(e, t), list(raised.items()), list(lowered.items()))
        rows.append(row)
    return page.TokenTable(rows, heads=("token", "raised by", "lowered by"))


def _is_saturated(e: ResponseExplanation, t: int) -> bool:
    """Whether the adapted model is so sure of a token that a module's share of log p is tiny."""
    return float(e.shifts.log_p[1, 0, t]) > _SATURATED


def _advice_on_saturation(e: ResponseExplanation) -> list[page.Block]:
    """A paragraph on what to ask where log p is saturated; empty where it is not."""
    names = [named_token(e, t) for t in e.moved_tokens if _is_saturated(e, t)]
    if not names:
        return []
    with_answers = worded("ll.explain with doc and pre", "explain with --doc and --pre")
    advice = (
        f"At {', '.join(names[:MODULES_NAMED])} log p is saturated: the adapted model is so sure "
        "of the token that no module seems to move it. Ask there for the margin between it and the "
        f"token that lost most ({with_answers}), or for KL (“Which modules changed them”)."
    )
    return [advice]


def response_tables(e: ResponseExplanation, k: int = 10) -> Group:
    """The tokens that changed most and the modules of the divergence, for the terminal.

    Args:
        e: the explanation.
        k: how many rows each table has.
    """
    return in_terminal(_tokens_table(e, k), _modules_table(e, k))


def responses_table(numbered: Sequence[tuple[int, ResponseExplanation]]) -> Table:
    """One row for each of several responses: how far its distributions moved, and where most.

    Args:
        numbered: the explanations, each with the number of its prompt on the page.
    """
    rows: list[Row] = []
    for number, e in numbered:
        total, share = kl_and_most(e)
        row = (
            f"{number}. {short_prompt(e.prompt)}",
            str(len(e.response)),
            magnitude(total),
            named_token(e, e.moved_tokens[0]),
            share,
            signed(float(e.shifts.total[0])),
        )
        rows.append(row)
    heads = ("prompt", "tokens", "KL, nats", "most at", "its share", "shift of log p")
    return Table(heads, rows, texts=(0, 3), links=[f"#prompt-{number}" for number, _ in numbered])


# --- The page


def response_part(e: ResponseExplanation) -> page.Part:
    """The share of a page: the shaded text on top, below it what is folded.

    Args:
        e: the explanation.
    """
    meta = e.shifts.meta
    prompt = text.shortened(text.prompt_text(e.prompt))
    about = [f"“{prompt}”", page.made_by(meta)]
    darkest = darkest_kl(e.shifts, 0)
    # A shade is a square root, so half of the darkest is a quarter of its KL.
    scale = ("0", magnitude(darkest / 4), f"{magnitude(darkest)} nats")
    shaded = page.ShadedText(noted_tokens(e.shifts, 0), scale, chosen=e.moved_tokens[0])
    numbers_file = page.Download("tokens.csv", e.to_frame().to_csv(index=False))
    first_moved, *_ = moved_texts(e)
    first_of_token, *_ = token_texts(e)
    first_of_modules, *_ = modules_texts(e)
    return page.Part(
        name=short_prompt(e.prompt),
        subtitle=" · ".join(filter(None, about)),
        headline=[first_moved, first_of_token, first_of_modules],
        numbers=_numbers(e),
        top=[*page.answers_of([e.answers]), shaded, numbers_file],
        sections=page.folded(response_story(e), _sections(e), "response", meta),
        warnings=page.warned(meta),
    )


def _numbers(e: ResponseExplanation) -> Pairs:
    """The four numbers on top of the page."""
    most_moved = e.moved_tokens[0]
    total, share = kl_and_most(e)
    probabilities = [percent(float(end[0, most_moved].exp())) for end in e.shifts.log_p]
    ranked = ranked_attribution(e)
    largest = percent(float(ranked.per_site[0].abs().max() / ranked.shift[0]))
    method = "the path integral" if e.path is not None else "first order at ε = 1"
    return (
        (magnitude(total), f"nats, KL over {many(len(e.response), 'token')}"),
        (share, f"of it at {named_token(e, most_moved)}"),
        (" → ".join(probabilities), "probability of that token, base → adapted"),
        (largest, f"of KL at the largest module, by {method}"),
    )


def _sections(e: ResponseExplanation) -> list[page.Section]:
    """The sections in the order in which one reads them; an empty one is left out of the page."""
    figures = response_figures(e)
    tokens = [
        figures["tokens"],
        _tokens_table(e, _TOKENS_SHOWN),
        _changes_table(e, _TOKENS_SHOWN),
    ]
    modules = [_modules_table(e, _MODULES_SHOWN)]
    moved = [_moved_by_table(e), *_advice_on_saturation(e)]
    layers = [figures[how] for how in _DONE if how in figures]
    return [
        page.Section("Which tokens changed", tokens),
        page.Section("Which modules changed them", modules, _modules_lead(e)),
        page.Section("Which module moved which token", moved),
        page.Section("Layer by layer, token by token", layers),
    ]


def _modules_lead(e: ResponseExplanation) -> str:
    lead = "First order at ε = 1 is what leaving a module out takes from KL of the response."
    if e.path is None:
        return lead
    lead = (
        "The path integral splits KL of the response completely: over all modules it sums to it. "
        f"{lead}"
    )
    if e.path.quadrature is not None:
        lead += f" Taken with {quadrature_text(e.path.quadrature)}."
    return lead
