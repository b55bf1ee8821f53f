"""lens_lora: what did this LoRA do to this model, on this prompt, where, and how far to trust it?

    import lens_lora as ll

    adapter = ll.load_adapter("path/or/hub-id")
    lens = ll.LoraLens(model, adapter)          # a HookedTransformer or a TransformerBridge
    ll.fact_margin(lens, "The capital of France is", " Lyon", " Paris")

The theory is "Formalising the Logit Shift Induced by LoRA" (arXiv 2604.20313).
"""

from lens_lora._version import __version__
from lens_lora.adapter import Adapter, LoRAFactors, load_adapter
from lens_lora.answers import AnswerLogProb, AnswerMargin
from lens_lora.attribution import Attribution
from lens_lora.calculus.components import Components, components
from lens_lora.calculus.first_order import first_order
from lens_lora.calculus.logit_shift import LogitShift, logit_shift
from lens_lora.calculus.margin import FactMargin, fact_margin
from lens_lora.calculus.remainder import (
    Remainder,
    RemainderCurve,
    remainder,
    remainder_curve,
)
from lens_lora.calculus.trajectory import tangents
from lens_lora.errors import (
    AdapterError,
    LensLoraError,
    ModelStateError,
    NumericsError,
    PromptError,
    SiteError,
    TokenError,
    UnsupportedAdapterError,
)
from lens_lora.hooked.sites import Site
from lens_lora.lens import LoraLens
from lens_lora.prompts import Prompts
from lens_lora.readout import Logit, LogProb, Margin, Readout

__all__ = [
    # adapters
    "Adapter",
    "LoRAFactors",
    "load_adapter",
    # the lens
    "LoraLens",
    "Prompts",
    "Site",
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
    "LogitShift",
    "components",
    "first_order",
    "logit_shift",
    "tangents",
    # the remainder and the margin
    "FactMargin",
    "Remainder",
    "RemainderCurve",
    "fact_margin",
    "remainder",
    "remainder_curve",
    # errors
    "AdapterError",
    "LensLoraError",
    "ModelStateError",
    "NumericsError",
    "PromptError",
    "SiteError",
    "TokenError",
    "UnsupportedAdapterError",
    "__version__",
]
