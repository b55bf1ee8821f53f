"""Which sites first: orders in which to switch them on, and the foils that they have to beat.

1. Scores (attributions, effects, tensors) → an order per prompt, the largest first; equal scores
   keep the sites' order.
2. Baselines know no readout: ‖ΔW_l‖_F, from the factors, and ‖δz_l‖ at the base model, recorded in
   one forward pass.
3. The greedy oracle: from g(0), add at each step the site that moves the readout furthest towards
   g(1), by running every one of those left.
4. Foils know a part of what first order knows, and are to be beaten before it is believed:

       sign(a_l) · ‖ΔW_l‖_F       the sign of first order, and the size of the weight change
       s ‖δz_l‖ · ‖Jᵀu_y‖         both norms of a_l, without the cosine between them
       sign(a_l) · noise          the sign alone: sizes drawn at random

   with s the sign of the prompt's shift, so that the first pushes the way the adapter went.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora.analyses.first_order import first_order_of, squared_norms
from lens_lora.arguments import whole
from lens_lora.compat import float64_device, in_float64
from lens_lora.engine.asked import Asked, ask
from lens_lora.engine.function import gated_readout
from lens_lora.engine.read import read_logits
from lens_lora.errors import ArgumentError
from lens_lora.model.hooks import alone
from lens_lora.model.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results import base as keys
from lens_lora.results.attribution import Attribution
from lens_lora.results.effects import Effects

Scores = Attribution | Effects | Float[Tensor, "*batch site"]
MOST_GREEDY = 40  # sites: 820 forward passes a prompt


def named(attribution: Scores | Mapping[str, Scores]) -> dict[str, Scores]:
    """{name: score}; a single attribution or effect goes by its key, a tensor by 'given'.

    Raises:
        ArgumentError: a name that a baseline has, or nothing to rank by.
    """
    if isinstance(attribution, Attribution | Effects):
        return {attribution.key: attribution}
    if isinstance(attribution, Tensor):
        return {"given": attribution}
    if not isinstance(attribution, Mapping):
        raise ArgumentError(
            f"{attribution!r} ranks nothing; pass an Attribution, Effects, a tensor [site], or "
            "{name: one of these}."
        )
    taken = {keys.WEIGHT_NORM, keys.UPDATE_NORM, keys.RANDOM, keys.GREEDY} & set(attribution)
    if taken or not attribution:
        raise ArgumentError(
            f"{sorted(taken)} are names of baselines; give the scores others."
            if taken
            else "no attribution to rank by; pass one, or {name: attribution}."
        )
    return dict(attribution)


def scores_towards(
    asked: Asked, given: Mapping[str, Scores], *, baselines: bool
) -> dict[str, Float[Tensor, "batch site"]]:
    """Each score · sign(shift), so that the largest pushes furthest the way the adapter moved g.

    Raises:
        ArgumentError: scores of something else.
    """
    base, adapted = asked.ends
    towards = (adapted - base).sign()[:, None].to(float64_device(asked.lens.device))
    scores = {name: _values_of(name, score, asked) * towards for name, score in given.items()}
    if baselines:
        scores[keys.WEIGHT_NORM] = weight_norms(asked.lens).expand(asked.reading.batch, -1)
        scores[keys.UPDATE_NORM] = update_norms(asked)
    return scores


def _values_of(name: str, score: Scores, asked: Asked) -> Float[Tensor, "batch site"]:
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
        raise ArgumentError(
            f"{name}: scores {tuple(score.shape)}; expected [{sites}], or [{batch}, {sites}], one "
            "per site in the order of lens.sites."
        )
    if not torch.isfinite(score).all():
        raise ArgumentError(f"{name}: scores are not all finite, so they rank nothing.")
    return in_float64(score.detach().to(asked.lens.device)).expand(batch, sites)


def _require_of(name: str, score: Attribution, asked: Asked) -> None:
    texts = [["".join(tokens) for tokens in result.str_tokens] for result in (score, asked)]
    facts = {
        "sites": ([s.name for s in score.sites], [s.name for s in asked.lens.sites]),
        "prompts": texts,
        "readout": (score.readout, asked.readout.label),
    }
    for fact, (theirs, ours) in facts.items():
        if theirs != ours:
            shown = [x if isinstance(x, str) else f"{len(x)} {x[:2]}" for x in (theirs, ours)]
            raise ArgumentError(
                f"{name} has other {fact} than what is run: {shown[0]} and {shown[1]}. To rank by "
                "it on purpose pass its numbers, attribution.per_site."
            )


def by_score(scores: Float[Tensor, "*batch site"]) -> Int[Tensor, "*batch site"]:
    """Indices of each prompt's sites, the largest score first; equal scores keep their order."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def switched_on(
    order: Int[Tensor, "batch site"], counts: tuple[int, ...]
) -> Float[Tensor, "batch count site"]:
    """Gates with the first `count` sites of the order at 1 and the others at 0."""
    rank = order.argsort(-1)[:, None]
    return (rank < torch.tensor(counts, device=order.device)[:, None]).float()


def random_orders(sites: int, batch: int, draws: int, seed: int) -> Int[Tensor, "draw batch site"]:
    """A random order for each draw and prompt, the same on every device."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.rand(draws, batch, sites, generator=generator, dtype=torch.float64)
    return noise.argsort(-1)


def weight_norms(lens: LoraLens) -> Float[Tensor, " site"]:
    """‖ΔW_l‖_F in the model's basis, biases left out; of a norm ‖Δγ‖. No forward pass."""
    norms = [site_map.norm() for site_map in lens.maps]
    return torch.tensor(norms, dtype=torch.float64, device=float64_device(lens.device))


def update_norms(asked: Asked) -> Float[Tensor, "batch site"]:
    """‖δz_l‖ at the base model over a prompt's real positions. One forward pass."""
    lens, reading = asked.lens, asked.reading
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
        read_logits(lens, reading.prompts)
    return reading.by_prompt(squares).sqrt()


def refuse_greedy(sites: int) -> None:
    """Check that the greedy oracle, S(S+1)/2 forward passes a prompt, is affordable.

    Raises:
        ArgumentError: more than `MOST_GREEDY` sites; names the cost.
    """
    if sites > MOST_GREEDY:
        raise ArgumentError(
            f"greedy on {sites} sites takes {sites * (sites + 1) // 2} forward passes a prompt; it "
            f"is for at most {MOST_GREEDY}. Make a lens of fewer modules: "
            "LoraLens(model, adapter.only(attribution.top(20)))."
        )


def greedy_order(asked: Asked, *, progress: bool) -> Int[Tensor, "batch site"]:
    """Each prompt's greedy order. S(S+1)/2 forward passes, batched."""
    lens, reading = asked.lens, asked.reading
    base, adapted = asked.ends
    towards = (adapted - base).sign()
    batch, sites = reading.batch, len(lens.sites)
    rows = torch.arange(batch, device=lens.device)
    on = torch.zeros(batch, sites, dtype=lens.gate_dtype, device=lens.device)
    order: list[Tensor] = []
    with tqdm(range(sites, 0, -1), desc="greedy", leave=False, disable=not progress) as bar:
        for left in bar:
            free = (on == 0).nonzero()[:, 1].view(batch, left)
            tried = on[:, None].expand(batch, left, sites).scatter(2, free[..., None], 1.0)
            values = gated_readout(lens, reading, tried, progress=False, what="greedy")
            best = free[rows, (values * towards[:, None]).argmax(1)]
            on[rows, best] = 1.0
            order.append(best)
    return torch.stack(order, 1)


@alone
def foils(
    lens: LoraLens, prompts: PromptsLike, readout: Readout, *, seed: int = 0
) -> dict[str, Attribution]:
    """Scores of equal information beside first order at the base model, by their keys.

    For `compare` and `faithfulness`: a method that a foil ties with has not been shown to know
    more. Their numbers are in no unit that can be summed.

    Cost: two forward passes and two forward and backward passes.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        seed: the seed of the random sizes.

    Returns:
        'signed_weight_norm', 'norm_product' and 'signed_random', each with values [batch, site].

    Raises:
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    asked = ask(lens, prompts, readout).require_slope_at_base()
    first = first_order_of(asked)
    signs = first.per_site.sign()
    generator = torch.Generator(device="cpu").manual_seed(whole("seed", seed, 0))
    noise = torch.rand(signs.shape, generator=generator, dtype=torch.float64)
    squares, by_prompt = squared_norms(asked), asked.reading.by_prompt
    delta, gradient = (by_prompt(squares[name]).sqrt() for name in ("delta", "gradient"))
    scores = {
        keys.SIGNED_WEIGHT_NORM: signs * weight_norms(asked.lens).to(signs),
        keys.NORM_PRODUCT: first.shift.sign()[:, None].to(signs) * delta * gradient,
        keys.SIGNED_RANDOM: signs * noise.to(signs),
    }
    return {
        key: dataclasses.replace(first, values=values.to(signs), method=key, mode="")
        for key, values in scores.items()
    }
