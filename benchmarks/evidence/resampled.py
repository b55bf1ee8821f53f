"""What resampling training tasks shows: how often an interval covers, how stable a choice is.

    python benchmarks/evidence/resampled.py      # minutes, into docs/faithfulness.json

The tasks of the first base stand for all tasks: samples of them are drawn with replacement.

1. Coverage, for each number that the page opens with: how often the interval of a sample of 17 or
   of 6 tasks holds the number of all. Of order statistics for the median, and, as the page had it
   before, of the BCa bootstrap for the mean.
2. Choices: how often each method is the cheapest of the tie, for each question.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
from intervals import LEVEL, choice, summary
from jaxtyping import Float
from results import Numbers, bases_of, costs_of, read, scores_of, write
from scipy import stats
from tables import means_of
from tqdm import tqdm
from words import ASKED, ERRORS, as_run, estimates

DRAWS = 2000
BOOTSTRAP = 999
SEED = 0
SIZES = (17, 6)


def study(numbers: Numbers, draws: int = DRAWS) -> dict[str, Any]:
    """Shares of the resamples, by question."""
    scores = scores_of(numbers)
    costs = costs_of(numbers)
    base = bases_of(numbers)[0]
    choices: dict[str, dict[str, float]] = {}
    coverage: dict[str, dict[str, Any]] = {}
    for question in tqdm(ASKED, desc="questions"):
        means, passes = estimates(scores, costs, question, base)
        larger = question.larger
        picked = [
            as_run(question, choice(sample, passes, larger_is_better=larger))
            for sample in resamples(means, draws)
        ]
        choices[question.label] = {m: n / draws for m, n in Counter(picked).most_common()}
        method = as_run(question, choice(means, passes, larger_is_better=larger))
        for asked in filter(None, (question, ERRORS.get(question))):
            values = means_of(scores, asked, base)[method].dropna().to_numpy()
            covered = {str(size): coverages(values, size, draws) for size in SIZES}
            coverage[asked.label] = {"method": method, **covered}
    return {
        "choices": choices,
        "coverage": coverage,
        "how": {"draws": draws, "bootstrap": BOOTSTRAP, "seed": SEED, "base": base},
    }


def resamples(means: pd.DataFrame, draws: int) -> list[pd.DataFrame]:
    """Samples of as many tasks, drawn with replacement; a task that comes twice counts as two."""
    indices = np.random.default_rng(SEED).integers(0, len(means), (draws, len(means)))
    return [means.iloc[index].reset_index(drop=True) for index in indices]


def coverages(values: Float[np.ndarray, " task"], size: int, draws: int) -> dict[str, float]:
    """How often the interval of a sample of this size holds the number of all tasks."""
    samples = values[np.random.default_rng(SEED).integers(0, len(values), (draws, size))]
    middle = [summary(sample) for sample in samples]
    how = {"n_resamples": BOOTSTRAP, "batch": 50, "confidence_level": LEVEL, "rng": SEED}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        low, high = stats.bootstrap((samples,), np.mean, axis=-1, **how).confidence_interval
    # It has no interval of equal numbers, which are their own.
    low, high = (np.where(np.isnan(end), samples.mean(1), end) for end in (low, high))
    covers = (low <= values.mean()) & (values.mean() <= high)
    return {
        "median": float(np.mean([one.low <= np.median(values) <= one.high for one in middle])),
        "mean": float(covers.mean()),
    }


if __name__ == "__main__":
    stored = read()
    write({**stored, "resampled": study(stored)})
