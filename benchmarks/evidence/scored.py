"""Judge how well scores answer the questions, as rows of a long table.

add_one, leave_one_out    each prompt's own scores against its measured effects: Spearman,
                          Pearson, slope, Σ|error| / Σ|effect|; means over prompts
… /held_out               scores made on the trained wording, in the mean over its prompts,
                          against the effects on other prompts
keep                      ranked on the trained wording, judged on these prompts: CPR, CMD, and
                          the share that a fifth of the sites keeps
sum                       Σ_l of the scores over the shift, all prompts together
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import lens_lora as ll
from benchmarks.evidence.signals import share_of
from lens_lora.core import Evaluations
from lens_lora.core.results.attribution import Attribution
from lens_lora.judging import circuit_scores as circuit_metrics
from lens_lora.judging import rankings

Row = dict[str, Any]
# How many random rankings are drawn; their mean is the chance level.
DRAWS = 3
SEED = 0
FIFTH = 0.2
# Statistics of `ll.compare`, and what they are called in the rows.
STATISTICS = {
    "spearman": "spearman",
    "pearson": "pearson",
    "slope": "slope",
    "relative_error": "error",
}
# The statistics that depend on the size of a score.
OF_SIZE = ("slope", "error")
# Scores that are not in the readout's units: no statistic of their size is computed.
WITHOUT_UNIT = (
    "weight_norm",
    "update_norm",
    "norm_product",
    "signed_weight_norm",
    "signed_random",
    "random",
)


def _row(kind: str, question: str, metric: str, method: str, value: float) -> Row:
    """A row of the long table; `kind` is the kind of prompt."""
    return {
        "prompts": kind,
        "question": question,
        "metric": metric,
        "method": method,
        "value": value,
    }


def attribution_of(g: Evaluations, values: Tensor, key: str) -> Attribution:
    """Label values [prompt, site] as an attribution of g's prompts and sites."""
    return Attribution(
        values=values,
        by=(),
        heads=(0,) * len(g.lens.sites),
        method=key,
        at=math.nan,
        **g.header(),
    )


def agreement(
    kind: str, g: Evaluations, scores: Mapping[str, Tensor], effects: Mapping[str, Tensor]
) -> list[Row]:
    """Each method's own scores against measured effects on the same prompts."""
    random_scores = _random_scores(next(iter(effects.values())).shape)
    rows: list[Row] = []
    for how, effect in effects.items():
        measured = attribution_of(g, effect.double(), how)
        for method, values in scores.items():
            if method == how:
                continue
            for metric, value in _statistics(g, values, method, measured).items():
                rows.append(_row(kind, how, metric, method, value))
        of_draws = [_statistics(g, values, "random", measured) for values in random_scores]
        for metric in of_draws[0]:
            mean = sum(statistics[metric] for statistics in of_draws) / len(of_draws)
            rows.append(_row(kind, how, metric, "random", mean))
    return rows


def _random_scores(shape: torch.Size) -> Tensor:
    """Random values for every prompt and site, the chance level: [draw, prompt, site]."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.rand((DRAWS, *shape), generator=generator, dtype=torch.float64)


def _statistics(
    g: Evaluations, values: Tensor, method: str, measured: Attribution
) -> dict[str, float]:
    """Compare one method's values with the measured effects, in the mean over prompts."""
    comparison = ll.compare(attribution_of(g, values.double(), method), measured, bootstrap=0)
    statistics: dict[str, float] = {}
    for statistic, metric in STATISTICS.items():
        is_meaningless = method in WITHOUT_UNIT and metric in OF_SIZE
        if not is_meaningless:
            statistics[metric] = comparison.mean(statistic)
    return statistics


def held_out(
    kind: str,
    trained: Evaluations,
    scores: Mapping[str, Tensor],
    g: Evaluations,
    effects: Mapping[str, Tensor],
) -> list[Row]:
    """Scores made on the trained wording against measured effects on other prompts."""
    rows: list[Row] = []
    for how, effect in effects.items():
        measured = attribution_of(g, effect.double(), how)
        for method, values in scores.items():
            made = attribution_of(trained, values.double(), method)
            comparison = ll.compare(made, measured, across_prompts=True, bootstrap=0)
            for metric in ("spearman", "pearson"):
                rows.append(_row(kind, f"{how}/held_out", metric, method, comparison.mean(metric)))
    return rows


def sums(kind: str, g: Evaluations, scores: Mapping[str, Tensor]) -> list[Row]:
    """Σ of each method's scores, as a share of the shift of all prompts together."""
    base, adapted = g.ends.cpu().double()
    rows: list[Row] = []
    for method, values in scores.items():
        if method not in WITHOUT_UNIT:
            share = share_of(adapted - base, values.cpu().double())
            rows.append(_row(kind, "sum", "sum", method, share))
    return rows


@dataclasses.dataclass(frozen=True)
class Judge:
    """Judges rankings that were made on the trained wording.

    Attributes:
        trained: g on the prompts that the rankings were made on.
        scores: each method's values [prompt, site] on those prompts.
        sets: sets of sites that are no ranking, by key: [site], true for the sites in the set.
    """

    trained: Evaluations
    scores: Mapping[str, Tensor]
    sets: Mapping[str, Tensor]

    def rows(self, kind: str, g: Evaluations) -> list[Row]:
        """CPR, CMD and the kept share of a fifth, of each ranking and set on other prompts."""
        means = self._means()
        random = circuit_metrics.random_orders(len(g.lens.sites), 1, DRAWS, SEED)[:, 0]
        by_value = [rankings.by_score(mean) for mean in means.values()]
        by_size = [rankings.by_score(mean.abs()) for mean in means.values()]
        found = circuit_metrics.scored(
            g,
            _for_each_prompt(by_value, random, g.reading.batch),
            _for_each_prompt(by_size, random, g.reading.batch),
        )
        fifth = circuit_metrics.MIB_SIZES.index(FIFTH)
        metrics = {"cpr": found.cpr, "cmd": found.cmd, "kept": found.kept[:, fifth]}
        rows: list[Row] = []
        for metric, values in metrics.items():
            # The random orders come after those of the methods.
            of_methods = values[: len(means)].tolist()
            of_random = values[len(means) :]
            for method, value in zip(means, of_methods, strict=True):
                # A set has one size, so it has no curve over sizes.
                is_ranking = method not in self.sets
                if is_ranking or metric == "kept":
                    rows.append(_row(kind, "keep", metric, method, value))
            rows.append(_row(kind, "keep", metric, "random", float(of_random.mean())))
        return rows

    def _means(self) -> dict[str, Tensor]:
        """One number a site for each ranking and set, [site].

        A score is averaged over prompts, each with the sign of its shift: positive moves the
        readout the way the adapter does. A set is 1 for its members and 0 for all others.
        """
        base, adapted = self.trained.ends
        signs = (adapted - base).sign().double()[:, None]
        means: dict[str, Tensor] = {}
        for method, values in self.scores.items():
            means[method] = (values.double() * signs).mean(0)
        for key, members in self.sets.items():
            means[key] = members.double()
        return means


def _for_each_prompt(orders: list[Tensor], random: Tensor, batch: int) -> Tensor:
    """The methods' orders, then the random ones, for every prompt: [order, prompt, site]."""
    every_order = torch.cat([torch.stack(orders), random])
    return every_order[:, None].expand(-1, batch, -1)
