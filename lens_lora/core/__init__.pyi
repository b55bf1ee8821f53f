"""The door of the core: what the other folders use of it, in the order in which one meets it.

An analysis needs the first four sections; the fifth is what the core itself answers. The last three
are for a readout with rows of its own, for passes with hooks of one's own, and for what asks about
weights. `docs/write_your_own.md` begins at the first line.
"""

# isort: split
# --- An adapter over a hooked model. An `Adapter` has an update for each module that was trained;
# `LoraLens` lays it over a model. Each adapted map is a `Site`, with a gate.
from .adapter.adapter import Adapter as Adapter
from .adapter.factors import LoRAFactors as LoRAFactors
from .adapter.factors import ModuleUpdate as ModuleUpdate
from .adapter.factors import TrainedModule as TrainedModule
from .adapter.formats import adapter_format as adapter_format
from .adapter.loading import AdapterLike as AdapterLike
from .adapter.loading import load_adapter as load_adapter
from .model.gates import Scale as Scale
from .model.lens import LoraLens as LoraLens
from .model.sites import Group as Group
from .model.sites import Groups as Groups
from .model.sites import Site as Site
from .model.sites import Sites as Sites

# isort: split
# --- What is asked: `Prompts`, and a `Readout`, the number that is read from the logits.
from .readout.positions import ChosenPositions as ChosenPositions
from .readout.positions import Positions as Positions
from .readout.prompts import Prompts as Prompts
from .readout.prompts import PromptsLike as PromptsLike
from .readout.prompts import PromptTokens as PromptTokens
from .readout.prompts import Source as Source
from .readout.readout import Logit as Logit
from .readout.readout import LogProb as LogProb
from .readout.readout import Margin as Margin
from .readout.readout import Readout as Readout
from .readout.responses import AnswerLike as AnswerLike
from .readout.responses import Generated as Generated
from .readout.tokenising import tokenise as tokenise
from .readout.tokens import Tokens as Tokens

# isort: split
# --- The function g(ε), `lens.function(prompts, readout)`. `@analysis` makes a public call of a
# function of g, an `Evaluations` there; a call that takes something else is `@alone`.
from .analyses.own_analyses import analysis as analysis
from .function.cache import Evaluations as Evaluations
from .function.function import Function as Function
from .function.noise import Noise as Noise
from .model.public_call import alone as alone
from .model.sites import by_axes as by_axes

# isort: split
# --- Results. A result is a subclass of one of these; `Labelled` has a table, a figure and words by
# itself. Figures and words are registered with `drawing`.
from .results import drawing as drawing
from .results import storage as storage
from .results import tables as tables
from .results.attribution import Attribution as Attribution
from .results.attribution import Axis as Axis
from .results.attribution import GroupAttribution as GroupAttribution
from .results.attribution import Quadrature as Quadrature
from .results.attribution import Shown as Shown
from .results.base import Described as Described
from .results.base import Drawn as Drawn
from .results.base import Entries as Entries
from .results.base import Measured as Measured
from .results.base import OfMeasured as OfMeasured
from .results.base import OfSites as OfSites
from .results.base import Paged as Paged
from .results.base import Pictured as Pictured
from .results.base import Ranked as Ranked
from .results.base import Read as Read
from .results.base import Reported as Reported
from .results.base import Result as Result
from .results.effects import Effects as Effects
from .results.labelled import Labelled as Labelled
from .results.signs import SIGMAS as SIGMAS
from .results.signs import changes_sign as changes_sign
from .results.signs import hides_sign as hides_sign

# isort: split
# --- What the core itself answers: each is a function of g, with its result.
from .analyses.activation_patching import ActivationEffects as ActivationEffects
from .analyses.activation_patching import patch_activations as patch_activations
from .analyses.components import Components as Components
from .analyses.components import components as components
from .analyses.components import squared_norms as squared_norms
from .analyses.first_order import first_order as first_order
from .analyses.margin import FactMargin as FactMargin
from .analyses.margin import fact_margin as fact_margin
from .analyses.margin import flip_scales as flip_scales
from .analyses.patching import How as How
from .analyses.patching import patch_sites as patch_sites
from .analyses.remainder import Remainder as Remainder
from .analyses.remainder import RemainderCurve as RemainderCurve
from .analyses.remainder import remainder as remainder
from .analyses.remainder import remainder_curve as remainder_curve
from .analyses.verdict import FlipVerdict as FlipVerdict
from .analyses.verdict import Point as Point
from .analyses.verdict import Verdict as Verdict

# isort: split
# --- From here on: for what is not a function of g alone. ---
#
# For a readout with rows of its own: its `Reading`, and how a pass reads g from the logits.
from .readout.beginnings import first_of_each as first_of_each
from .readout.beginnings import marks_of as marks_of
from .readout.declared import DeclaredReadout as DeclaredReadout
from .readout.declared import declared_readout as declared_readout
from .readout.reading import AtPoint as AtPoint
from .readout.reading import LogProbs as LogProbs
from .readout.reading import Picks as Picks
from .readout.reading import Reading as Reading
from .readout.readout import LogitFunction as LogitFunction

# isort: split
# --- For passes with hooks of one's own: what is laid, what a site writes, what is recorded.
from .function.duals import tangent_of as tangent_of
from .function.recording import Recording as Recording
from .function.reverse import SlopeSums as SlopeSums
from .function.reverse import Visit as Visit
from .function.rounding import rounding_hooks as rounding_hooks
from .model.hooks import Arranger as Arranger
from .model.hooks import HookFn as HookFn
from .model.injections import ScaleInject as ScaleInject
from .model.passes import ForwardPass as ForwardPass
from .model.passes import OpenBlock as OpenBlock
from .model.passes import Rows as Rows
from .model.plan import Injection as Injection
from .model.sites import Names as Names
from .model.sites import layer_order as layer_order

# isort: split
# --- For what asks about weights and sizes: the updates of the sites, the hooked model beneath
# them, and what an analysis of a model of some size takes.
from .function.planned import ModelSizes as ModelSizes
from .model.adapted_modules import SiteFactors as SiteFactors
from .model.basis import SiteMap as SiteMap
from .model.basis import Update as Update
from .model.check import refuse_unusable as refuse_unusable
from .model.check import require_adapter as require_adapter
from .model.find_host import host_of as host_of
from .model.gauge import Gauge as Gauge
from .model.host import Host as Host
from .model.injections import refuse_lens_hooks as refuse_lens_hooks
from .model.updates import SiteUpdate as SiteUpdate
