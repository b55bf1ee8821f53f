"""Intervals over training tasks: known answers, and mistakes that they must not make."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.evidence import intervals as of
from benchmarks.evidence import pictures, resampled, violent


def long(rows: list[tuple[str, str, str, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["cluster", "adapter", "method", "value"])


def test_each_training_task_counts_once_whatever_its_adapters_and_prompts():
    means = of.cluster_means(
        long(
            [
                ("one", "a", "m", 0.0),
                ("one", "a", "m", 1.0),
                ("one", "a", "m", 2.0),
                ("one", "b", "m", 5.0),
                ("two", "c", "m", 7.0),
            ]
        )
    )
    assert means["m"].to_dict() == {"one": 3.0, "two": 7.0}


def test_copies_of_an_adapter_do_not_narrow_an_interval():
    """The mistake of counting adapters: twenty copies of each would look like more evidence."""
    values = np.random.default_rng(0).normal(size=12)
    rows = [(f"task {i}", f"{i}-0", "m", v) for i, v in enumerate(values)]
    copies = [(f"task {i}", f"{i}-{j}", "m", v) for j in range(20) for i, v in enumerate(values)]
    once, often = (of.summary(of.cluster_means(long(r))["m"]) for r in (rows, copies))
    counted_as_adapters = of.summary(np.repeat(values, 20))
    assert (once.low, once.high) == pytest.approx((often.low, often.high))
    assert counted_as_adapters.high - counted_as_adapters.low < 0.5 * (once.high - once.low)


def test_the_interval_is_that_of_order_statistics():
    """Of 17 the fifth to the thirteenth, of 6 the range, of fewer none; the binomial says why."""
    found = of.summary(np.arange(17.0)[::-1])
    assert (found.median, found.low, found.high, found.worst, found.tasks) == (8, 4, 12, 0, 17)
    assert 1 - 2 * stats.binom.cdf(4, 17, 0.5) >= 0.95 > 1 - 2 * stats.binom.cdf(5, 17, 0.5)
    errors = of.summary(np.append(np.arange(6.0), np.nan), larger_is_better=False)
    assert (errors.low, errors.high, errors.worst, errors.tasks) == (0, 5, 5, 6)
    assert np.isnan(of.summary(np.arange(5.0)).low)


def outlier_population() -> np.ndarray:
    """Seventeen tasks, of which one carries the mean."""
    return np.append(np.linspace(0.0, 0.1, 16), 3.0)


@pytest.mark.parametrize("size", [17, 6])
def test_the_interval_covers_where_one_task_carries_the_mean(size: int):
    """At least as often as it says; the bootstrap of the mean, beside it, does not."""
    covered = resampled.coverages(outlier_population(), size, 300)
    assert covered["median"] >= 0.93
    assert covered["mean"] < 0.8


@pytest.mark.slow
def test_coverage_of_resampled_tasks_is_what_binomials_say():
    values = outlier_population()
    for size in (17, 6):
        found = resampled.coverages(values, size, 1000)["median"]
        assert abs(found - exact_coverage(values, size)) < 4 * np.sqrt(0.05 * 0.95 / 1000)


def exact_coverage(values: np.ndarray, size: int) -> float:
    """Of the interval from the k-th to the k-th last of a sample, for the median of all values."""
    k = 1 + int(stats.binom.ppf(0.025, size, 0.5) - 1)
    low = (values <= np.median(values)).mean()
    high = (values >= np.median(values)).mean()
    return 1 - stats.binom.cdf(k - 1, size, low) - stats.binom.cdf(k - 1, size, high)


@pytest.mark.parametrize("count", [2, 7, 10])
def test_the_sign_flip_test_is_exact(count: int):
    """scipy's enumeration of all patterns, with zeros and equal differences among them."""
    draw = np.random.default_rng(count)
    for shift in (0.0, 0.3, 1.0):
        values = (draw.normal(shift, 1.0, size=count)).round(1)
        expected = stats.permutation_test(
            (values,),
            lambda x, axis: x.mean(axis),
            vectorized=True,
            permutation_type="samples",
            n_resamples=np.inf,
        )
        assert of.sign_flip(values) == pytest.approx(expected.pvalue, abs=1e-12)


def test_sign_flip_by_hand():
    assert of.sign_flip(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert of.sign_flip(np.array([3.0, -1.0, -2.0])) == 1.0
    assert of.sign_flip(np.zeros(4)) == 1.0
    assert of.sign_flip(np.ones(17)) == 2 / 2**17


def test_holm_by_hand():
    assert of.holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def false_alarms() -> int:
    """Of 60 tables whose twenty rows are noise, how many call one better or worse."""
    draw = np.random.default_rng(8)
    tables = (pd.DataFrame(draw.normal(size=(12, 20))) for _ in range(60))
    return sum(of.verdicts(table).isin(["better", "worse"]).any() for table in tables)


def test_a_table_of_noise_has_no_verdicts(monkeypatch: pytest.MonkeyPatch):
    """And a planted fault, p that are not corrected, is seen."""
    assert false_alarms() <= 7
    monkeypatch.setattr(of, "holm", lambda p: p)
    assert false_alarms() >= 25


def test_too_few_tasks_have_no_verdict():
    """Six never, seven only in a table of one row, seventeen in any of ours."""
    apart = pd.DataFrame({row: np.linspace(1, 2, 17) for row in range(25)})
    assert set(of.verdicts(apart)) == {"better"}
    assert set(of.verdicts(apart[:7])) == {of.TOO_FEW}
    assert of.verdicts(apart.loc[:6, [0]])[0] == "better"
    assert of.verdicts(apart.loc[:5, [0]])[0] == of.TOO_FEW
    some = apart.assign(**{"few": [*[1.0] * 6, *[np.nan] * 11]})
    assert of.verdicts(some)["few"] == of.TOO_FEW
    assert of.verdicts(some)[0] == "better"


def test_a_difference_is_paired():
    """A constant lead of 0.01 is seen through a spread of 1 between tasks; unpaired it is not."""
    spread = np.random.default_rng(3).normal(size=12)
    means = pd.DataFrame({"a": spread + 0.01, "b": spread})
    found = {s.method: s for s in of.ranked(means)}
    assert (found["a"].verdict, found["b"].verdict) == ("best", "worse")
    assert found["b"].behind == pytest.approx(-0.01)
    assert found["a"].score.low < found["b"].score.median < found["a"].score.high
    shuffled = means.assign(b=np.roll(spread, 1))
    assert {s.verdict for s in of.ranked(shuffled)} == {"best", "tie"}


def test_ties_are_called_ties_and_losses_losses():
    draw = np.random.default_rng(4)
    base = draw.normal(size=20)
    means = pd.DataFrame(
        {"best": base, "equal": base + draw.normal(0, 0.1, 20) - 0.005, "worse": base - 0.5}
    )
    standing = {s.method: s for s in of.ranked(means)}
    assert standing["best"].tie
    assert standing["equal"].tie
    assert not standing["worse"].tie
    assert standing["worse"].behind == pytest.approx(-0.5)
    errors = {s.method: s for s in of.ranked(-means, larger_is_better=False)}
    assert {m: s.tie for m, s in errors.items()} == {m: s.tie for m, s in standing.items()}
    assert errors["worse"].behind == pytest.approx(-0.5)
    assert errors["worse"].score.worst == -means["worse"].min()


def test_the_choice_is_the_cheapest_tie():
    base = np.random.default_rng(5).normal(size=20)
    jitter = np.random.default_rng(6).normal(0, 0.1, 20)
    cheap = base + jitter - jitter.mean()
    means = pd.DataFrame({"dear": base, "cheap": cheap, "same": cheap - 1e-3, "bad": base - 1})
    means["some"] = np.where(np.arange(20) < 12, base + 1, np.nan)
    cost = {"dear": 20.0, "cheap": 2.0, "same": 2.0, "bad": 0.1, "some": 0.1}
    assert of.choice(means, cost) == "cheap"
    assert of.choice(-means, cost, larger_is_better=False) == "cheap"
    assert set(of.tied(means)) == {"dear", "cheap", "same"}
    *complete, last = of.ranked(means)
    assert last.method == "some"
    assert last.verdict == "better"
    assert len(complete) == 4


def test_a_choice_that_other_tasks_would_not_make_is_seen():
    """A method far ahead is chosen in every resample, one of two that differ by luck is not."""
    draw = np.random.default_rng(9)
    cost = {"a": 3.0, "b": 3.0}
    base = draw.normal(size=17)
    clear = pd.DataFrame({"a": base, "b": base - 1})
    even = pd.DataFrame({"a": base, "b": base + draw.normal(0, 0.3, 17)})
    shares = [
        np.mean([of.choice(sample, cost) == "a" for sample in resampled.resamples(means, 100)])
        for means in (clear, even)
    ]
    assert shares[0] == 1.0
    assert 0.1 < shares[1] < 0.9


def cases(informative: bool) -> pd.DataFrame:
    """Sixty cases, a third of them broken; half of them choose, the others confirm."""
    draw = np.random.default_rng(7)
    place = np.arange(60)
    broken = place % 3 == 0
    signal = draw.uniform(size=60) + (2.0 * broken if informative else 0.0)
    return pd.DataFrame({"confirms": place % 2 == 0, "signal": signal, "broken": broken})


def test_a_warning_that_knows_is_right_on_cases_that_it_has_not_seen():
    threshold, chosen, confirmed = violent.confusion(cases(True), "signal")
    assert 1.0 < threshold < 2.1
    assert chosen.f1 == 1.0
    assert confirmed == violent.Counts(hit=10, false=0, missed=0, silent=20)


def test_a_warning_that_knows_nothing_is_no_better_than_the_share_of_broken():
    _, _, confirmed = violent.confusion(cases(False), "signal")
    assert confirmed.hit < 0.5 * (confirmed.hit + confirmed.false)


def test_what_confirms_does_not_choose_the_threshold():
    """A case that is broken at a signal where no other is: chosen with it, it would be caught."""
    table = cases(True)
    table.loc[len(table)] = {"confirms": True, "signal": 0.5, "broken": True}
    assert violent.confusion(table, "signal")[2].missed == 1


def violent_cases() -> pd.DataFrame:
    """Sixteen adapters of eight tasks: an estimate holds up to strength 1 and breaks above it."""
    rows = []
    for i in range(16):
        strength = 0.1 * (i + 1) if i < 10 else float(i)
        good = 0.99 if strength <= 1 else 0.5
        rows.append((f"task {i % 8}", f"a{i}", "m", strength, good))
    columns = ["cluster", "adapter", "method", "strength", "agreement"]
    return pd.DataFrame(rows, columns=columns)


def test_the_curve_over_strength_falls_where_the_estimate_breaks():
    points = violent.curve(violent_cases())["m"]
    strengths = [at for at, _ in points]
    means = [found.median for _, found in points]
    assert strengths == sorted(strengths)
    assert means[:2] == [0.99, 0.99]
    assert means[3] == 0.5


def test_the_pareto_front_is_what_nothing_cheaper_beats():
    points = [(1.0, 0.2), (2.0, 0.9), (2.0, 0.5), (5.0, 0.8), (9.0, 0.95)]
    assert pictures.front(points) == [0, 1, 4]
