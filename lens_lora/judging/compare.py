"""How well an attribution a agrees with measured effects e, over the same sites and prompts.

1. Both are brought to one number per prompt and group: an attribution is summed over the groups of
   the effects it is compared with.
2. Statistics of each prompt, over its groups l:

       pearson, spearman      correlation of a_l with e_l, and of their ranks
       slope                  of the least-squares line of e on a, with an intercept
       sign_agreement         share of groups where a_l and e_l have the same sign, of those whose
                              effect is beyond three noise floors
       top_k_overlap          |top-k by |a| ∩ top-k by |e|| / k
       relative_error         Σ|a_l − e_l| / Σ|e_l|
       sum_ratio              Σ a_l / Σ e_l

3. With `across_prompts` the attribution is of other prompts than the effects. Its values are turned
   to the direction of their prompt's shift and averaged over its prompts; that mean is compared
   with each prompt's effects, turned to the direction of their own shift.
4. Over prompts: their mean, and a percentile interval of it from prompts drawn with replacement.

A correlation is blind to size and to the sum; the slope, the relative error and the sum ratio are
not. A statistic that does not exist (of constant numbers, of one group) is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from lens_lora.arguments import whole, word
from lens_lora.core import (
    Attribution,
    Drawn,
    Effects,
    Groups,
    PromptTokens,
    Read,
    Site,
    Sites,
    hides_sign,
)
from lens_lora.correlation import correlation, is_constant
from lens_lora.edge_attribution.edges import Edges
from lens_lora.errors import ArgumentError, warn
from lens_lora.guesses import fitting

Vector = np.ndarray[tuple[int], np.dtype[np.float64]]

# The ends of a 95 % interval.
_PERCENTILES = (2.5, 97.5)
# A fact that one of two runs does not state.
_NOT_STATED = "not stated"
STATISTICS = (
    "pearson",
    "spearman",
    "slope",
    "sign_agreement",
    "top_k_overlap",
    "relative_error",
    "sum_ratio",
)
Grouped = Float[Tensor, "batch group"]
Interval = tuple[float, float]


@final
class Comparison(Read, Drawn):
    """Agreement of an attribution with effects, per prompt and over prompts.

    `plot` is effect against attribution, with the identity line.

    Attributes:
        labels, kinds: the names of the sites or groups, and their kinds; that of a group of
            several kinds is 'group'.
        attribution, effects: [batch, group], in the readout's units.
        attribution_name, effects_name: their keys, as in `results.keys`.
        k: how many groups the top-k overlap counts; all of them where there are fewer.
        pearson, spearman, slope, sign_agreement, top_k_overlap, relative_error, sum_ratio:
            [batch]; without unit. Sign agreement counts alike all groups whose effect stands out
            of rounding; zero agrees only with zero.
        beyond_noise: [batch], the share of groups whose effect is beyond three noise floors; the
            order of the others may be rounding. NaN where the effects state no floor.
        interval: statistic → the 95 % bootstrap interval of its mean over prompts; NaN with one
            prompt or without resampling.
        str_tokens, readout, units: those of the effects; see `Read`.
        meta: the facts of both runs. Of a fact in which they differ it has both values, such as
            'float32 (effects: bfloat16)'.
        made_on: tokens of the prompts that an attribution was made on, if it is judged on others.
    """

    labels: Annotated[tuple[str, ...], "group"]
    kinds: Annotated[tuple[str, ...], "group"]
    attribution: Float[Tensor, "batch group"]
    effects: Float[Tensor, "batch group"]
    attribution_name: str
    effects_name: str
    k: int
    pearson: Float[Tensor, " batch"]
    spearman: Float[Tensor, " batch"]
    slope: Float[Tensor, " batch"]
    sign_agreement: Float[Tensor, " batch"]
    top_k_overlap: Float[Tensor, " batch"]
    relative_error: Float[Tensor, " batch"]
    sum_ratio: Float[Tensor, " batch"]
    beyond_noise: Float[Tensor, " batch"]
    interval: Mapping[str, Interval]
    made_on: tuple[tuple[str, ...], ...] = ()

    @property
    def per_prompt(self) -> dict[str, Float[Tensor, " batch"]]:
        """Every statistic by name."""
        return {name: getattr(self, name) for name in STATISTICS}

    def mean(self, statistic: str) -> float:
        """A statistic's mean over the prompts in which it exists.

        Args:
            statistic: its name, such as 'pearson'.

        Raises:
            ArgumentError: there is no statistic of this name.
        """
        return float(getattr(self, word("statistic", statistic, STATISTICS)).nanmean())

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, one column per statistic."""
        columns = {name: values.tolist() for name, values in self.per_prompt.items()}
        return pd.DataFrame({"prompt": range(len(self.pearson))} | columns)

    def summary(self) -> pd.DataFrame:
        """One row per statistic: its mean over prompts and the interval of that mean."""
        rows = [(self.mean(name), *self.interval[name]) for name in STATISTICS]
        index = pd.Index(STATISTICS, name="statistic")
        return pd.DataFrame(rows, index=index, columns=pd.Index(["mean", "low", "high"]))


@fitting
def compare(
    attribution: Attribution | Effects | Edges,
    effects: Attribution | Effects,
    *,
    across_prompts: bool = False,
    k: int = 10,
    bootstrap: int = 1000,
    seed: int = 0,
    held_out: bool | None = None,
) -> Comparison:
    """How well an attribution, or one kind of effect, agrees with effects. No forward pass.

    Args:
        attribution, effects: results over the same prompts, sites and readout. An attribution is
            summed over the groups of the effects that it is compared with. `Edges` are compared at
            the edges that `patch_edges` measured.
        across_prompts: whether the two results are of different prompts, so that an attribution
            made on some prompts is judged by effects on others. Their readouts may then be of
            different tokens, but must have the same units.
        k: how many groups count as the top.
        bootstrap: how many times the prompts are resampled for the intervals; 0 for no intervals.
        seed: the seed of the resampling.
        held_out: the former name of `across_prompts`; using it gives a warning.

    Raises:
        ArgumentError: other sites, prompts, readouts or groups, naming both; numbers that are not
            finite; k below 1.
    """
    if held_out is not None:
        warn(
            "compare: held_out= is called across_prompts= now, and the old name will go",
            remedy=f"write across_prompts={held_out}.",
        )
        across_prompts = held_out
    k = whole("k", k, 1)
    bootstrap = whole("bootstrap", bootstrap, 0)
    seed = whole("seed", seed, 0)
    if isinstance(attribution, Edges):
        attribution = attribution.along(effects)
    _require_comparable(attribution)
    _require_comparable(effects)
    _require_same(attribution, effects, across_prompts)

    pair = _paired(attribution, effects, across_prompts)
    k = min(k, len(pair.groups))
    statistics = _statistics(pair.a, pair.e, pair.clear, k, pair.eps)
    kinds: list[str] = []
    for members in pair.groups.values():
        kinds.append(_kind_of([effects.sites[index] for index in members]))
    made_on = attribution.str_tokens if across_prompts else ()
    return Comparison(
        labels=tuple(pair.groups),
        kinds=tuple(kinds),
        attribution=pair.a,
        effects=pair.e,
        attribution_name=attribution.key,
        effects_name=effects.key,
        k=k,
        **statistics,
        beyond_noise=pair.beyond_noise,
        interval=_intervals_of(statistics, bootstrap, seed),
        str_tokens=effects.str_tokens,
        readout=effects.readout,
        units=effects.units,
        meta=_facts_of_both_runs(attribution.meta, effects.meta),
        made_on=made_on,
    )


def _facts_of_both_runs(
    of_attribution: Mapping[str, str], of_effects: Mapping[str, str]
) -> dict[str, str]:
    """The names, dtypes and versions of both runs, with both values of each that differs."""
    facts: dict[str, str] = {}
    for name in [*of_attribution, *of_effects]:
        of_one = of_attribution.get(name, _NOT_STATED)
        of_other = of_effects.get(name, _NOT_STATED)
        facts[name] = of_one if of_one == of_other else f"{of_one} (effects: {of_other})"
    return facts


class _Pair(NamedTuple):
    """Both results as numbers of the same prompts and groups, in float64 on the CPU.

    Attributes:
        groups: the sites of each group.
        a, e: the attribution and the effects.
        clear: whether both numbers stand out of rounding.
        beyond_noise: the share of a prompt's groups that are clear; NaN where no floor is stated.
        eps: the relative rounding of the coarser dtype.
    """

    groups: Groups
    a: Grouped
    e: Grouped
    clear: Bool[Tensor, "batch group"]
    beyond_noise: Float[Tensor, " batch"]
    eps: float


def _paired(
    attribution: Attribution | Effects, effects: Attribution | Effects, across_prompts: bool
) -> _Pair:
    """Bring both results to one number for each prompt and group."""
    grouped = _grouped_one(attribution, effects)
    groups = Sites(effects.sites).grouped() if grouped is None else grouped.groups
    a = _over_groups(attribution, grouped)
    e = _over_groups(effects, grouped)
    floor_of_a = _floor(attribution)
    floor_of_e = _floor(effects)
    if across_prompts:
        e = _towards(e, effects.shift)
        # The mean over the attribution's prompts, and its floor, are those of each judged prompt.
        a = _towards(a, attribution.shift).mean(0).expand_as(e)
        if floor_of_a is not None:
            floor_of_mean = floor_of_a.norm() / len(floor_of_a)
            floor_of_a = floor_of_mean.expand(len(e))
    _require_finite(attribution.key, a, list(groups))
    _require_finite(effects.key, e, list(groups))

    eps = max(torch.finfo(a.dtype).eps, torch.finfo(e.dtype).eps)
    a = a.detach().cpu().double()
    e = e.detach().cpu().double()
    clear = _clear(a, floor_of_a) & _clear(e, floor_of_e)
    beyond_noise = clear.double().mean(1)
    if floor_of_a is None and floor_of_e is None:
        beyond_noise = torch.full_like(beyond_noise, torch.nan)
    return _Pair(groups, a, e, clear, beyond_noise, eps)


def _grouped_one(
    attribution: Attribution | Effects, effects: Attribution | Effects
) -> Effects | None:
    """The result whose groups are compared; None where both are of single sites."""
    if isinstance(effects, Effects):
        return effects
    if isinstance(attribution, Effects):
        return attribution
    return None


def _floor(result: Attribution | Effects) -> Float[Tensor, " batch"] | None:
    """The noise floor of effects; an attribution states none."""
    return None if isinstance(result, Attribution) else result.noise_floor


def _kind_of(sites: Sequence[Site]) -> str:
    """The kind that all of these sites have; 'group' where there are several."""
    kinds = {site.kind for site in sites}
    return kinds.pop() if len(kinds) == 1 else "group"


def _over_groups(result: Attribution | Effects, grouped: Effects | None) -> Grouped:
    """The values by group: an attribution is summed over the groups of the effects."""
    if isinstance(result, Effects):
        return result.values
    return result.per_site if grouped is None else grouped.summed(result)


def _clear(values: Grouped, floor: Tensor | None) -> Bool[Tensor, "batch group"]:
    """Whether each value stands out of rounding. Where no floor is stated, all do."""
    if floor is None:
        return torch.ones_like(values, dtype=torch.bool)
    return ~hides_sign(values, floor.to(values)[:, None])


def _towards(values: Grouped, shift: Float[Tensor, " batch"]) -> Grouped:
    """Each prompt's values in the direction of its shift."""
    direction = shift.cpu().double().sign()
    return values.detach().cpu().double() * direction[:, None]


def _require_finite(key: str, values: Grouped, labels: list[str]) -> None:
    """Refuse numbers with which nothing can agree."""
    odd = (~torch.isfinite(values)).nonzero().tolist()
    if odd:
        prompt, group = odd[0]
        raise ArgumentError(
            f"{key} is {float(values[prompt, group])} at prompt {prompt}, {labels[group]} "
            f"({len(odd)} such numbers), and nothing agrees with that",
            remedy="compute it again.",
        )


def _require_comparable(result: object) -> None:
    """Refuse what is neither an attribution nor effects."""
    if not isinstance(result, Attribution | Effects):
        kind = type(result).__name__
        raise ArgumentError(
            f"compare takes attributions and effects, and this is of the class {kind}",
            remedy="ll.compare_adapters(lens, other) compares two adapters.",
            in_shell="`lens-lora compare ADAPTER OTHER` compares two adapters.",
        )


def _require_same(
    one: Attribution | Effects, other: Attribution | Effects, across_prompts: bool
) -> None:
    """Check that the two results share what a comparison needs: sites, prompts, readout, groups.

    Raises:
        ArgumentError: naming the fact that differs, with what each result has.
    """
    facts_of_one = _facts(one)
    facts_of_other = _facts(other)
    remedy = "compute both with the same lens, prompts and readout"
    if across_prompts:
        required = ["sites", "units"]
    else:
        required = ["sites"]
        # A file of an earlier version does not say where in its rows the prompts end.
        if facts_of_one["responses"] != facts_of_other["responses"]:
            required.append("prompts")
        # The label of a readout need not name all that is said after a prompt.
        required += ["readouts", "responses"]
        remedy += ", or compare results of different prompts: across_prompts=True"
    if isinstance(one, Effects) and isinstance(other, Effects):
        required.append("groups")
    for fact in required:
        of_one = facts_of_one[fact]
        of_other = facts_of_other[fact]
        if of_one != of_other:
            raise ArgumentError(
                f"the two results are of different {fact}: {one.key} has "
                f"{_shown(of_one, of_other)}, {other.key} has {_shown(of_other, of_one)}",
                remedy=f"{remedy}.",
            )


def _facts(result: Attribution | Effects) -> dict[str, list[str]]:
    """The words for each fact that two compared results may need to share."""
    facts = {
        "sites": [site.name for site in result.sites],
        "prompts": ["|".join(PromptTokens.of(tokens).asked) for tokens in result.str_tokens],
        "readouts": [f"{result.readout} in {result.units}"],
        "units": [result.units],
        "responses": ["|".join(tokens) for tokens in result.str_tokens],
    }
    if isinstance(result, Effects):
        facts["groups"] = [str(group) for group in result.groups.items()]
    return facts


def _shown(mine: Sequence[str], theirs: Sequence[str]) -> str:
    """The first items that the other result lacks; where only the order differs, the first."""
    different = [item for item in mine if item not in theirs] or list(mine)
    more = ", …" if len(different) > 2 else ""
    return f"{len(mine)} ({', '.join(different[:2])}{more})"


def _statistics(
    a: Grouped, e: Grouped, clear: Bool[Tensor, "batch group"], k: int, eps: float
) -> dict[str, Float[Tensor, " batch"]]:
    """Every statistic of each prompt, by name."""
    by_prompt: list[dict[str, float]] = []
    for a_of_prompt, e_of_prompt, clear_of_prompt in zip(a, e, clear, strict=True):
        statistics = _statistics_of(
            a_of_prompt.numpy(), e_of_prompt.numpy(), clear_of_prompt.numpy(), k, eps
        )
        by_prompt.append(statistics)
    columns: dict[str, Tensor] = {}
    for name in STATISTICS:
        values = [statistics[name] for statistics in by_prompt]
        columns[name] = torch.tensor(values, dtype=torch.float64)
    return columns


def _statistics_of(
    a: Vector, e: Vector, clear: NDArray[np.bool_], k: int, eps: float
) -> dict[str, float]:
    """Every statistic of one prompt; NaN where it does not exist."""
    has_same_sign = np.sign(a) == np.sign(e)
    sign_agreement = np.nan
    if clear.any():
        sign_agreement = float(has_same_sign[clear].mean())
    return {
        "pearson": correlation(a, e, eps=eps),
        "spearman": correlation(a, e, ranked=True, eps=eps),
        "slope": _slope(a, e, eps),
        "sign_agreement": sign_agreement,
        "top_k_overlap": len(_top(a, k) & _top(e, k)) / k,
        "relative_error": _ratio(float(np.abs(a - e).sum()), float(np.abs(e).sum())),
        "sum_ratio": _ratio(float(a.sum()), float(e.sum())),
    }


def _slope(a: Vector, e: Vector, eps: float) -> float:
    """The slope of the least-squares line of e on a, with an intercept."""
    if is_constant(a, eps):
        return np.nan
    centred = a - a.mean()
    return float(centred @ (e - e.mean()) / (centred @ centred))


def _top(x: Vector, k: int) -> set[int]:
    """The indices of the k largest sizes."""
    order = np.argsort(-np.abs(x), kind="stable")
    return set(order[:k].tolist())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else np.nan


def _intervals_of(values_of: Mapping[str, Tensor], draws: int, seed: int) -> dict[str, Interval]:
    """Bootstrap intervals of the mean over prompts, by the same draws for every statistic."""
    batch = len(values_of["pearson"])
    intervals = dict.fromkeys(values_of, (np.nan, np.nan))
    if batch == 1 or not draws:
        return intervals
    drawn = torch.from_numpy(np.random.default_rng(seed).integers(batch, size=(draws, batch)))
    for name, values in values_of.items():
        means = values[drawn].nanmean(1)
        means = means[~means.isnan()]
        if len(means):
            low, high = np.percentile(means.numpy(), _PERCENTILES)
            intervals[name] = float(low), float(high)
    return intervals
