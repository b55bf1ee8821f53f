"""Intervals over training tasks: known answers, and mistakes that they must not make."""

from __future__ import annotations

import evidence
import numpy as np
import pandas as pd
import pytest

of = evidence.load("intervals")


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
    once, often = (of.interval(of.cluster_means(long(r))["m"]) for r in (rows, copies))
    counted_as_adapters = of.interval(np.repeat(values, 20))
    assert (once.low, once.high) == pytest.approx((often.low, often.high), rel=1e-3)
    assert counted_as_adapters.high - counted_as_adapters.low < 0.4 * (once.high - once.low)


def test_the_interval_covers_a_known_mean_about_as_often_as_it_says():
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        found = of.interval(draw.normal(2.0, 1.0, size=16))
        hits += found.low <= 2.0 <= found.high
    assert 86 <= hits <= 99


def test_it_is_about_the_interval_of_t_on_normal_numbers():
    values = np.random.default_rng(2).normal(size=40)
    half = 2.0227 * values.std(ddof=1) / np.sqrt(40)
    found = of.interval(values)
    assert found.mean == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_a_difference_is_paired():
    """A constant lead of 0.01 is seen through a spread of 1 between tasks; unpaired it is not."""
    spread = np.random.default_rng(3).normal(size=12)
    means = pd.DataFrame({"a": spread + 0.01, "b": spread})
    found = of.difference(means, "a", "b")
    assert (found.low, found.high) == pytest.approx((0.01, 0.01))
    assert not found.tie
    alone = of.interval(means["a"])
    assert alone.low < means["b"].mean() < alone.high


def test_ties_are_called_ties_and_losses_losses():
    draw = np.random.default_rng(4)
    base = draw.normal(size=20)
    means = pd.DataFrame(
        {"best": base, "equal": base + draw.normal(0, 0.1, 20) - 0.005, "worse": base - 0.5}
    )
    standing = {s.method: s for s in of.ranked(means)}
    assert standing["best"].tie and standing["equal"].tie
    assert not standing["worse"].tie
    assert standing["worse"].behind.mean == pytest.approx(-0.5)
    errors = {s.method: s for s in of.ranked(-means, larger_is_better=False)}
    assert [s.tie for s in errors.values()] == [True, True, False]
    assert errors["worse"].behind.mean == pytest.approx(-0.5)


def test_the_recommendation_is_the_cheapest_tie():
    base = np.random.default_rng(5).normal(size=20)
    jitter = np.random.default_rng(6).normal(0, 0.1, 20)
    means = pd.DataFrame({"dear": base, "cheap": base + jitter - jitter.mean(), "bad": base - 1})
    found = of.cheapest_of_the_best(of.ranked(means), {"dear": 20.0, "cheap": 2.0, "bad": 0.1})
    assert found.method == "cheap"


def test_fewer_than_three_tasks_have_no_interval_and_prove_nothing():
    found = of.interval(np.array([1.0, 2.0]))
    assert found.mean == 1.5
    assert np.isnan(found.low)
    assert found.tie


violent = evidence.load("violent")


def cases(informative: bool) -> pd.DataFrame:
    """Sixty cases, a third of them broken; half of them choose, the others confirm."""
    draw, place = np.random.default_rng(7), np.arange(60)
    broken = place % 3 == 0
    signal = draw.uniform(size=60) + (2.0 * broken if informative else 0.0)
    return pd.DataFrame({"confirms": place % 2 == 0, "signal": signal, "broken": broken})


def test_a_warning_that_knows_is_right_on_cases_that_it_has_not_seen():
    threshold, chosen, confirmed = violent.confusion(cases(True), "signal")
    assert 1.0 < threshold < 2.1 and chosen.f1 == 1.0
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
    strengths, means = [at for at, _ in points], [found.mean for _, found in points]
    assert strengths == sorted(strengths)
    assert means[:2] == [0.99, 0.99]
    assert means[3] == 0.5


def test_the_pareto_front_is_what_nothing_cheaper_beats():
    points = [(1.0, 0.2), (2.0, 0.9), (2.0, 0.5), (5.0, 0.8), (9.0, 0.95)]
    assert evidence.load("pictures").front(points) == [0, 1, 4]
