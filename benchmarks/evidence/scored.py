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
from signals import share_of
from torch import Tensor

import lens_lora as ll
from lens_lora.core import Evaluations
from lens_lora.core.results.attribution import Attribution
from lens_lora.judging import circuit_scores as circuit_metrics
from lens_lora.judging import rankings

Row = dict[str, Any]
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
OF_SIZE = ("slope", "error")
# Scores that are in no unit: only what does not depend on their size is asked of them.
WITHOUT_UNIT = (
    "weight_norm",
    "update_norm",
    "norm_product",
    "signed_weight_norm",
    "signed_random",
    "random",
)


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
    generator = torch.Generator().manual_seed(SEED)
    shape = (DRAWS, *next(iter(effects.values())).shape)
    draws = torch.rand(shape, generator=generator, dtype=torch.float64)
    rows: list[Row] = []
    for how, effect in effects.items():
        measured = attribution_of(g, effect.double(), how)
        values_of = {key: [values] for key, values in scores.items() if key != how}
        values_of["random"] = list(draws)
        for key, draws_of_key in values_of.items():
            statistics = [_statistics(g, values, key, measured) for values in draws_of_key]
            for metric in statistics[0]:
                total = sum(of_draw[metric] for of_draw in statistics)
                row: Row = {
                    "prompts": kind,
                    "question": how,
                    "metric": metric,
                    "method": key,
                    "value": total / len(statistics),
                }
                rows.append(row)
    return rows


def _statistics(
    g: Evaluations, values: Tensor, key: str, measured: Attribution
) -> dict[str, float]:
    """Compare one method's values with the measured effects, in the mean over prompts."""
    found = ll.compare(attribution_of(g, values.double(), key), measured, bootstrap=0)
    statistics = {}
    for statistic, name in STATISTICS.items():
        is_meaningless = key in WITHOUT_UNIT and name in OF_SIZE
        if not is_meaningless:
            statistics[name] = found.mean(statistic)
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
        for key, values in scores.items():
            made = attribution_of(trained, values.double(), key)
            found = ll.compare(made, measured, across_prompts=True, bootstrap=0)
            for metric in ("spearman", "pearson"):
                row: Row = {
                    "prompts": kind,
                    "question": f"{how}/held_out",
                    "metric": metric,
                    "method": key,
                    "value": found.mean(metric),
                }
                rows.append(row)
    return rows


def sums(kind: str, g: Evaluations, scores: Mapping[str, Tensor]) -> list[Row]:
    """Σ of each method's scores, as a share of the shift of all prompts together."""
    base, adapted = g.ends.cpu().double()
    rows: list[Row] = []
    for key, values in scores.items():
        if key in WITHOUT_UNIT:
            continue
        row: Row = {
            "prompts": kind,
            "question": "sum",
            "metric": "sum",
            "method": key,
            "value": share_of(adapted - base, values.cpu().double()),
        }
        rows.append(row)
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
        batch = g.reading.batch
        random = circuit_metrics.random_orders(len(g.lens.sites), 1, DRAWS, SEED)[:, 0]
        by_value = [rankings.by_score(mean) for mean in means.values()]
        by_size = [rankings.by_score(mean.abs()) for mean in means.values()]
        orders = torch.cat([torch.stack(by_value), random])[:, None].expand(-1, batch, -1)
        size_orders = torch.cat([torch.stack(by_size), random])[:, None].expand(-1, batch, -1)
        found = circuit_metrics.scored(g, orders, size_orders)
        fifth = found.kept[:, circuit_metrics.MIB_SIZES.index(FIFTH)]
        metrics = {"cpr": found.cpr, "cmd": found.cmd, "kept": fifth}
        rows: list[Row] = []
        for metric, values in metrics.items():
            value_of = dict(zip(means, values.tolist(), strict=False))
            value_of["random"] = float(values[len(means) :].mean())
            for method, value in value_of.items():
                is_ranking = method not in self.sets
                if is_ranking or metric == "kept":
                    row: Row = {
                        "prompts": kind,
                        "question": "keep",
                        "metric": metric,
                        "method": method,
                        "value": value,
                    }
                    rows.append(row)
        return rows

    def _means(self) -> dict[str, Tensor]:
        """One number a site for each ranking and set: the mean over prompts, towards the shift."""
        base, adapted = self.trained.ends
        towards = (adapted - base).sign().double()[:, None]
        means = {key: (values.double() * towards).mean(0) for key, values in self.scores.items()}
        for key, members in self.sets.items():
            means[key] = members.double()
        return means
