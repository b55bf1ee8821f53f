"""An explained response: its pictures, its tables and its share of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Group

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
from lens_lora.responses.figures import log_p_pair, noted_tokens
from lens_lora.show import go, maps, page, text
from lens_lora.show.tables import Pairs, Row, Table, in_terminal, table_of
from lens_lora.show.text import magnitude, percent, short_prompt, signed, visible

_DONE = {"add_one": "added alone to the base", "leave_one_out": "left out of the adapted model"}


@drawing.figures.register(ResponseExplanation)
def response_figures(e: ResponseExplanation) -> dict[str, go.Figure]:
    """What there is to see; the last two, what each layer does to log p of each token, exactly."""
    figures = {"text": e.shifts.plot_text(), "tokens": e.shifts.plot()}
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


_CHANGES, _RAISERS = 3, 4


def _tokens_table(e: ResponseExplanation, k: int) -> Table:
    """The tokens whose distribution moved most."""
    frame = e.shifts.top(k, 0)
    frame["share"] = frame["kl_base_to_adapted"] / (float(e.shifts.kl[0, 0].nansum()) or 1.0)
    rows = frame.to_dict("records")
    frame["place"] = [placed_token(e, row["t"]) for row in rows]
    frame["log p"] = list(map(log_p_pair, rows))
    frame["rank"] = [f"{row['rank_base'] + 1} → {row['rank_adapted'] + 1}" for row in rows]
    heads = {"place": "token", "kl_base_to_adapted": "KL, nats", "share": "of all"}
    heads |= {"log p": "log p", "rank": "rank"}
    return table_of(frame, heads, texts=(0,), title="tokens that changed most")


def _changes_table(e: ResponseExplanation, k: int) -> page.TokenTable:
    """What is promoted and suppressed where the distribution moved most."""
    shifts = e.shifts

    def pairs(ids: Any, changes: Any, t: int) -> Pairs:
        largest = zip(*(x[0, t, :_CHANGES].tolist() for x in (ids, changes)), strict=True)
        return [(visible(shifts.strings[str(i)]), signed(change)) for i, change in largest]

    ends = (shifts.promoted_ids, shifts.promoted), (shifts.suppressed_ids, shifts.suppressed)
    order = shifts.kl[0, 0].argsort(descending=True)[:k].tolist()
    rows = [(placed_token(e, t), pairs(*ends[0], t), pairs(*ends[1], t)) for t in order]
    return page.TokenTable(rows, heads=("token", "promoted", "suppressed"))


def _modules_table(e: ResponseExplanation, k: int) -> Table:
    """The modules that hold most of the divergence."""
    ranked, first = ranked_attribution(e), e.modules.per_site[0]
    values, shift = ranked.per_site[0], ranked.shift[0]
    rows: list[Row] = []
    for i in values.abs().argsort(descending=True)[:k].tolist():
        share, site = percent(float(values[i] / shift)), ranked.sites[i]
        along = () if e.path is None else (signed(float(values[i])), share)
        rows.append((site.name, site.module, *along, signed(float(first[i]))))
    along = () if e.path is None else ("path integral, nats", "of the divergence")
    heads = ("site", "module", *along, "first order at ε = 1, nats")
    return Table(heads, rows, texts=(0, 1), title="modules of the divergence")


def _moved_by_table(e: ResponseExplanation) -> page.TokenTable:
    """Of the tokens that changed most: the modules that raise them, and those that lower them."""
    rows: list[tuple[str, Pairs, Pairs]] = []
    for t, values in zip(e.moved_tokens, e.moved.tolist(), strict=True):
        if _is_saturated(e, t):
            log_p = f"log p {text.log_p_text(float(e.shifts.log_p[1, 0, t]))}"
            rows.append((placed_token(e, t), [(log_p, "saturated")], []))
            continue
        slopes: Any = pd.Series(values, [site.name for site in e.modules.sites])
        raised = slopes[slopes > 0].nlargest(_RAISERS).map(signed)
        lowered = slopes[slopes < 0].nsmallest(_RAISERS).map(signed)
        rows.append((placed_token(e, t), list(raised.items()), list(lowered.items())))
    return page.TokenTable(rows, heads=("token", "raised by", "lowered by"))


_SATURATED = -0.03  # nats: then log p moves by 3% at most of what the token's margin moves by


def _is_saturated(e: ResponseExplanation, t: int) -> bool:
    """Whether the adapted model is so sure of a token that a module's share of log p is tiny."""
    return float(e.shifts.log_p[1, 0, t]) > _SATURATED


def _saturation(e: ResponseExplanation) -> list[page.Block]:
    """What to ask where log p is saturated; nothing where it is not."""
    names = [named_token(e, t) for t in e.moved_tokens if _is_saturated(e, t)][:MODULES_NAMED]
    with_answers = worded("ll.explain with doc and pre", "explain with --doc and --pre")
    advice = (
        f"At {', '.join(names)} log p is saturated: the adapted model is so sure of the token that "
        "no module seems to move it. Ask there for the margin between it and the token that lost "
        f"most ({with_answers}), or for KL (“Which modules changed them”)."
    )
    return [advice] if names else []


def response_tables(e: ResponseExplanation, k: int = 10) -> Group:
    """The tokens that changed most and the modules of the divergence, for the terminal."""
    return in_terminal(_tokens_table(e, k), _modules_table(e, k))


def responses_table(numbered: Sequence[tuple[int, ResponseExplanation]]) -> Table:
    """What happened to each of several responses."""
    rows: list[Row] = []
    for number, e in numbered:
        asked = (f"{number}. {short_prompt(e.prompt)}", str(len(e.response)))
        total, share = kl_and_most(e)
        moved = signed(float(e.shifts.total[0]))
        rows.append((*asked, magnitude(total), named_token(e, e.moved_tokens[0]), share, moved))
    heads = ("prompt", "tokens", "KL, nats", "most at", "its share", "shift of log p")
    return Table(heads, rows, texts=(0, 3), links=[f"#prompt-{number}" for number, _ in numbered])


_TOKENS_SHOWN, _MODULES_SHOWN = 12, 20


def response_part(e: ResponseExplanation) -> page.Part:
    """The text on top, shaded; below it what is folded."""
    prompt, meta = text.shortened(text.prompt_text(e.prompt)), e.shifts.meta
    noted, most = noted_tokens(e.shifts, 0)
    scale = ("0", magnitude(most / 4), f"{magnitude(most)} nats")
    numbers_file = page.Download("tokens.csv", e.to_frame().to_csv(index=False))
    shaded = page.ShadedText(noted, scale, chosen=e.moved_tokens[0])
    return page.Part(
        name=short_prompt(e.prompt),
        subtitle=" · ".join(filter(None, (f"“{prompt}”", page.made_by(meta)))),
        headline=[sentences[0] for sentences in (moved_texts(e), token_texts(e), modules_texts(e))],
        numbers=_numbers(e),
        top=[*page.answers_of([e.answers]), shaded, numbers_file],
        sections=page.folded(response_story(e), _sections(e), "response", meta),
        warnings=page.warned(meta),
    )


def _numbers(e: ResponseExplanation) -> Pairs:
    t, ranked = e.moved_tokens[0], ranked_attribution(e)
    total, share = kl_and_most(e)
    before, after = (percent(float(end[0, t].exp())) for end in e.shifts.log_p)
    most = percent(float(ranked.per_site[0].abs().max() / ranked.shift[0]))
    method = "the path integral" if e.path is not None else "first order at ε = 1"
    return (
        (magnitude(total), f"nats, KL over {many(len(e.response), 'token')}"),
        (share, f"of it at {named_token(e, t)}"),
        (f"{before} → {after}", "probability of that token, base → adapted"),
        (most, f"of KL at the largest module, by {method}"),
    )


def _sections(e: ResponseExplanation) -> list[page.Section]:
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
