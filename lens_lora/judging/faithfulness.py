"""Curves of the shift that remains where the top k of a ranking are kept, or dropped.

1. Rank each prompt's sites by value · sign(shift), the largest first: what pushes the readout the
   way the adapter moved it comes first. Norms (‖ΔW‖, ‖δz‖) are ranked as they are.
2. With T_k the first k sites and e_T the gates that are 1 on T and 0 elsewhere,

       keep(k) = (g(e_T) − g(0)) / (g(1) − g(0)),   drop(k) = (g(1 − e_T) − g(0)) / (g(1) − g(0)).

   keep runs from 0 to 1 and drop from 1 to 0. Between the two they may leave this range, as keeping
   half of the sites can overshoot.
3. The area under each curve is taken by the trapezoid rule over the fraction of sites. A good
   ranking has a large area under keep and a small one under drop.
4. With `test` the sites are ranked once, by the mean over the prompts of value · sign(shift), and
   that order is judged on the test prompts, by curves as well as by CPR and CMD
   (`circuit_scores.py`). On the prompts that it was made on, a ranking may do well by
   what is peculiar to them.
5. The greedy oracle begins at g(0). At each step it adds the site that moves the readout furthest
   towards g(1), and runs every site that is left to find it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import number, numbers_of, whole, word
from lens_lora.core import (
    SIGMAS,
    Drawn,
    Evaluations,
    Function,
    Measured,
    PromptsLike,
    Readout,
    Sites,
    analysis,
    tables,
)
from lens_lora.errors import ArgumentError
from lens_lora.judging import rankings
from lens_lora.judging.circuit_scores import Orders, mean_of_draws, random_orders, scored, top_gates

_FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# With this number of sites the greedy oracle takes 820 forward passes for each prompt.
MOST_GREEDY = 40
# The mean over this number of random orders is a curve as smooth as the others.
RANDOM_DRAWS = 5
# A summary shows the share of the shift that this fraction of the sites keeps.
_SHOWN = 0.2
# It also shows the smallest fraction of the sites that carries this share of the shift.
_CARRIED = 0.9

# How many sites are kept or dropped, in increasing order.
Counts = tuple[int, ...]
_Named = Mapping[str, Int[Tensor, "batch site"]]


@final
class Faithfulness(Measured, Drawn):
    """Shares of the shift that remain where the top of a ranking is kept, or dropped.

    `plot` is both curves, one colour a ranking.

    Attributes:
        names: the keys of the rankings: 'first_order@0', 'path', 'weight_norm', 'random', …, or
            names that the caller gave.
        fractions: the fractions of the sites at which the curves were measured, from 0 to 1.
        counts: how many sites each fraction is.
        keep, drop: [method, batch, fraction], shares of the prompt's shift; NaN for a prompt whose
            shift is within three noise floors.
        orders: name → [batch, site], indices into sites, the top first; 'random' has none.
        noise_floor: [batch], σ of the shift from rounding.
        draws: the number of random orders whose mean is the random curve.
        cpr, cmd: [method], the scores on the test prompts together; None without `test`.
        ranked_on: the tokens of the prompts that the sites were ranked on, where the curves are
            those of other prompts.
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
        """Share of the shift that the top `fraction` of the sites keeps, at the nearest point run.

        Args:
            name: the ranking's key.
            fraction: the share of the sites.

        Raises:
            ArgumentError: there is no such ranking, or a fraction is outside 0 to 1.
        """
        return self.keep[self._index(name), :, self._nearest(fraction)]

    def carrying(self, name: str, share: float = _CARRIED) -> Float[Tensor, " batch"]:
        """The smallest fraction run that keeps at least `share` of the shift; NaN if none does.

        Args:
            name: the ranking's key.
            share: the share of the shift.

        Raises:
            ArgumentError: there is no such ranking.
        """
        enough = self.keep[self._index(name)] >= number("share", share)
        first = self.fractions[enough.int().argmax(-1)]
        return torch.where(enough.any(-1), first, torch.full_like(first, float("nan")))

    def kept(self, name: str, fraction: float = _SHOWN, prompt: int | None = None) -> pd.DataFrame:
        """The top sites of one prompt, in order, as `adapter.only` takes them: site and module.

        Args:
            name: the ranking's key.
            fraction: the share of the sites; the nearest one that was run is taken.
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such ranking, or random, which is the mean of many; no such prompt,
                or several and none named.
        """
        if self._index(name) == len(self.orders):
            raise ArgumentError(f"{name!r} is the mean of {self.draws} orders; it has no top.")
        index = self.only_prompt(prompt, "rankings")
        count = self.counts[self._nearest(fraction)]
        top = [self.sites[i] for i in self.orders[name][index, :count].tolist()]
        return pd.DataFrame(Sites(top).columns(), columns=["site", "module"])

    def to_frame(self) -> pd.DataFrame:
        """One row per ranking, prompt and fraction: count, shares kept and left."""
        prompts = {"prompt": range(len(self.base))}
        points = {"fraction": self.fractions.tolist(), "count": self.counts}
        numbers = {"keep": self.keep, "drop": self.drop}
        return tables.long_table(numbers, {"method": self.names}, prompts, points)

    def summary(self) -> pd.DataFrame:
        """One row per ranking: areas, the share a fifth keeps, the fraction that carries 90 %.

        The numbers are means over prompts, for the last one over those where some fraction carries
        90 %. With `test` there are also CPR and CMD.
        """
        shown = float(self.fractions[self._nearest(_SHOWN)])
        kept = [float(self.kept_share(name).nanmean()) for name in self.names]
        carrying = [float(self.carrying(name).nanmean()) for name in self.names]
        columns = {
            "area_keep": self.area_keep.nanmean(1).tolist(),
            "area_drop": self.area_drop.nanmean(1).tolist(),
            f"keep_top_{shown:.0%}": kept,
            f"carries_{_CARRIED:.0%}": carrying,
        }
        if self.cpr is not None and self.cmd is not None:
            columns["cpr"] = self.cpr.tolist()
            columns["cmd"] = self.cmd.tolist()
        return pd.DataFrame(columns, index=pd.Index(self.names, name="method"))

    def _index(self, name: str) -> int:
        return self.names.index(word("ranking", name, self.names))

    def _nearest(self, fraction: float) -> int:
        if not 0 <= number("fraction", fraction) <= 1:
            raise ArgumentError(f"fraction {fraction}: expected a number from 0 to 1.")
        return int((self.fractions - fraction).abs().argmin())


@analysis
def faithfulness(
    g: Evaluations,
    attribution: rankings.Scores | Mapping[str, rankings.Scores],
    *,
    test: tuple[PromptsLike, Readout] | None = None,
    fractions: Sequence[float] | None = None,
    baselines: bool = True,
    greedy: bool = False,
    draws: int = RANDOM_DRAWS,
    seed: int = 0,
) -> Faithfulness:
    """Keep-top-k and drop-top-k curves of rankings of the sites, each point a real intervention.

    Cost: 2 forward passes per ranking (`draws` of them for random) and fraction between 0 and 1,
    batched; 11 for the ends, the noise and ‖δz‖; S(S+1)/2 for the greedy oracle. With `test`, 2
    more per ranking and size of MIB's, and 2 for the ends of the prompts that are ranked on.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, the number that is read from the logits.
        attribution: an attribution of these prompts and this readout, effects of single sites, or a
            tensor of contributions in the readout's units ([site], or [batch, site]); or {name: any
            of these}. Multiply a score without a sign by the sign of the shift to rank it rightly.
        test: held-out prompts and their readout, on which the ranking is judged, so that the curves
            say what it is worth beyond the prompts that it was made on.
        fractions: shares of the sites; one above 0 is at least one site. No site, one and all are
            always there.
        baselines: also rank by ‖ΔW‖, by ‖δz‖ at the base model, and at random.
        greedy: also rank by the oracle that at each step adds the site that moves the readout
            furthest towards g(1).
        draws: random orders whose mean is the random curve.
        seed: the seed of the random orders.
        progress: show a bar.

    Raises:
        ArgumentError: scores of other sites, prompts or readout; fractions outside 0 to 1; greedy
            on many sites, or with `test`; a `test` that is no pair.
        NumericsError: a readout is not finite.
    """
    sites = len(g.lens.sites)
    held_out = None if test is None else _held_out(g, test)
    wanted_fractions = _FRACTIONS if fractions is None else fractions
    counts = _counts_of(wanted_fractions, sites)
    draws = whole("draws", draws, 1) if baselines else 0
    seed = whole("seed", seed, 0)
    random = _RandomOrders(draws, seed)
    given = rankings.named(attribution)
    if greedy:
        _require_few(sites, held_out)
    scores = rankings.scores_towards(g, given, baselines=baselines)
    if held_out is not None:
        curves = _curves_held_out(held_out, scores, random, counts)
        return dataclasses.replace(curves, ranked_on=g.str_tokens)
    orders = {name: rankings.by_score(score) for name, score in scores.items()}
    if greedy:
        orders[rankings.GREEDY] = _greedy_order(g)
    return _curves(g, orders, random, counts)


def _held_out(g: Function, test: object) -> Evaluations:
    """The function of the prompts that the ranking is judged on."""
    if not isinstance(test, tuple) or len(test) != 2:
        raise ArgumentError("test: expected (prompts, readout), the pair that is held out.")
    prompts, readout = test
    f = g.lens.function(prompts, progress=g.progress)
    return Evaluations(f.about(Readout.required(readout)))


@dataclasses.dataclass(frozen=True)
class _RandomOrders:
    """Random orders of the sites, which follow the named ones.

    Attributes:
        draws: how many there are; 0 for none.
        seed: the seed of the draws.
    """

    draws: int
    seed: int

    def after(self, named: _Named) -> Orders:
        """The named orders, and the random ones after them."""
        orders = torch.stack(list(named.values()))
        _, batch, sites = orders.shape
        drawn = random_orders(sites, batch, self.draws, self.seed)
        return torch.cat([orders, drawn.to(orders.device)])


def _curves(g: Evaluations, orders: _Named, random: _RandomOrders, counts: Counts) -> Faithfulness:
    """The curves of these orders, and the mean of the curves of random ones."""
    base, adapted = g.ends.cpu().double()
    floor = g.floor.cpu().double()
    shift = adapted - base
    # A share of a shift that is within rounding means nothing.
    is_clear = shift.abs() > SIGMAS * floor
    clear_shift = torch.where(is_clear, shift, torch.nan)
    moved = _moved(g, random.after(orders), counts)
    keep, drop = moved / clear_shift[:, None]
    names = list(orders)
    if random.draws:
        names.append(rankings.RANDOM)
    header = g.header()
    header["base"] = base
    header["adapted"] = adapted
    return Faithfulness(
        names=tuple(names),
        fractions=torch.tensor(counts, dtype=torch.float64) / len(g.lens.sites),
        counts=counts,
        keep=mean_of_draws(keep, len(orders)),
        drop=mean_of_draws(drop, len(orders)),
        orders={name: order.cpu() for name, order in orders.items()},
        noise_floor=floor,
        draws=random.draws,
        **header,
    )


def _curves_held_out(
    held_out: Evaluations,
    scores: Mapping[str, rankings.BySite],
    random: _RandomOrders,
    counts: Counts,
) -> Faithfulness:
    """The curves on held-out prompts of one order for all of them, with CPR and CMD.

    Args:
        held_out: the function of the prompts that the ranking is judged on.
        scores: the scores on other prompts, whose mean over these prompts ranks the sites.
        random: the random orders.
        counts: how many sites are kept or dropped.
    """
    batch = held_out.reading.batch
    signed: dict[str, Tensor] = {}
    by_magnitude: dict[str, Tensor] = {}
    for name, score in scores.items():
        mean = score.mean(0).expand(batch, -1)
        signed[name] = rankings.by_score(mean)
        by_magnitude[name] = rankings.by_score(mean.abs())
    curves = _curves(held_out, signed, random, counts)
    scores_of_orders = scored(
        held_out, signed=random.after(signed), by_magnitude=random.after(by_magnitude)
    )
    return dataclasses.replace(
        curves,
        cpr=mean_of_draws(scores_of_orders.cpr, len(signed)),
        cmd=mean_of_draws(scores_of_orders.cmd, len(signed)),
    )


def _counts_of(fractions: Sequence[float], sites: int) -> Counts:
    """How many sites each fraction is, without repeats. No site, one and all are always there."""
    shares = numbers_of("fractions", fractions)
    for share in shares:
        if not 0 <= share <= 1:
            raise ArgumentError(f"fraction {share:g}: expected numbers from 0 to 1.")
    counts = {max(1, round(share * sites)) for share in shares if share}
    return tuple(sorted({0, 1, sites, *counts}))


def _moved(
    g: Function, orders: Orders, counts: Counts
) -> Float[Tensor, "side=2 order batch count"]:
    """The change g − g(0) where the top is kept, and where it is dropped."""
    base, adapted = g.ends.cpu().double()
    kept = base.new_zeros(len(orders), len(base), len(counts))
    dropped = torch.zeros_like(kept)
    # With no site and with all of them, the values are those of the ends.
    kept[..., -1] = adapted - base
    dropped[..., 0] = adapted - base
    inner = counts[1:-1]
    if not inner:
        return torch.stack([kept, dropped])

    on = torch.stack([top_gates(order, inner) for order in orders])
    gates = torch.stack([on, 1 - on]).movedim(2, 0)  # [batch, side, order, count, site]
    points = gates.flatten(1, 3).movedim(1, 0)
    values = g.each_prompt(points).T.cpu().double()
    change = values.view(gates.shape[:-1]) - base[:, None, None, None]
    kept[..., 1:-1] = change[:, 0].movedim(0, 1)
    dropped[..., 1:-1] = change[:, 1].movedim(0, 1)
    return torch.stack([kept, dropped])


# --- The greedy oracle


def _require_few(sites: int, held_out: Function | None) -> None:
    """Check that the greedy oracle, S(S+1)/2 forward passes a prompt, is affordable."""
    if held_out is not None:
        raise ArgumentError("greedy ranks each prompt's own sites: leave it out with test.")
    if sites > MOST_GREEDY:
        passes = sites * (sites + 1) // 2
        raise ArgumentError(
            f"greedy on {sites} sites takes {passes} passes a prompt; at most "
            f"{MOST_GREEDY} are run: LoraLens(model, adapter.only(attribution.top(20)))."
        )


def _greedy_order(g: Function) -> Int[Tensor, "batch site"]:
    """Each prompt's greedy order. S(S+1)/2 forward passes, batched."""
    lens = g.lens
    silent = g.with_progress(False)
    towards = g.shift.sign()
    batch = len(towards)
    sites = len(lens.sites)
    rows = torch.arange(batch, device=lens.device)
    on = torch.zeros(batch, sites, dtype=lens.gate_dtype, device=lens.device)
    order: list[Tensor] = []
    steps = tqdm(range(sites, 0, -1), desc="greedy", leave=False, disable=not g.progress)
    with steps as bar:
        for left in bar:
            # The sites of each prompt that are off still, each of which is switched on in turn.
            free = (on == 0).nonzero()[:, 1].view(batch, left)
            tried = on[:, None].expand(batch, left, sites).scatter(2, free[..., None], 1.0)
            values = silent.each_prompt(tried.movedim(1, 0)).T
            furthest = (values * towards[:, None]).argmax(1)
            best = free[rows, furthest]
            on[rows, best] = 1.0
            order.append(best)
    return torch.stack(order, 1)
