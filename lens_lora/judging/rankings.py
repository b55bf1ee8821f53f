"""Orders of the sites, in which they are switched on one after another.

1. Scores (attributions, effects, tensors) become an order for each prompt, the largest first. Equal
   scores keep the sites' order.
2. Two baselines know no readout: ‖ΔW_l‖_F, from the factors, and ‖δz_l‖ at the base model, recorded
   in one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.compat import float64_device, in_float64
from lens_lora.core import Attribution, Effects, Function, LoraLens, PromptTokens
from lens_lora.errors import ArgumentError

# The keys of the baselines.
WEIGHT_NORM = "weight_norm"
UPDATE_NORM = "update_norm"
RANDOM = "random"
GREEDY = "greedy"

Scores = Attribution | Effects | Float[Tensor, "*batch site"]
BySite = Float[Tensor, "batch site"]


def named(attribution: Scores | Mapping[str, Scores]) -> dict[str, Scores]:
    """The scores by name. A single attribution or effect goes by its key, a tensor by 'given'.

    Raises:
        ArgumentError: no scores, or names of baselines.
    """
    if isinstance(attribution, Attribution | Effects):
        return {attribution.key: attribution}
    if isinstance(attribution, Tensor):
        return {"given": attribution}
    if not isinstance(attribution, Mapping):
        raise ArgumentError(
            f"{attribution!r} ranks nothing",
            remedy="pass an Attribution, Effects, a tensor [site], or {name: one of these}.",
        )
    baselines = {WEIGHT_NORM, UPDATE_NORM, RANDOM, GREEDY}
    reserved = baselines & set(attribution)
    if reserved:
        raise ArgumentError(f"{sorted(reserved)} are names of baselines; give the scores others.")
    if not attribution:
        raise ArgumentError("no attribution to rank by; pass one, or {name: attribution}.")
    return dict(attribution)


def scores_towards(
    g: Function, given: Mapping[str, Scores], *, baselines: bool
) -> dict[str, BySite]:
    """Each score times the sign of the shift, by name.

    The largest then pushes furthest in the direction in which the adapter moved g. The norms of the
    baselines have no sign and stay as they are.

    Args:
        g: the function that is ranked for.
        given: the scores by name.
        baselines: whether ‖ΔW‖ and ‖δz‖ are among the results.
    """
    towards = g.shift.sign()[:, None].to(float64_device(g.lens.device))
    scores = {name: _values_of(name, score, g) * towards for name, score in given.items()}
    if baselines:
        scores[WEIGHT_NORM] = weight_norms(g.lens).expand(len(towards), -1)
        scores[UPDATE_NORM] = update_norms(g)
    return scores


def _values_of(name: str, score: Scores, g: Function) -> BySite:
    """The score as one number per prompt and site.

    Raises:
        ArgumentError: it is of other sites, other prompts or another readout, or is not finite.
    """
    if isinstance(score, Effects):
        score = score.attribution()
    if isinstance(score, Attribution):
        _require_of(name, score, g)
        score = score.per_site
    batch = g.reading.batch
    sites = len(g.lens.sites)
    is_of_sites = score.shape in ((sites,), (batch, sites))
    if not is_of_sites:
        raise ArgumentError(
            f"{name}: scores {tuple(score.shape)}; expected [{sites}], or [{batch}, {sites}], one "
            "per site in the order of lens.sites."
        )
    if not torch.isfinite(score).all():
        raise ArgumentError(f"{name}: scores are not all finite, so they rank nothing.")
    return in_float64(score.detach().to(g.lens.device)).expand(batch, sites)


def _require_of(name: str, score: Attribution, g: Function) -> None:
    """Check that an attribution is of the sites, prompts and readout that are run."""
    their_sites = [site.name for site in score.sites]
    our_sites = [site.name for site in g.lens.sites]
    their_rows = _joined(score.str_tokens)
    our_rows = _joined(g.str_tokens)
    facts: dict[str, tuple[str | list[str], str | list[str]]] = {"sites": (their_sites, our_sites)}
    # A file of an earlier version does not say where in its rows the prompts end.
    if their_rows != our_rows:
        their_prompts = _joined([PromptTokens.of(tokens).asked for tokens in score.str_tokens])
        our_prompts = _joined([PromptTokens.of(tokens).asked for tokens in g.str_tokens])
        facts["prompts"] = (their_prompts, our_prompts)
    facts["readout"] = (score.readout, g.labels()["readout"])
    # The label of a readout need not name all that is said after a prompt.
    facts["responses"] = (their_rows, our_rows)
    for fact, (of_score, of_g) in facts.items():
        if of_score != of_g:
            raise ArgumentError(
                f"{name} has other {fact} than what is run: {_shown(of_score)} and {_shown(of_g)}",
                remedy="To rank by it on purpose pass attribution.per_site.",
            )


def _joined(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["".join(tokens) for tokens in rows]


def _shown(fact: str | list[str]) -> str:
    return fact if isinstance(fact, str) else f"{len(fact)} {fact[:2]}"


def by_score(scores: Float[Tensor, "*batch site"]) -> Int[Tensor, "*batch site"]:
    """Indices of each prompt's sites, the largest score first; equal scores keep their order."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def weight_norms(lens: LoraLens) -> Float[Tensor, " site"]:
    """‖ΔW_l‖_F in the model's basis without biases, or ‖Δγ‖ of a norm. No forward pass."""
    norms = [site_map.norm() for site_map in lens.maps]
    return torch.tensor(norms, dtype=torch.float64, device=float64_device(lens.device))


def update_norms(g: Function) -> BySite:
    """‖δz_l‖ at the base model over a prompt's real positions. One forward pass."""
    return torch.cat([_update_norms(group) for group in g.groups()])


def _update_norms(g: Function) -> BySite:
    """‖δz_l‖ of prompts that go through the model together."""
    lens = g.lens
    real = g.rows.real[..., None]
    home = float64_device(lens.device)
    squares = torch.zeros(g.rows.batch, len(lens.sites), dtype=torch.float64, device=home)

    def add_square(index: int, out: Tensor, z: Tensor) -> None:
        """Sum δ² of each row and site; the output stays as it is."""
        del out
        injection = lens.injections[index]
        if injection.partner is not None:
            # Its partner's gate also multiplies this update, and is zero at the base model.
            return
        delta = in_float64(injection.map(z))
        # The unembedding is run at the read position alone, where there is no padding.
        if delta.shape[1] == real.shape[1]:
            delta = delta * real.to(delta.device)
        sums = delta.square().flatten(1).sum(1) / injection.ports.repeats
        squares[:, injection.site] += sums.to(home)

    g.passes.observe(add_square)
    return g.reading.by_prompt(squares).sqrt()
