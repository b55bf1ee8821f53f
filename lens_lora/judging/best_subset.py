"""What is attainable (`best_subset`): the sites that keep most of a shift, of all sets of so many.
Or the heads, where gate m_h moves a head's z from the base's to the adapted model's, in the base
(desiderata-based component masking, arXiv 2402.14811); what a set keeps is then less than the shift
even for all heads, as MLPs write as well.

    maximise   kept(ε) = Σ_p s_p (g_p(ε) − g_p(0)) / Σ_p |g_p(1) − g_p(0)|,   ε ∈ {0, 1}^S, Σ ε = k

with s_p the sign of prompt p's shift: one set for all prompts, judged by the ratio of means of CPR.

1. Gates in [0, 1] with Σ ε = k start at k/S. Each step goes along the gradient (Adam), and back to
   the nearest gates that are allowed. The k largest gates after each step are a candidate, and so
   are the tops of the slopes at 0, ½ and 1, and those of rankings that the caller gives.
2. All candidates are run; swaps start from the best few. At a set's own corner the slopes say what
   adding each other site and taking out each of its own would do. The most promising exchanges, of
   one pair and of several at once, are run, and the best is taken if it keeps more, until none
   does.
3. Where there are few exchanges of one pair, all of them are run before a set is called the best.

With prompts held out, the search sees the others alone, and each set is run on both. Every value is
one of an exact run at the corner itself, so none is above what is attainable. It is the best set
found, not provably the best there is; on ten sites or fewer a search of all sets rarely finds
another. A ranking's own share, as a share of this, is how much of what is attainable it keeps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, final, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import brentq
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import number, numbers_of, one_entry, whole, word
from lens_lora.core import (
    SIGMAS,
    LoraLens,
    Measured,
    PromptsLike,
    Reading,
    Readout,
    alone,
    site_labels,
)
from lens_lora.core.function import forward as function
from lens_lora.core.function import interventions, reverse
from lens_lora.core.function.asked import Asked, ask
from lens_lora.core.results import drawing
from lens_lora.core.results.base import header
from lens_lora.errors import ArgumentError
from lens_lora.judging.rankings import Scores, by_score, named, scores_towards

Over = Literal["sites", "heads"]
_AT = (0.0, 0.5, 1.0)


@final
class BestSubset(Measured):
    """The sets of sites, or of heads, that keep most of the shift, one for each size asked for.

    Attributes:
        counts: how many sites or heads each set has.
        members: [size, name], which of them are in it.
        names: of the sites; or of the heads, 'blocks.3.attn.hook_z[5]'.
        over: 'sites' or 'heads'.
        kept: [size], share of the shift of the prompts that were searched on together, measured.
        kept_by_prompt: [size, batch], of each prompt's own shift; NaN within three noise floors.
        held_out: indices of the prompts that the search did not see.
        found_by: of each set, where the search that found it began ('gates', or the key of a
            ranking), with '+swaps' where exchanges improved on it.
        gradients: forward passes with a backward pass that the search took, of all prompts each.
        forwards: forward passes beside them, of all prompts each.
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
        """Of all sites, or of all heads."""
        return torch.tensor(self.counts, dtype=torch.float64) / len(self.names)

    @property
    def kept_held_out(self) -> Float[Tensor, " size"]:
        """[size], of the held-out prompts together, without those that have no shift; else NaN."""
        prompts = list(self.held_out)
        shares, sizes = self.kept_by_prompt[:, prompts], self.shift[prompts].abs().double().cpu()
        return (shares * sizes).nansum(1) / (sizes * ~shares[0].isnan()).sum()

    def chosen(self, count: int | None = None) -> pd.DataFrame:
        """The sites of one set, as `adapter.only` takes them: site and module; or its heads: name.

        Args:
            count: how many it has; without it, the only set.

        Raises:
            ArgumentError: no such set, or several and none named.
        """
        members = self.members[self.row(count)].nonzero()[:, 0].tolist()
        if self.over == "heads":
            return pd.DataFrame({"name": [self.names[i] for i in members]})
        sites = site_labels([self.sites[i] for i in members])
        return pd.DataFrame(sites, columns=["site", "module"])

    def row(self, count: int | None = None) -> int:
        """Which set has so many sites or heads.

        Args:
            count: how many; without it, the only set.

        Raises:
            ArgumentError: no such set, or several and none named.
        """
        if count is None and len(self.counts) == 1:
            return 0
        if count not in self.counts:
            raise ArgumentError(f"count={count}: expected one of {self.counts}.")
        return self.counts.index(count)

    def plot(self, count: int | None = None) -> drawing.Figure:
        """One set as a map of the sites or heads; several sizes as a curve of what they keep.

        Args:
            count: the set of so many; without it, the only set, or the curve over sizes.

        Raises:
            ArgumentError: no such set.
        """
        return drawing.figure(self, count)

    def to_frame(self) -> pd.DataFrame:
        """One row per size: how many, what they keep, held out as well, and what found them."""
        columns = {"count": self.counts, "kept": self.kept.tolist()}
        columns |= {"kept_held_out": self.kept_held_out.tolist(), "found_by": self.found_by}
        return pd.DataFrame({"fraction": self.fractions.tolist(), **columns})


@alone
def best_subset(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    size: float | Sequence[float] = 0.2,
    k: int | Sequence[int] | None = None,
    over: Over = "sites",
    held_out: Sequence[int] = (),
    starts: Scores | Mapping[str, Scores] | None = None,
    steps: int = 30,
    progress: bool = True,
) -> BestSubset:
    """The best sets of so many sites, or heads, that are found, and what they keep of the shift.

    What a ranking keeps can be read beside it: no ranking given in `starts` keeps more.

    Cost: 3 forward and backward passes, and for each size `steps` more, as many forward passes, and
    for each round of swaps (of ten or so) one forward and backward and twenty forward passes; the
    result says how many. Of 210 sites at 20 %, some 50 forward and backward passes.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`; the sets are of all of them together.
        readout: u_y, what is read of the logits.
        size: fraction of the sites or heads, or several.
        k: in place of size, the number of sites or heads, or several.
        over: 'sites', whose updates the base gets; or 'heads', whose z it gets from the adapted
            model at all positions, of every block with attention.
        held_out: indices of prompts that the search does not see: `kept_held_out` judges on them.
        starts: of sites, these prompts and this readout: attributions, effects, tensors, or {name:
            any of these}, whose tops (in the mean over prompts) the search also begins at.
        steps: how often the gates are moved.
        progress: show a bar.

    Raises:
        ArgumentError: sizes outside 0 to 1, or no such number of sites; starts of something else; a
            shift that rounding may be all of; no such prompt to hold out, or all of them.
        ModelStateError: heads that are not laid out as the model's n_heads and d_head say.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a non-finite readout or slope.
    """
    asked, steps = ask(lens, prompts, readout), whole("steps", steps, 1)
    search_on, judge_on = _split(asked.reading.batch, held_out)
    word("over", over, get_args(Over))
    names, values, _ = _gates_of(asked.lens, asked.reading, over)
    counts = _counts(over, len(names), size, k)
    _require_shift(asked, search_on)
    given = {} if starts is None else named(starts)
    if given and over == "heads":
        raise ArgumentError("starts are scores of sites; leave them out with over='heads'.")
    scores = scores_towards(asked, given, False)
    total = steps * len(counts)
    with tqdm(total=total, desc="best subset", leave=False, disable=not progress) as bar:
        search = _Search(asked, over, search_on, steps, bar)
        ones = torch.ones(len(names), dtype=torch.float64)
        tops = {f"first_order@{at:g}": search.gradient(at * ones) for at in _AT}
        tops |= {name: score[search_on].mean(0).cpu() for name, score in scores.items()}
        sets = [_best_set(search, count, tops) for count in counts]
    members = torch.stack([best.members for best in sets])
    return BestSubset(
        counts=counts,
        members=members,
        names=names,
        over=over,
        kept=torch.tensor([best.kept for best in sets], dtype=torch.float64),
        kept_by_prompt=_by_prompt(asked, values(members.double())),
        held_out=tuple(judge_on),
        found_by=tuple(best.start for best in sets),
        gradients=search.gradients,
        forwards=search.forwards,
        **header(asked),
    )


def _by_prompt(asked: Asked, values: Float[Tensor, "batch size"]) -> Float[Tensor, "size batch"]:
    base, adapted = asked.ends.cpu()
    shift = (adapted - base).double()
    clear = torch.where(shift.abs() > SIGMAS * asked.noise_floor.cpu(), shift, torch.nan)
    return ((values.double().cpu() - base.double()[:, None]) / clear[:, None]).T.contiguous()


def _require_shift(asked: Asked, prompts: list[int]) -> None:
    size = float((asked.ends[1] - asked.ends[0])[prompts].abs().mean())
    noise = float(asked.noise_floor[prompts].mean())
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


def _counts(over: Over, every: int, size: Any, k: Any) -> tuple[int, ...]:
    if k is not None:
        counts = [whole("k", count, 1) for count in (k if _is_several(k) else [k])]
    else:
        fractions = numbers_of("size", size) if _is_several(size) else [number("size", size)]
        for fraction in fractions:
            if not 0 < fraction <= 1:
                raise ArgumentError(f"size {fraction:g}: expected a fraction above 0, at most 1.")
        counts = [max(1, round(fraction * every)) for fraction in fractions]
    if not counts or max(counts) > every:
        raise ArgumentError(f"{k=}: expected numbers of {over} from 1 to {every}.")
    return tuple(sorted(set(counts)))


def _is_several(value: object) -> bool:
    return not isinstance(one_entry(value), int | float)


# --- the search


_RATE = 0.1  # how far a gate moves in a step of Adam
_STARTS = 3  # candidates that swaps start from
_OUTS, _INS = 4, 4  # sites of each side that are exchanged in pairs
_FEW_PAIRS = 64  # exchanges of one pair that are all run
_ROUNDS = 40

Sets = Bool[Tensor, "set site"]


@dataclasses.dataclass(frozen=True)
class _Best:
    """The best set so far, the share of the shift that it keeps, and where its search began.

    Attributes:
        start: 'gates', or the key of a ranking; with '+swaps' where exchanges improved on it.
    """

    members: Bool[Tensor, " site"]
    kept: float
    start: str


_Runs = Callable[[Tensor], Tensor]  # gates → g, or its slopes, of each prompt


def _gates_of(lens: LoraLens, reading: Reading, over: Over) -> tuple[tuple[str, ...], _Runs, _Runs]:
    """What has a gate; of each prompt, g at many gate vectors, and the slopes at one."""
    if over == "heads":
        masks = interventions.HeadMasks(lens, reading)
        return masks.names, masks.values, masks.slopes
    return (
        tuple(site.name for site in lens.sites),
        lambda gates: function.gated_readout(lens, reading, gates, progress=False, what="sets"),
        lambda gates: reverse.site_slopes(lens, reading, gates.to(lens.gates(0.0))),
    )


class _Search:
    """kept(ε) and its gradient on some of the prompts, and how often each was run."""

    def __init__(self, asked: Asked, over: Over, prompts: list[int], steps: int, bar: tqdm) -> None:
        # A user's function may read all prompts together, and is run on all of them.
        reading = asked.reading.only(torch.tensor(prompts))
        self._rows = prompts if reading.batch > len(prompts) else slice(None)
        names, self._values, self._slopes = _gates_of(asked.lens, reading, over)
        base, adapted = asked.ends[:, prompts]
        self.steps, self.bar = steps, bar
        self._base = base.double().cpu()
        self._signs = (adapted - base).sign().double().cpu()
        self._size = (adapted - base).abs().sum().double().cpu()
        self.sites = len(names)
        self.forwards, self.gradients = 0, 0

    def kept(self, gates: Float[Tensor, "point site"]) -> Float[Tensor, " point"]:
        """kept(ε) at several gate vectors. A forward pass each, batched."""
        values = self._values(gates)[self._rows]
        self.forwards += len(gates)
        moved = (values.double().cpu() - self._base[:, None]) * self._signs[:, None]
        return moved.sum(0) / self._size

    def gradient(self, gates: Float[Tensor, " site"]) -> Float[Tensor, " site"]:
        """∂kept/∂ε. One forward and one backward pass."""
        slopes = self._slopes(gates)[self._rows]
        self.gradients += 1
        return (slopes.double().cpu() * self._signs[:, None]).sum(0) / self._size


def _best_set(search: _Search, count: int, scores: Mapping[str, Float[Tensor, " site"]]) -> _Best:
    """The best set of so many sites that is found."""
    if count == search.sites:
        search.bar.update(search.steps)
        every = torch.ones(1, count, dtype=torch.bool)
        return _Best(every[0], float(search.kept(every.double())[0]), "all")
    climbed = _climbed(search, count)
    names = [*scores, *["gates"] * len(climbed)]
    candidates = torch.stack([*(_top(score, count) for score in scores.values()), *climbed])
    sets, index = torch.unique(candidates, dim=0, return_inverse=True)
    kept, first = search.kept(sets.double()), index.tolist().index
    best = kept.argsort(descending=True)[:_STARTS].tolist()
    starts = [_Best(sets[i], float(kept[i]), names[first(i)]) for i in best]
    return max((_swapped(search, start) for start in starts), key=lambda best: best.kept)


def _top(score: Float[Tensor, " site"], count: int) -> Bool[Tensor, " site"]:
    return by_score(score).argsort() < count


def _climbed(search: _Search, count: int) -> list[Bool[Tensor, " site"]]:
    """The k largest gates, after each step."""
    gates = torch.full((search.sites,), count / search.sites, dtype=torch.float64)
    adam = torch.optim.Adam([gates], lr=_RATE, maximize=True)
    tops: list[Tensor] = []
    for _ in range(search.steps):
        gates.grad = search.gradient(gates)
        adam.step()
        gates.copy_(_allowed(gates, count))
        tops.append(_top(gates, count))
        search.bar.update()
    return tops


def _allowed(gates: Float[Tensor, " site"], count: int) -> Float[Tensor, " site"]:
    """The nearest ε with 0 ≤ ε ≤ 1 and Σ ε = k: clamp(ε + c)."""
    ends = -float(gates.max()), 1 - float(gates.min())
    c: Any = brentq(lambda c: float((gates + c).clamp(0, 1).sum()) - count, *ends)
    return (gates + c).clamp(0, 1)


def _swapped(search: _Search, start: _Best) -> _Best:
    """Exchanges that keep more, until none of those tried does."""
    best = start
    for _ in range(_ROUNDS):
        members = best.members
        better = _best_of(search, best, _exchanges(members, search.gradient(members.double())))
        inside = int(members.sum())
        if better is None and inside * (len(members) - inside) <= _FEW_PAIRS:
            every = _pairs(members, members.nonzero(), (~members).nonzero())
            better = _best_of(search, best, every)
        if better is None:
            return best
        best = better
    return best


def _best_of(search: _Search, best: _Best, tried: Sets) -> _Best | None:
    kept = search.kept(tried.double())
    index = int(kept.argmax())
    if not float(kept[index]) > best.kept:
        return None
    start = f"{best.start.removesuffix('+swaps')}+swaps"
    return _Best(tried[index], float(kept[index]), start)


def _exchanges(members: Bool[Tensor, " site"], slopes: Float[Tensor, " site"]) -> Sets:
    """The least of the set for the most promising outside: one pair, or the first 2, 4, 8, …."""
    rising, falling = slopes.argsort(), slopes.argsort(descending=True)
    outs, ins = rising[members[rising]], falling[~members[falling]]
    several = [2**i for i in range(1, min(len(outs), len(ins)).bit_length())]
    blocks = [_exchanged(members, outs[:n], ins[:n]) for n in several]
    return torch.cat([_pairs(members, outs[:_OUTS, None], ins[:_INS, None]), *blocks])


def _pairs(members: Tensor, outs: Int[Tensor, "out 1"], ins: Int[Tensor, "in 1"]) -> Sets:
    return torch.cat([_exchanged(members, *pair) for pair in itertools.product(outs, ins)])


def _exchanged(members: Tensor, outs: Int[Tensor, " out"], ins: Int[Tensor, " out"]) -> Sets:
    changed = members.clone()
    changed[outs], changed[ins] = False, True
    return changed[None]
