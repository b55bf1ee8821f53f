"""Self-contained HTML pages: of a fact margin, and of whole explanations, one prompt or several.

Of several prompts an overview comes first; each prompt is folded, and drawn once it is unfolded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lens_lora.analyses.explain_margin import Explanation
from lens_lora.analyses.explain_response import ResponseExplanation
from lens_lora.analyses.logit_shift import LogitShift
from lens_lora.analyses.margin import FactMargin
from lens_lora.errors import ArgumentError
from lens_lora.results.attribution import Attribution
from lens_lora.show.figures.attribution import position_heatmap, site_heatmap
from lens_lora.show.figures.remainder import remainder_figure
from lens_lora.show.page.overview import overview
from lens_lora.show.page.parts import Downloads, File, HowToRead, Part, Section, Table
from lens_lora.show.page.render import page_html, plot
from lens_lora.show.page.response import response_part
from lens_lora.show.page.sections import (
    explanation_sections,
    explanation_top,
    in_words,
    provenance,
    token_table,
)
from lens_lora.show.tables.margin import margin_heads, margin_rows
from lens_lora.show.text import short_prompt, shortened, top_rows
from lens_lora.show.words.account import Account, account_of
from lens_lora.show.words.explanation import explained_account, explanation_story
from lens_lora.show.words.headline import margin_headline
from lens_lora.show.words.margin import margin_story

__all__ = ["explanation_report", "margin_report"]

_MODULES, _TOKEN_SITES = 20, 5


def margin_report(
    fact_margin: FactMargin,
    *,
    logit_shift: LogitShift | None = None,
    positions: Attribution | None = None,
    prompt: int = 0,
    title: str | None = None,
) -> str:
    """The page of a fact margin, as a string.

    Args:
        fact_margin: of one or several prompts.
        logit_shift: adds the tokens promoted and suppressed; by site too with by_site=True.
        positions: an attribution of the same prompts with by='position'; adds the map of layers
            and tokens.
        prompt: which prompt.
        title: by default the two facts.

    Raises:
        ArgumentError: no such prompt, or `positions` not split by position.
    """
    account, attribution = account_of(fact_margin, prompt), fact_margin.attribution
    sections = _margin_sections(fact_margin, account, logit_shift, positions, prompt)
    part = _part(account, attribution, margin_story(fact_margin, prompt), sections)
    return page_html(title or _facts(account), [part])


def explanation_report(
    explanations: Sequence[Explanation | ResponseExplanation], *, title: str | None = None
) -> str:
    """The page of one or several explanations, as a string.

    Args:
        explanations: of a prompt each.
        title: by default the two answers, where they are the same throughout; of a response,
            the prompt.

    Raises:
        ArgumentError: no explanation.
    """
    if not explanations:
        raise ArgumentError("no explanation to report; give at least one.")
    numbered = list(enumerate(explanations, start=1))
    parts = [_explained(e, n) for n, e in numbered]
    facts = list(dict.fromkeys(map(_title, explanations)))
    name = title or (facts[0] if len(facts) == 1 else f"{len(parts)} prompts explained")
    return page_html(name, parts, overview(numbered) if len(parts) > 1 else ())


def _explained(e: Explanation | ResponseExplanation, number: int) -> Part:
    if isinstance(e, ResponseExplanation):
        return response_part(e)
    account, story = explained_account(e), explanation_story(e)
    numbers = File(f"modules-{number}.csv", e.to_frame().to_csv(index=False))
    return dataclasses.replace(
        _part(account, e.first_order, story, [in_words(story), *explanation_sections(e)]),
        headline=margin_headline(e),
        top=[*explanation_top(e), Downloads((numbers,))],
    )


def _title(e: Explanation | ResponseExplanation) -> str:
    if isinstance(e, ResponseExplanation):
        return f"The response to “{short_prompt(e.prompt)}”"
    return _facts(explained_account(e))


def _margin_sections(
    fact_margin: FactMargin,
    account: Account,
    logit_shift: LogitShift | None,
    positions: Attribution | None,
    prompt: int,
) -> list[Section]:
    attribution = fact_margin.attribution
    numbers = Table(margin_heads(account), margin_rows(account))
    sites = plot(site_heatmap(attribution, prompt))
    heads = ("site", "module", f"first order, {attribution.units}", "share of the shift")
    modules = Table(heads, top_rows(attribution, _MODULES, prompt), texts=(0, 1))
    path = plot(remainder_figure(fact_margin.curve, prompt))
    sections = [
        Section("The numbers", [numbers]),
        Section("Where first order finds the shift", [sites]),
        Section("Largest modules", [modules]),
        Section("What first order leaves, along the path", [path]),
    ]
    if positions is not None:
        sections.append(Section("Where in the prompt", [plot(position_heatmap(positions, prompt))]))
    if logit_shift is not None:
        names = attribution.top(_TOKEN_SITES, prompt)["site"].tolist() if logit_shift.sites else []
        tokens = token_table(logit_shift, logit_shift, names, prompt)
        sections.append(Section("Tokens promoted and suppressed, to first order", [tokens]))
    return [
        *sections,
        Section("How to read this", [HowToRead()]),
        Section("Made with", [provenance(attribution.meta)]),
    ]


def _part(
    account: Account,
    attribution: Attribution,
    story: str,
    sections: Sequence[Section],
) -> Part:
    made = " over ".join(attribution.meta[k] for k in ("adapter", "model") if k in attribution.meta)
    prompt = shortened(account.prompt)
    return Part(
        name=f"{prompt} — {_facts(account)}",
        subtitle=" · ".join(filter(None, (attribution.readout, f"“{prompt}”", made))),
        story=story.split("\n"),
        sections=sections,
    )


def _facts(account: Account) -> str:
    return f"{account.doc} against {account.pre}"
