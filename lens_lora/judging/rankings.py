"""Which sites first: orders in which to switch them on.

1. Scores (attributions, effects, tensors) → an order per prompt, the largest first; equal scores
   keep the sites' order.
2. Baselines know no readout: ‖ΔW_l‖_F, from the factors, and ‖δz_l‖ at the base model, recorded in
   one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.compat import float64_device, in_float64
from lens_lora.core import Attribution, Effects, LoraLens, Reading, asked_of
from lens_lora.core.function import forward as function
from lens_lora.core.function import memory
from lens_lora.core.function.asked import Asked
from lens_lora.core.results import base as keys
from lens_lora.errors import ArgumentError

Scores = Attribution | Effects | Float[Tensor, "*batch site"]
BySite = Float[Tensor, "batch site"]


def named(attribution: Scores | Mapping[str, Scores]) -> dict[str, Scores]:
    """{name: score}; a single attribution or effect goes by its key, a tensor by 'given'."""
    if isinstance(attribution, Attribution | Effects):
        return {attribution.key: attribution}
    if isinstance(attribution, Tensor):
        return {"given": attribution}
    if not isinstance(attribution, Mapping):
        expected = "an Attribution, Effects, a tensor [site], or {name: one of these}"
        raise ArgumentError(f"{attribution!r} ranks nothing; pass {expected}.")
    taken = {keys.WEIGHT_NORM, keys.UPDATE_NORM, keys.RANDOM, keys.GREEDY} & set(attribution)
    if taken:
        raise ArgumentError(f"{sorted(taken)} are names of baselines; give the scores others.")
    if not attribution:
        raise ArgumentError("no attribution to rank by; pass one, or {name: attribution}.")
    return dict(attribution)


def scores_towards(asked: Asked, given: Mapping[str, Scores], baselines: bool) -> dict[str, BySite]:
    """Each score · sign(shift), so that the largest pushes furthest the way the adapter moved g."""
    base, adapted = asked.ends
    towards = (adapted - base).sign()[:, None].to(float64_device(asked.lens.device))
    scores = {name: _values_of(name, score, asked) * towards for name, score in given.items()}
    if baselines:
        scores[keys.WEIGHT_NORM] = weight_norms(asked.lens).expand(asked.reading.batch, -1)
        scores[keys.UPDATE_NORM] = update_norms(asked)
    return scores


def _values_of(name: str, score: Scores, asked: Asked) -> BySite:
    """The score as one number per prompt and site.

    Raises:
        ArgumentError: it is of other sites, prompts or of another readout, or not finite.
    """
    if isinstance(score, Effects):
        score = score.attribution()
    if isinstance(score, Attribution):
        _require_of(name, score, asked)
        score = score.per_site
    batch, sites = asked.reading.batch, len(asked.lens.sites)
    if score.shape not in ((sites,), (batch, sites)):
        expected = f"[{sites}], or [{batch}, {sites}], one per site in the order of lens.sites"
        raise ArgumentError(f"{name}: scores {tuple(score.shape)}; expected {expected}.")
    if not torch.isfinite(score).all():
        raise ArgumentError(f"{name}: scores are not all finite, so they rank nothing.")
    return in_float64(score.detach().to(asked.lens.device)).expand(batch, sites)


def _require_of(name: str, score: Attribution, asked: Asked) -> None:
    rows = [["".join(tokens) for tokens in result.str_tokens] for result in (score, asked)]
    prompts = [
        ["".join(asked_of(tokens)) for tokens in result.str_tokens] for result in (score, asked)
    ]
    are_same_rows = rows[0] == rows[1]
    facts = {
        "sites": ([s.name for s in score.sites], [s.name for s in asked.lens.sites]),
        # A file of an earlier version does not say where in its rows the prompts end.
        "prompts": rows if are_same_rows else prompts,
        "readout": (score.readout, asked.readout.label),
        # The label of a readout need not name all that is said after a prompt.
        "responses": rows,
    }
    for fact, (theirs, ours) in facts.items():
        if theirs != ours:
            shown = [x if isinstance(x, str) else f"{len(x)} {x[:2]}" for x in (theirs, ours)]
            other = f"{name} has other {fact} than what is run: {shown[0]} and {shown[1]}"
            raise ArgumentError(f"{other}. To rank by it on purpose pass attribution.per_site.")


def by_score(scores: Float[Tensor, "*batch site"]) -> Int[Tensor, "*batch site"]:
    """Indices of each prompt's sites, the largest score first; equal scores keep their order."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def weight_norms(lens: LoraLens) -> Float[Tensor, " site"]:
    """‖ΔW_l‖_F in the model's basis, biases left out; of a norm ‖Δγ‖. No forward pass."""
    norms = [site_map.norm() for site_map in lens.maps]
    return torch.tensor(norms, dtype=torch.float64, device=float64_device(lens.device))


def update_norms(asked: Asked) -> Float[Tensor, "batch site"]:
    """‖δz_l‖ at the base model over a prompt's real positions. One forward pass."""
    groups = memory.pass_groups(asked.lens, asked.reading)
    return torch.cat([_update_norms(asked.lens, group) for group in groups])


def _update_norms(lens: LoraLens, reading: Reading) -> Float[Tensor, "some site"]:
    real, home = reading.prompts.real[..., None], float64_device(lens.device)
    squares = torch.zeros(len(reading.owner), len(lens.sites), dtype=torch.float64, device=home)

    def record(index: int, out: Tensor, z: Tensor) -> None:
        """Adds nothing; sums δ² of each row and site."""
        del out
        injection = lens.plan.injections[index]
        if injection.partner is not None:  # its gate is zero at the base model
            return
        delta = in_float64(injection.map(z))
        if delta.shape[1] == real.shape[1]:  # the unembedding is run at the read position
            delta = delta * real.to(delta.device)
        sums = delta.square().flatten(1).sum(1) / injection.ports.repeats
        squares[:, injection.site] += sums.to(home)

    with torch.no_grad(), lens.injected(record):
        function.read_logits(lens, reading.prompts)
    return reading.by_prompt(squares).sqrt()
