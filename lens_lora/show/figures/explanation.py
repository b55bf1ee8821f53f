"""The pictures of an explanation by name, each drawn by the result's own figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lens_lora.show.figures.attribution import (
    margin_figure,
    position_heatmap,
    remainder_figure,
    site_heatmap,
)
from lens_lora.show.words.explanation import explained_account, is_comparable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from lens_lora.analyses.explain import Explanation

__all__ = ["explanation_figures"]


def explanation_figures(e: Explanation) -> dict[str, Figure]:
    """What there is to see; nothing that compares effects within rounding."""
    a, first = explained_account(e), e.first_order
    figures = {
        "path": margin_figure(e.margin),
        "remainder": remainder_figure(e.margin.curve),
        "second order": e.second_order.plot_path(0),
        "sites": site_heatmap(first, 0),
        "positions": position_heatmap(first, 0),
    }
    if e.coupling is not None:
        figures["coupling"] = e.coupling.plot(0)
    for name, comparison in zip(
        ("added", "left out", "left out at 1"), e.comparisons, strict=False
    ):
        if is_comparable(comparison, a):
            figures[name] = comparison.plot(0)
    for question, found in e.reliability.items():
        figures[f"reliability, {question}"] = found.plot(0)
    if e.faithfulness is not None and not a.is_noise(a.shift):
        figures["faithfulness"] = e.faithfulness.plot(0)
    if e.null is not None:
        figures["null"] = e.null.plot(0)
    return figures
