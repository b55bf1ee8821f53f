"""How well scores answer the questions, as rows of a long table.

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
from lens_lora.core import Evaluations
from lens_lora.core.results.attribution import Attribution
from lens_lora.judging import circuit_scores as circuit_metrics
from lens_lora.judging import rankings

Row = dict[str, Any]
DRAWS = 3
SEED = 0
FIFTH = 0.2
STATISTICS = {of: of for of in ("spearman", "pearson", "slope")} | {"relative_error": "error"}
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
    """Values of these prompts and sites, with their labels."""
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
        every = {key: [values] for key, values in scores.items() if key != how}
        for key, some in {**every, "random": list(draws)}.items():
            found = [_statistics(g, values, key, measured) for values in some]
            rows += [
                {
                    "prompts": kind,
                    "question": how,
                    "metric": metric,
                    "method": key,
                    "value": sum(one[metric] for one in found) / len(found),
                }
                for metric in found[0]
            ]
    return rows


def _statistics(
    g: Evaluations, values: Tensor, key: str, measured: Attribution
) -> dict[str, float]:
    found = ll.compare(attribution_of(g, values.double(), key), measured, bootstrap=0)
    chosen = {k: v for k, v in STATISTICS.items() if key not in WITHOUT_UNIT or v not in OF_SIZE}
    return {name: found.mean(statistic) for statistic, name in chosen.items()}


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
            rows += [
                {
                    "prompts": kind,
                    "question": f"{how}/held_out",
                    "metric": metric,
                    "method": key,
                    "value": found.mean(metric),
                }
                for metric in ("spearman", "pearson")
            ]
    return rows


def sums(kind: str, g: Evaluations, scores: Mapping[str, Tensor]) -> list[Row]:
    """Σ of each method's scores, as a share of the shift of all prompts together."""
    base, adapted = g.ends.cpu().double()
    signs = (adapted - base).sign()
    size = (adapted - base).abs().sum()
    return [
        {
            "prompts": kind,
            "question": "sum",
            "metric": "sum",
            "method": key,
            "value": float((values.cpu().double().sum(1) * signs).sum() / size),
        }
        for key, values in scores.items()
        if key not in WITHOUT_UNIT
    ]


@dataclasses.dataclass(frozen=True)
class Judge:
    """Rankings made on the trained wording.

    Attributes:
        trained: the prompts that they were made on.
        scores: each method's, of those prompts.
        sets: sets of sites that are no ranking, by key: [site], true for those in the set.
    """

    trained: Evaluations
    scores: Mapping[str, Tensor]
    sets: Mapping[str, Tensor]

    def rows(self, kind: str, g: Evaluations) -> list[Row]:
        """How they do on other prompts."""
        given = {**self.scores, **{key: of.double() for key, of in self.sets.items()}}
        towards = (self.trained.ends[1] - self.trained.ends[0]).sign().double()[:, None]
        means = {
            key: of if key in self.sets else (of.double() * towards).mean(0)
            for key, of in given.items()
        }
        batch = g.reading.batch
        sites = len(g.lens.sites)
        signed = torch.stack([rankings.by_score(mean) for mean in means.values()])
        sized = torch.stack([rankings.by_score(mean.abs()) for mean in means.values()])
        random = circuit_metrics.random_orders(sites, 1, DRAWS, SEED)[:, 0]
        orders, by_size = (
            torch.cat([some, random])[:, None].expand(-1, batch, -1) for some in (signed, sized)
        )
        found = circuit_metrics.scored(g, orders, by_size)
        fifth = found.kept[:, circuit_metrics.MIB_SIZES.index(FIFTH)]
        metrics = {"cpr": found.cpr, "cmd": found.cmd, "kept": fifth}
        rows: list[Row] = []
        for metric, values in metrics.items():
            named = dict(zip(means, values.tolist(), strict=False))
            named["random"] = float(values[len(means) :].mean())
            rows += [
                {"prompts": kind, "question": "keep", "metric": metric, "method": k, "value": v}
                for k, v in named.items()
                if metric == "kept" or k not in self.sets
            ]
        return rows
