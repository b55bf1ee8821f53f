"""The page of an explained readout: a part for each prompt, and before several an overview."""

from __future__ import annotations

from lens_lora.core import drawing
from lens_lora.explanations.explanation import ReadoutExplanation
from lens_lora.explanations.figures import readout_figures
from lens_lora.explanations.page import by_site_sections
from lens_lora.explanations.readout_words import readout_headline, readout_story
from lens_lora.explanations.words import readout_numbers
from lens_lora.show import page, text
from lens_lora.show.tables import Table
from lens_lora.views.attribution_words import top_sites
from lens_lora.views.tables import modules_table, readout_table

# How many modules the table of the mean over prompts has.
_MODULES = 20


@drawing.report.register(ReadoutExplanation)
def readout_report(e: ReadoutExplanation, *, title: str | None = None) -> str:
    """The page, with a part for each of the first prompts."""
    count = page.parts_shown(len(e.prompts))
    parts = [_part(e.of_prompt(index), index + 1) for index in range(count)]
    overview: list[page.Block] = []
    if len(e.prompts) > 1:
        numbers_file = page.Download("prompts.csv", _numbers(e))
        modules = modules_table(e.first_order, _MODULES)
        overview = [
            *readout_figures(e).values(),
            modules,
            _prompts_table(e, count),
            numbers_file,
            *page.without_part(len(e.prompts)),
        ]
    subtitle = page.made_by(e.first_order.meta)
    return page.page_html(title or e.readout, parts, overview, subtitle)


def _part(e: ReadoutExplanation, number: int) -> page.Part:
    """One prompt's share of the page."""
    numbers = readout_numbers(e)
    figures = readout_figures(e)
    meta = e.first_order.meta
    prompt = text.shortened(numbers.prompt)
    headline = readout_headline(e)
    split_sites: list[page.Block] = []
    for name in ("heads", "ranks"):
        if name in figures:
            split_sites.append(figures[name])
    by_part = page.Section(
        "By head and by rank",
        split_sites,
        "First order at ε = 0 of the sites with the largest parts.",
    )
    sections = [
        page.Section("The readout in numbers", [readout_table(numbers, e.readout)]),
        *by_site_sections(e, figures, numbers, [by_part]),
    ]
    return page.Part(
        name=prompt,
        subtitle=" · ".join(filter(None, (e.readout, f"“{prompt}”", page.made_by(meta)))),
        headline=headline.sentences,
        numbers=headline.numbers,
        top=[
            figures["sites"],
            page.Download(f"modules-{number}.csv", e.to_frame().to_csv(index=False)),
        ],
        sections=page.folded(readout_story(e), sections, "attribution", meta),
        warnings=page.warned(meta),
    )


def _prompts_table(e: ReadoutExplanation, count: int) -> Table:
    """A row for each prompt that has a part, which leads to it."""
    rows: list[tuple[str, ...]] = []
    for index in range(count):
        of_prompt = e.of_prompt(index)
        numbers = readout_numbers(of_prompt)
        (largest,) = top_sites(of_prompt.first_order, 1)
        row = (
            f"{index + 1}. {text.short_prompt(e.prompts[index])}",
            text.signed(numbers.m0),
            text.signed(numbers.m),
            text.signed(numbers.shift),
            numbers.share(numbers.first_order),
            f"{largest.site} {largest.value}",
        )
        rows.append(row)
    heads = ("prompt", "base", "adapted", "shift", "of it first order", "largest first-order part")
    links = [f"#prompt-{number}" for number in range(1, count + 1)]
    return Table(heads, rows, texts=(0, 5), links=links)


def _numbers(e: ReadoutExplanation) -> str:
    """The numbers of every prompt, as a table to save."""
    return e.second_order.to_frame().to_csv(index=False)
