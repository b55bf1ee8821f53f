"""Which few modules carry the shift? Keep or drop the top k of a ranking, by real interventions.

1. Rank each prompt's sites by value · sign(shift), the largest first: what pushes the readout the
   way in which the adapter moved it. Norms (‖ΔW‖, ‖δz‖) are ranked as they are.
2. With T_k the first k sites and e_T the gates that are 1 on T and 0 elsewhere,

       keep(k) = (g(e_T) − g(0)) / (g(1) − g(0)),   drop(k) = (g(1 − e_T) − g(0)) / (g(1) − g(0)).

   keep runs from 0 to 1 and drop from 1 to 0, not always between: keeping half can overshoot.
3. The area under each curve by the trapezoid rule over the fraction of sites: a good ranking has a
   high one of keep and a low one of drop.
4. With `test` the sites are ranked once, by the mean over the prompts of value · sign(shift), and
   that order is judged on the test prompts. A ranking that is judged on the prompts that it was
   made on knows more of them than an explanation can.
5. On test prompts also CPR = ∫ f dk, ranked by signed score (higher is better), and
   CMD = ∫ |1 − f| dk, ranked by magnitude (lower is better), by the trapezoid rule over MIB's ten
   sizes, in linear k. f is a ratio of means over the prompts judged,

       f(k) = mean s(g(e_T) − g(0)) / mean s(g(1) − g(0)),   T the first int(k·S) sites,

   0 for no site, and s the sign of the prompt's shift. MIB has no s: its readouts all move one way.
   Without it, shifts of two signs would cancel.

6. The greedy oracle: from g(0), add at each step the site that moves the readout furthest towards
   g(1), by running every one of those left.

Source of 5: Mueller et al., "MIB: A Mechanistic Interpretability Benchmark" (arXiv 2504.13151).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import number, numbers_of, whole, word
from lens_lora.core import (
    Drawn,
    LoraLens,
    Measured,
    PromptsLike,
    Readout,
    alone,
    long_table,
    only_prompt,
    site_labels,
)
from lens_lora.core.function.asked import Asked, ask
from lens_lora.core.function.forward import gated_readout
from lens_lora.core.results import base as results_base
from lens_lora.core.results.base import header
from lens_lora.errors import ArgumentError
from lens_lora.judging import rankings

_FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MOST_GREEDY = 40  # sites: 820 forward passes a prompt
RANDOM_DRAWS = 5  # random orders: their mean is a curve as smooth as the others
_SHOWN, _CARRIED = 0.2, 0.9  # what a summary says: the share a fifth keeps, and what carries 90 %


@final
class Faithfulness(Measured, Drawn):
    """Share of the shift that remains where the top of a ranking is kept, or dropped.

    `plot` is both curves, one colour a ranking.

    Attributes:
        names: the rankings' keys: 'first_order@0', 'path', 'weight_norm', 'random', …, or names
            that the caller gave.
        fractions: shares of the sites, from 0 to 1.
        counts: how many sites each fraction is.
        keep, drop: [method, batch, fraction], shares of the prompt's shift; NaN for a prompt whose
            shift is within three noise floors.
        orders: name → [batch, site], indices into sites, first ranked first; 'random' has none.
        noise_floor: [batch], σ of the shift from rounding.
        draws: random orders that the random curve is the mean of.
        cpr, cmd: [method], of the test prompts together; None without `test`.
        ranked_on: the tokens of the prompts that the sites were ranked on, where others are judged.
        sites, base, adapted, str_tokens, readout, units, meta: as in `Measured`.
    """

    names: Annotated[tuple[str, ...], "method"]
    fractions: Float[Tensor, " fraction"]
    counts: Annotated[tuple[int, ...], "fraction"]
    keep: Float[Tensor, "method batch fraction"]
    drop: Float[Tensor, "method batch fraction"]
    orders: Mapping[str, Int[Tensor, "batch site"]]
    noise_floor: Float[Tensor, " batch"]
    draws: int
    cpr: Float[Tensor, " method"] | None = None
    cmd: Float[Tensor, " method"] | None = None
    ranked_on: tuple[tuple[str, ...], ...] = ()

    @property
    def area_keep(self) -> Float[Tensor, "method batch"]:
        """Area under the keep curve: higher is better."""
        return torch.trapezoid(self.keep, self.fractions, dim=-1)

    @property
    def area_drop(self) -> Float[Tensor, "method batch"]:
        """Area under the drop curve: lower is better."""
        return torch.trapezoid(self.drop, self.fractions, dim=-1)

    def kept_share(self, name: str, fraction: float = _SHOWN) -> Float[Tensor, " batch"]:
        """Share of the shift that the top `fraction` of the sites keeps, at the nearest one run.

        Args:
            name: the ranking's key.
            fraction: the share of the sites.

        Raises:
            ArgumentError: no such ranking, or a fraction outside 0 to 1.
        """
        return self.keep[self._index(name), :, self._nearest(fraction)]

    def carrying(self, name: str, share: float = _CARRIED) -> Float[Tensor, " batch"]:
        """The smallest fraction run that keeps at least `share` of the shift; NaN for none.

        Args:
            name: the ranking's key.
            share: the share of the shift.

        Raises:
            ArgumentError: no such ranking.
        """
        enough = self.keep[self._index(name)] >= number("share", share)
        first = self.fractions[enough.int().argmax(-1)]
        return torch.where(enough.any(-1), first, torch.full_like(first, float("nan")))

    def kept(self, name: str, fraction: float = _SHOWN, prompt: int | None = None) -> pd.DataFrame:
        """The top sites of one prompt, in order, as `adapter.only` takes them: site and module.

        Args:
            name: the ranking's key.
            fraction: the share of the sites, at the nearest one run.
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such ranking, or random, which is the mean of many; no such prompt,
                or several and none named.
        """
        if self._index(name) == len(self.orders):
            raise ArgumentError(f"{name!r} is the mean of {self.draws} orders; it has no top.")
        index = only_prompt(prompt, len(self.base), "rankings")
        count = self.counts[self._nearest(fraction)]
        top = [self.sites[i] for i in self.orders[name][index, :count].tolist()]
        return pd.DataFrame(site_labels(top), columns=["site", "module"])

    def to_frame(self) -> pd.DataFrame:
        """One row per ranking, prompt and fraction: count, shares kept and left."""
        prompts = {"prompt": range(len(self.base))}
        points = {"fraction": self.fractions.tolist(), "count": self.counts}
        numbers = {"keep": self.keep, "drop": self.drop}
        return long_table(numbers, {"method": self.names}, prompts, points)

    def summary(self) -> pd.DataFrame:
        """One row per ranking: areas, the share a fifth keeps, the fraction that carries 90 %.

        Means over prompts; of the last, over those where some fraction does. With `test` also CPR
        and CMD.
        """
        shown = float(self.fractions[self._nearest(_SHOWN)])
        held_out = {"cpr": self.cpr, "cmd": self.cmd}
        return pd.DataFrame(
            {
                "area_keep": self.area_keep.nanmean(1).tolist(),
                "area_drop": self.area_drop.nanmean(1).tolist(),
                f"keep_top_{shown:.0%}": [float(self.kept_share(n).nanmean()) for n in self.names],
                f"carries_{_CARRIED:.0%}": [float(self.carrying(n).nanmean()) for n in self.names],
                **{name: x.tolist() for name, x in held_out.items() if x is not None},
            },
            index=pd.Index(self.names, name="method"),
        )

    def _index(self, name: str) -> int:
        return self.names.index(word("ranking", name, self.names))

    def _nearest(self, fraction: float) -> int:
        if not 0 <= number("fraction", fraction) <= 1:
            raise ArgumentError(f"fraction {fraction}: expected a number from 0 to 1.")
        return int((self.fractions - fraction).abs().argmin())


@alone
def faithfulness(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    attribution: rankings.Scores | Mapping[str, rankings.Scores],
    *,
    test: tuple[PromptsLike, Readout] | None = None,
    fractions: Sequence[float] | None = None,
    baselines: bool = True,
    greedy: bool = False,
    draws: int = RANDOM_DRAWS,
    seed: int = 0,
    progress: bool = True,
) -> Faithfulness:
    """Keep-top-k and drop-top-k curves of rankings of the sites, each point a real intervention.

    Cost: 2 forward passes per ranking (`draws` of them for random) and fraction between 0 and 1,
    batched; 13 for the ends, the noise and ‖δz‖; S(S+1)/2 for the greedy oracle. With `test`, 2
    more per ranking and size of MIB's, and 2 for the ends of the prompts that are ranked on.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        attribution: of these prompts and this readout, effects of single sites, or a tensor of
            contributions in the readout's units ([site], or [batch, site]); or {name: any of
            these}. A score without a sign is ranked rightly once multiplied by the shift's.
        test: other prompts and their readout, on which the ranking is judged: held out, so that the
            curves say what it is worth beyond the prompts that it was made on.
        fractions: of the sites, above 0 at least one; 0, one site, and 1 are always there.
        baselines: also rank by ‖ΔW‖, by ‖δz‖ at the base model, and at random.
        greedy: also add at each step the site that moves the readout furthest towards g(1).
        draws: random orders whose mean is the random curve.
        seed: the seed of the random orders.
        progress: show a bar.

    Raises:
        ArgumentError: scores of something else; fractions outside 0 to 1; greedy on many sites, or
            with `test`; a `test` that is no pair.
        NumericsError: a non-finite readout.
    """
    asked, judged = ask(lens, prompts, readout), None
    if test is not None:
        if not isinstance(test, tuple) or len(test) != 2:
            raise ArgumentError("test: expected (prompts, readout), the pair that is held out.")
        judged = ask(lens, *test)
    sites, judge = len(asked.lens.sites), judged or asked
    counts = counts_of(_FRACTIONS if fractions is None else fractions, sites)
    draws, seed = whole("draws", draws, 1) if baselines else 0, whole("seed", seed, 0)
    given = rankings.named(attribution)
    if greedy:
        _require_few(sites, judged)
    scores = rankings.scores_towards(asked, given, baselines)
    if judged is not None:
        batch = judged.reading.batch
        scores = {name: score.mean(0).expand(batch, -1) for name, score in scores.items()}
    orders = {name: rankings.by_score(score) for name, score in scores.items()}
    if greedy:
        orders[results_base.GREEDY] = _greedy_order(asked, progress=progress)
    curves = curves_of(judge, orders, counts, draws, seed, progress)
    if judged is None:
        return curves
    by_size = {name: rankings.by_score(score.abs()) for name, score in scores.items()}
    both = (_with_random(ranked, draws, seed) for ranked in (orders, by_size))
    marks = scored(judged, *both, progress=progress)
    cpr, cmd = (_mean_of_draws(mark, len(orders)) for mark in (marks.cpr, marks.cmd))
    return dataclasses.replace(curves, cpr=cpr, cmd=cmd, ranked_on=asked.str_tokens)


Orders = Int[Tensor, "order batch site"]
Counts = tuple[int, ...]  # of sites, increasing
_Named = Mapping[str, Int[Tensor, "batch site"]]


def curves_of(
    asked: Asked, orders: _Named, counts: Counts, draws: int, seed: int, progress: bool
) -> Faithfulness:
    """The curves of these orders, and the mean of those of random ones."""
    base, adapted = asked.ends.cpu().double()
    floor, shift = asked.noise_floor.cpu().double(), adapted - base
    clear = torch.where(shift.abs() > results_base.SIGMAS * floor, shift, torch.nan)
    moved = _moved_by(asked, _with_random(orders, draws, seed), counts, progress)
    keep, drop = (_mean_of_draws(curves, len(orders)) for curves in moved / clear[:, None])
    labels: dict[str, Any] = {**header(asked), "base": base, "adapted": adapted}
    return Faithfulness(
        names=(*orders, results_base.RANDOM) if draws else tuple(orders),
        fractions=torch.tensor(counts, dtype=torch.float64) / len(asked.lens.sites),
        counts=counts,
        keep=keep,
        drop=drop,
        orders={name: order.cpu() for name, order in orders.items()},
        noise_floor=floor,
        draws=draws,
        **labels,
    )


def _with_random(orders: _Named, draws: int, seed: int) -> Orders:
    """The named orders, and the random ones after them."""
    named = torch.stack(list(orders.values()))
    batch, sites = named.shape[1:]
    return torch.cat([named, random_orders(sites, batch, draws, seed).to(named.device)])


def counts_of(fractions: Sequence[float], sites: int) -> Counts:
    """How many sites each fraction is, without repeats: 0, 1 and all of them among them."""
    fractions = numbers_of("fractions", fractions)
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise ArgumentError(f"fraction {fraction:g}: expected numbers from 0 to 1.")
    return tuple(sorted({0, 1, sites, *(max(1, round(f * sites)) for f in fractions if f)}))


def _moved_by(asked: Asked, orders: Orders, counts: Counts, progress: bool) -> Tensor:
    """g − g(0) where the top is kept, and where it is dropped, [side, method, batch, count]."""
    base, adapted = asked.ends.cpu().double()
    inner = counts[1:-1]
    moved = base.new_zeros(2, len(base), len(orders), len(counts))
    moved[0, ..., -1] = moved[1, ..., 0] = (adapted - base)[:, None]
    if inner:
        on = torch.stack([_switched_on(order, inner) for order in orders])
        gates = torch.stack([on, 1 - on]).movedim(2, 0)  # batch, side, method, count, site
        flat_gates, what = gates.flatten(1, 3), "keep and drop"
        values = gated_readout(asked.lens, asked.reading, flat_gates, progress=progress, what=what)
        change = values.cpu().double().view(gates.shape[:-1]) - base[:, None, None, None]
        moved[..., 1:-1] = change.movedim(1, 0)
    return moved.movedim(1, 2)


def _mean_of_draws(curves: Tensor, named: int) -> Float[Tensor, " method *rest"]:
    """The named orders' curves, and the mean of the random ones after them."""
    if len(curves) == named:
        return curves
    return torch.cat([curves[:named], curves[named:].mean(0, keepdim=True)])


# --- CPR and CMD of prompts held out


MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Scored(NamedTuple):
    """Of each order: CPR of the signed one, CMD of that by magnitude, and f of the signed one."""

    cpr: Float[Tensor, " order"]
    cmd: Float[Tensor, " order"]
    kept: Float[Tensor, "order size"]


def scored(asked: Asked, signed: Orders, by_magnitude: Orders, *, progress: bool) -> Scored:
    """CPR and CMD of orders of the sites, on the prompts asked about.

    Cost: 2 forward passes per order and size between no site and all, batched; orders that agree on
    their first sites share the pass.

    NaN where the mean of |shift| is within three mean noise floors.
    """
    sites = signed.shape[-1]
    counts = [int(size * sites) for size in MIB_SIZES]
    inner = tuple(sorted({count for count in counts if 0 < count < sites}))
    base, adapted = asked.ends.cpu().double()
    size, noise = (adapted - base).abs().mean(), asked.noise_floor.cpu().double().mean()
    moved = _mean_moved(asked, torch.cat([signed, by_magnitude]), inner, progress)
    nothing = moved.new_zeros(len(moved), 1)
    known = torch.cat([nothing, moved / size, nothing + 1], 1)
    every = (0, *inner, sites)
    shares = known[:, [every.index(count) for count in counts]]
    if size <= results_base.SIGMAS * noise:
        shares = torch.full_like(shares, float("nan"))
    sizes = torch.tensor(MIB_SIZES, dtype=torch.float64)
    kept, matched = shares.split([len(signed), len(by_magnitude)])
    cmd = torch.trapezoid((1 - matched).abs(), sizes)
    return Scored(torch.trapezoid(kept, sizes), cmd, kept)


def _mean_moved(asked: Asked, orders: Orders, counts: Counts, progress: bool) -> Tensor:
    """[order, count], the mean over prompts of g(e_T) − g(0) in the direction of their shifts."""
    if not counts:
        return torch.zeros(len(orders), 0, dtype=torch.float64)
    on = torch.stack([_switched_on(order, counts) for order in orders], 1).flatten(1, 2)
    values = _of_distinct(asked, on, progress).cpu().double()
    base, adapted = asked.ends.cpu().double()[..., None]
    moved = (values - base) * (adapted - base).sign()
    return moved.mean(0).view(len(orders), len(counts))


def _of_distinct(asked: Asked, gates: Tensor, progress: bool) -> Float[Tensor, "batch point"]:
    """g at gates [batch, point, site]; where all prompts have the same ones, each is run once."""
    lens, reading, what = asked.lens, asked.reading, "CPR and CMD"
    if not bool((gates == gates[:1]).all()):
        return gated_readout(lens, reading, gates, progress=progress, what=what)
    distinct, index = torch.unique(gates[0], dim=0, return_inverse=True)
    return gated_readout(lens, reading, distinct, progress=progress, what=what)[:, index]


def random_orders(sites: int, batch: int, draws: int, seed: int) -> Int[Tensor, "draw batch site"]:
    """A random order for each draw and prompt, the same on every device."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.rand(draws, batch, sites, generator=generator, dtype=torch.float64)
    return noise.argsort(-1)


def _switched_on(order: Int[Tensor, "batch site"], counts: Counts) -> Tensor:
    """[batch, count, site], gates with the first `count` sites of the order at 1, others at 0."""
    rank = order.argsort(-1)[:, None]
    return (rank < torch.tensor(counts, device=order.device)[:, None]).float()


# --- The greedy oracle


def _require_few(sites: int, judged: Asked | None) -> None:
    """Check that the greedy oracle, S(S+1)/2 forward passes a prompt, is affordable."""
    if judged is not None:
        raise ArgumentError("greedy ranks each prompt's own sites: leave it out with test.")
    if sites > MOST_GREEDY:
        raise ArgumentError(
            f"greedy on {sites} sites takes {sites * (sites + 1) // 2} passes a prompt; at most "
            f"{MOST_GREEDY} are run: LoraLens(model, adapter.only(attribution.top(20)))."
        )


def _greedy_order(asked: Asked, *, progress: bool) -> Int[Tensor, "batch site"]:
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
