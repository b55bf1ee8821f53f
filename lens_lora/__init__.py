"""lens_lora: what did this LoRA do to this model, on this prompt, where, and how far to trust it?

    import lens_lora as ll

    adapter = ll.load_adapter("path/or/hub-id")
    lens = ll.LoraLens(model, adapter)          # a HookedTransformer or a TransformerBridge
    ll.fact_margin(lens, "The capital of France is", " Lyon", " Paris")

The theory is "Formalising the Logit Shift Induced by LoRA" (arXiv 2604.20313).

A name is imported from its module when it is first used, so `import lens_lora` alone loads neither
torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lens_lora._version import __version__

if TYPE_CHECKING:
    from lens_lora.adapters.adapter import Adapter, load_adapter
    from lens_lora.adapters.factors import LoRAFactors
    from lens_lora.adapters.random_directions import null_adapter
    from lens_lora.adapters.trained import TrainedModule
    from lens_lora.analyses.compare import Comparison, compare
    from lens_lora.analyses.components import Components, components
    from lens_lora.analyses.coupling import Coupling, coupling
    from lens_lora.analyses.explain import Explanation, explain
    from lens_lora.analyses.faithfulness import Faithfulness, faithfulness
    from lens_lora.analyses.feature_shift import FeatureShift, feature_shift
    from lens_lora.analyses.feature_writes import FeatureWrites, feature_writes
    from lens_lora.analyses.first_order import first_order, first_orders
    from lens_lora.analyses.logit_shift import LogitShift, logit_shift
    from lens_lora.analyses.margin import FactMargin, fact_margin
    from lens_lora.analyses.null_test import NullTest, null_test
    from lens_lora.analyses.patch_activations import patch_activations
    from lens_lora.analyses.patch_sites import patch_sites
    from lens_lora.analyses.path import path_attribution
    from lens_lora.analyses.reliability import Reliability, reliability
    from lens_lora.analyses.remainder import Remainder, remainder
    from lens_lora.analyses.remainder_curve import RemainderCurve, remainder_curve
    from lens_lora.analyses.second_order import SecondOrder, second_order
    from lens_lora.analyses.tangents import tangents
    from lens_lora.errors import (
        AdapterError,
        ArgumentError,
        LensLoraError,
        ModelStateError,
        NumericsError,
        PromptError,
        SiteError,
        TokenError,
        UnsupportedAdapterError,
    )
    from lens_lora.hooked.frozen import FrozenRules
    from lens_lora.hooked.sites import Site
    from lens_lora.lens import LoraLens
    from lens_lora.loading import demo, load
    from lens_lora.readouts.answers import AnswerLogProb, AnswerMargin
    from lens_lora.readouts.prompts import Prompts
    from lens_lora.readouts.readout import Logit, LogProb, Margin, Readout
    from lens_lora.results.activation_effects import ActivationEffects
    from lens_lora.results.attribution import Attribution, Quadrature
    from lens_lora.results.effects import Effects
    from lens_lora.results.token_view import TokenView
    from lens_lora.sweeps.records import SweepError
    from lens_lora.sweeps.result import SweepResult
    from lens_lora.sweeps.sweep import sweep

__all__ = [
    # adapters
    "Adapter",
    "LoRAFactors",
    "TrainedModule",
    "load_adapter",
    # the lens
    "LoraLens",
    "Prompts",
    "Site",
    "demo",
    "load",
    # readouts
    "AnswerLogProb",
    "AnswerMargin",
    "LogProb",
    "Logit",
    "Margin",
    "Readout",
    # first order
    "Attribution",
    "Components",
    "FrozenRules",
    "LogitShift",
    "Quadrature",
    "components",
    "first_order",
    "first_orders",
    "logit_shift",
    "tangents",
    # the remainder and the margin
    "FactMargin",
    "Remainder",
    "RemainderCurve",
    "fact_margin",
    "remainder",
    "remainder_curve",
    # beyond first order
    "Coupling",
    "Reliability",
    "SecondOrder",
    "coupling",
    "path_attribution",
    "reliability",
    "second_order",
    # real interventions, and what agrees with them
    "ActivationEffects",
    "Comparison",
    "Effects",
    "Faithfulness",
    "NullTest",
    "compare",
    "faithfulness",
    "null_adapter",
    "null_test",
    "patch_activations",
    "patch_sites",
    # all of one prompt
    "Explanation",
    "explain",
    # features: directions, sparse autoencoders
    "FeatureShift",
    "FeatureWrites",
    "feature_shift",
    "feature_writes",
    # tokens, drawn by circuitsvis
    "TokenView",
    # many prompts
    "SweepError",
    "SweepResult",
    "sweep",
    # errors
    "AdapterError",
    "ArgumentError",
    "LensLoraError",
    "ModelStateError",
    "NumericsError",
    "PromptError",
    "SiteError",
    "TokenError",
    "UnsupportedAdapterError",
    "__version__",
]

# The imports above once more, for `__getattr__`; a test keeps the two the same.
_HOMES: dict[str, tuple[str, ...]] = {
    "adapters.adapter": (
        "Adapter",
        "load_adapter",
    ),
    "adapters.factors": ("LoRAFactors",),
    "adapters.random_directions": ("null_adapter",),
    "adapters.trained": ("TrainedModule",),
    "analyses.compare": (
        "Comparison",
        "compare",
    ),
    "analyses.components": (
        "Components",
        "components",
    ),
    "analyses.coupling": (
        "Coupling",
        "coupling",
    ),
    "analyses.explain": (
        "Explanation",
        "explain",
    ),
    "analyses.faithfulness": (
        "Faithfulness",
        "faithfulness",
    ),
    "analyses.feature_shift": (
        "FeatureShift",
        "feature_shift",
    ),
    "analyses.feature_writes": (
        "FeatureWrites",
        "feature_writes",
    ),
    "analyses.first_order": (
        "first_order",
        "first_orders",
    ),
    "analyses.logit_shift": (
        "LogitShift",
        "logit_shift",
    ),
    "analyses.margin": (
        "FactMargin",
        "fact_margin",
    ),
    "analyses.null_test": (
        "NullTest",
        "null_test",
    ),
    "analyses.patch_activations": ("patch_activations",),
    "analyses.patch_sites": ("patch_sites",),
    "analyses.path": ("path_attribution",),
    "analyses.reliability": (
        "Reliability",
        "reliability",
    ),
    "analyses.remainder": (
        "Remainder",
        "remainder",
    ),
    "analyses.remainder_curve": (
        "RemainderCurve",
        "remainder_curve",
    ),
    "analyses.second_order": (
        "SecondOrder",
        "second_order",
    ),
    "analyses.tangents": ("tangents",),
    "errors": (
        "AdapterError",
        "ArgumentError",
        "LensLoraError",
        "ModelStateError",
        "NumericsError",
        "PromptError",
        "SiteError",
        "TokenError",
        "UnsupportedAdapterError",
    ),
    "hooked.frozen": ("FrozenRules",),
    "hooked.sites": ("Site",),
    "lens": ("LoraLens",),
    "loading": (
        "demo",
        "load",
    ),
    "readouts.answers": (
        "AnswerLogProb",
        "AnswerMargin",
    ),
    "readouts.prompts": ("Prompts",),
    "readouts.readout": (
        "LogProb",
        "Logit",
        "Margin",
        "Readout",
    ),
    "results.activation_effects": ("ActivationEffects",),
    "results.attribution": (
        "Attribution",
        "Quadrature",
    ),
    "results.effects": ("Effects",),
    "results.token_view": ("TokenView",),
    "sweeps.records": ("SweepError",),
    "sweeps.result": ("SweepResult",),
    "sweeps.sweep": ("sweep",),
}
_MODULE_OF: dict[str, str] = {name: module for module, names in _HOMES.items() for name in names}

# A type checker that saw __getattr__ would accept every misspelt name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """The public name, imported from its module the first time it is asked for (PEP 562)."""
        if name not in _MODULE_OF:
            raise AttributeError(_unknown(name))
        found = getattr(importlib.import_module(f"lens_lora.{_MODULE_OF[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _unknown(name: str) -> str:
    import difflib

    nearest = difflib.get_close_matches(name, __all__)
    remedy = f"the nearest are {', '.join(nearest)}" if nearest else "see dir(lens_lora)"
    return f"module 'lens_lora' has no attribute {name!r}; {remedy}."
