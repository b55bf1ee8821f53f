"""What stands before the prompts of a page of several: a table of them, and their pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from plotly.graph_objects import Figure

from lens_lora.analyses.explain_margin import Explanation
from lens_lora.analyses.explain_response import ResponseExplanation
from lens_lora.show.figures.overview import layers_figure, margins_figure
from lens_lora.show.page.parts import Block, Downloads, File, Table
from lens_lora.show.page.render import plot
from lens_lora.show.tables import overview as tables

__all__ = ["overview"]

Numbered = Sequence[tuple[int, Explanation | ResponseExplanation]]


def overview(numbered: Numbered) -> list[Block]:
    """Of margins and of responses, whichever there are.

    Args:
        numbered: (number on the page, explanation).
    """
    margins = [(n, e) for n, e in numbered if isinstance(e, Explanation)]
    responses = [(n, e) for n, e in numbered if isinstance(e, ResponseExplanation)]
    blocks: list[Block] = []
    if margins:
        rows = tables.margin_overview(margins)
        numbers = File("prompts.csv", tables.margins_frame(margins).to_csv(index=False))
        each = [e for _, e in margins]
        blocks += [
            *_pictures(each, margins_figure),
            Table(tables.MARGIN_HEADS, rows, texts=(0, 1, 7), links=_links(margins)),
            Downloads((numbers,)),
            *_pictures(each, layers_figure),
        ]
    if responses:
        rows = tables.response_overview(responses)
        blocks.append(
            Table(tables.RESPONSE_HEADS, rows, texts=(0, 3), links=_links(responses)),
        )
    return blocks


def _pictures(
    margins: Sequence[Explanation], draw: Callable[[Sequence[Explanation]], Figure]
) -> list[Block]:
    """A picture of the margins in each unit."""
    by_units: dict[str, list[Explanation]] = {}
    for e in margins:
        by_units.setdefault(e.units, []).append(e)
    return [plot(draw(each)) for each in by_units.values()]


def _links(numbered: Numbered) -> list[str]:
    return [f"#prompt-{n}" for n, _ in numbered]
