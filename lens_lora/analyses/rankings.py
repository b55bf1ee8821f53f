"""Orders in which to switch sites on.

1. Scores (attributions, effects, tensors) → an order per prompt, the largest first; equal scores
   keep the sites' order.
2. Scores that know no readout: ‖ΔW_l‖_F, from the factors, and ‖δz_l‖ at the base model, recorded
   in one forward pass.
3. The greedy oracle: from g(0), add at each step the site that moves the readout furthest towards
   g(1), by running every one of those left.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora.engine.asked import Asked
from lens_lora.engine.function import readout_at
from lens_lora.engine.read import read_logits
from lens_lora.errors import ArgumentError
from lens_lora.float64 import float64_device, in_float64
from lens_lora.lens import LoraLens
from lens_lora.readouts.rows import Reading
from lens_lora.results.attribution import Attribution
from lens_lora.results.effects import Effects
from lens_lora.results.keys import GREEDY, RANDOM, UPDATE_NORM, WEIGHT_NORM

__all__ = [
    "MOST_GREEDY",
    "Orders",
    "Scores",
    "by_score",
    "greedy_order",
    "named",
    "orders_for",
    "orders_of",
    "random_orders",
    "refuse_greedy",
    "scores_towards",
    "switched_on",
    "update_norms",
    "values_of",
    "weight_norms",
]

Orders = dict[str, Int[Tensor, "batch site"]]
Scores = Attribution | Effects | Float[Tensor, "*batch site"]
MOST_GREEDY = 40


def named(attribution: Scores | Mapping[str, Scores]) -> dict[str, Scores]:
    """{name: score}; a single attribution or effect goes by its key, a tensor by 'given'.

    Args:
        attribution: one score, or {name: score}.

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
    taken = {WEIGHT_NORM, UPDATE_NORM, RANDOM, GREEDY} & set(attribution)
    if taken or not attribution:
        raise ArgumentError(
            f"{sorted(taken)} are names of baselines; give the scores others."
            if taken
            else "no attribution to rank by; pass one, or {name: attribution}."
        )
    return dict(attribution)


def orders_of(
    asked: Asked,
    given: Mapping[str, Scores],
    *,
    baselines: bool,
    greedy: bool,
    progress: bool,
) -> Orders:
    """Each ranking's order of every prompt's sites; random ones are apart (`random_orders`).

    Scores rank by value · sign(shift), norms as they are.

    Args:
        asked: of what.
        given: the scores by name.
        baselines: also ‖ΔW‖ and ‖δz‖; the latter takes a forward pass.
        greedy: also the greedy oracle.
        progress: show a bar.

    Raises:
        ArgumentError: scores of something else; greedy on too many sites.
    """
    if greedy:
        refuse_greedy(len(asked.lens.sites))
    scores = scores_towards(asked, given, baselines=baselines)
    orders = {name: by_score(score) for name, score in scores.items()}
    if greedy:
        orders[GREEDY] = greedy_order(asked, progress=progress)
    return orders


def scores_towards(
    asked: Asked, given: Mapping[str, Scores], *, baselines: bool
) -> dict[str, Float[Tensor, "batch site"]]:
    """Each score · sign(shift), so that the largest pushes furthest the way the adapter moved g.

    Args:
        asked: of what.
        given: the scores by name.
        baselines: also ‖ΔW‖ and ‖δz‖, as they are; the latter takes a forward pass.

    Raises:
        ArgumentError: scores of something else.
    """
    base, adapted = asked.ends
    towards = (adapted - base).sign()[:, None].to(float64_device(asked.lens.device))
    scores = {name: values_of(name, score, asked) * towards for name, score in given.items()}
    if baselines:
        scores[WEIGHT_NORM] = weight_norms(asked.lens).expand(asked.reading.batch, -1)
        scores[UPDATE_NORM] = update_norms(asked)
    return scores


def orders_for(
    judged: Asked, asked: Asked, given: Mapping[str, Scores], *, baselines: bool
) -> tuple[Orders, Orders]:
    """One order for all prompts judged, by the mean score of those asked: signed, by magnitude.

    Args:
        judged: the prompts that it is for.
        asked, given, baselines: as for `scores_towards`.
    """
    scores = scores_towards(asked, given, baselines=baselines)
    means = {name: score.mean(0).expand(judged.reading.batch, -1) for name, score in scores.items()}
    return (
        {name: by_score(mean) for name, mean in means.items()},
        {name: by_score(mean.abs()) for name, mean in means.items()},
    )


def values_of(name: str, score: Scores, asked: Asked) -> Float[Tensor, "batch site"]:
    """The score as one number per prompt and site.

    Args:
        name: of the score, for errors.
        score: to rank by.
        asked: what it must be of.

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
    rows = (score.str_tokens, asked.str_tokens)
    theirs, ours = (["".join(tokens) for tokens in some] for some in rows)
    facts = {
        "sites": ([s.name for s in score.sites], [s.name for s in asked.lens.sites]),
        "prompts": (theirs, ours),
        "readout": (score.readout, asked.readout.label),
    }
    for what, (theirs, ours) in facts.items():
        if theirs != ours:
            theirs, ours = (
                x if isinstance(x, str) else f"{len(x)} {x[:2]}" for x in (theirs, ours)
            )
            raise ArgumentError(
                f"{name} has other {what} than what is run: {theirs} and {ours}. To rank by it on "
                "purpose pass its numbers, attribution.per_site."
            )


def by_score(scores: Float[Tensor, "*batch site"]) -> Int[Tensor, "*batch site"]:
    """Indices of each prompt's sites, the largest score first; equal scores keep their order.

    Args:
        scores: one per site, of each prompt or of all at once.
    """
    return scores.argsort(dim=-1, descending=True, stable=True)


def switched_on(
    order: Int[Tensor, "batch site"], counts: tuple[int, ...]
) -> Float[Tensor, "batch count site"]:
    """Gates with the first `count` sites of the order at 1 and the others at 0.

    Args:
        order: indices of each prompt's sites, the first to be switched on first.
        counts: how many are on, for each set of gates.
    """
    rank = order.argsort(-1)[:, None]
    return (rank < torch.tensor(counts, device=order.device)[:, None]).float()


def random_orders(sites: int, batch: int, draws: int, seed: int) -> Int[Tensor, "draw batch site"]:
    """A random order for each draw and prompt, the same on every device.

    Args:
        sites, batch, draws: how many there are.
        seed: of the random numbers.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.rand(draws, batch, sites, generator=generator, dtype=torch.float64)
    return noise.argsort(-1)


def weight_norms(lens: LoraLens) -> Float[Tensor, "site"]:
    """‖ΔW_l‖_F in the model's basis, biases left out; of a norm ‖Δγ‖. No forward pass.

    Args:
        lens: the adapter over the model.
    """
    norms = [site_map.norm() for site_map in lens.maps]
    return torch.tensor(norms, dtype=torch.float64, device=float64_device(lens.device))


def update_norms(asked: Asked) -> Float[Tensor, "batch site"]:
    """‖δz_l‖ at the base model over a prompt's real positions. One forward pass.

    Args:
        asked: the lens and the rows that are run.
    """
    recorder = _NormRecorder(asked.lens, asked.reading)
    with torch.no_grad(), asked.lens.injected(recorder):
        read_logits(asked.lens, asked.reading.prompts)
    return asked.reading.by_prompt(recorder.squares).sqrt()


class _NormRecorder:
    """Adds nothing; keeps Σ δ² of each row and site."""

    def __init__(self, lens: LoraLens, reading: Reading) -> None:
        self._injections = lens.plan.injections
        self._real = reading.prompts.real[..., None]
        shape = (len(reading.owner), len(lens.sites))
        home = float64_device(lens.device)
        self.squares = torch.zeros(shape, dtype=torch.float64, device=home)

    def __call__(self, index: int, out: Tensor, z: Tensor) -> None:
        del out
        injection = self._injections[index]
        if injection.partner is not None:  # its gate is zero at the base model
            return
        delta = in_float64(injection.map(z))
        if delta.shape[1] == self._real.shape[1]:  # the unembedding is run at the read position
            delta = delta * self._real.to(delta.device)
        squares = delta.square().flatten(1).sum(1) / injection.ports.repeats
        self.squares[:, injection.site] += squares.to(self.squares.device)


def refuse_greedy(sites: int) -> None:
    """Check that the greedy oracle, S(S+1)/2 forward passes a prompt, is affordable.

    Args:
        sites: their number S.

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
    """Each prompt's greedy order. S(S+1)/2 forward passes, batched.

    Args:
        asked: of what.
        progress: show a bar.
    """
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
            values = readout_at(lens, reading, tried, progress=False, what="greedy")
            best = free[rows, (values * towards[:, None]).argmax(1)]
            on[rows, best] = 1.0
            order.append(best)
    return torch.stack(order, 1)
