"""The sections of an explanation's page, in order; each appears when its result is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from lens_lora.analyses.explain_margin import Explanation
from lens_lora.analyses.logit_shift import LogitShift
from lens_lora.show.figures.explanation import explanation_figures
from lens_lora.show.figures.margin import margin_figure
from lens_lora.show.page.parts import (
    Block,
    HowToRead,
    Paragraph,
    Plot,
    Section,
    Table,
    Tables,
    TokenTable,
)
from lens_lora.show.page.render import plot
from lens_lora.show.tables import explanation as tables
from lens_lora.show.tables.logit_shift import token_rows
from lens_lora.show.tables.margin import margin_heads, margin_rows
from lens_lora.show.tables.next_token import MOVED_HEADS, moved_rows, site_moves
from lens_lora.show.text import magnitude, quadrature_text
from lens_lora.show.words.explanation import explained_account

__all__ = ["explanation_sections", "explanation_top", "in_words", "provenance", "token_table"]

_MODULES, _TOKEN_SITES = 20, 8
_TOKENS, _TOKENS_OF_A_SITE = 8, 4
Drawn = Callable[..., list[Plot]]


def explanation_top(e: Explanation) -> list[Block]:
    """What stands unfolded: the margin along the path, and what the models say next.

    Args:
        e: the explanation of one prompt.
    """
    return [plot(margin_figure(e.margin))]


def in_words(story: str) -> Section:
    """The whole story, a paragraph a line.

    Args:
        story: of one prompt.
    """
    return Section("The whole story in words", [Paragraph(line) for line in story.split("\n")])


def explanation_sections(e: Explanation) -> list[Section]:
    """What there is, in the order in which one reads it.

    Args:
        e: the explanation of one prompt.
    """
    figures = explanation_figures(e)

    def drawn(start: str, heading: str = "") -> list[Plot]:
        """The figures whose names begin so."""
        return [
            plot(figure, heading=heading)
            for name, figure in figures.items()
            if name == start or name.startswith(f"{start}/")
        ]

    makers: tuple[Callable[[Explanation, Drawn], Section | None], ...] = (
        _numbers,
        _remainder,
        _second_order,
        _heatmap,
        _modules,
        _tokens,
        _positions,
        _coupling,
        _measured,
        _reliability,
        _curves,
        _null,
    )
    found = [section for make in makers if (section := make(e, drawn)) is not None]
    return [
        *found,
        Section("How to read this", [HowToRead()]),
        Section("Made with", [provenance(e.first_order.meta)]),
    ]


def token_table(
    joint: LogitShift, by_site: LogitShift, names: Sequence[str], prompt: int
) -> TokenTable:
    """The tokens that all sites together promote and suppress, then those of single sites.

    Args:
        joint: shifts of the logits by all sites together.
        by_site: the same by site.
        names: the sites shown one by one.
        prompt: which prompt.
    """

    def row(name: str, shift: LogitShift, site: str | None, k: int):
        up, down = shift.promoted(site, k, prompt), shift.suppressed(site, k, prompt)
        return name, token_rows(up), token_rows(down)

    return TokenTable(
        [
            row("all modules together", joint, None, _TOKENS),
            *(row(name, by_site, name, _TOKENS_OF_A_SITE) for name in names),
        ]
    )


def provenance(meta: Mapping[str, str]) -> Table:
    """What the page was made with.

    Args:
        meta: a result's; what is empty is left out.
    """
    rows = [(key.replace("_", " "), str(value)) for key, value in meta.items() if value]
    return Table(("what", "value"), rows, texts=(0, 1))


def _numbers(e: Explanation, drawn: Drawn) -> Section:
    a = explained_account(e)
    numbers = Table(margin_heads(a), margin_rows(a))
    said = Table(
        ("", "base model", "probability", "adapted model", "probability"),
        tables.said_rows(e),
        texts=(1, 3),
        heading="Likeliest next tokens",
    )
    return Section("The margin in numbers", [Tables((numbers, said))])


def _remainder(e: Explanation, drawn: Drawn) -> Section:
    heads = ("part", f"value, {e.units}", "share of the shift")
    lead = (
        "What the sum of first-order parts leaves of the exact shift, along the path and, below, "
        "at ε = 1 by its parts."
    )
    blocks = [*drawn("remainder"), Table(heads, tables.remainder_rows(e))]
    return Section("The remainder and its parts", blocks, lead)


def _second_order(e: Explanation, drawn: Drawn) -> Section:
    lead = (
        "A diagnostic of curvature at the base model, not a correction: at full strength it is "
        "often farther from the measured shift than first order. The verdict is in the caption."
    )
    return Section("Second order", drawn("second_order"), lead)


def _heatmap(e: Explanation, drawn: Drawn) -> Section:
    lead = "First order at ε = 0: what adding one module to the base model is predicted to do."
    return Section("Where first order finds the shift", drawn("sites"), lead)


def _modules(e: Explanation, drawn: Drawn) -> Section:
    heads = tables.site_heads(e)
    table = Table(heads, tables.site_rows(e, _MODULES), texts=(0, len(heads) - 1))
    lead = f"In {e.units}, by size of first order at ε = 0 (a)."
    if not e.is_fast:
        lead += " Each module was also added to the base model and left out of the adapted one."
    if e.path is not None and e.path.quadrature is not None:
        lead += f" Path integral with {quadrature_text(e.path.quadrature)}."
    lead += " A flag names the question for which a at ε = 0 is not to be trusted."
    return Section("Largest modules", [table], lead)


def _tokens(e: Explanation, drawn: Drawn) -> Section:
    names = [site.name for site in e.module_shift.sites[:_TOKEN_SITES]]
    lead = (
        "Next tokens by the change of their probability, of real runs; beside it the first-order "
        "shift of their logits at ε = 0, relative to the mean over the vocabulary. Tokens to which "
        "neither model gives 0.01% are left out."
    )
    of_sites = TokenTable(
        site_moves(e, _TOKENS_OF_A_SITE),
        heads=("site", "raises", "lowers"),
        heading="The largest modules: change of probability to first order, and of the logit",
    )
    by_logit = dataclasses.replace(
        token_table(e.shift, e.module_shift, names, 0),
        heading="By raw logit to first order: rare tokens come first",
    )
    moved = Table(MOVED_HEADS, moved_rows(e, _TOKENS))
    return Section("Tokens promoted and suppressed", [moved, of_sites, by_logit], lead)


def _positions(e: Explanation, drawn: Drawn) -> Section:
    lead = "First order at ε = 0, by the token at which a module writes, summed over each layer."
    if len(e.first_order.str_tokens[0]) > len(e.prompt):
        lead += " After the prompt come the answers' tokens; a|b is where the two differ."
    return Section("Where in the prompt", drawn("positions"), lead)


def _coupling(e: Explanation, drawn: Drawn) -> Section | None:
    if e.coupling is None:
        return None
    pairs = Table(tables.PAIR_HEADS, tables.pair_rows(e), texts=(0, 1))
    lead = (
        "Half the second derivative between layers at ε = 0: how much the effect of one depends on "
        "the presence of the other. Below, the strongest pairs; each value is both halves together."
    )
    return Section("Coupling between layers", [*drawn("coupling"), pairs], lead)


def _measured(e: Explanation, drawn: Drawn) -> Section | None:
    if e.is_fast:
        return None
    rows = tables.agreement_rows(e)
    if not rows:
        floor = magnitude(explained_account(e).floor)
        none = f"No single module moves the margin by more than rounding ({floor})."
        return Section("First order against measurements", [Paragraph(none)])
    lead = (
        "Each point is a module: the prediction on the horizontal axis, the measured effect on the "
        "vertical one. On the dashed line they agree. A correlation does not see a difference in "
        "size; the slope does."
    )
    blocks = [
        Table(tables.AGREEMENT_HEADS, rows, texts=(0, 1)),
        *drawn("add_one", "First order at ε = 0 as a guide to adding one module to the base model"),
        *drawn(
            "leave_one_out",
            "First order at ε = 0 as a guide to leaving one module out of the adapted one",
        ),
        *drawn("leave_one_out@1", "First order at ε = 1 as a guide to leaving one module out"),
    ]
    return Section("First order against measurements", blocks, lead)


def _reliability(e: Explanation, drawn: Drawn) -> Section | None:
    if not e.reliability:
        return None
    table = Table(tables.FLAG_HEADS, tables.flag_rows(e), texts=(0, 2))
    lead = (
        "A module is flagged where first order misses more of the answer than it finds. An "
        "unflagged module is not necessarily right: modules too small to matter are not checked."
    )
    return Section("Reliability flags", [table, *drawn("reliability")], lead)


def _curves(e: Explanation, drawn: Drawn) -> Section | None:
    rows = tables.curve_rows(e)
    if not rows:
        return None
    lead = (
        "What the model does with only the top of each ranking switched on (kept), or only that "
        "switched off (dropped). A good ranking keeps much with few modules."
    )
    blocks = [*drawn("faithfulness"), Table(tables.curve_heads(e), rows)]
    return Section("Which few modules carry the shift", blocks, lead)


def _null(e: Explanation, drawn: Drawn) -> Section | None:
    if e.null is None:
        return None
    lead = f"Adapters of the same sizes in random directions: {e.null.verdict[0]}."
    return Section("Against random directions", drawn("null"), lead)
