"""Every drawing, imported so that it is registered with `results/drawing.py`.

Importing `lens_lora.show` alone draws in neither plotly nor the analyses.
"""

from __future__ import annotations

from lens_lora.analyses.explain import Explanation
from lens_lora.results import drawing
from lens_lora.show import reprs
from lens_lora.show.figures import (
    activation_effects,
    activations,
    attribution,
    comparison,
    coupling,
    effects,
    explanation,
    faithfulness,
    features,
    margin,
    null_test,
    reliability,
    remainder,
    second_order,
    token_shifts,
    tokens,
)
from lens_lora.show.page.report import explanation_report
from lens_lora.show.words import explanation as explanation_words
from lens_lora.show.words import margin as margin_words
from lens_lora.show.words import verdicts

__all__ = [
    "activation_effects",
    "activations",
    "attribution",
    "comparison",
    "coupling",
    "effects",
    "explanation",
    "explanation_words",
    "faithfulness",
    "features",
    "margin",
    "margin_words",
    "null_test",
    "reliability",
    "remainder",
    "reprs",
    "second_order",
    "token_shifts",
    "tokens",
    "verdicts",
]


@drawing.report.register(Explanation)
def _report(explanation: Explanation, *, title: str | None = None) -> str:
    return explanation_report([explanation], title=title)
