"""The pages of an attribution and of a fact margin: one part for each prompt.

The sentences on a fact margin are those of its story.
"""

from __future__ import annotations

from lens_lora.core import Attribution, FactMargin, drawing
from lens_lora.errors import many
from lens_lora.show import text
from lens_lora.show.page import (
    Block,
    Part,
    Section,
    folded,
    made_by,
    page_html,
    parts_shown,
    warned,
    without_part,
)
from lens_lora.show.tables import Row, Table
from lens_lora.show.text import percent, short_prompt, signed
from lens_lora.views.attribution_words import top_sites
from lens_lora.views.curves import margin_figure, remainder_figure
from lens_lora.views.maps import attribution_figure, site_heatmap
from lens_lora.views.tables import attribution_heading, margin_table, modules_table, prompts_table
from lens_lora.views.words import (
    MarginNumbers,
    adapted_text,
    base_text,
    conclusion_text,
    flip_sentence,
    joined,
    margin_numbers,
    margin_story,
)

_MODULES = 30
_MODULES_IN_HEADLINE = 3


# --- A fact margin


@drawing.report.register(FactMargin)
def margin_report(margin: FactMargin, *, title: str | None = None) -> str:
    """Write a fact margin as a page, with a part for each of the first prompts."""
    prompts = len(margin.doc)
    count = parts_shown(prompts)
    all_numbers = [margin_numbers(margin, prompt) for prompt in range(count)]
    parts = [_margin_part(margin, prompt, numbers) for prompt, numbers in enumerate(all_numbers)]
    first = all_numbers[0]
    name = f"{first.doc} against {first.pre}"
    overview: list[Block] = []
    if count > 1:
        name = f"Margins on {many(prompts, 'prompt')}"
        overview = [_margins_table(all_numbers), *without_part(prompts)]
    return page_html(title or name, parts, overview, made_by(margin.attribution.meta))


def _margin_part(margin: FactMargin, prompt: int, numbers: MarginNumbers) -> Part:
    """One prompt's part of the page."""
    attribution = margin.attribution
    shown = text.shortened(numbers.prompt)
    sections = [
        Section("The margin in numbers", [margin_table(numbers)]),
        Section(
            "The remainder along the path",
            [remainder_figure(margin.curve, prompt)],
            "The share of the exact shift that first order leaves, at each strength that was run.",
        ),
        Section("Where first order finds the shift", [site_heatmap(attribution, prompt)]),
        Section(
            "Largest modules",
            [modules_table(attribution, _MODULES, prompt)],
            f"In {numbers.units}, by size of first order at ε = 0.",
        ),
    ]
    flip = "none" if numbers.flip_scale is None else f"ε = {numbers.flip_scale:.3g}"
    return Part(
        name=f"{shown} — {numbers.doc} against {numbers.pre}",
        subtitle=" · ".join(
            filter(None, (attribution.readout, f"“{shown}”", made_by(attribution.meta)))
        ),
        headline=(
            base_text(numbers),
            joined(adapted_text(numbers), flip_sentence(numbers)),
            conclusion_text(numbers),
        ),
        numbers=(
            (signed(numbers.m0), f"{numbers.units}, the base model's margin"),
            (signed(numbers.m), f"{numbers.units}, the adapted model's margin"),
            (flip, "where the preference flips"),
            (numbers.share(numbers.first_order), "of the shift is the sum of first-order parts"),
        ),
        top=[margin_figure(margin, prompt)],
        sections=folded(margin_story(margin, prompt), sections, "margin", attribution.meta),
        warnings=warned(attribution.meta),
    )


def _margins_table(all_numbers: list[MarginNumbers]) -> Table:
    """A row for each prompt, which leads to its part of the page."""
    rows: list[Row] = []
    for numbers in all_numbers:
        flip = "none" if numbers.flip_scale is None else f"{numbers.flip_scale:.3g}"
        row = (
            numbers.prompt,
            f"{numbers.doc} − {numbers.pre}",
            signed(numbers.m0),
            signed(numbers.m),
            flip,
            numbers.share(numbers.first_order),
        )
        rows.append(row)
    heads = ("prompt", "margin", "base", "adapted", "flips at ε", "first order, of the shift")
    links = [f"#prompt-{number}" for number in range(1, len(rows) + 1)]
    return Table(heads, rows, texts=(0, 1), links=links)


# --- An attribution


@drawing.report.register(Attribution)
def attribution_report(attribution: Attribution, *, title: str | None = None) -> str:
    """Write an attribution as a page, with a part for each of the first prompts."""
    prompts = len(attribution.base)
    count = parts_shown(prompts)
    parts = [_attribution_part(attribution, prompt) for prompt in range(count)]
    name = f"{attribution.readout}: {text.key_text(attribution.key)}"
    overview: list[Block] = []
    if count > 1:
        overview = [
            site_heatmap(attribution),
            modules_table(attribution, _MODULES),
            prompts_table(attribution, count),
            *without_part(prompts),
        ]
    return page_html(title or name, parts, overview, made_by(attribution.meta))


def _attribution_part(attribution: Attribution, prompt: int) -> Part:
    """One prompt's part of the page."""
    units = attribution.units
    base = float(attribution.base[prompt])
    adapted = float(attribution.adapted[prompt])
    shift = float(attribution.shift[prompt])
    total = float(attribution.total[prompt])
    method = text.key_text(attribution.key)
    share = percent(total / shift) if shift else "—"
    tops = top_sites(attribution, _MODULES_IN_HEADLINE, prompt)
    largest = ", ".join(f"{top.site} {top.value} ({top.share})" for top in tops)
    heading, *notes = attribution_heading(attribution)
    sentences = (
        f"The adapter moves {attribution.readout} by {signed(shift)} {units}.",
        f"The modules' parts, {method}, sum to {signed(total)} {units}, {share} of the shift.",
        f"The largest are {largest}.",
    )
    split: list[Block] = []
    if attribution.by:
        split = [site_heatmap(attribution, prompt)]
    sections = [
        Section("By layer and kind of module", split),
        Section(
            "Largest modules",
            [modules_table(attribution, _MODULES, prompt)],
            f"In {units}, by size, with the share of the shift.",
        ),
    ]
    shown = text.shortened(text.prompt_text(attribution.str_tokens[prompt]))
    return Part(
        name=short_prompt(attribution.str_tokens[prompt]),
        subtitle=" · ".join(filter(None, (method, f"“{shown}”", made_by(attribution.meta)))),
        headline=sentences,
        numbers=(
            (signed(base), f"{units}, the base model"),
            (signed(adapted), f"{units}, the adapted model"),
            (signed(total), f"{units}, the sum of all modules"),
            (signed(shift - total), f"{units}, what the sum leaves of the shift"),
        ),
        top=[attribution_figure(attribution, prompt)],
        sections=folded(
            "\n".join((heading, *notes, *sentences)), sections, "attribution", attribution.meta
        ),
        warnings=warned(attribution.meta),
    )
