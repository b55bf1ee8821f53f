"""Self-contained HTML pages: of a fact margin, and of whole explanations, one prompt or several.

Plotly's script is inlined once, so that a page works offline; tokens and names are escaped. Of
several prompts one is shown at a time; the others wait in <template>s, not drawn until chosen.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plotly.offline import get_plotlyjs

from lens_lora.errors import ArgumentError
from lens_lora.show.figures.attribution import position_heatmap, site_heatmap
from lens_lora.show.figures.remainder import remainder_figure
from lens_lora.show.page.html import (
    Plots,
    Section,
    contents,
    provenance,
    scrolling,
    section_html,
    tokens_html,
)
from lens_lora.show.page.sections import explanation_sections
from lens_lora.show.page.template import HOW_TO_READ, PAGE
from lens_lora.show.tables.results import html_table, margin_rows
from lens_lora.show.text import top_rows
from lens_lora.show.words.account import Account, account_of
from lens_lora.show.words.explanation import explained_account, explanation_story
from lens_lora.show.words.margin import margin_story

if TYPE_CHECKING:
    from lens_lora.analyses.explain import Explanation
    from lens_lora.analyses.logit_shift import LogitShift
    from lens_lora.analyses.margin import FactMargin
    from lens_lora.results.attribution import Attribution

__all__ = ["explanation_report", "margin_report"]

_MODULES, _SITES = 20, 5


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
        logit_shift: adds the tokens promoted and suppressed; by site too with by_site=True.
        positions: an attribution of the same prompts with by='position'; adds the map of layers
            and tokens.
        title: by default the two facts.

    Raises:
        ArgumentError: no such prompt, or `positions` not split by position.
    """
    account, attribution = account_of(fact_margin, prompt), fact_margin.attribution
    plots = Plots()
    sections = [
        Section("The numbers", _numbers(account)),
        Section("Where first order finds the shift", plots(site_heatmap(attribution, prompt))),
        Section("Largest modules", _modules(attribution, prompt)),
        Section(
            "What first order leaves, along the path",
            plots(remainder_figure(fact_margin.curve, prompt)),
        ),
    ]
    if positions is not None:
        sections.append(Section("Where in the prompt", plots(position_heatmap(positions, prompt))))
    if logit_shift is not None:
        names = attribution.top(_SITES, prompt)["site"].tolist() if logit_shift.sites else []
        tokens = tokens_html(logit_shift, logit_shift, names, prompt)
        sections.append(Section("Tokens promoted and suppressed, to first order", tokens))
    sections.append(Section("How to read this", HOW_TO_READ))
    sections.append(Section("Made with", provenance(attribution.meta)))
    return _page(
        title or _facts(account),
        _told(_subtitle(account, attribution), margin_story(fact_margin, prompt), sections),
    )


def explanation_report(explanations: Sequence[Explanation], *, title: str | None = None) -> str:
    """The page of one or several explanations, as a string.

    Args:
        title: by default the two answers, where they are the same throughout.

    Raises:
        ArgumentError: no explanation.
    """
    if not explanations:
        raise ArgumentError("no explanation to report; give at least one.")
    accounts = [explained_account(e) for e in explanations]
    parts = [
        _explained(e, account, f"p{n}")
        for n, (e, account) in enumerate(zip(explanations, accounts, strict=True), start=1)
    ]
    facts = list(dict.fromkeys(map(_facts, accounts)))
    name = title or (facts[0] if len(facts) == 1 else f"{len(parts)} prompts explained")
    return _page(name, parts[0] if len(parts) == 1 else _choice(accounts, parts))


def _explained(e: Explanation, account: Account, prefix: str) -> str:
    sections = explanation_sections(e, Plots(f"{prefix}-plot"))
    return _told(
        _subtitle(account, e.first_order), explanation_story(e), sections, contents(sections)
    )


def _choice(accounts: Sequence[Account], parts: Sequence[str]) -> str:
    """A list to choose a prompt from, and each prompt's part."""
    options = "".join(
        f'<option value="prompt-{n}">{n}. {html.escape(_option(a))}</option>'
        for n, a in enumerate(accounts, start=1)
    )
    templates = "\n".join(
        f'<template id="prompt-{n}">{part}</template>' for n, part in enumerate(parts, start=1)
    )
    return (
        f'<p class="choose"><label>Prompt <select id="choose">{options}</select></label></p>\n'
        f'<main id="shown"></main>\n{templates}'
    )


def _option(account: Account) -> str:
    return f"{account.prompt} — {_facts(account)}"


def _facts(account: Account) -> str:
    return f"{account.doc} against {account.pre}"


def _told(subtitle: str, story: str, sections: Sequence[Section], links: str = "") -> str:
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in story.split("\n"))
    body = "\n".join(map(section_html, sections))
    return (
        f'<p class="under">{html.escape(subtitle)}</p>\n<div class="story">{paragraphs}</div>\n'
        f"{links}\n{body}"
    )


def _page(title: str, content: str) -> str:
    return PAGE.substitute(title=html.escape(title), content=content, plotly_js=get_plotlyjs())


def _subtitle(account: Account, attribution: Attribution) -> str:
    made = " over ".join(attribution.meta[k] for k in ("adapter", "model") if k in attribution.meta)
    return " · ".join(filter(None, (attribution.readout, f"“{account.prompt}”", made)))


def _numbers(account: Account) -> str:
    heads = ("", f"value, {account.units}", "share of the shift")
    return scrolling(html_table(heads, margin_rows(account), text_columns=(0,)))


def _modules(attribution: Attribution, prompt: int) -> str:
    heads = ("site", "module", f"first order, {attribution.units}", "share of the shift")
    return scrolling(html_table(heads, top_rows(attribution, _MODULES, prompt)))
