"""The best set of a given number of sites or heads: the most that any ranking could keep.

    maximise   kept(ε) = Σ_p s_p (g_p(ε) − g_p(0)) / Σ_p |g_p(1) − g_p(0)|,   ε ∈ {0, 1}^S, Σ ε = k

Here s_p is the sign of prompt p's shift. There is one set for all prompts, judged by the ratio of
means that CPR also takes (`circuit_scores.py`).

With heads in place of sites, the base model runs, and gate m_h moves the z of a head from the
base's to the adapted model's (desiderata-based component masking, arXiv 2402.14811). Even all heads
together need not keep the whole shift, as MLPs write as well.

1. Gates in [0, 1] with Σ ε = k start at k/S. Each step follows the gradient (Adam), and then goes
   back to the nearest gates that are allowed. The k largest gates after each step are a candidate,
   and so are the sites of the k largest slopes at ε = 0, ½ and 1, and those at the top of rankings
   that the caller gives.
2. All candidates are run, and swaps start from the best few. At the corner of
   a set, slopes predict what adding a site or taking one out would do. The most promising
   exchanges, of one pair and of several pairs at once, are run. The best of them is taken if it
   keeps more, until none does.
3. Where there are few exchanges of one pair, all of them are run before a set is called the best.

With prompts held out, the search sees the others alone, and each set is run on both. Every value is
that of an exact run at the corner itself, so none is above what is attainable. The result is the
best set that was found, and there may be a better one; on ten sites or fewer a search of all sets
rarely finds another. The share that a ranking keeps, divided by this one, says how
much of what is attainable it keeps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, final, get_args, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import brentq
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import number, numbers_of, one_entry, whole, word
from lens_lora.core import SIGMAS, Evaluations, Function, Measured, Sites, analysis, drawing
from lens_lora.errors import ArgumentError
from lens_lora.judging.head_masks import HeadMasks
from lens_lora.judging.rankings import Scores, by_score, named, scores_towards

Over = Literal["sites", "heads"]
Sets = Bool[Tensor, "set site"]

# The strengths at which the sites of the largest slopes are candidates.
_SCALES_OF_SLOPES = (0.0, 0.5, 1.0)
# How far a gate moves in a step of Adam.
_STEP_SIZE = 0.1
# How many candidates swaps start from.
_STARTS = 3
# How many sites of the set, and how many outside it, are exchanged in pairs.
_OUTS = 4
_INS = 4
# All exchanges of one pair are run where there are at most this many of them.
_FEW_PAIRS = 64
# The most rounds of swaps.
_ROUNDS = 40


@final
class BestSubset(Measured):
    """The sets of sites, or of heads, that keep most of the shift, one for each chosen size.

    Attributes:
        counts: how many sites or heads each set has.
        members: [size, name], whether each site or head is in the set.
        names: the names of the sites; or of the heads, 'blocks.3.attn.hook_z[5]'.
        over: 'sites' or 'heads'.
        kept: [size], the share of the shift that each set keeps, measured on all prompts of the
            search together.
        kept_by_prompt: [size, batch], the share of each prompt's own shift; NaN for a shift within
            three noise floors.
        held_out: indices of the prompts that the search did not see.
        found_by: where the search that found each set began ('gates', or the key of a ranking),
            with '+swaps' where exchanges improved on it; 'all' for the set of everything.
        gradients: how many times the search ran its prompts forward and backward.
        forwards: how many times more it ran them forward only.
        sites, base, adapted, str_tokens, readout, units, meta: as in `Measured`.
    """

    counts: Annotated[tuple[int, ...], "size"]
    members: Bool[Tensor, "size name"]
    names: Annotated[tuple[str, ...], "name"]
    over: Over
    kept: Float[Tensor, " size"]
    kept_by_prompt: Float[Tensor, "size batch"]
    held_out: tuple[int, ...]
    found_by: Annotated[tuple[str, ...], "size"]
    gradients: int
    forwards: int

    @property
    def fractions(self) -> Float[Tensor, " size"]:
        """[size], the share of all sites, or of all heads, that each set has."""
        return torch.tensor(self.counts, dtype=torch.float64) / len(self.names)

    @property
    def kept_held_out(self) -> Float[Tensor, " size"]:
        """[size], the share that is kept of the shift of the held-out prompts together.

        Prompts without a shift are left out. NaN where no prompts were held out.
        """
        prompts = list(self.held_out)
        shares = self.kept_by_prompt[:, prompts]
        sizes = self.shift[prompts].abs().double().cpu()
        has_shift = ~shares[0].isnan()
        return (shares * sizes).nansum(1) / (sizes * has_shift).sum()

    def chosen(self, count: int | None = None) -> pd.DataFrame:
        """The sites of one set, as `adapter.only` takes them, or the names of its heads.

        Sites have the columns site and module, heads the column point.

        Args:
            count: the size of the set; None for the only set.

        Raises:
            ArgumentError: there is no such set, or there are several and none is named.
        """
        members = self.members[self.row(count)].nonzero()[:, 0].tolist()
        if self.over == "heads":
            return pd.DataFrame({"point": [self.names[i] for i in members]})
        return pd.DataFrame(Sites(self.sites[i] for i in members).columns())

    def row(self, count: int | None = None) -> int:
        """The index of the set with this number of sites or heads.

        Args:
            count: the size of the set; None for the only set.

        Raises:
            ArgumentError: there is no such set, or there are several and none is named.
        """
        if count is None and len(self.counts) == 1:
            return 0
        if count is None or whole("count", count) not in self.counts:
            raise ArgumentError(f"count={count}: expected one of {self.counts}.")
        return self.counts.index(count)

    def plot(self, count: int | None = None) -> drawing.Figure:
        """One set as a map of the sites or heads; several sizes as a curve of what they keep.

        Args:
            count: the size of the set; None for the only set, or the curve over sizes.

        Raises:
            ArgumentError: there is no set of this size.
        """
        return drawing.figure(self, count)

    def to_frame(self) -> pd.DataFrame:
        """One row per size: fraction, count, share kept, that on held-out prompts, and found_by."""
        columns = {
            "fraction": self.fractions.tolist(),
            "count": self.counts,
            "keep": self.kept.tolist(),
            "keep_held_out": self.kept_held_out.tolist(),
            "found_by": self.found_by,
        }
        return pd.DataFrame(columns)


@analysis
def best_subset(
    g: Evaluations,
    *,
    size: float | Sequence[float] = 0.2,
    k: int | Sequence[int] | None = None,
    over: Over = "sites",
    held_out: Sequence[int] = (),
    starts: Scores | Mapping[str, Scores] | None = None,
    steps: int = 30,
) -> BestSubset:
    """The best sets of sites or heads that are found, and the share of the shift that they keep.

    They are a bound to judge rankings by: no ranking given in `starts` keeps more.

    Cost: 3 forward and backward passes. Each size takes `steps` more, as many forward passes, and
    some ten rounds of swaps, each of one forward and backward pass and about twenty forward passes;
    the result says how many. With 210 sites at 20 %, some 50 forward and backward passes.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`; the sets are of all of them together.
        readout: u_y, the number that is read from the logits.
        size: fraction of the sites or heads, or several.
        k: the number of sites or heads, or several numbers, in place of size.
        over: 'sites', whose updates are added to the base model; or 'heads', those of every block
            with attention, whose z at all positions is replaced by the adapted model's.
        held_out: indices of prompts that the search does not see; `kept_held_out` judges on them.
        starts: attributions or effects of sites on these prompts and this readout, tensors, or
            {name: any of these}. The search also begins at the top of each, by its mean over
            prompts.
        steps: how often the gates are moved.
        progress: show a bar.

    Raises:
        ArgumentError: sizes outside 0 to 1, or no such number of sites; starts of other sites,
            prompts or readout, or with over='heads'; a shift that may be rounding alone; no such
            prompt to hold out, or all of them.
        ModelStateError: heads that are not laid out as the model's n_heads and d_head say.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a readout or slope is not finite.
    """
    steps = whole("steps", steps, 1)
    search_on, judge_on = _split(g.reading.batch, held_out)
    word("over", over, get_args(Over))
    switches = _switches(g, over)
    counts = _counts(over, len(switches.names), size, k)
    _require_shift(g, search_on)
    given = {} if starts is None else named(starts)
    if given and over == "heads":
        raise ArgumentError("starts are scores of sites; leave them out with over='heads'.")
    scores = scores_towards(g, given, baselines=False)
    total = steps * len(counts)
    with tqdm(total=total, desc="best subset", leave=False, disable=not g.progress) as bar:
        search = _Search(g, over, search_on, steps, bar)
        starts_of_search = _slopes_at_strengths(search)
        for name, score in scores.items():
            starts_of_search[name] = score[search_on].mean(0).cpu()
        sets = [_best_set(search, count, starts_of_search) for count in counts]
    members = torch.stack([best.members for best in sets])
    values_of_sets = switches.values(members.double())
    return BestSubset(
        counts=counts,
        members=members,
        names=switches.names,
        over=over,
        kept=torch.tensor([best.kept for best in sets], dtype=torch.float64),
        kept_by_prompt=_kept_by_prompt(g, values_of_sets),
        held_out=tuple(judge_on),
        found_by=tuple(best.start for best in sets),
        gradients=search.gradients,
        forwards=search.forwards,
        **g.header(),
    )


def _kept_by_prompt(
    g: Function, values: Float[Tensor, "batch size"]
) -> Float[Tensor, "size batch"]:
    """The share that each set keeps of each prompt's own shift; NaN within three noise floors."""
    base, adapted = g.ends.cpu()
    shift = (adapted - base).double()
    is_clear = shift.abs() > SIGMAS * g.floor.cpu()
    clear_shift = torch.where(is_clear, shift, torch.nan)
    shift_of_sets = values.double().cpu() - base.double()[:, None]
    return (shift_of_sets / clear_shift[:, None]).T.contiguous()


def _require_shift(g: Function, prompts: list[int]) -> None:
    """Refuse a readout that the adapter moves by no more than rounding may."""
    size = float(g.shift[prompts].abs().mean())
    noise = float(g.floor[prompts].mean())
    if not size > SIGMAS * noise:
        raise ArgumentError(
            f"the adapter moves this readout by {size:.2g} ± {noise:.2g}, which rounding alone may "
            "do: there is nothing for a subset to keep. Ask about what the adapter changes."
        )


def _split(batch: int, held_out: Sequence[int]) -> tuple[list[int], list[int]]:
    """The prompts to search on, and those to judge on."""
    numbers_of("held_out", held_out)
    judged = sorted({whole("held_out", index) for index in held_out})
    searched = sorted({*range(batch)} - {*judged})
    if not searched or len(searched) + len(judged) != batch:
        raise ArgumentError(f"{held_out=}: expected some of prompts 0 to {batch - 1}, and not all.")
    return searched, judged


def _counts(over: Over, total: int, size: Any, k: Any) -> tuple[int, ...]:
    """How many sites or heads each set is to have, in increasing order.

    Args:
        over: 'sites' or 'heads'.
        total: how many there are.
        size: a fraction of them, or several.
        k: a number in place of it, or several.
    """
    if k is None:
        counts = [max(1, round(fraction * total)) for fraction in _fractions(size)]
    else:
        given = k if _is_several(k) else [k]
        counts = [whole("k", count, 1) for count in given]
    if not counts or max(counts) > total:
        raise ArgumentError(f"{k=}: expected numbers of {over} from 1 to {total}.")
    return tuple(sorted(set(counts)))


def _fractions(size: Any) -> list[float]:
    fractions = numbers_of("size", size) if _is_several(size) else [number("size", size)]
    if not fractions:
        raise ArgumentError(f"{size=}: expected a fraction above 0, at most 1, or several of them.")
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise ArgumentError(f"size {fraction:g}: expected a fraction above 0, at most 1.")
    return list(fractions)


def _is_several(value: object) -> bool:
    """Whether this is a list of numbers, rather than one number or a tensor of one."""
    return not isinstance(one_entry(value), int | float)


# --- What has a gate: sites, or heads


@runtime_checkable
class _Switches(Protocol):
    """The gates of sites or of heads, with the values and slopes of g."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what is switched, one for each gate."""
        ...

    def values(self, gates: Float[Tensor, "point site"], /) -> Float[Tensor, "batch point"]:
        """The values of g at several gate vectors. At most a forward pass each, batched."""
        ...

    def slopes(self, gates: Float[Tensor, " site"], /) -> Float[Tensor, "batch site"]:
        """The derivatives of g by each gate. One forward and one backward pass."""
        ...


class _Sites:
    """The gates of sites."""

    def __init__(self, g: Function) -> None:
        self._g = g

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(site.name for site in self._g.lens.sites)

    def values(self, gates: Float[Tensor, "point site"]) -> Float[Tensor, "batch point"]:
        return self._g(gates).T

    def slopes(self, gates: Float[Tensor, " site"]) -> Float[Tensor, "batch site"]:
        # As one of several points, the base is not refused for a KL: its slope there is truly zero.
        return self._g.slopes(gates[None])[0]


def _switches(g: Function, over: Over) -> _Switches:
    return HeadMasks(g) if over == "heads" else _Sites(g)


# --- The search


@dataclasses.dataclass(frozen=True)
class _Best:
    """The best set so far.

    Attributes:
        members: which sites are in it.
        kept: the share of the shift that it keeps.
        start: where its search began: 'gates', or the key of a ranking; with '+swaps' where
            exchanges improved on it.
    """

    members: Bool[Tensor, " site"]
    kept: float
    start: str


class _Search:
    """The function kept(ε) of some of the prompts, with its gradient.

    Attributes:
        steps: how often the gates are moved.
        bar: the progress bar, which each of these steps moves by one.
        sites: how many gates there are.
        forwards, gradients: how often kept and its gradient were computed.
    """

    def __init__(self, g: Function, over: Over, prompts: list[int], steps: int, bar: tqdm) -> None:
        g_of_prompts = g.only(prompts).with_progress(False)
        # A user's own readout may read all prompts together; then it is run on all of them.
        reads_all = g_of_prompts.reading.batch > len(prompts)
        self._rows = prompts if reads_all else slice(None)
        self._switches = _switches(g_of_prompts, over)
        base, adapted = g.ends[:, prompts]
        shift = adapted - base
        self._base = base.double().cpu()
        self._signs = shift.sign().double().cpu()
        self._size = shift.abs().sum().double().cpu()
        self.steps = steps
        self.bar = bar
        self.sites = len(self._switches.names)
        self.forwards = 0
        self.gradients = 0

    def kept(self, gates: Float[Tensor, "point site"]) -> Float[Tensor, " point"]:
        """The share that is kept at several gate vectors. A forward pass each, batched."""
        values = self._switches.values(gates)[self._rows]
        self.forwards += len(gates)
        shift = values.double().cpu() - self._base[:, None]
        in_direction = shift * self._signs[:, None]
        return in_direction.sum(0) / self._size

    def gradient(self, gates: Float[Tensor, " site"]) -> Float[Tensor, " site"]:
        """∂kept/∂ε. One forward and one backward pass."""
        slopes = self._switches.slopes(gates)[self._rows]
        self.gradients += 1
        return (slopes.double().cpu() * self._signs[:, None]).sum(0) / self._size


def _slopes_at_strengths(search: _Search) -> dict[str, Float[Tensor, " site"]]:
    """The slopes where all gates are 0, ½ and 1, by the key of first order there."""
    slopes: dict[str, Float[Tensor, " site"]] = {}
    for at in _SCALES_OF_SLOPES:
        everywhere = torch.full((search.sites,), at, dtype=torch.float64)
        slopes[f"first_order@{at:g}"] = search.gradient(everywhere)
    return slopes


def _best_set(search: _Search, count: int, scores: Mapping[str, Float[Tensor, " site"]]) -> _Best:
    """The best set of this number of sites that is found."""
    if count == search.sites:
        search.bar.update(search.steps)
        all_sites = torch.ones(count, dtype=torch.bool)
        kept = search.kept(all_sites.double()[None])
        return _Best(all_sites, float(kept[0]), "all")
    swapped = [_swapped(search, candidate) for candidate in _candidates(search, count, scores)]
    return max(swapped, key=lambda best: best.kept)


def _candidates(
    search: _Search, count: int, scores: Mapping[str, Float[Tensor, " site"]]
) -> list[_Best]:
    """The best few sets among the top of every score and the largest gates after each step."""
    candidates = [_top(score, count) for score in scores.values()]
    found_by = list(scores)
    for largest_gates in _climbed(search, count):
        candidates.append(largest_gates)
        found_by.append("gates")
    # Several candidates may be the same set, which is run once and named by the first of them.
    sets, inverse = torch.unique(torch.stack(candidates), dim=0, return_inverse=True)
    set_of_candidate = inverse.tolist()
    kept = search.kept(sets.double())
    best_first = kept.argsort(descending=True)[:_STARTS].tolist()
    best: list[_Best] = []
    for index in best_first:
        first_candidate = set_of_candidate.index(index)
        best.append(_Best(sets[index], float(kept[index]), found_by[first_candidate]))
    return best


def _top(score: Float[Tensor, " site"], count: int) -> Bool[Tensor, " site"]:
    """Mark the `count` sites with the highest scores."""
    rank = by_score(score).argsort()
    return rank < count


def _climbed(search: _Search, count: int) -> list[Bool[Tensor, " site"]]:
    """The sets of the k largest gates, after each step along the gradient."""
    gates = torch.full((search.sites,), count / search.sites, dtype=torch.float64)
    adam = torch.optim.Adam([gates], lr=_STEP_SIZE, maximize=True)
    tops: list[Tensor] = []
    for _ in range(search.steps):
        gates.grad = search.gradient(gates)
        adam.step()
        gates.copy_(_allowed(gates, count))
        tops.append(_top(gates, count))
        search.bar.update()
    return tops


def _allowed(gates: Float[Tensor, " site"], count: int) -> Float[Tensor, " site"]:
    """The nearest ε with 0 ≤ ε ≤ 1 and Σ ε = k, which is clamp(ε + c) for some c."""
    lowest = -float(gates.max())
    highest = 1 - float(gates.min())

    def excess(c: float) -> float:
        return float((gates + c).clamp(0, 1).sum()) - count

    shift: Any = brentq(excess, lowest, highest)
    return (gates + shift).clamp(0, 1)


def _swapped(search: _Search, start: _Best) -> _Best:
    """Exchange sites for others while that keeps more."""
    best = start
    for _ in range(_ROUNDS):
        members = best.members
        slopes = search.gradient(members.double())
        better = _best_of(search, best, _exchanges(members, slopes))
        inside = int(members.sum())
        pairs = inside * (len(members) - inside)
        if better is None and pairs <= _FEW_PAIRS:
            every_pair = _pairs(members, members.nonzero(), (~members).nonzero())
            better = _best_of(search, best, every_pair)
        if better is None:
            return best
        best = better
    return best


def _best_of(search: _Search, best: _Best, tried: Sets) -> _Best | None:
    """The one of these sets that keeps most, if it keeps more than the best so far."""
    kept = search.kept(tried.double())
    index = int(kept.argmax())
    if not float(kept[index]) > best.kept:
        return None
    start = f"{best.start.removesuffix('+swaps')}+swaps"
    return _Best(tried[index], float(kept[index]), start)


def _exchanges(members: Bool[Tensor, " site"], slopes: Float[Tensor, " site"]) -> Sets:
    """The sets after exchanging members of the lowest slopes for other sites of the highest.

    One pair is exchanged, or the first 2, 4, 8, … pairs at once.
    """
    rising = slopes.argsort()
    falling = slopes.argsort(descending=True)
    outs = rising[members[rising]]
    ins = falling[~members[falling]]
    sets = [_pairs(members, outs[:_OUTS, None], ins[:_INS, None])]
    most = min(len(outs), len(ins))
    for power in range(1, most.bit_length()):
        several = 2**power
        sets.append(_exchanged(members, outs[:several], ins[:several]))
    return torch.cat(sets)


def _pairs(members: Tensor, outs: Int[Tensor, "out 1"], ins: Int[Tensor, "in 1"]) -> Sets:
    """The sets after exchanging each site of `outs` for each of `ins`, one pair at a time."""
    sets: list[Tensor] = []
    for out, into in itertools.product(outs, ins):
        sets.append(_exchanged(members, out, into))
    return torch.cat(sets)


def _exchanged(members: Tensor, outs: Int[Tensor, " out"], ins: Int[Tensor, " out"]) -> Sets:
    """The set without the sites `outs` and with the sites `ins`."""
    changed = members.clone()
    changed[outs] = False
    changed[ins] = True
    return changed[None]
