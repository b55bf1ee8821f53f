"""Every score of sites that the evidence compares, by its key: values [prompt, site] in g's units.

1. `PARTS` are computed, each from the question alone. `COMPOSED` are made from parts without a
   further pass, so the cost of each is the sum of its parts' costs.
2. Second order of each effect, at its own end and across, needs the diagonal of H, dearer than
   running the sites: `curvature` takes few prompts.
3. `hessian_steps/K` integrates along the path by K Hessian-vector products: Σ_k a(k/K)/K +
   ½ H(k/K)1/K². This is "multi-step HVP" (arXiv 2606.09899), read as having one path for all sites.
   With one step it is `second_order@0`.
4. Ensembles are means of values, not of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import lens_lora as ll
from lens_lora.core import Evaluations
from lens_lora.core.analyses.components import squared_norms
from lens_lora.core.analyses.first_order import first_order
from lens_lora.core.analyses.patching import patch_sites
from lens_lora.core.function.gate_graph import hessian_product
from lens_lora.core.function.reverse import site_slopes
from lens_lora.curvature.coupling import coupling
from lens_lora.judging import rankings

Part = Callable[[Evaluations], Tensor]
Parts = Mapping[str, Tensor]
EFFECTS = ("add_one", "leave_one_out")
# The seed of the sizes in `signed_random`.
_SEED = 0


def _first(at: float, g: Evaluations) -> Tensor:
    """a_l(ε) where all gates are at the same value."""
    return site_slopes(g.lens, g.reading, g.lens.gates(at))


def _ruled(rules: ll.results.FrozenRules, at: float, g: Evaluations) -> Tensor:
    """First order where the backward pass follows rules of LRP in place of the derivative."""
    return first_order.of(g, at=at, rules=rules).per_site


def _path(nodes: int, g: Evaluations) -> Tensor:
    """∫ a(ε) dε over [0, 1] by Gauss-Legendre quadrature."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    terms: list[Tensor] = []
    for point, weight in zip(points, weights, strict=True):
        # The quadrature is for [−1, 1], which is twice as long as the path.
        at = (point + 1) / 2
        terms.append(weight / 2 * _first(at, g))
    return torch.stack(terms).sum(0)


def _hessian(at: float, g: Evaluations) -> Tensor:
    """H·1, the curvature along all sites together."""
    gates = g.lens.gates(at)
    return hessian_product(g.lens, g.reading, gates, torch.ones_like(gates))


def _effects(how: str, g: Evaluations) -> Tensor:
    """The measured effects of all sites."""
    return patch_sites.of(g, how).values  # type: ignore[arg-type]


def _towards(g: Evaluations) -> Tensor:
    """The sign of each prompt's shift, [prompt, 1]; norms have no sign of their own, and get it."""
    base, adapted = g.ends
    return (adapted - base).sign()[:, None]


def _weight_norm(g: Evaluations) -> Tensor:
    towards = _towards(g)
    return towards * rankings.weight_norms(g.lens).to(towards)


def _update_norm(g: Evaluations) -> Tensor:
    towards = _towards(g)
    return towards * rankings.update_norms(g).to(towards)


def _norm_product(g: Evaluations) -> Tensor:
    """‖δz‖ · ‖Jᵀu‖ of each site and prompt."""
    squares = squared_norms(g)
    delta = g.reading.by_prompt(squares["delta"])
    gradient = g.reading.by_prompt(squares["gradient"])
    return _towards(g) * (delta * gradient).sqrt()


HELD = ll.results.FrozenRules(attention_patterns=True, norm_scales=True)
RELP = ll.results.FrozenRules.relp()
# As the paper's own code has it by default: attention is differentiated.
RELP_LIVE = ll.results.FrozenRules(norm_scales=True, identity_rule=True, half_rule=True)


def _parts() -> dict[str, Part]:
    """Every part by its key."""
    parts: dict[str, Part] = {}
    for at in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts[f"first_order@{at:g}"] = functools.partial(_first, at)
    for nodes in (2, 4, 8):
        parts[f"path/{nodes}"] = functools.partial(_path, nodes)
    for at in (0.0, 0.25, 0.5, 0.75):
        parts[f"hessian@{at:g}"] = functools.partial(_hessian, at)
    for rules, at in ((HELD, 0.0), (RELP, 0.0), (RELP_LIVE, 0.0), (RELP, 1.0)):
        parts[f"first_order/{rules.key}@{at:g}"] = functools.partial(_ruled, rules, at)
    for how in EFFECTS:
        parts[how] = functools.partial(_effects, how)
    parts["weight_norm"] = _weight_norm
    parts["update_norm"] = _update_norm
    parts["norm_product"] = _norm_product
    return parts


PARTS = _parts()


def _steps(count: int, parts: Parts) -> Tensor:
    """Σ_k a(k/K)/K + ½ H(k/K)1/K² with K = `count` steps."""
    total = torch.zeros_like(parts["first_order@0"])
    for at in _points(count):
        total = total + parts[f"first_order@{at}"] / count
        total = total + parts[f"hessian@{at}"] / (2 * count**2)
    return total


def _points(count: int) -> list[str]:
    """The gate values at which so many Hessian steps begin, as keys have them."""
    return [f"{k / count:g}" for k in range(count)]


def _parts_of_steps(count: int) -> tuple[str, ...]:
    """The keys of the parts that so many Hessian steps are made of."""
    points = _points(count)
    first_order_parts = [f"first_order@{at}" for at in points]
    hessian_parts = [f"hessian@{at}" for at in points]
    return (*first_order_parts, *hessian_parts)


def _mean(keys: tuple[str, ...], parts: Parts) -> Tensor:
    """The mean of some parts' values."""
    return torch.stack([parts[key].double() for key in keys]).mean(0)


def _signed_weight_norm(parts: Parts) -> Tensor:
    """‖ΔW‖ with the signs of first order at 0."""
    return parts["first_order@0"].sign() * parts["weight_norm"].abs()


def _signed_random(parts: Parts) -> Tensor:
    """Random sizes with the signs of first order at 0."""
    first = parts["first_order@0"]
    generator = torch.Generator().manual_seed(_SEED)
    return first.sign() * torch.rand(first.shape, generator=generator).to(first)


class Composed(NamedTuple):
    """A method that is made from parts.

    Attributes:
        needed: the keys of its parts.
        make: makes its values from the parts, which may be more than it needs.
    """

    needed: tuple[str, ...]
    make: Callable[[Parts], Tensor]


_PAIRS = (
    ("first_order@0", "first_order@1"),
    ("first_order@0", "first_order@0.5"),
    ("first_order@0.5", f"first_order/{RELP.key}@0"),
)


def _composed() -> dict[str, Composed]:
    """Every method that is made from parts, by its key."""
    composed: dict[str, Composed] = {}
    for count in (1, 2, 4):
        key = "second_order@0" if count == 1 else f"hessian_steps/{count}"
        steps = functools.partial(_steps, count)
        composed[key] = Composed(_parts_of_steps(count), steps)
    for pair in _PAIRS:
        mean = functools.partial(_mean, pair)
        composed[f"mean({pair[0]}, {pair[1]})"] = Composed(pair, mean)
    composed["signed_weight_norm"] = Composed(("first_order@0", "weight_norm"), _signed_weight_norm)
    composed["signed_random"] = Composed(("first_order@0",), _signed_random)
    return composed


COMPOSED = _composed()
# Parts that are run on some kinds of prompt only, and those kinds.
DEAR = ("path/8", "first_order@0.25", "first_order@0.75", "hessian@0.25", "hessian@0.75")
DEAR_ON = ("trained", "paraphrase")
# Parts that are no method by themselves.
ONLY_PARTS = frozenset(
    key for key in PARTS if key.startswith("hessian@") or key.endswith(("@0.25", "@0.75"))
)


def methods_of(parts: Parts) -> dict[str, Tensor]:
    """Every method's values, as far as its parts were run."""
    values_of = {key: values for key, values in parts.items() if key not in ONLY_PARTS}
    for key, composed in COMPOSED.items():
        if all(part in parts for part in composed.needed):
            values_of[key] = composed.make(parts)
    return values_of


def curvature(at: float, hows: tuple[str, ...], g: Evaluations) -> dict[str, Tensor]:
    """Second order of effects, expanded at the gate value t; one matrix H serves all of them.

    Adding site l to the base: a_l − t (H1)_l + ½ H_ll.
    Leaving it out of the adapted model: a_l + (1 − t) (H1)_l − ½ H_ll.
    """
    first = first_order.of(g, at=at).per_site
    hessian = coupling.of(g, at=at)
    effects = {
        "add_one": first - at * hessian.row_sums + hessian.self_curvature,
        "leave_one_out": first + (1 - at) * hessian.row_sums - hessian.self_curvature,
    }
    return {f"second_order/{how}@{at:g}": effects[how] for how in hows}


# Gate values, and the effects that are expanded there: each effect at the end where it is measured,
# and leaving one out also from the base.
CURVATURE = ((0.0, ("add_one", "leave_one_out")), (1.0, ("leave_one_out",)))


# The lean protocol: what the page's questions need on the adapter's own wordings (`LEAN`), and less
# on other prompts.
LEAN_ELSEWHERE = (
    "first_order@0",
    "first_order@0.5",
    "first_order@1",
    "path/4",
    "weight_norm",
    *EFFECTS,
)
LEAN = (*LEAN_ELSEWHERE, "path/2", "path/8", "hessian@0", "hessian@0.5", "update_norm")


def parts_for(kind: str, *, is_long: bool, is_lean: bool) -> dict[str, Part]:
    """The parts that are run on a kind of prompt: the dear ones not on every kind, nor if long."""
    is_own = kind in DEAR_ON
    keys = [*PARTS]
    if is_long or not is_own:
        keys = [key for key in keys if key not in DEAR]
    if is_lean:
        wanted = LEAN if is_own else LEAN_ELSEWHERE
        keys = [key for key in keys if key in wanted]
    return {key: PARTS[key] for key in keys}
