"""The pictures of an explanation by name, each drawn by the result's own figure."""

from __future__ import annotations

from plotly.graph_objects import Figure

from lens_lora.analyses.explain_margin import Explanation
from lens_lora.results import drawing
from lens_lora.show.figures.attribution import position_heatmap, site_heatmap
from lens_lora.show.figures.comparison import comparison_scatter
from lens_lora.show.figures.coupling import coupling_heatmap
from lens_lora.show.figures.faithfulness import faithfulness_figure
from lens_lora.show.figures.margin import margin_figure
from lens_lora.show.figures.null_test import null_figure
from lens_lora.show.figures.reliability import reliability_figure
from lens_lora.show.figures.remainder import remainder_figure
from lens_lora.show.figures.second_order import second_order_figure
from lens_lora.show.words.explanation import explained_account, is_comparable

__all__ = ["explanation_figures"]


@drawing.figures.register(Explanation)
def explanation_figures(e: Explanation) -> dict[str, Figure]:
    """What there is to see; nothing that compares effects within rounding.

    Args:
        e: to be drawn.
    """
    a, first = explained_account(e), e.first_order
    figures = {
        "path": margin_figure(e.margin),
        "remainder": remainder_figure(e.margin.curve),
        "second_order": second_order_figure(e.second_order),
        "sites": site_heatmap(first),
        "positions": position_heatmap(first),
    }
    if e.coupling is not None:
        figures["coupling"] = coupling_heatmap(e.coupling)
    for name, comparison in zip(
        ("add_one", "leave_one_out", "leave_one_out@1"), e.comparisons, strict=False
    ):
        if is_comparable(comparison, a):
            figures[name] = comparison_scatter(comparison)
    for question, found in e.reliability.items():
        figures[f"reliability/{question}"] = reliability_figure(found)
    if e.faithfulness is not None and not a.is_noise(a.shift):
        figures["faithfulness"] = faithfulness_figure(e.faithfulness)
    if e.null is not None:
        figures["null"] = null_figure(e.null)
    return figures
