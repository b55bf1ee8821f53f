"""Resample the training tasks: how often does an interval cover, and how stable is a choice?

    python -m benchmarks.evidence.resampled      # minutes, into docs/faithfulness.json

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
from jaxtyping import Float
from scipy import stats
from tqdm import tqdm

from benchmarks.evidence.intervals import LEVEL, choice, summary
from benchmarks.evidence.results import Numbers, bases_of, costs_of, read, scores_of, write
from benchmarks.evidence.tables import Question, means_of
from benchmarks.evidence.words import ASKED, ERRORS, as_run, estimates

DRAWS = 2000
BOOTSTRAP = 999
SEED = 0
SIZES = (17, 6)


def study(numbers: Numbers, draws: int = DRAWS) -> dict[str, Any]:
    """Shares of the resamples: by what they choose, and in which the interval covers."""
    scores = scores_of(numbers)
    costs = costs_of(numbers)
    base = bases_of(numbers)[0]
    choices: dict[str, dict[str, float]] = {}
    coverage: dict[str, dict[str, Any]] = {}
    for question in tqdm(ASKED, desc="questions"):
        means, passes = estimates(scores, costs, question, base)
        samples = resamples(means, draws)
        counts = Counter(_chosen_from(sample, passes, question) for sample in samples)
        choices[question.label] = {name: count / draws for name, count in counts.most_common()}
        method = _chosen_from(means, passes, question)
        scored_by = [question]
        if question in ERRORS:
            scored_by.append(ERRORS[question])
        for scored in scored_by:
            values = means_of(scores, scored, base)[method].dropna().to_numpy()
            covered = {str(size): coverages(values, size, draws) for size in SIZES}
            coverage[scored.label] = {"method": method, **covered}
    return {
        "choices": choices,
        "coverage": coverage,
        "how": {"draws": draws, "bootstrap": BOOTSTRAP, "seed": SEED, "base": base},
    }


def _chosen_from(means: pd.DataFrame, passes: dict[str, float], question: Question) -> str:
    """The cheapest method of the tie on these tasks, named as the call that runs it."""
    method = choice(means, passes, larger_is_better=question.larger)
    return as_run(question, method)


def resamples(means: pd.DataFrame, draws: int) -> list[pd.DataFrame]:
    """Samples of as many tasks, drawn with replacement; a task that comes twice counts as two."""
    indices = np.random.default_rng(SEED).integers(0, len(means), (draws, len(means)))
    return [means.iloc[index].reset_index(drop=True) for index in indices]


def coverages(values: Float[np.ndarray, " task"], size: int, draws: int) -> dict[str, float]:
    """How often the interval of a sample of this size holds the number of all tasks."""
    samples = values[np.random.default_rng(SEED).integers(0, len(values), (draws, size))]
    true_median = np.median(values)
    summaries = [summary(sample) for sample in samples]
    covers_median = [found.low <= true_median <= found.high for found in summaries]
    how = {"n_resamples": BOOTSTRAP, "batch": 50, "confidence_level": LEVEL, "rng": SEED}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        low, high = stats.bootstrap((samples,), np.mean, axis=-1, **how).confidence_interval
    # A bootstrap of equal numbers has no interval (NaN): their mean takes its place.
    low = np.where(np.isnan(low), samples.mean(1), low)
    high = np.where(np.isnan(high), samples.mean(1), high)
    covers_mean = (low <= values.mean()) & (values.mean() <= high)
    return {
        "median": float(np.mean(covers_median)),
        "mean": float(covers_mean.mean()),
    }


if __name__ == "__main__":
    stored = read()
    write({**stored, "resampled": study(stored)})
