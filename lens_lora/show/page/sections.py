"""The sections of an explanation's page, in order; each appears when its result is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lens_lora.show.figures.explanation import explanation_figures
from lens_lora.show.page.html import Plots, Section, provenance, scrolling, tokens_html
from lens_lora.show.page.template import HOW_TO_READ
from lens_lora.show.tables import explanation as tables
from lens_lora.show.tables.results import html_table, margin_rows
from lens_lora.show.text import magnitude, quadrature_text
from lens_lora.show.words.explanation import explained_account

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from lens_lora.analyses.explain import Explanation

__all__ = ["explanation_sections"]

_MODULES, _TOKEN_SITES = 20, 8
_WIDE = {"positions", "coupling", "added", "left out", "left out at 1", "faithfulness", "null"}


def explanation_sections(e: Explanation, plots: Plots) -> list[Section]:
    """What there is, in the order in which one reads it."""
    figures = explanation_figures(e)

    def drawn(*names: str) -> str:
        return "\n".join(
            plots(figures[name], wide=name in _WIDE) for name in names if name in figures
        )

    makers: tuple[Callable[[], Section | None], ...] = (
        lambda: _path(e, drawn("path")),
        lambda: _remainder(e, drawn("remainder")),
        lambda: Section("Second order", drawn("second order"), _SECOND_ORDER),
        lambda: _heatmap(drawn("sites")),
        lambda: _modules(e),
        lambda: _tokens(e),
        lambda: _positions(e, drawn("positions")),
        lambda: _coupling(e, drawn("coupling")),
        lambda: _measured(e, drawn),
        lambda: _reliability(e, figures, drawn),
        lambda: _curves(e, drawn("faithfulness")),
        lambda: _null(e, drawn("null")),
    )
    found = [section for make in makers if (section := make()) is not None]
    return [
        *found,
        Section("How to read this", HOW_TO_READ),
        Section("Made with", provenance(e.first_order.meta)),
    ]


_MEASURED = {
    "added": "First order at ε = 0 as a guide to adding one module to the base model",
    "left out": "First order at ε = 0 as a guide to leaving one module out of the adapted one",
    "left out at 1": "First order at ε = 1 as a guide to leaving one module out",
}
_SECOND_ORDER = (
    "A diagnostic of curvature at the base model, not a correction: at full strength it is often "
    "farther from the run than first order. The verdict is in the caption."
)


def _path(e: Explanation, plot: str) -> Section:
    a = explained_account(e)
    heads = ("", f"value, {a.units}", "share of the shift")
    numbers = html_table(heads, margin_rows(a), text_columns=(0,))
    said = html_table(
        ("", "base model", "probability", "adapted model", "probability"),
        tables.said_rows(e),
        text_columns=(1, 3),
    )
    body = (
        f'{plot}<div class="side">{scrolling(numbers)}'
        f"<div><h3>Likeliest next tokens</h3>{scrolling(said)}</div></div>"
    )
    lead = "The margin of the model with the adapter at strength ε, run and not predicted."
    return Section("The margin's path", body, lead)


def _remainder(e: Explanation, plot: str) -> Section:
    heads = ("part", f"value, {e.units}", "share of the shift")
    table = html_table(heads, tables.remainder_rows(e), text_columns=(0,))
    lead = (
        "What the sum of first-order parts leaves of the exact shift, along the path and, below, "
        "at ε = 1 by its parts."
    )
    return Section("The remainder and its parts", plot + scrolling(table), lead)


def _heatmap(plot: str) -> Section:
    lead = "First order at ε = 0: what adding one module to the base model is predicted to do."
    return Section("Where first order finds the shift", plot, lead)


def _modules(e: Explanation) -> Section:
    heads, rows = tables.site_heads(e), tables.site_rows(e, _MODULES)
    table = html_table(heads, rows, text_columns=(0, len(heads) - 1))
    lead = f"In {e.units}, by size of first order at ε = 0 (a)."
    if not e.is_fast:
        lead += " Added to the base model, and left out of the adapted one, each module was run."
    if e.path is not None and e.path.quadrature is not None:
        lead += f" Path integral with {quadrature_text(e.path.quadrature)}."
    lead += " A flag says for which question a at ε = 0 is not to be trusted."
    return Section("Largest modules", scrolling(table), lead)


def _tokens(e: Explanation) -> Section:
    names = [site.name for site in e.module_shift.sites[:_TOKEN_SITES]]
    lead = (
        "First-order shifts of the next token's logits at ε = 0, relative to their mean over the "
        "vocabulary: all modules, then the largest one by one."
    )
    return Section(
        "Tokens promoted and suppressed", tokens_html(e.shift, e.module_shift, names, 0), lead
    )


def _positions(e: Explanation, plot: str) -> Section:
    lead = "First order at ε = 0, by the token at which a module writes, summed over each layer."
    if len(e.first_order.str_tokens[0]) > len(e.prompt):
        lead += " After the prompt come the answers' tokens; a|b is where the two differ."
    return Section("Where in the prompt", plot, lead)


def _coupling(e: Explanation, plot: str) -> Section | None:
    if e.coupling is None:
        return None
    heads = tables.PAIR_HEADS
    pairs = html_table(heads, tables.pair_rows(e), text_columns=(0, 1))
    lead = (
        "Half the second derivative between layers at ε = 0: how much the effect of one depends on "
        "the presence of the other. Below, the strongest pairs: of each, both halves together."
    )
    return Section("Coupling between layers", plot + scrolling(pairs), lead)


def _measured(e: Explanation, drawn: Callable[..., str]) -> Section | None:
    if e.is_fast:
        return None
    rows = tables.agreement_rows(e)
    if not rows:
        floor = magnitude(explained_account(e).floor)
        none = f"<p>No single module moves the margin by more than rounding ({floor}).</p>"
        return Section("First order against measurements", none)
    table = html_table(tables.AGREEMENT_HEADS, rows)
    lead = (
        "Each point is a module: what was predicted across, what running it did upwards. On the "
        "dashed line they agree. A correlation is blind to size; the slope is not."
    )
    plots = [
        f"<h3>{heading}</h3>{plot}" for name, heading in _MEASURED.items() if (plot := drawn(name))
    ]
    return Section("First order against measurements", scrolling(table) + "".join(plots), lead)


def _reliability(
    e: Explanation, figures: dict[str, Figure], drawn: Callable[..., str]
) -> Section | None:
    if not e.reliability:
        return None
    table = html_table(tables.FLAG_HEADS, tables.flag_rows(e), text_columns=(0, 2))
    plots = drawn(*(name for name in figures if name.startswith("reliability")))
    lead = (
        "A module is flagged where first order misses more of the answer than it finds. No flag "
        "does not mean right: modules too small to matter are not looked at."
    )
    return Section("Reliability flags", scrolling(table) + plots, lead)


def _curves(e: Explanation, plot: str) -> Section | None:
    rows = tables.curve_rows(e)
    if not rows:
        return None
    table = html_table(tables.curve_heads(e), rows, text_columns=(0,))
    lead = (
        "The top of each ranking switched on alone (kept), or off alone (dropped), and the model "
        "run. A good ranking keeps much with few modules."
    )
    return Section("Which few modules carry the shift", plot + scrolling(table), lead)


def _null(e: Explanation, plot: str) -> Section | None:
    if e.null is None:
        return None
    lead = f"Adapters of the same sizes in random directions: {e.null.verdict[0]}."
    return Section("Against random directions", plot, lead)
