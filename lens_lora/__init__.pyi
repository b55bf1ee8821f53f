"""The public names and where they live: what `lens_lora/__init__.py` imports at their first use."""

from . import errors as errors
from . import results as results
from ._version import __version__ as __version__
from .audit.counted_speech import counted_speech
from .audit.what_changed import what_changed
from .banks.bank import bank, load_bank
from .banks.training import ShiftCallback
from .core import (
    Adapter,
    Function,
    Logit,
    LogProb,
    LoRAFactors,
    LoraLens,
    Margin,
    Readout,
    adapter_format,
    analysis,
    components,
    fact_margin,
    first_order,
    load_adapter,
    patch_activations,
    patch_sites,
    remainder,
    remainder_curve,
)
from .core.readout.declared import readout
from .core.results.base import load_result
from .curvature.coupling import coupling
from .curvature.second_order import second_order
from .directions.alignment import weight_alignment
from .directions.contrast import contrast
from .directions.intruders import intruders
from .directions.patchscope import patchscope
from .directions.removal_cost import removal_cost
from .directions.scaled_intruders import scale_intruders
from .edge_attribution.edges import edges
from .edge_attribution.patch_edges import patch_edges
from .explanations.explain import explain
from .hidden.activation_shift import activation_shift
from .hidden.activations import lora_activations
from .hidden.constant_part import constant_part
from .hidden.features import feature_shift
from .hidden.readout import Projection
from .interaction.reconcile import reconcile
from .interaction.together import together
from .judging.best_subset import best_subset
from .judging.compare import compare
from .judging.faithfulness import faithfulness
from .judging.foils import foils
from .judging.null_test import null_test
from .judging.reliability import reliability
from .loading import demo, load
from .path.path_attribution import path_attribution
from .responses.answers import AnswerLogProb, AnswerMargin
from .responses.kl import KL
from .runs.shards import gather
from .shifts.hook_points import gradients, tangents
from .shifts.kl_shares import kl_shares
from .shifts.logit_shift import logit_shift
from .shifts.token_shifts import token_shifts
from .ship.combined import verify_combined
from .ship.forms import forms
from .ship.served import verify_served
from .show.compose import panel, table
from .sweeps.sweep import sweep
from .two_adapters.checkpoints import checkpoints
from .two_adapters.compare_adapters import compare_adapters
from .two_adapters.repair import repair

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
    "Projection",
    "Readout",
    # first order
    "components",
    "edges",
    "first_order",
    "gradients",
    "logit_shift",
    "tangents",
    # activations
    "lora_activations",
    "feature_shift",
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
    "foils",
    "null_test",
    "patch_activations",
    "patch_edges",
    "patch_sites",
    # two adapters
    "checkpoints",
    "compare_adapters",
    "repair",
    "together",
    "reconcile",
    # one prompt
    "explain",
    # directions
    "weight_alignment",
    "contrast",
    "intruders",
    "patchscope",
    "removal_cost",
    "scale_intruders",
    # auditing
    "activation_shift",
    "constant_part",
    "counted_speech",
    "what_changed",
    # shipping
    "forms",
    "verify_combined",
    "verify_served",
    # sweeps
    "ShiftCallback",
    "bank",
    "load_bank",
    "sweep",
    "gather",
    # results
    "load_result",
    "panel",
    "table",
    # your own
    "analysis",
    "readout",
    "adapter_format",
]
