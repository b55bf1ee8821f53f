"""The public names and where they live: what `lens_lora/__init__.py` imports at their first use."""

from ._version import __version__
from .adapters.adapter import Adapter, load_adapter
from .adapters.factors import LoRAFactors
from .adapters.random_directions import null_adapter
from .adapters.trained import TrainedModule
from .analyses.activation_shift import activation_shift
from .analyses.activations import activations
from .analyses.best_subset import BestSubset, best_subset
from .analyses.checkpoints import checkpoints
from .analyses.compare import Comparison, compare
from .analyses.compare_adapters import AdapterComparison, compare_adapters
from .analyses.components import Components, components
from .analyses.constant_part import constant_part
from .analyses.coupling import Coupling, coupling
from .analyses.explain import explain
from .analyses.explain_all import Explanations, explain_all
from .analyses.explain_margin import Explanation
from .analyses.explain_response import ResponseExplanation
from .analyses.faithfulness import Faithfulness, faithfulness
from .analyses.feature_shift import FeatureShift, feature_shift
from .analyses.feature_writes import FeatureWrites, feature_writes
from .analyses.first_order import first_order
from .analyses.foils import foils
from .analyses.kl_shares import KLShares, kl_shares
from .analyses.logit_shift import LogitShift, logit_shift
from .analyses.many_readouts import first_orders
from .analyses.margin import FactMargin, fact_margin
from .analyses.null_test import NullTest, null_test
from .analyses.patch_activations import patch_activations
from .analyses.patch_sites import patch_sites
from .analyses.path import path_attribution
from .analyses.reliability import Reliability, reliability
from .analyses.remainder import Remainder, remainder
from .analyses.remainder_curve import RemainderCurve, remainder_curve
from .analyses.repair import Repair, repair
from .analyses.second_order import SecondOrder, second_order
from .analyses.tangents import tangents
from .analyses.token_shifts import TokenShifts, token_shifts
from .analyses.what_changed import what_changed
from .errors import (
    AdapterError,
    ArgumentError,
    LensLoraError,
    ModelStateError,
    NumericsError,
    OutOfMemoryError,
    PromptError,
    SiteError,
    TokenError,
    UnsupportedAdapterError,
)
from .hooked.frozen import FrozenRules
from .hooked.sites import Site
from .lens import LoraLens
from .loading import demo, load
from .readouts.answers import AnswerLogProb, AnswerMargin
from .readouts.divergence import KL
from .readouts.generated import Generated
from .readouts.prompts import Prompts
from .readouts.readout import Logit, LogProb, Margin, Readout
from .results.activation_effects import ActivationEffects
from .results.activation_shift import ActivationShift
from .results.activations import Activations
from .results.attribution import Attribution, Quadrature
from .results.checkpoints import Checkpoints
from .results.constant_part import ConstantPart
from .results.effects import Effects
from .results.grouped import GroupAttribution
from .results.token_view import TokenView
from .results.what_changed import Changes, WhatChanged
from .show.figures.theme import theme
from .sweeps.records import SweepError
from .sweeps.result import SweepResult
from .sweeps.sweep import sweep
from .sweeps.token_file import ActivationsFile

__all__ = [
    # adapters
    "Adapter",
    "LoRAFactors",
    "TrainedModule",
    "load_adapter",
    # the lens
    "Generated",
    "LoraLens",
    "Prompts",
    "Site",
    "demo",
    "load",
    # readouts
    "AnswerLogProb",
    "AnswerMargin",
    "KL",
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
    # rank space
    "Activations",
    "ActivationsFile",
    "activations",
    # whole responses
    "GroupAttribution",
    "KLShares",
    "TokenShifts",
    "kl_shares",
    "token_shifts",
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
    "BestSubset",
    "Comparison",
    "Effects",
    "Faithfulness",
    "NullTest",
    "best_subset",
    "compare",
    "faithfulness",
    "foils",
    "null_adapter",
    "null_test",
    "patch_activations",
    "patch_sites",
    # two adapters, one through its training, and the part of one that is kept
    "AdapterComparison",
    "Checkpoints",
    "Repair",
    "checkpoints",
    "compare_adapters",
    "repair",
    # all of one prompt
    "Explanation",
    "Explanations",
    "ResponseExplanation",
    "explain",
    "explain_all",
    # features: directions, sparse autoencoders
    "FeatureShift",
    "FeatureWrites",
    "feature_shift",
    "feature_writes",
    # nothing asked
    "ActivationShift",
    "Changes",
    "ConstantPart",
    "WhatChanged",
    "activation_shift",
    "constant_part",
    "what_changed",
    # tokens, drawn by circuitsvis
    "TokenView",
    # the look of figures
    "theme",
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
    "OutOfMemoryError",
    "PromptError",
    "SiteError",
    "TokenError",
    "UnsupportedAdapterError",
    "__version__",
]
