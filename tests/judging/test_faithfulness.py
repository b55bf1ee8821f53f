"""Keep and drop curves against one run a point; rankings against loops; ends, laws, refusals."""

from __future__ import annotations

import dataclasses

import cases
import limits
import models
import numpy as np
import pytest
import reference
import torch
from differences import largest_difference
from torch import Tensor
from two_scalars import scalar_lens

import lens_lora as ll
from lens_lora.core import Effects
from lens_lora.judging import rankings
from lens_lora.judging.circuit_scores import random_orders
from lens_lora.judging.faithfulness import Faithfulness, faithfulness

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
EXACT = 1e-10


@pytest.fixture(params=models.MAKERS)
def lens(request) -> ll.LoraLens:
    return cases.case("llama", request.param, "raw").lens


@pytest.fixture
def one_lens() -> ll.LoraLens:
    """Of one class, for what does not depend on the class."""
    return cases.case("llama", list(models.MAKERS)[0], "raw").lens


def first(lens: ll.LoraLens, prompts=None, readout: ll.Readout = MARGIN) -> ll.results.Attribution:
    return ll.first_order(lens, models.tokens() if prompts is None else prompts, readout)


def run(lens: ll.LoraLens, score=None, prompts=None, readout=MARGIN, **kwargs) -> Faithfulness:
    prompts = models.tokens() if prompts is None else prompts
    score = first(lens, prompts, readout) if score is None else score
    return faithfulness(lens, prompts, readout, score, progress=False, **kwargs)


def slow_curves(lens: ll.LoraLens, order: Tensor, counts, row: Tensor) -> np.ndarray:
    """keep and drop of one prompt, one run a point: [keep or drop, count]."""

    def g(sites: list[int]) -> float:
        gates = torch.zeros(len(lens.sites), dtype=torch.float64)
        gates[sites] = 1.0
        if any(site.kind in ("embed", "unembed") for site in lens.sites):  # no hook point on 2.18
            return float(MARGIN.of_logits(lens.model, 1)(lens.logits(row, gates)[:, -1]))
        return float(reference.plain_readout(lens, row[None], MARGIN, gates))

    every = order.tolist()
    base = g([])
    shift = g(every) - g([])
    keep = [(g(every[:k]) - base) / shift for k in counts]
    drop = [(g(every[k:]) - base) / shift for k in counts]
    return np.array([keep, drop])


# --- curves


def test_curves_against_one_run_a_point(lens: ll.LoraLens):
    """Every method, prompt and fraction; each prompt has an order of its own."""
    result = run(lens, fractions=(0.5, 0.8))
    tokens = models.tokens()
    assert result.counts == (0, 1, 7, 11, 14)
    for name, order in result.orders.items():
        at = result.names.index(name)
        for i in range(2):
            expected = slow_curves(lens, order[i], result.counts, tokens[i])
            assert np.abs(result.keep[at, i].numpy() - expected[0]).max() < EXACT, name
            assert np.abs(result.drop[at, i].numpy() - expected[1]).max() < EXACT, name
    assert not torch.equal(*result.orders["first_order@0"])
    assert largest_difference(result.keep[0] + result.drop[0], 1) > 0.01  # not linear


def test_random_curve_is_the_mean_of_its_draws(one_lens: ll.LoraLens):
    tokens = models.tokens()
    result = run(one_lens, fractions=(0.5,), draws=2, seed=4)
    orders = random_orders(len(one_lens.sites), 2, 2, 4)
    for i in range(2):
        slow = [slow_curves(one_lens, order[i], result.counts, tokens[i]) for order in orders]
        found = torch.stack([result.keep[-1, i], result.drop[-1, i]]).numpy()
        assert np.abs(found - np.mean(slow, 0)).max() < EXACT
    assert all(sorted(o.tolist()) == list(range(14)) for o in orders.flatten(0, 1))


def test_ends_are_nothing_and_everything(lens: ll.LoraLens):
    result = run(lens, greedy=True)
    assert result.names == ("first_order@0", "weight_norm", "update_norm", "greedy", "random")
    assert torch.equal(result.keep[..., 0], torch.zeros(5, 2, dtype=torch.float64))
    assert torch.equal(result.drop[..., 0], torch.ones(5, 2, dtype=torch.float64))
    assert largest_difference(result.keep[..., -1], 1) < 1e-14
    assert result.drop[..., -1].abs().max() < 1e-14
    assert result.fractions[0] == 0
    assert result.fractions[-1] == 1


def test_same_seed_same_numbers(one_lens: ll.LoraLens, monkeypatch):
    """Chunking changes nothing beyond rounding; the seed decides the random curve alone."""
    one, two, other = (run(one_lens, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.keep, two.keep)
    assert torch.equal(one.keep[:-1], other.keep[:-1])
    assert largest_difference(one.keep[-1], other.keep[-1]) > 1e-3
    limits.tokens_at_once(monkeypatch, ROW_TOKENS=40)
    assert largest_difference(run(one_lens).keep, one.keep) < EXACT


def test_padding_and_answers_of_several_tokens(lens: ll.LoraLens):
    """A padded batch equals its prompts one by one; so does a readout with rows of its own."""
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13"]
    for readout in (MARGIN, ll.AnswerMargin(torch.tensor([5, 9, 12]), torch.tensor([5, 7]))):
        both = run(lens, prompts=texts, readout=readout, fractions=(0.3,))
        for i, text in enumerate(texts):
            alone = run(lens, prompts=text, readout=readout, fractions=(0.3,))
            assert largest_difference(both.keep[:-1, i], alone.keep[:-1, 0]) < 1e-9
            assert largest_difference(both.drop[:-1, i], alone.drop[:-1, 0]) < 1e-9
            assert all(torch.equal(o[i], alone.orders[n][0]) for n, o in both.orders.items())


def test_linear_readout_by_hand():
    """Two scalars with φ(y) = y² worked by hand: shares of each site alone and left."""
    lens = scalar_lens(lambda y: y**2)
    scores = torch.tensor([18.0, 45.0])
    result = faithfulness(
        lens, torch.tensor([[3]]), ll.Logit(0), scores, baselines=False, progress=False
    )
    assert (float(result.base), float(result.adapted)) == (18.0, 141.75)
    second_alone = 63.0 - 18.0
    first_alone = 2 * 2.25 * 9 - 18.0
    assert result.names == ("given",)
    assert result.counts == (0, 1, 2)
    expected_keep = torch.tensor([0, second_alone / 123.75, 1], dtype=torch.float64)
    expected_drop = torch.tensor([1, first_alone / 123.75, 0], dtype=torch.float64)
    assert torch.allclose(result.keep[0, 0], expected_keep, rtol=0, atol=1e-14)
    assert torch.allclose(result.drop[0, 0], expected_drop, rtol=0, atol=1e-14)
    assert float(result.area_keep) == pytest.approx(0.25 * expected_keep[1] * 2 + 0.25)
    assert float(result.area_drop) == pytest.approx(0.25 + 0.25 * expected_drop[1] * 2)


# --- rankings


def small_shift_lens(lens: ll.LoraLens) -> ll.LoraLens:
    """The same adapter so small that g is linear to a part in ten thousand."""
    return ll.LoraLens(lens.model, lens.adapter.scaled(1e-5))


def test_where_g_is_linear_the_signed_ranking_is_the_best(one_lens: ll.LoraLens):
    """keep(k) is the largest sum of k terms: no method beats it, greedy equals it, at every k."""
    small = small_shift_lens(one_lens)
    att = first(small)
    signed = att.per_site * att.shift.sign()[:, None]
    result = run(small, att, greedy=True, fractions=[k / 14 for k in range(15)])
    best = signed.sort(-1, descending=True).values.cumsum(-1) / att.shift.abs()[:, None]
    assert largest_difference(result.keep[0][:, 1:], best) < 1e-3
    assert (result.keep <= result.keep[:1] + 1e-3).all()
    assert (result.drop >= result.drop[:1] - 1e-3).all()
    at = result.names.index("greedy")
    assert largest_difference(result.keep[at], result.keep[0]) < 1e-3
    assert (result.keep[:1] > result.keep[1:3].amax(0) + 0.01).any()  # and the norms do not


def test_the_sign_of_the_shift_turns_the_ranking(one_lens: ll.LoraLens):
    """Swapping the margin negates shift and values: the same order; unsigned it is the reverse."""
    swapped = ll.Margin(9, 5)
    one = run(one_lens)
    two = run(one_lens, readout=swapped)
    (name, *_) = one.names
    assert torch.equal(one.orders[name], two.orders[name])
    assert largest_difference(one.keep[:3], two.keep[:3]) < EXACT
    small = small_shift_lens(one_lens)  # where first order is right, its negative is seen to fail
    right, negated = (run(small, sign * first(small).per_site) for sign in (1, -1))
    assert torch.equal(negated.orders["given"], right.orders["given"].flip(-1))
    assert (negated.area_keep[0] < right.area_keep[0] - 0.1).all()


@pytest.mark.slow
def test_greedy_takes_the_best_single_site(lens: ll.LoraLens):
    """At one site greedy is at least as good as any ranking; each step is the slow loop's."""
    tokens = models.tokens()
    sites = range(len(lens.sites))
    result = run(lens, greedy=True)
    at = result.names.index("greedy")
    assert (result.keep[at, :, 1] >= result.keep[:, :, 1] - EXACT).all()
    for i in range(2):
        on = torch.zeros(len(lens.sites), dtype=torch.float64)
        for step in range(2):

            def gain(site: int, on: Tensor = on, i: int = i) -> float:
                tried = on.clone()
                tried[site] = 1.0
                value = reference.plain_readout(lens, tokens[i : i + 1], MARGIN, tried)
                return float(value * result.shift[i].sign())

            best = max((s for s in sites if not on[s]), key=gain)
            assert int(result.orders["greedy"][i, step]) == best
            on[best] = 1.0


@pytest.mark.sample(2)
@pytest.mark.parametrize("flags", ["raw", "processed"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_against_dense_updates_and_components(family: str, flags: str):
    """‖ΔW‖ of the dense map; ‖δz‖ as `components` has it, with padding and folded biases."""
    lens = cases.case(family, list(models.MAKERS)[-1], flags).lens
    dense = torch.stack([(m.sB @ m.A).norm() for m in lens.maps])
    assert largest_difference(rankings.weight_norms(lens), dense) < 1e-12 * dense.max()
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13"]
    expected = ll.components(lens, texts, MARGIN, progress=False).delta_norm
    found = rankings.update_norms(lens.function(texts, MARGIN))
    assert largest_difference(found, expected) < 1e-12 * expected.max()
    assert largest_difference(found[0], found[1]) > 0.01


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_outside_the_blocks(target: str):
    """An unembedding is read at one position, an embedding reads ids: norms and curves hold."""
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw", (target, "q_proj")).lens
    expected = ll.components(lens, models.tokens(), MARGIN, progress=False).delta_norm
    g = lens.function(models.tokens(), MARGIN)
    assert largest_difference(rankings.update_norms(g), expected) < 1e-12
    result = run(lens)
    for i, row in enumerate(models.tokens()):
        slow = slow_curves(lens, result.orders["update_norm"][i], result.counts, row)
        assert np.abs(result.keep[2, i].numpy() - slow[0]).max() < EXACT


# --- what is asked of the result


def test_attributions_effects_and_tensors_rank_alike(one_lens: ll.LoraLens):
    att = first(one_lens)
    effects = Effects(
        values=att.per_site,
        groups=one_lens.sites.grouped(),
        how="leave_one_out",
        **{
            f: getattr(att, f)
            for f in ("sites", "base", "adapted", "str_tokens", "readout", "units", "meta")
        },
    )
    split = ll.first_order(one_lens, models.tokens(), MARGIN, by=("position", "rank"))
    scores = {"a": att, "b": effects, "c": att.per_site, "d": split, "e": att.per_site.mean(0)}
    result = run(one_lens, scores, baselines=False, fractions=(0.2,))
    assert result.names == tuple("abcde")
    assert all(largest_difference(result.keep[i], result.keep[0]) < EXACT for i in range(4))
    assert run(one_lens, effects, baselines=False).names == ("leave_one_out",)


def test_kept_sites_make_the_pruned_adapter(lens: ll.LoraLens):
    """kept() names the sites whose gates were on: its adapter has the share that the curve says."""
    result = run(lens)
    name = result.names[0]
    prompt = 1
    frame = result.kept(name, 0.3, prompt)
    assert len(frame) == 4
    pruned = ll.LoraLens(lens.model, lens.adapter.only(frame))
    value = MARGIN.of_logits(lens.model, 1)(pruned.logits(models.tokens()[prompt])[:, -1])
    share = (value - result.base[prompt]) / result.shift[prompt]
    assert float(share) == pytest.approx(float(result.kept_share(name, 0.3)[prompt]), abs=1e-9)


def test_carrying_is_the_first_fraction_that_keeps_enough(one_lens: ll.LoraLens):
    result = run(one_lens)
    for name in result.names:
        at = result.names.index(name)
        for i, found in enumerate(result.carrying(name, 0.5).tolist()):
            enough = [
                f
                for f, k in zip(result.fractions.tolist(), result.keep[at, i].tolist(), strict=True)
                if k >= 0.5
            ]
            assert found == enough[0]
    assert result.carrying("random", 1e6).isnan().all()


def test_tables(one_lens: ll.LoraLens):
    result = run(one_lens)
    frame = result.to_frame()
    summary = result.summary()
    assert len(frame) == result.keep.numel()
    row = frame[(frame["method"] == "update_norm") & (frame["prompt"] == 1) & (frame["count"] == 7)]
    at = (result.names.index("update_norm"), 1, result.counts.index(7))
    assert row["keep"].item() == result.keep[at]
    assert row["drop"].item() == result.drop[at]
    assert row["fraction"].item() == 0.5
    area = np.trapezoid if hasattr(np, "trapezoid") else np.trapz
    by_hand = [area(k, result.fractions.numpy()) for k in result.keep[0].numpy()]
    assert summary.loc[result.names[0], "area_keep"] == pytest.approx(np.mean(by_hand))
    assert "margin(5 − 9)" in repr(result)
    assert "random" in repr(result)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.draws = 2  # type: ignore[misc]


def test_a_shift_within_the_noise_has_no_shares(one_lens: ll.LoraLens):
    """Shares of rounding are not numbers: NaN for that prompt, said in the text, drawn as a gap."""
    none = ll.LoraLens(one_lens.model, one_lens.adapter.scaled(1e-16))
    result = run(none, torch.ones(len(one_lens.sites)))
    assert result.keep.isnan().all()
    assert result.drop.isnan().all()
    assert "2 prompts have no shift above the noise" in repr(result)
    assert result.carrying("given").isnan().all()
    result.plot()


def test_figure_has_both_curves_of_every_ranking(one_lens: ll.LoraLens):
    result = run(one_lens)
    for prompt, rows in ((None, slice(None)), (1, slice(1, 2))):
        traces = result.plot(prompt).data
        names = [trace.name for trace in traces]
        kept = names[: len(result.names)]
        assert names == kept * 2
        assert len(set(kept)) == len(result.names)
        assert {"first order at ε = 0", "‖ΔW‖", "random"} <= set(kept)
        for trace, curve in zip(traces, [*result.keep, *result.drop], strict=True):
            assert trace.y == pytest.approx((100 * curve[rows].mean(0)).tolist())
            assert trace.x == pytest.approx((100 * result.fractions).tolist())
    with pytest.raises(ValueError, match="prompts 0 to 1"):
        result.plot(2)


# --- ranked on some prompts, judged on others

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def held_out_tokens() -> Tensor:
    return models.tokens(batch=3, pos=5, seed=11)


def slow_mib(lens: ll.LoraLens, order: list[int], rows: Tensor, off) -> float:
    """∫ f or ∫ |1 − f|, one run a prompt and size, f a ratio of means along each prompt's shift."""

    def values_of(sites: list[int]) -> Tensor:
        gates = torch.zeros(len(lens.sites), dtype=torch.float64)
        gates[sites] = 1.0
        found = [reference.plain_readout(lens, row[None], MARGIN, gates) for row in rows]
        return torch.stack([x.flatten()[0] for x in found])

    nothing = values_of([])
    shift = values_of(order) - nothing
    f = [((values_of(order[: int(k * len(order))]) - nothing) * shift.sign()).mean() for k in SIZES]
    found = torch.tensor([off(float(x / shift.abs().mean())) for x in f], dtype=torch.float64)
    return float(torch.trapezoid(found, torch.tensor(SIZES, dtype=torch.float64)))


@pytest.mark.slow
def test_cpr_and_cmd_against_one_run_a_size(lens: ll.LoraLens):
    """Ranked by the mean on some prompts, judged on three others together."""
    score = first(lens)
    rows = held_out_tokens()
    result = run(lens, score, test=(rows, MARGIN), baselines=False)
    mean = (score.values * score.shift.sign()[:, None]).mean(0)
    signed = mean.argsort(descending=True).tolist()
    by_size = mean.abs().argsort(descending=True).tolist()
    assert result.orders["first_order@0"].tolist() == [signed] * 3
    assert abs(float(result.cpr[0]) - slow_mib(lens, signed, rows, lambda f: f)) < EXACT
    assert abs(float(result.cmd[0]) - slow_mib(lens, by_size, rows, lambda f: abs(1 - f))) < EXACT
    assert signed != by_size, "both rank alike: the test cannot tell them apart"
    for i, row in enumerate(rows):
        keep, drop = slow_curves(lens, torch.tensor(signed), result.counts, row)
        assert np.abs(result.keep[0, i].numpy() - keep).max() < EXACT
        assert np.abs(result.drop[0, i].numpy() - drop).max() < EXACT


def test_prompts_that_move_the_other_way_count_as_much(one_lens: ll.LoraLens):
    """MIB's ratio without a sign, of one prompt's margin and minus another's."""
    score = first(one_lens)
    exact = ll.first_order(one_lens, models.tokens(12, 5, seed=11), MARGIN)
    up = int(exact.shift.argmax())
    down = int(exact.shift.argmin())
    assert exact.shift[up] > 1
    assert exact.shift[down] < -1
    rows = models.tokens(12, 5, seed=11)[[up, down]]
    gates = {}
    sites = len(one_lens.sites)
    order = (score.values * score.shift.sign()[:, None]).mean(0).argsort(descending=True).tolist()
    for count in sorted({0, sites, *(int(k * sites) for k in SIZES)}):
        on = torch.zeros(sites, dtype=torch.float64)
        on[order[:count]] = 1.0
        found = [reference.plain_readout(one_lens, row[None], MARGIN, on) for row in rows]
        gates[count] = float(found[0].flatten()[0] - found[1].flatten()[0])
    whole = gates[sites] - gates[0]
    f = torch.tensor([(gates[int(k * sites)] - gates[0]) / whole for k in SIZES])
    result = run(one_lens, score, test=(rows, MARGIN), baselines=False)
    expected = float(torch.trapezoid(f, torch.tensor(SIZES)))
    assert float(result.cpr[0]) == pytest.approx(expected, abs=1e-6)


def test_what_is_held_out_is_said(one_lens: ll.LoraLens):
    """Beside the curves, and through a file; nothing of it without `test`."""
    rows = held_out_tokens()
    result = run(one_lens, test=(rows, MARGIN), draws=2)
    assert len(result.base) == 3
    assert len(result.ranked_on) == 2
    assert list(result.summary().columns)[-2:] == ["cpr", "cmd"]
    assert len(result.cpr) == len(result.names)
    assert result.names[-1] == "random"
    assert "cpr" not in run(one_lens).summary().columns
    exact = ll.first_order(one_lens, rows, MARGIN)
    assert torch.allclose(result.shift, exact.shift.double())


def test_a_mean_shift_within_the_noise_has_no_cpr(one_lens: ll.LoraLens):
    none = ll.LoraLens(one_lens.model, one_lens.adapter.scaled(1e-16))
    for rows in (held_out_tokens(), models.tokens(60, 5, seed=11)):
        result = run(none, torch.ones(len(none.sites)), test=(rows, MARGIN), baselines=False)
        assert result.cpr.isnan().all()
        assert result.cmd.isnan().all()
    assert not run(one_lens, test=(held_out_tokens(), MARGIN)).cpr.isnan().any()


@pytest.mark.bad_input
def test_what_cannot_be_held_out_is_refused(one_lens: ll.LoraLens):
    with pytest.raises(ll.errors.ArgumentError, match=r"test: expected \(prompts, readout\)"):
        run(one_lens, test=held_out_tokens())
    with pytest.raises(ll.errors.ArgumentError, match="greedy ranks each prompt's own sites"):
        run(one_lens, test=(held_out_tokens(), MARGIN), greedy=True)


def test_bad_arguments_say_what_to_do(one_lens: ll.LoraLens):
    att = first(one_lens)
    sites = len(one_lens.sites)
    part = ll.LoraLens(one_lens.model, one_lens.adapter.only("*q_proj"))
    bad = {
        "first_order@0 has other sites.*14 .* and 2": lambda: run(part, att),
        "other prompts.*per_site": lambda: run(one_lens, att, models.tokens(seed=8)),
        "other readout.*margin.*logit": lambda: run(one_lens, att, readout=ll.Logit(5)),
        rf"scores \(3,\); expected \[{sites}\]": lambda: run(one_lens, torch.ones(3)),
        "not all finite": lambda: run(one_lens, torch.full((sites,), float("nan"))),
        "names of baselines": lambda: run(one_lens, {"random": att}),
        "no attribution to rank by": lambda: run(one_lens, {}),
        "fraction 20: expected": lambda: run(one_lens, fractions=(20,)),
        "draws=0": lambda: run(one_lens, draws=0),
    }
    for words, call in bad.items():
        with pytest.raises(ValueError, match=words):
            call()
    result = run(one_lens, baselines=True, fractions=())
    with pytest.raises(ValueError, match="expected 'first_order@0', 'weight_norm'"):
        result.carrying("path")
    with pytest.raises(ValueError, match="mean of 5 orders"):
        result.kept("random")
    with pytest.raises(ValueError, match="from 0 to 1"):
        result.kept_share("weight_norm", 20)
    with pytest.raises(ValueError, match="prompts 0 to 1"):
        result.kept("weight_norm", 0.2, 2)


def test_greedy_on_many_sites_is_refused_with_its_cost(one_lens: ll.LoraLens, monkeypatch):
    monkeypatch.setattr("lens_lora.judging.faithfulness.MOST_GREEDY", 13)
    with pytest.raises(ValueError, match=r"14 sites takes 105 passes.*only\(attribution"):
        run(one_lens, greedy=True)
