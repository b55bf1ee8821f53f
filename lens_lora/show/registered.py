"""Every drawing, imported so that it is registered with `results/drawing.py`.

Importing `lens_lora.show` alone draws in neither plotly nor the analyses.
"""

from __future__ import annotations

from lens_lora.analyses.explain_all import Explanations
from lens_lora.analyses.explain_margin import Explanation
from lens_lora.analyses.explain_response import ResponseExplanation
from lens_lora.results import drawing
from lens_lora.show import reprs
from lens_lora.show.figures import (
    activation_effects,
    activation_shift,
    activations,
    adapter_comparison,
    attribution,
    best_subset,
    checkpoints,
    comparison,
    constant_part,
    coupling,
    effects,
    explanation,
    faithfulness,
    features,
    grouped,
    margin,
    null_test,
    overview,
    reliability,
    remainder,
    repair,
    response,
    second_order,
    shaded,
    token_shifts,
    tokens,
    what_changed,
)
from lens_lora.show.page import what_changed as what_changed_page
from lens_lora.show.page.report import explanation_report
from lens_lora.show.words import checkpoints as checkpoints_words
from lens_lora.show.words import explanation as explanation_words
from lens_lora.show.words import margin as margin_words
from lens_lora.show.words import repair as repair_words
from lens_lora.show.words import response as response_words
from lens_lora.show.words import verdicts
from lens_lora.show.words import what_changed as what_changed_words

__all__ = [
    "activation_effects",
    "activation_shift",
    "activations",
    "adapter_comparison",
    "attribution",
    "best_subset",
    "checkpoints",
    "checkpoints_words",
    "comparison",
    "constant_part",
    "coupling",
    "effects",
    "explanation",
    "explanation_words",
    "faithfulness",
    "features",
    "grouped",
    "margin",
    "margin_words",
    "null_test",
    "overview",
    "reliability",
    "remainder",
    "repair",
    "repair_words",
    "reprs",
    "response",
    "response_words",
    "second_order",
    "shaded",
    "token_shifts",
    "tokens",
    "verdicts",
    "what_changed",
    "what_changed_page",
    "what_changed_words",
]


@drawing.report.register(ResponseExplanation)
@drawing.report.register(Explanation)
def _report(explanation: Explanation | ResponseExplanation, *, title: str | None = None) -> str:
    return explanation_report([explanation], title=title)


@drawing.report.register(Explanations)
def _report_of_all(found: Explanations, *, title: str | None = None) -> str:
    return explanation_report(found.each, title=title)
