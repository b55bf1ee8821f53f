"""The door of the core: what the other folders use of it, in the order in which one meets it.

An analysis needs the first four sections; the fifth is what the core itself answers. The last three
are for a readout with rows of its own, for passes with hooks of one's own, and for what asks about
weights. Above each group of names stands what they are for, and why they are no methods of what one
has already. `docs/write_your_own.md` begins at the first line.
"""

# isort: split
# --- 1. An adapter over a hooked model.
#
# An `Adapter` has an update for each module that was trained: `LoRAFactors`, or a
# `TrainedModule`. `load_adapter` reads one, in any format that `adapter_format` has declared.
from .adapter.adapter import Adapter as Adapter
from .adapter.factors import LoRAFactors as LoRAFactors
from .adapter.factors import ModuleUpdate as ModuleUpdate
from .adapter.factors import TrainedModule as TrainedModule
from .adapter.formats import adapter_format as adapter_format
from .adapter.loading import AdapterLike as AdapterLike
from .adapter.loading import load_adapter as load_adapter

# isort: split
# `LoraLens` lays it over a model. Each adapted map is a `Site` with a gate, whose value is a
# `Scale`; `lens.sites` chooses and groups them.
from .model.gates import Scale as Scale
from .model.lens import LoraLens as LoraLens
from .model.sites import Group as Group
from .model.sites import Groups as Groups
from .model.sites import Site as Site
from .model.sites import Sites as Sites

# isort: split
# --- 2. What is asked.
#
# `Prompts` are token ids with the positions that are read; `lens.prompts(…)` makes them, and
# `tokenise` does where there is a model and no lens yet. `Source` is how one was given. A result
# holds the tokens as strings, `PromptTokens`. `Tokens(model)` finds the ids of answers.
from .readout.positions import ChosenPositions as ChosenPositions
from .readout.positions import Positions as Positions
from .readout.prompts import Prompts as Prompts
from .readout.prompts import PromptsLike as PromptsLike
from .readout.prompts import PromptTokens as PromptTokens
from .readout.prompts import Source as Source
from .readout.responses import AnswerLike as AnswerLike
from .readout.responses import Generated as Generated
from .readout.tokenising import tokenise as tokenise
from .readout.tokens import Tokens as Tokens

# isort: split
# A mean over texts that begin alike counts each beginning once. The marks may come from a file,
# and then there are no `Prompts`.
from .readout.beginnings import first_of_each as first_of_each
from .readout.beginnings import marks_of as marks_of

# isort: split
# A `Readout` is the number that is read from the logits; `declared_readout` makes one of a
# function.
from .readout.declared import declared_readout as declared_readout
from .readout.readout import Logit as Logit
from .readout.readout import LogProb as LogProb
from .readout.readout import Margin as Margin
from .readout.readout import Readout as Readout

# isort: split
# --- 3. The function g(ε), `lens.function(prompts, readout)`.
#
# `@analysis` makes a public call of a function of g, an `Evaluations` there; a call that takes
# something else is `@alone`. `by_axes` checks what values are to be split by, before anything
# runs.
from .analyses.own_analyses import analysis as analysis
from .function.cache import Evaluations as Evaluations
from .function.function import Function as Function
from .function.noise import Noise as Noise
from .model.public_call import alone as alone
from .model.sites import by_axes as by_axes

# isort: split
# --- 4. Results.
#
# A result is a frozen dataclass, and a subclass of what it has:
#
#     fields    `Described`   the names of model and adapter
#               `OfSites`     and the sites
#               `Read`        or the readout and the prompts' tokens
#               `Measured`    and the sites, and both exact ends, g(0) and g(1)
#               `OfMeasured`  or all of that by way of another result that it is made from
#     ranking   `Ranked`      one number for each prompt and entry: `entries`, and so `top`
#               `Labelled`    and table, figure and words follow from its annotations
#     showing   `Pictured`    one picture
#               `Drawn`       a picture of each prompt
#               `Reported`    a page
#               `Paged`       a page and a story
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
from .results.labelled import Labelled as Labelled

# isort: split
# Two that many analyses return: slopes or integrals by site, and exact effects by group of sites.
# `Axis` and `Shown` are what values may be split by, and what a picture shows of them.
from .results.attribution import Attribution as Attribution
from .results.attribution import Axis as Axis
from .results.attribution import GroupAttribution as GroupAttribution
from .results.attribution import Quadrature as Quadrature
from .results.attribution import Shown as Shown
from .results.effects import Effects as Effects

# isort: split
# How results are drawn and said (each class registers its own), how they become tables, and how
# they become files; and which signs rounding hides, which is asked of tensors before there is a
# result.
from .results import drawing as drawing
from .results import storage as storage
from .results import tables as tables
from .results.signs import SIGMAS as SIGMAS
from .results.signs import changes_sign as changes_sign
from .results.signs import hides_sign as hides_sign

# isort: split
# --- 5. What the core itself answers: each a function of g, with its result.
#
# `squared_norms` are those of `components` before they are averaged, of which `foils` makes
# scores; `flip_scales` is where g changes its sign between points that are known, as for a fact
# margin.
from .analyses.activation_patching import ActivationEffects as ActivationEffects
from .analyses.activation_patching import patch_activations as patch_activations
from .analyses.components import Components as Components
from .analyses.components import components as components
from .analyses.components import squared_norms as squared_norms
from .analyses.first_order import first_order as first_order
from .analyses.flips import flip_scales as flip_scales
from .analyses.margin import FactMargin as FactMargin
from .analyses.margin import fact_margin as fact_margin
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
# --- 6. A readout with rows of its own.
#
# Its method `reading` returns a `Reading`: the rows that are run, and how a pass reads g from
# their logits. That may be logits at `Picks`, log-probabilities of given tokens (`LogProbs`), or
# a number inside the model (`AtPoint`). `LogitFunction` is f as such a readout sees it. A
# fingerprint asks a `DeclaredReadout` for its function.
from .readout.declared import DeclaredReadout as DeclaredReadout
from .readout.reading import AtPoint as AtPoint
from .readout.reading import LogProbs as LogProbs
from .readout.reading import Picks as Picks
from .readout.reading import Reading as Reading
from .readout.readout import LogitFunction as LogitFunction

# isort: split
# --- 7. Passes with hooks of one's own, which `g.passes` runs.
#
# On the way forward: what a hook is, what a site writes where (`ScaleInject`, an `Injection`),
# what hook points held (`Recording`), the tangent of what a hook sees, and hooks that move the
# stream by one rounding. `Arranger` keeps the hooks of a block in order.
# `Names` are hook points as they may be named, and `layer_order` sorts them.
from .function.duals import tangent_of as tangent_of
from .function.recording import Recording as Recording
from .function.rounding import rounding_hooks as rounding_hooks
from .model.hooks import Arranger as Arranger
from .model.hooks import HookFn as HookFn
from .model.injections import ScaleInject as ScaleInject
from .model.plan import Injection as Injection
from .model.sites import Names as Names
from .model.sites import layer_order as layer_order

# isort: split
# On the way back `g.passes.visit` calls a `Visit` for each place where a site writes, and
# `SlopeSums` is the one that adds up ∂g/∂ε.
from .function.reverse import SlopeSums as SlopeSums
from .function.reverse import Visit as Visit

# isort: split
# A hook sees a tensor, and not which of its tokens are which; the pass that is under way knows.
# An `OpenBlock` of the caller's says what it leaves out of every pass, for results and their
# pages.
from .model.passes import ForwardPass as ForwardPass
from .model.passes import OpenBlock as OpenBlock
from .model.passes import Rows as Rows

# isort: split
# --- 8. Weights, and models without a lens.
#
# `lens.updates` has each site in Hugging Face's basis (`SiteUpdate`: `SiteFactors` as the adapter
# holds them, `Update` as they add), `lens.maps` in the model's (`SiteMap`); `Gauge` says what a
# rank is. `ModelSizes` says what passes over a model will take that is known by its configuration
# alone.
from .function.planned import ModelSizes as ModelSizes
from .model.adapted_modules import SiteFactors as SiteFactors
from .model.basis import SiteMap as SiteMap
from .model.basis import Update as Update
from .model.gauge import Gauge as Gauge
from .model.updates import SiteUpdate as SiteUpdate

# isort: split
# `lens.host` is the hooked model beneath a lens, and `host_of` finds it where there is no lens.
# What a lens would refuse is refused before one is made: a base (`ll.load`), an adapter that a
# user passes (a bank), or hooks of another lens on the model (a fingerprint).
from .model.check import refuse_unusable as refuse_unusable
from .model.check import require_adapter as require_adapter
from .model.find_host import host_of as host_of
from .model.host import Host as Host
from .model.injections import refuse_lens_hooks as refuse_lens_hooks
