"""The pages of explanations, of one prompt or several.

Of several prompts an overview comes first; each prompt is folded, and drawn once it is unfolded. A
section appears when what it shows was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from lens_lora.core import drawing
from lens_lora.errors import ArgumentError
from lens_lora.explanations import tables, words
from lens_lora.explanations.explanation import Explanation, Explanations, ResponseExplanation
from lens_lora.explanations.figures import (
    COMPARED,
    explanation_figures,
    layers_figure,
    margins_figure,
)
from lens_lora.explanations.response_page import response_part, responses_table
from lens_lora.show import go, page, text
from lens_lora.show.tables import margin_table
from lens_lora.show.text import magnitude, short_prompt
from lens_lora.show.words import Account

# --- The page of explanations

_MODULES = 20
_TOKENS, _TOKENS_OF_A_SITE = 8, 4


@drawing.report.register(ResponseExplanation)
@drawing.report.register(Explanation)
@drawing.report.register(Explanations)
def _report(explained: Any, *, title: str | None = None) -> str:
    return explanation_report(getattr(explained, "each", (explained,)), title=title)


Explained = Explanation | ResponseExplanation


def explanation_report(explanations: Sequence[Explained], *, title: str | None = None) -> str:
    """The page of one or several explanations, as a string."""
    if not explanations:
        raise ArgumentError("no explanation to report; give at least one.")
    numbered = list(enumerate(explanations, start=1))
    parts, titles = zip(*(_part(e, number) for number, e in numbered), strict=True)
    name = titles[0] if len(set(titles)) == 1 else f"{len(parts)} prompts explained"
    return page.page_html(title or name, parts, _overview(numbered) if len(parts) > 1 else ())


def _part(e: Explained, number: int) -> tuple[page.Part, str]:
    """One explanation's share of the page, and the page's title were it alone."""
    if isinstance(e, ResponseExplanation):
        return response_part(e), f"The response to “{short_prompt(e.prompt)}”"
    a, figures, first = words.explained_account(e), explanation_figures(e), e.first_order
    sentences, numbers = words.headline(e)
    facts, prompt = f"{a.doc} against {a.pre}", text.shortened(a.prompt)
    numbers_file = page.Download(f"modules-{number}.csv", e.to_frame().to_csv(index=False))
    story, sections = words.explanation_story(e), _sections(e, figures)
    part = page.Part(
        name=f"{prompt} — {facts}",
        subtitle=" · ".join(filter(None, (first.readout, f"“{prompt}”", page.made_by(first.meta)))),
        headline=sentences,
        numbers=numbers,
        top=[*page.answers_of([e.answers]), figures["path"], numbers_file],
        sections=page.folded(story, sections, "margin", first.meta),
        warnings=page.warned(first.meta),
    )
    return part, facts


def _sections(e: Explanation, figures: dict[str, go.Figure]) -> list[page.Section]:
    """What there is, in the order in which one reads it."""
    a = words.explained_account(e)

    def drawn(*names: str) -> list[page.Plot]:
        chosen = (name for name in figures if name.partition("/")[0] in names)
        return [page.plot(figures[name], heading=COMPARED.get(name, "")) for name in chosen]

    numbers = (margin_table(a), tables.said_table(e))
    moves = page.TokenTable(
        tables.site_moves(e, _TOKENS_OF_A_SITE),
        heads=("site", "raises", "lowers"),
        heading="The largest modules: change of probability to first order, and of the logit",
    )
    by_site, joint = e.module_shift, tables.token_pairs(e.shift, None, _TOKENS)
    names = [site.name for site in by_site.sites]
    tokens = [(name, *tables.token_pairs(by_site, name, _TOKENS_OF_A_SITE)) for name in names]
    rare = "By raw logit to first order: rare tokens come first"
    by_logit = page.TokenTable([("all modules together", *joint), *tokens], heading=rare)
    written = "First order at ε = 0, by the token at which a module writes, summed over each layer."
    if len(e.first_order.str_tokens[0]) > len(e.prompt):
        written += " After the prompt come the answers' tokens; a|b is where the two differ."
    null = "" if e.null is None else str(e.null.verdict[0])
    remainder = [*drawn("remainder"), tables.remainder_table(e)]
    changed_most = [tables.moved_table(e, _TOKENS), moves, by_logit]
    random = f"Adapters of the same sizes in random directions: {null}."
    kept = [*drawn("faithfulness"), tables.curves_table(e)]
    return [
        page.Section("The margin in numbers", [numbers]),
        page.Section("The remainder and its parts", remainder),
        page.Section("Second order", drawn("second_order")),
        page.Section("Where first order finds the shift", drawn("sites")),
        page.Section("Largest modules", [tables.sites_table(e, _MODULES)], _modules_lead(e)),
        page.Section("Tokens promoted and suppressed", changed_most),
        page.Section("Where in the prompt", drawn("positions"), written),
        page.Section("Coupling between layers", [*drawn("coupling"), tables.pairs_table(e)]),
        _measured(e, a, drawn(*COMPARED)),
        page.Section("Reliability flags", [tables.flags_table(e), *drawn("reliability")]),
        page.Section("Which few modules carry the shift", kept),
        page.Section("Against random directions", drawn("null"), random),
    ]


def _modules_lead(e: Explanation) -> str:
    lead = f"In {e.units}, by size of first order at ε = 0 (a)."
    if not e.is_fast:
        lead += " Each module was also added to the base model and left out of the adapted one."
    if e.path is not None and e.path.quadrature is not None:
        lead += f" Path integral with {text.quadrature_text(e.path.quadrature)}."
    return f"{lead} A flag names the question for which a at ε = 0 is not to be trusted."


def _measured(e: Explanation, a: Account, plots: Sequence[page.Plot]) -> page.Section:
    table = tables.agreement_table(e)
    if not table.rows and not e.is_fast:
        none = f"No single module moves the margin by more than rounding ({magnitude(a.floor)})."
        return page.Section("First order against measurements", [none])
    lead = (
        "Each point is a module: the prediction on the horizontal axis, the measured effect on the "
        "vertical one. On the dashed line they agree. A correlation does not see a difference in "
        "size; the slope does."
    )
    return page.Section("First order against measurements", [table, *plots], lead)


# --- What stands before the prompts of a page of several


def _overview(numbered: Sequence[tuple[int, Explained]]) -> list[page.Block]:
    """A table and pictures of the margins, and a table of the responses."""
    margins = [(n, e) for n, e in numbered if isinstance(e, Explanation)]
    responses = [(n, e) for n, e in numbered if isinstance(e, ResponseExplanation)]
    blocks = page.answers_of([e.answers for _, e in numbered])
    if margins:
        blocks += [
            *_by_units(margins, margins_figure),
            tables.margins_table(margins),
            page.Download("prompts.csv", _margins_frame(margins).to_csv(index=False)),
            *_by_units(margins, layers_figure),
        ]
    return [*blocks, responses_table(responses)]


def _by_units(margins: tables.Numbered, draw: Callable[..., go.Figure]) -> list[page.Plot]:
    """A picture of the margins in each unit."""
    units = dict.fromkeys(e.units for _, e in margins)
    return [page.plot(draw([e for _, e in margins if e.units == unit])) for unit in units]


def _margins_frame(margins: tables.Numbered) -> pd.DataFrame:
    """The table of the margins as numbers."""
    rows = []
    for number, e in margins:
        a, asked = words.explained_account(e), {"prompt": number, "text": short_prompt(e.prompt)}
        answers = {"doc": e.margin.doc[0], "pre": e.margin.pre[0], "units": e.units}
        numbers = {"base": a.m0, "adapted": a.m, "first_order": a.first_order}
        rows.append({**asked, **answers, **numbers, "flip_scale": a.flip_scale})
    return pd.DataFrame(rows)
