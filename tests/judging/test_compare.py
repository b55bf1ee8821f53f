"""Comparisons: every statistic against scipy or a loop, laws, and what must not be compared."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from results_by_hand import two_prompts
from scipy import stats
from torch import Tensor

import lens_lora as ll
from lens_lora.core import Effects, Sites
from lens_lora.judging.compare import Comparison, compare

KINDS = ("q", "k", "v", "o", "gate", "down")
SITES = tuple(
    ll.results.Site(f"blocks.{layer}.x.{kind}", f"m.{layer}.{kind}", layer, kind, "r", "w", 2)
    for layer in range(3)
    for kind in KINDS
)
BATCH = 4
COUNT = len(SITES)


def attribution(values: Tensor, **fields) -> ll.results.Attribution:
    """An attribution of these numbers, [batch, site]."""
    batch = len(values)
    known = {
        "by": (),
        "sites": SITES[: values.shape[1]],
        "heads": (0,) * values.shape[1],
        "base": torch.zeros(batch, dtype=values.dtype),
        "adapted": values.flatten(1).sum(1),
        "str_tokens": tuple((f"p{i}", " is") for i in range(batch)),
        "readout": "margin(5 − 9)",
        "units": "logits",
        "method": "first_order",
        "at": 0.0,
        "meta": {"adapter": "a"},
    }
    return ll.results.Attribution(values=values, **{**known, **fields})


def effects(values: Tensor, group="site", how: str = "leave_one_out") -> Effects:
    whole = attribution(torch.zeros(len(values), COUNT, dtype=values.dtype))
    return Effects(
        values=values,
        groups=Sites(SITES).grouped(group),
        how=how,
        **{
            f: getattr(whole, f)
            for f in ("sites", "base", "adapted", "str_tokens", "readout", "units", "meta")
        },
    )


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(BATCH, COUNT, generator=generator, dtype=torch.float64)
    e = 0.5 * a + 0.4 * torch.randn(BATCH, COUNT, generator=generator, dtype=torch.float64)
    e[:, 3] = a[:, 3] = 0.0
    e[:, 5] = e[:, 6]  # a tie
    return a, e


def test_every_statistic_against_scipy_and_loops(pair):
    a, e = pair
    found = compare(attribution(a), effects(e), k=5)
    for i in range(BATCH):
        x = a[i].numpy()
        y = e[i].numpy()
        largest = [set(sorted(range(COUNT), key=lambda j: -abs(v[j]))[:5]) for v in (x, y)]
        signs = [(x[j] > 0, x[j] < 0) == (y[j] > 0, y[j] < 0) for j in range(COUNT)]
        expected = {
            "pearson": stats.pearsonr(x, y).statistic,
            "spearman": stats.spearmanr(x, y).statistic,
            "slope": stats.linregress(x, y).slope,
            "sign_agreement": sum(signs) / COUNT,
            "top_k_overlap": len(largest[0] & largest[1]) / 5,
            "relative_error": sum(abs(x - y)) / sum(abs(y)),
            "sum_ratio": sum(x) / sum(y),
        }
        for name, value in expected.items():
            assert abs(float(found.per_prompt[name][i]) - value) < 1e-12, name
    assert 0.2 < float(found.pearson.mean()) < 0.95
    assert 0 < float(found.top_k_overlap.mean()) < 1
    frame = found.to_frame()
    assert list(frame["spearman"]) == found.spearman.tolist()
    assert found.summary().loc["slope", "mean"] == pytest.approx(float(found.slope.mean()))


def test_identity_and_negation(pair):
    """With itself every agreement is 1; with its negative the signs, the line and the sum turn."""
    a, _ = pair
    same, turned = (compare(attribution(a), effects(sign * a)) for sign in (1, -1))
    one = torch.ones(BATCH, dtype=torch.float64)
    zero = torch.zeros(BATCH, dtype=torch.float64)
    for name in ("pearson", "spearman", "slope", "sign_agreement", "top_k_overlap", "sum_ratio"):
        assert torch.allclose(same.per_prompt[name], one, rtol=0, atol=1e-12), name
    assert torch.equal(same.relative_error, zero)
    for name in ("pearson", "spearman", "slope", "sum_ratio"):
        assert torch.allclose(turned.per_prompt[name], -one, rtol=0, atol=1e-12), name
    assert torch.allclose(turned.sign_agreement, one / COUNT)  # the site that is zero in both
    assert torch.equal(turned.top_k_overlap, one)
    assert torch.allclose(turned.relative_error, 2 * one)


def test_correlation_is_blind_to_size_and_the_others_are_not(pair):
    """Negative control: a doubled, shifted attribution has the same Pearson, and is found out."""
    a, e = pair
    plain, wrong = (compare(attribution(x), effects(e)) for x in (a, 2 * a + 1))
    assert torch.allclose(plain.pearson, wrong.pearson, rtol=0, atol=1e-12)
    assert torch.allclose(plain.slope, 2 * wrong.slope, rtol=0, atol=1e-12)
    assert (wrong.relative_error > plain.relative_error + 0.5).all()


def test_a_permuted_site_is_seen(pair):
    """Negative control: labels out of step with the numbers lower every agreement."""
    a, _ = pair
    rolled = compare(attribution(a.roll(1, 1)), effects(a), k=3)
    assert (rolled.pearson < 0.9).all()
    assert (rolled.top_k_overlap < 1).all()


@pytest.mark.parametrize(
    ("group", "kinds"),
    [
        ("layer", {"group"}),
        ("kind", {*KINDS}),
        # A group of one kind has its name, whatever the group is called.
        ({"attention": "*.[qkvo]", "rest": "*.down"}, {"group", "down"}),
    ],
)
def test_an_attribution_is_summed_over_the_groups(pair, group, kinds: set[str]):
    a, _ = pair
    groups = Sites(SITES).grouped(group)
    sums = torch.stack([a[:, list(indices)].sum(1) for indices in groups.values()], 1)
    for found in (
        compare(attribution(a), effects(sums, group)),
        compare(effects(sums, group), attribution(a)),
    ):
        assert torch.allclose(found.attribution, found.effects, rtol=0, atol=1e-12)
        assert found.labels == tuple(groups)
        assert set(found.kinds) == kinds


def test_parts_are_summed_to_sites(pair):
    """An attribution by position is compared by its sites."""
    a, e = pair
    split = torch.stack([0.25 * a, 0.75 * a], 2)
    whole, parts = (
        compare(attribution(v, by=by), effects(e)) for v, by in ((a, ()), (split, ("position",)))
    )
    assert torch.allclose(whole.pearson, parts.pearson, rtol=0, atol=1e-12)


def test_bootstrap_interval_is_that_of_resampled_prompts(pair):
    a, e = pair
    found = compare(attribution(a), effects(e), bootstrap=500, seed=3)
    drawn = np.random.default_rng(3).integers(BATCH, size=(500, BATCH))
    means = [np.mean([float(found.slope[i]) for i in row]) for row in drawn]
    assert found.interval["slope"] == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))))
    low, high = found.interval["slope"]
    assert float(found.slope.min()) <= low < float(found.slope.mean()) < high
    again, other = (compare(attribution(a), effects(e), bootstrap=500, seed=s) for s in (3, 4))
    assert again.interval == found.interval
    assert other.interval != found.interval


def test_one_prompt_has_no_interval(pair):
    a, e = (x[:1] for x in pair)
    found = compare(attribution(a), effects(e))
    assert all(np.isnan(end) for ends in found.interval.values() for end in ends)
    assert "one prompt: no interval" in repr(found)
    assert "nan" not in repr(found).lower()
    assert "no interval" not in repr(compare(attribution(pair[0]), effects(pair[1])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_does_not_exist_is_nan_without_a_warning(dtype: torch.dtype):
    """Constant numbers, zeros, one site: NaN, no warning; the mean runs over what exists."""
    flat = torch.full((2, COUNT), 0.1, dtype=dtype)
    moving = flat.clone()
    moving[0] = torch.arange(COUNT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare(attribution(moving), effects(moving))
        zero = compare(attribution(flat), effects(0 * flat))
        single = compare(attribution(flat[:, :1]), attribution(flat[:, :1]))
        repr(zero), zero.plot(), zero.summary()
    assert found.pearson[0] == pytest.approx(1)
    assert found.pearson[1].isnan()
    assert found.mean("pearson") == pytest.approx(1)
    assert found.interval["pearson"] == (pytest.approx(1), pytest.approx(1))
    for name in ("pearson", "spearman", "slope", "relative_error", "sum_ratio"):
        assert zero.per_prompt[name].isnan().all(), name
    assert single.pearson.isnan().all()
    assert single.k == 1
    assert torch.equal(single.top_k_overlap, torch.ones(2, dtype=torch.float64))


def test_different_results_are_refused_naming_both(pair):
    a, e = pair
    of = attribution(a)
    tokens = (("p0", " was"), *of.str_tokens[1:])
    cases = {
        r"different sites: .*18 \(blocks.2.x.down\).*17 \(": attribution(a[:, :-1]),
        r"different prompts: .*p0\| is.*p0\| was": dataclasses.replace(of, str_tokens=tokens),
        r"different prompts: .*4 \(.*2 \(": attribution(a[:2]),
        r"different readouts: .*margin.*logit\(5\)": dataclasses.replace(of, readout="logit(5)"),
    }
    for words, other in cases.items():
        with pytest.raises(ValueError, match=words):
            compare(of, other)
    with pytest.raises(ValueError, match="different groups: .*layer 0.*q"):
        compare(effects(a[:, :3], "layer"), effects(a[:, :6], "kind"))
    for bad in ({"k": 0}, {"bootstrap": -1}):
        with pytest.raises(ValueError, match="expected at least"):
            compare(of, effects(e), **bad)
    with pytest.raises(ValueError, match="expected .pearson."):
        compare(of, effects(e)).mean("r2")


def test_effects_with_effects_and_names(pair):
    a, e = pair
    found = compare(effects(a, how="add_one"), effects(e))
    assert found.attribution_name == "add_one"
    assert found.units == "logits"
    assert "leaving one out at a time" in repr(found)
    assert found.pearson[0] == pytest.approx(stats.pearsonr(a[0], e[0]).statistic)


def test_it_has_the_facts_of_both_runs(pair):
    """It had those of the attribution alone, also where the effects were of another dtype."""
    a, e = pair
    of_a = attribution(a, meta={"adapter": "a", "dtype": "float32", "tokenizer": "given"})
    of_e = dataclasses.replace(effects(e), meta={"adapter": "a", "dtype": "bfloat16", "own": "x"})
    assert compare(of_a, of_e).meta == {
        "adapter": "a",
        "dtype": "float32 (effects: bfloat16)",
        "tokenizer": "given (effects: not stated)",
        "own": "not stated (effects: x)",
    }


def test_scatter_draws_every_site_once(pair):
    """Points are (attribution, effect); the line is the identity; names are in the hover."""
    a, e = pair
    found: Comparison = compare(attribution(a), effects(e))
    for prompt, x, y in ((None, a.mean(0), e.mean(0)), (2, a[2], e[2])):
        line, *traces = found.plot(prompt).data
        assert line.x == line.y
        assert line.x[0] < min(x.min(), y.min())
        drawn = {
            h.split("</b>")[0][3:]: p
            for t in traces
            for p, h in zip(zip(t.x, t.y, strict=True), t.hovertext, strict=True)
        }
        assert drawn == {s.name: (float(x[i]), float(y[i])) for i, s in enumerate(SITES)}
        assert [t.name for t in traces] == list(KINDS)
    assert found.plot(1).layout.title.text.count(f"{float(found.pearson[1]):.3f}") == 1
    with pytest.raises(ValueError, match="prompts 0 to 3"):
        found.plot(4)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_agrees_with_nothing(odd: float, which: int):
    """Otherwise the largest of a ranking, and of no sign."""
    pair = [two_prompts(), two_prompts()]
    values = pair[which].values.clone()
    values[1, 2] = odd
    pair[which] = dataclasses.replace(pair[which], values=values)
    words = rf"first_order@0 is {odd} at prompt 1, blocks\.2\.mlp\.up \(1 such numbers\)"
    with pytest.raises(ll.errors.ArgumentError, match=words):
        ll.compare(*pair)


def test_across_prompts_is_the_mean_of_the_one_against_each_of_the_other():
    """By a loop; each prompt in the direction of its own shift, readouts of other tokens."""
    made = attribution(torch.randn(3, COUNT, dtype=torch.float64))
    made = dataclasses.replace(made, adapted=torch.tensor([1.0, -2.0, 3.0]).double())
    judged = effects(torch.randn(BATCH, COUNT, dtype=torch.float64))
    shift = torch.tensor([1.0, -1.0, 2.0, -3.0]).double()
    others = tuple((f"q{i}", " was") for i in range(BATCH))
    judged = dataclasses.replace(judged, adapted=shift, str_tokens=others, readout="margin(1 − 2)")
    found = compare(made, judged, across_prompts=True)
    mean = (made.values[0] - made.values[1] + made.values[2]) / 3
    for i, sign in enumerate((1, -1, 1, -1)):
        truth = sign * judged.values[i]
        assert found.pearson[i] == pytest.approx(stats.pearsonr(mean, truth).statistic)
        assert found.spearman[i] == pytest.approx(stats.spearmanr(mean, truth).statistic)
        error = (mean - truth).abs().sum() / truth.abs().sum()
        assert float(found.relative_error[i]) == pytest.approx(float(error))
    assert found.made_on == made.str_tokens
    assert found.str_tokens == others
    assert "made on 3 other prompts" in repr(found)


def test_other_prompts_are_refused_unless_across_prompts():
    made = attribution(torch.randn(3, COUNT))
    judged = effects(torch.randn(BATCH, COUNT))
    with pytest.raises(ll.errors.ArgumentError, match=r"different prompts.*across_prompts=True"):
        compare(made, judged)
    assert compare(attribution(torch.randn(BATCH, COUNT)), judged).made_on == ()
    with pytest.raises(ll.errors.ArgumentError, match="different units"):
        compare(made, dataclasses.replace(judged, units="nats"), across_prompts=True)
    with pytest.raises(ll.errors.ArgumentError, match="different sites"):
        compare(attribution(torch.randn(3, COUNT - 1)), judged, across_prompts=True)


def test_the_former_name_of_across_prompts_warns():
    """One release long the old name works, and says what to write."""
    made = attribution(torch.randn(3, COUNT, dtype=torch.float64))
    made = dataclasses.replace(made, adapted=torch.tensor([1.0, -2.0, 3.0]).double())
    judged = effects(torch.randn(BATCH, COUNT, dtype=torch.float64))
    judged = dataclasses.replace(judged, adapted=torch.ones(BATCH, dtype=torch.float64))
    with pytest.warns(ll.errors.LensLoraWarning, match="write across_prompts=True"):
        former = compare(made, judged, held_out=True)
    now = compare(made, judged, across_prompts=True)
    assert former.made_on == now.made_on
    assert former.pearson.isfinite().all()
    assert torch.equal(former.pearson, now.pearson)
