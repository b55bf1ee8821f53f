"""The sections of a response's page, in the order in which one reads them."""

from __future__ import annotations

from lens_lora.analyses.explain_response import ResponseExplanation
from lens_lora.show.figures.response import response_figures
from lens_lora.show.figures.token_shifts import noted, shades
from lens_lora.show.page.parts import (
    Downloads,
    File,
    HowToReadResponse,
    Part,
    Section,
    ShadedText,
    Table,
    TokenTable,
)
from lens_lora.show.page.render import plot
from lens_lora.show.page.sections import in_words, provenance
from lens_lora.show.tables import response as tables
from lens_lora.show.text import magnitude, prompt_text, quadrature_text, short_prompt, shortened
from lens_lora.show.words.headline import response_headline
from lens_lora.show.words.response import response_story

__all__ = ["response_part"]

_TOKENS, _MODULES = 12, 20


def response_part(e: ResponseExplanation) -> Part:
    """One response's share of a page.

    Args:
        e: the explanation.
    """
    meta, prompt = e.shifts.meta, shortened(prompt_text(e.prompt))
    made = " over ".join(meta[key] for key in ("adapter", "model") if key in meta)
    return Part(
        name=short_prompt(e.prompt),
        subtitle=" · ".join(filter(None, (f"“{prompt}”", made))),
        story=response_story(e).split("\n"),
        sections=[in_words(response_story(e)), *_sections(e)],
        headline=response_headline(e),
        top=[_text(e), Downloads((File("tokens.csv", e.to_frame().to_csv(index=False)),))],
    )


def _sections(e: ResponseExplanation) -> list[Section]:
    found = [_tokens(e), _modules(e), _by_token(e), _layers(e)]
    return [
        *(section for section in found if section is not None),
        Section("How to read this", [HowToReadResponse()]),
        Section("Made with", [provenance(e.shifts.meta)]),
    ]


def _text(e: ResponseExplanation) -> ShadedText:
    _, most = shades(e.shifts, 0)
    return ShadedText(
        tokens=noted(e.shifts, 0),
        scale=("0", magnitude(most / 4), f"{magnitude(most)} nats"),
        chosen=e.moved_tokens[0],
    )


def _tokens(e: ResponseExplanation) -> Section:
    numbers = Table(tables.TOKEN_HEADS, tables.token_rows(e, _TOKENS), texts=(1,))
    changes = TokenTable(tables.changed(e, _TOKENS), heads=("token", "promoted", "suppressed"))
    lead = (
        "Every number is of whole distributions, exactly. Promoted and suppressed are the largest "
        "changes of a probability at that place."
    )
    drawing = plot(response_figures(e)["tokens"])
    return Section("Which tokens changed", [drawing, numbers, changes], lead)


def _modules(e: ResponseExplanation) -> Section:
    heads = tables.module_heads(e)
    lead = "First order at ε = 1 is what leaving a module out takes from KL of the response."
    if e.path is not None:
        lead = (
            "The path integral splits KL of the response completely: over all modules it sums to "
            f"it. {lead}"
        )
        if e.path.quadrature is not None:
            lead += f" Taken with {quadrature_text(e.path.quadrature)}."
    table = Table(heads, tables.module_rows(e, _MODULES), texts=(0, 1))
    return Section("Which modules changed them", [table], lead)


def _by_token(e: ResponseExplanation) -> Section:
    lead = (
        "Of the tokens that changed most: what leaving a module out takes from the token's log p, "
        "to first order at ε = 1. A module on the left raises the token."
    )
    table = TokenTable(tables.moved_by(e), heads=("token", "raised by", "lowered by"))
    return Section("Which module moved which token", [table], lead)


def _layers(e: ResponseExplanation) -> Section | None:
    if e.is_fast:
        return None
    figures = response_figures(e)
    lead = (
        "Real runs, no prediction. Where a layer does much alone and little is lost without it, "
        "other layers do the same again."
    )
    blocks = [plot(figures[name]) for name in ("add_one", "leave_one_out")]
    return Section("Layer by layer, token by token", blocks, lead)
