"""The parts of an explanation that take many passes, of a margin or of another readout.

Every module is added and left out, layers are coupled, the path is integrated, and the curves of
what is kept and dropped are measured.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.core import Evaluations, patch_sites
from lens_lora.curvature.coupling import coupling
from lens_lora.explanations.explanation import Explanation, ReadoutExplanation
from lens_lora.explanations.steps import PATH_NODES, PATH_TOLERANCE, step
from lens_lora.judging.faithfulness import faithfulness
from lens_lora.judging.reliability import judged
from lens_lora.path.path_attribution import path_attribution

# The shares of the sites that are kept and dropped.
_FRACTIONS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
# The steps of the bar that `in_full` takes.
SLOW_STEPS = 5

_SiteExplanation = TypeVar("_SiteExplanation", Explanation, ReadoutExplanation)


def in_full(g: Evaluations, quick: _SiteExplanation, bar: tqdm[Any]) -> _SiteExplanation:
    """The same explanation with the parts that take many passes.

    Args:
        g: the readout of the explanation's prompts.
        quick: the explanation so far.
        bar: moves on by `SLOW_STEPS`.
    """
    with step(bar, "each site added"):
        add_one = patch_sites.of(g, "add_one")
    with step(bar, "each site left out"):
        leave_one_out = patch_sites.of(g, "leave_one_out")

    def added(sites: Bool[Tensor, " site"]) -> Float[Tensor, "batch chosen"]:
        return add_one.values[:, sites]

    def left_out(sites: Bool[Tensor, " site"]) -> Float[Tensor, "batch chosen"]:
        return leave_one_out.values[:, sites]

    reliability = {
        "add_one": judged(g, quick.second_order.first_order, "add_one", added),
        "leave_one_out": judged(g, quick.adapted_end, "leave_one_out", left_out),
    }
    with step(bar, "coupling of layers"):
        layers = coupling.of(g, group="layer")
    with step(bar, "path integral"):
        path = path_attribution.of(g, tol=PATH_TOLERANCE, max_nodes=PATH_NODES)
    with step(bar, "keep and drop curves"):
        scores = {score.key: score for score in (quick.first_order, path, leave_one_out)}
        curves = faithfulness.of(g, scores, fractions=_FRACTIONS)
    return dataclasses.replace(
        quick,
        reliability=reliability,
        coupling=layers,
        add_one=add_one,
        leave_one_out=leave_one_out,
        path=path,
        faithfulness=curves,
    )
