"""The public names and where they live: what `lens_lora/__init__.py` imports at their first use."""

from . import errors as errors
from . import results as results
from ._version import __version__ as __version__
from .adapters.adapter import Adapter, load_adapter
from .adapters.factors import LoRAFactors
from .adapters.formats import adapter_format
from .analyses.activation_shift import activation_shift
from .analyses.activations import activations, constant_part
from .analyses.checkpoints import checkpoints
from .analyses.compare_adapters import compare_adapters
from .analyses.contrast import contrast
from .analyses.directions import alignment, intruders, patchscope, removal_cost
from .analyses.divergence import kl_shares, token_shifts
from .analyses.edges import edges, patch_edges
from .analyses.first_order import components, first_order
from .analyses.logit_shift import gradients, logit_shift, tangents
from .analyses.margin import fact_margin
from .analyses.patching import patch_activations, patch_sites
from .analyses.path import path_attribution, remainder, remainder_curve
from .analyses.repair import repair
from .analyses.second_order import coupling, second_order
from .analyses.what_changed import what_changed
from .core import Function, LoraLens, analysis
from .evaluation.compare import compare, reliability
from .evaluation.explain import explain
from .evaluation.faithfulness import faithfulness
from .evaluation.null_test import null_test
from .evaluation.rankings import best_subset
from .loading import demo, load
from .readouts.answers import KL, AnswerLogProb, AnswerMargin
from .readouts.declared import readout
from .readouts.readout import Logit, LogProb, Margin, Readout
from .results.base import load_result
from .sweeps.bank import bank, load_bank
from .sweeps.sweep import sweep
from .sweeps.training import ShiftCallback

__all__ = [
    # adapters
    "Adapter",
    "LoRAFactors",
    "load_adapter",
    # the lens
    "LoraLens",
    "demo",
    "load",
    "Function",
    # readouts
    "AnswerLogProb",
    "AnswerMargin",
    "KL",
    "LogProb",
    "Logit",
    "Margin",
    "Readout",
    # first order
    "components",
    "edges",
    "first_order",
    "gradients",
    "logit_shift",
    "tangents",
    # activations
    "activations",
    # responses
    "kl_shares",
    "token_shifts",
    # remainder and margin
    "fact_margin",
    "remainder",
    "remainder_curve",
    # beyond first order
    "coupling",
    "path_attribution",
    "reliability",
    "second_order",
    # interventions
    "best_subset",
    "compare",
    "faithfulness",
    "null_test",
    "patch_activations",
    "patch_edges",
    "patch_sites",
    # two adapters
    "checkpoints",
    "compare_adapters",
    "repair",
    # one prompt
    "explain",
    # directions
    "alignment",
    "contrast",
    "intruders",
    "patchscope",
    "removal_cost",
    # auditing
    "activation_shift",
    "constant_part",
    "what_changed",
    # sweeps
    "ShiftCallback",
    "bank",
    "load_bank",
    "sweep",
    # results
    "load_result",
    # your own
    "analysis",
    "readout",
    "adapter_format",
]
