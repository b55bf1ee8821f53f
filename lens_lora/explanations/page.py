"""The pages of explanations, of one prompt or several.

For several prompts an overview comes first; each prompt is folded, and drawn when it is unfolded. A
section appears if its numbers were computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from lens_lora.core import drawing
from lens_lora.errors import ArgumentError
from lens_lora.explanations import tables, words
from lens_lora.explanations.explanation import (
    Explanation,
    Explanations,
    ResponseExplanation,
    SiteExplanation,
)
from lens_lora.explanations.figures import (
    COMPARED,
    explanation_figures,
    layers_figure,
    margins_figure,
)
from lens_lora.explanations.response_page import response_part, responses_table
from lens_lora.show import go, page, text
from lens_lora.show.text import magnitude, short_prompt
from lens_lora.views.attribution_words import quadrature_text
from lens_lora.views.tables import margin_table
from lens_lora.views.words import ReadoutNumbers

Explained = Explanation | ResponseExplanation

# How many modules the table of the largest has.
_MODULES = 20
# How many tokens a table names that are promoted, and as many that are suppressed.
_TOKENS = 8
_TOKENS_OF_A_SITE = 4


@drawing.report.register(ResponseExplanation)
@drawing.report.register(Explanation)
def _report(explanation: Explained, *, title: str | None = None) -> str:
    return explanation_report([explanation], title=title)


@drawing.report.register(Explanations)
def _report_of_several(explanations: Explanations, *, title: str | None = None) -> str:
    return explanation_report(explanations.each, title=title)


def explanation_report(explanations: Sequence[Explained], *, title: str | None = None) -> str:
    """The page of one or several explanations, as a string.

    Args:
        explanations: explanations of margins or of responses.
        title: the page's title; by default it names the subject of the explanations.

    Raises:
        ArgumentError: the list of explanations is empty.
    """
    if not explanations:
        raise ArgumentError("no explanation to report; give at least one.")
    numbered = list(enumerate(explanations, start=1))
    parts = [_part(explanation, number) for number, explanation in numbered]
    overview = _overview(numbered) if len(parts) > 1 else []
    made_by = {page.made_by(_meta(explanation)) for explanation in explanations}
    subtitle = made_by.pop() if len(made_by) == 1 else ""
    return page.page_html(title or _title(explanations), parts, overview, subtitle)


def _meta(e: Explained) -> page.Meta:
    """The names of the model and the adapter."""
    return e.shifts.meta if isinstance(e, ResponseExplanation) else e.first_order.meta


def _title(explanations: Sequence[Explained]) -> str:
    """The title of a page: the subject that its parts share, or their number."""
    subjects = {_subject(explanation) for explanation in explanations}
    if len(subjects) == 1:
        return subjects.pop()
    return f"{len(explanations)} prompts explained"


def _subject(e: Explained) -> str:
    if isinstance(e, ResponseExplanation):
        return f"The response to “{short_prompt(e.prompt)}”"
    numbers = words.explained_numbers(e)
    return f"{numbers.doc} against {numbers.pre}"


def _part(e: Explained, number: int) -> page.Part:
    """One explanation's share of the page."""
    if isinstance(e, ResponseExplanation):
        return response_part(e)
    figures = explanation_figures(e)
    meta = e.first_order.meta
    prompt = text.shortened(words.explained_numbers(e).prompt)
    about = [e.first_order.readout, f"“{prompt}”", page.made_by(meta)]
    headline = words.headline(e)
    numbers_file = page.Download(f"modules-{number}.csv", e.to_frame().to_csv(index=False))
    story = words.explanation_story(e)
    return page.Part(
        name=f"{prompt} — {_subject(e)}",
        subtitle=" · ".join(filter(None, about)),
        headline=headline.sentences,
        numbers=headline.numbers,
        top=[*page.answers_of([e.answers]), figures["path"], numbers_file],
        sections=page.folded(story, _sections(e, figures), "margin", meta),
        warnings=page.warned(meta),
    )


def _sections(e: Explanation, figures: dict[str, go.Figure]) -> list[page.Section]:
    """The sections in the order in which one reads them; an empty one is left out of the page."""
    side_by_side = (margin_table(words.explained_numbers(e)), tables.said_table(e))
    promoted = page.Section("Tokens promoted and suppressed", _token_blocks(e))
    return [
        page.Section("The margin in numbers", [side_by_side]),
        *by_site_sections(e, figures, words.explained_numbers(e), [promoted]),
    ]


def by_site_sections(
    e: SiteExplanation,
    figures: dict[str, go.Figure],
    numbers: ReadoutNumbers,
    after_modules: Sequence[page.Section],
) -> list[page.Section]:
    """The sections that need no two answers; an empty one is left out of the page.

    Args:
        e: the explanation of one prompt.
        figures: its figures by name.
        numbers: those of its readout.
        after_modules: sections that follow the largest modules.
    """

    def plots_of(*names: str) -> list[page.Plot]:
        """The figures of these names, and those whose names begin with one of them and '/'."""
        plots: list[page.Plot] = []
        for name, figure in figures.items():
            if name.partition("/")[0] in names:
                plots.append(page.plot(figure, heading=COMPARED.get(name, "")))
        return plots

    remainder = [*plots_of("remainder"), tables.remainder_table(e)]
    largest = [tables.sites_table(e, _MODULES)]
    coupling = [*plots_of("coupling"), tables.pairs_table(e)]
    flags = [tables.flags_table(e), *plots_of("reliability")]
    kept = [*plots_of("faithfulness"), tables.curves_table(e)]
    return [
        page.Section("The remainder and its parts", remainder),
        page.Section("Second order", plots_of("second_order")),
        page.Section("Where first order finds the shift", plots_of("sites")),
        page.Section("Largest modules", largest, _modules_lead(e)),
        *after_modules,
        page.Section("Where in the prompt", plots_of("positions"), _positions_lead(e)),
        page.Section("Coupling between layers", coupling),
        _measured(e, numbers, plots_of(*COMPARED)),
        page.Section("Reliability flags", flags),
        page.Section("Which few modules carry the shift", kept),
        page.Section("Against random directions", plots_of("null"), _null_lead(e)),
    ]


def _token_blocks(e: Explanation) -> list[page.Block]:
    """The sections on the next token: its probabilities, by the largest modules, and its logits."""
    moves = page.TokenTable(
        tables.site_moves(e, _TOKENS_OF_A_SITE),
        heads=("site", "raises", "lowers"),
        heading="The largest modules: change of probability to first order, and of the logit",
    )
    promoted, suppressed = tables.token_pairs(e.shift, None, _TOKENS)
    by_logit = [page.TokenRow("all modules together", promoted, suppressed)]
    for site in e.module_shift.sites:
        promoted, suppressed = tables.token_pairs(e.module_shift, site.name, _TOKENS_OF_A_SITE)
        by_logit.append(page.TokenRow(site.name, promoted, suppressed))
    logits = page.TokenTable(
        by_logit, heading="By raw logit to first order: rare tokens come first"
    )
    return [tables.moved_table(e, _TOKENS), moves, logits]


def _positions_lead(e: SiteExplanation) -> str:
    lead = "First order at ε = 0, by the token at which a module writes, summed over each layer."
    if isinstance(e, Explanation) and len(e.first_order.str_tokens[0]) > len(e.prompt):
        lead += " After the prompt come the answers' tokens; a|b is where the two differ."
    return lead


def _null_lead(e: SiteExplanation) -> str:
    verdict = "" if e.null is None else str(e.null.verdict[0])
    return f"Adapters of the same sizes in random directions: {verdict}."


def _modules_lead(e: SiteExplanation) -> str:
    lead = f"In {e.units}, by size of first order at ε = 0 (a)."
    if not e.is_fast:
        lead += " Each module was also added to the base model and left out of the adapted one."
    if e.path is not None and e.path.quadrature is not None:
        lead += f" Path integral with {quadrature_text(e.path.quadrature)}."
    return f"{lead} A flag names the question for which a at ε = 0 is not to be trusted."


def _measured(
    e: SiteExplanation, numbers: ReadoutNumbers, plots: Sequence[page.Plot]
) -> page.Section:
    """First order compared with the measured effects of single modules."""
    heading = "First order against measurements"
    table = tables.agreement_table(e)
    if not table.rows and not e.is_fast:
        floor = magnitude(numbers.floor)
        none = f"No single module moves the {words.noun_of(e)} by more than rounding ({floor})."
        return page.Section(heading, [none])
    lead = (
        "Each point is a module: the prediction on the horizontal axis, the measured effect on the "
        "vertical one. On the dashed line they agree. A correlation does not see a difference in "
        "size; the slope does."
    )
    return page.Section(heading, [table, *plots], lead)


# --- What stands before the prompts of a page of several


def _overview(numbered: Sequence[tuple[int, Explained]]) -> list[page.Block]:
    """A table and pictures of the margins, and a table of the responses."""
    margins = [(number, e) for number, e in numbered if isinstance(e, Explanation)]
    responses = [(number, e) for number, e in numbered if isinstance(e, ResponseExplanation)]
    blocks = page.answers_of([e.answers for _, e in numbered])
    if margins:
        numbers_file = page.Download("prompts.csv", _margins_frame(margins).to_csv(index=False))
        blocks += _plots_by_units(margins, margins_figure)
        blocks += [tables.margins_table(margins), numbers_file]
        blocks += _plots_by_units(margins, layers_figure)
    return [*blocks, responses_table(responses)]


def _plots_by_units(
    margins: tables.Numbered, draw: Callable[[Sequence[Explanation]], go.Figure]
) -> list[page.Plot]:
    """A picture of the margins in logits, and one of those in nats."""
    by_units: dict[str, list[Explanation]] = {}
    for _, e in margins:
        by_units.setdefault(e.units, []).append(e)
    return [page.plot(draw(of_unit)) for of_unit in by_units.values()]


def _margins_frame(margins: tables.Numbered) -> pd.DataFrame:
    """The table of the margins as numbers."""
    rows: list[Mapping[str, object]] = []
    for number, e in margins:
        numbers = words.explained_numbers(e)
        row = {
            "prompt": number,
            "text": short_prompt(e.prompt),
            "doc": e.margin.doc[0],
            "pre": e.margin.pre[0],
            "units": e.units,
            "base": numbers.m0,
            "adapted": numbers.m,
            "first_order": numbers.first_order,
            "flip_scale": numbers.flip_scale,
        }
        rows.append(row)
    return pd.DataFrame(rows)
