"""The page of an audit without a question, in the order in which one reads it."""

from __future__ import annotations

from lens_lora.results import drawing
from lens_lora.results.what_changed import WhatChanged
from lens_lora.show.figures.what_changed import promoted_figure, shares_figure
from lens_lora.show.page.parts import HowToReadChanges, Part, Section, Table, Tables
from lens_lora.show.page.render import page_html, plot
from lens_lora.show.page.sections import provenance
from lens_lora.show.tables import what_changed as tables
from lens_lora.show.words.what_changed import what_changed_story

__all__ = ["what_changed_report"]

_TOKENS, _PLACES, _MODULES = 20, 12, 20


@drawing.report.register(WhatChanged)
def what_changed_report(found: WhatChanged, *, title: str | None = None) -> str:
    """A self-contained HTML page.

    Args:
        found: the audit.
        title: by default the adapter's name.
    """
    sections = [_tokens(found), _reading(found), _where(found)]
    if bool(found.shares.any()):
        sections.append(_modules(found))
    made = " over ".join(found.meta[key] for key in ("adapter", "model") if key in found.meta)
    part = Part(
        name=found.found.name,
        subtitle=f"{made} · {found.texts}",
        story=what_changed_story(found).split("\n"),
        sections=[
            _summary(found),
            *sections,
            Section("How to read this", [HowToReadChanges()]),
            Section("Made with", [provenance(found.meta)]),
        ],
    )
    return page_html(title or f"What did {found.found.name} change?", [part])


def _summary(found: WhatChanged) -> Section:
    rows = tables.summary_rows(found)
    lead = "The adapter beside its controls, over the same texts."
    return Section("How much", [Table(tables.SUMMARY_HEADS, rows, texts=(0, 1))], lead)


def _tokens(found: WhatChanged) -> Section:
    lists = tuple(
        Table(
            tables.promoted_heads(found, by),
            tables.promoted_rows(found, by, _TOKENS),
            texts=(1,),
            heading=f"by {by}",
        )
        for by in ("logit", "probability")
    )
    lead = "Mean shifts over all counted tokens, beside the largest of any token under a control."
    return Section("Which tokens are promoted", [plot(promoted_figure(found)), Tables(lists)], lead)


def _reading(found: WhatChanged) -> Section:
    promoted = Table(
        tables.promoted_heads(found, "reading"),
        tables.promoted_rows(found, "reading", _TOKENS),
        texts=(1,),
        heading="read through the unembedding",
    )
    writers = Table(
        ("added by", "of ‖Δh‖²"), tables.writer_rows(found, _TOKENS), heading="which blocks add it"
    )
    lead = "The mean shift of the residual stream behind the last block, on tokens 1 to 5."
    return Section("What the first tokens carry", [Tables((promoted, writers))], lead)


def _where(found: WhatChanged) -> Section:
    rows = tables.place_rows(found, _PLACES)
    table = Table(tables.place_heads(found), rows, texts=(0, 2))
    lead = "After which token the next one's distribution moves most, with KL under the controls."
    return Section("Where", [table], lead)


def _modules(found: WhatChanged) -> Section:
    table = Table(tables.MODULE_HEADS, tables.module_rows(found, _MODULES), texts=(0, 1))
    lead = "A complete split of the quadratic part of KL over the texts."
    return Section("Which modules", [plot(shares_figure(found)), table], lead)
