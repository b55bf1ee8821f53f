"""`explain`: parts that are the functions' own, words that are the numbers'."""

from __future__ import annotations

import dataclasses
import html
import io
import re

import cases
import models
import pytest
import torch
from results_by_hand import (
    FIRST,
    SCALES,
    explanation,
    without_plotly,
)
from rich.console import Console
from terminal import faults, shown

import lens_lora as ll
from lens_lora.errors import PromptError, TokenError
from lens_lora.explanations import words as words_of
from lens_lora.explanations.tables import (
    explanation_tables,
    margins_table,
    moved_table,
    remainder_table,
    sites_table,
)

CLASSES = list(models.MAKERS)
PROMPT = "w13 w14 w15"
DOC = "w9"
PRE = "w26"


# --- the parts are what the functions give


@pytest.fixture(scope="module", params=CLASSES)
def explained(request):
    with models.lifted():
        lens = cases.case("llama", request.param, "raw").lens
        return lens, ll.explain(lens, PROMPT, DOC, PRE, null=3, progress=False)


@pytest.fixture
def tiny(explained, float64):
    return explained


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_first_order_second_order_and_path_are_the_functions_own(tiny):
    lens, found = tiny
    margin = ll.Margin(DOC, PRE)
    alone = ll.fact_margin(lens, PROMPT, DOC, PRE, progress=False)
    same(found.margin.curve.values, alone.curve.values)
    same(found.first_order.values.sum(2), alone.attribution.values)
    same(found.adapted_end.values, ll.first_order(lens, PROMPT, margin, at=1.0).values)
    second = ll.second_order(lens, PROMPT, margin, progress=False)
    same(found.second_order.half_row_sums, second.half_row_sums)
    for mine, own in zip(found.second_order.verdict, second.verdict, strict=True):
        assert (mine.kind, mine.helps_up_to) == (own.kind, own.helps_up_to)
        assert mine.remainder_floor == pytest.approx(own.remainder_floor, rel=0.5)
    same(found.second_order.attribution().per_site, second.attribution().per_site)
    same(found.coupling.total, second.curvature)
    path = ll.path_attribution(lens, PROMPT, margin, tol=1e-2, max_nodes=17, progress=False)
    same(found.path.values, path.values)


def test_interventions_are_the_functions_own(tiny):
    lens, found = tiny
    margin = ll.Margin(DOC, PRE)
    for how in ("add_one", "leave_one_out"):
        alone = ll.patch_sites(lens, PROMPT, margin, how, progress=False)
        same(getattr(found, how).values, alone.values)
    names = [(c.attribution_name, c.effects_name) for c in found.comparisons]
    assert names == [
        ("first_order@0", "add_one"),
        ("first_order@0", "leave_one_out"),
        ("first_order@1", "leave_one_out"),
    ]
    assert found.null.draws == 3
    assert set(found.reliability) == {"add_one", "leave_one_out"}


def test_promoted_tokens_of_the_largest_sites_are_those_of_the_whole_sweep(tiny):
    lens, found = tiny
    every = ll.logit_shift(lens, PROMPT, progress=False)
    same(found.shift.values, every.joint)
    top = ll.first_order(lens, PROMPT, ll.Margin(DOC, PRE)).top(8, 0)["site"].tolist()
    assert [site.name for site in found.module_shift.sites] == top
    for place, name in enumerate(top):
        same(found.module_shift.values[:, place], every.values[:, lens.site_index(name)])


def test_likeliest_tokens_are_the_models_own(tiny):
    lens, found = tiny
    for name, scale in (("base", 0.0), ("adapted", 1.0)):
        p = lens.logits(PROMPT, scale)[0, -1].softmax(-1)
        token, probability = found.said[name][0]
        assert token == lens.decode([int(p.argmax())])[0]
        assert probability == pytest.approx(float(p.max()))
        likeliest = sorted(map(float, p.topk(5)[0]), reverse=True)
        assert [q for _, q in found.said[name]] == pytest.approx(likeliest, abs=1e-12)


def test_frame_has_every_number_of_every_site(tiny):
    lens, found = tiny
    frame = found.to_frame()
    assert frame["site"].tolist() == [s.name for s in lens.sites]
    for column, values in (
        ("first_order", found.first_order.per_site),
        ("leave_one_out", found.leave_one_out.values),
        ("path", found.path.values),
    ):
        assert frame[column].tolist() == pytest.approx(values[0].tolist())
    assert frame["flagged_leave_one_out"].tolist() == (
        found.reliability["leave_one_out"].flagged[0].tolist()
    )


def test_parts_of_the_remainder_add_up(tiny):
    """The remainder of each site alone, from runs of its own, and the interaction are all of it."""
    lens, found = tiny
    alone = ll.remainder(lens, PROMPT, ll.Margin(DOC, PRE), by_site=True, progress=False)
    same(
        (alone.site_shift - alone.site_first_order).sum(1) + found.add_one.interaction,
        found.margin.remainder,
    )
    assert found.add_one.interaction.abs().min() > 1e-3


def test_fast_leaves_the_slow_parts_out_and_says_so():
    with models.lifted():
        found = ll.explain(
            cases.case("gpt2", CLASSES[0], "raw").lens, PROMPT, DOC, PRE, fast=True, progress=False
        )
    assert found.is_fast
    assert found.comparisons == ()
    assert found.null is None
    assert "Not measured: single modules added or left out, keep and drop curves" in found.story()
    assert found.reliability == {}
    assert "flags" not in found.story()
    assert set(found.figures()) == {"path", "remainder", "second_order", "sites", "positions"}
    assert "add_one" not in found.to_frame().columns
    own = without_plotly(found.report())
    assert "First order against measurements" not in own
    assert "Coupling between" not in own


@pytest.mark.slow
def test_answers_of_several_tokens_are_in_nats():
    with models.lifted():
        lens = cases.case("llama", CLASSES[0], "raw").lens
        found = ll.explain(lens, PROMPT, "w9 w4", "w26", progress=False)
    assert found.units == "nats"
    assert found.add_one.units == "nats"
    answer = ll.AnswerMargin("w9 w4", "w26")
    with models.lifted():
        same(found.margin.attribution.per_site, ll.first_order(lens, PROMPT, answer).values)
    assert "difference of the whole answers' log-probabilities" in found.story()
    assert " nats" in found.story()
    assert " logits" not in found.story()
    assert "On the prompt “w13w14w15” the base" in found.story()
    assert "After the prompt come the answers' tokens" in html.unescape(found.report())


def test_what_cannot_be_explained_is_refused():
    with models.lifted():
        lens = cases.case("llama", CLASSES[0], "raw").lens
        with pytest.raises(PromptError, match="2 prompts: a response is explained for one prompt"):
            ll.explain(lens, [PROMPT, "w1 w2"])
        with pytest.raises(ValueError, match="null=1; expected 0 for none, or at least 2"):
            ll.explain(lens, PROMPT, DOC, PRE, null=1)
        with pytest.raises(TokenError, match="same token"):
            ll.explain(lens, PROMPT, DOC, DOC)


def test_the_model_is_left_as_it_was():
    with models.lifted():
        lens = cases.case("llama", CLASSES[0], "raw").lens
        before = lens.logits(PROMPT, 0.0)
        ll.explain(lens, PROMPT, DOC, PRE, progress=False)
        same(lens.logits(PROMPT, 0.0), before)
    assert not any(hook.fwd_hooks for hook in lens.model.hook_dict.values())


# --- words


def test_story_holds_the_margins_own_and_the_likeliest_tokens():
    story = explanation().story()
    for sentence in explanation().margin.story().split("\n"):
        assert sentence in story
    assert "likeliest next token is “·Paris” (75%) for the base model" in story
    assert "“·Lyon” (90%) with the adapter." in story
    assert "begins n" not in story


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ((" the", " Lyon"), "The base model's begins neither answer"),
        ((" Paris", " a"), "The adapted model's begins neither answer"),
        ((" the", " a"), "Neither begins one of the two answers"),
    ],
)
def test_story_says_when_neither_answer_would_be_said(said, words):
    story = explanation(said=said).story()
    assert f"{words}, so the margin is not about what would be said first." in story


def test_story_of_the_remainders_parts():
    story = explanation(add=[1.5, 2.0, 1.5, 0.5]).story()
    assert "Of the remainder of +4.00, +1.50 is what first order misses of the modules" in story
    assert "+2.50 what they do together; both from runs of the model" in story
    assert "Second order adds +1.50 at ε = 1, which brings the estimate nearer: it misses" in story
    assert "+0.50 are within layers and +1.00 between them" in story
    assert "rounding alone could make" in explanation().story()


@pytest.mark.parametrize(
    "left, words",
    [
        ((1.0, 4.0, 0.3), "which makes the estimate worse: it misses 40.0% of the shift, first"),
        ((4.0, 1.0, 0.5), "On the way it helps only up to ε = 0.5, so this is a coincidence."),
        (
            (4.0, 1.0, 1.0),
            "brings the estimate nearer: it misses 10.0% of the shift, first order 40",
        ),
        ((1.2, 1.0, 0.3), "which makes no difference beyond rounding: it misses 10.0%"),
    ],
)
def test_story_says_whether_second_order_helps(left, words):
    first, second, helps_up_to = left
    (verdict,) = explanation().second_order.verdict
    verdict = dataclasses.replace(
        verdict,
        shift=10.0,
        first=first,
        second=second,
        floor=0.5,
        remainder_floor=0.5,
        helps_up_to=helps_up_to,
    )
    assert words in words_of.of_second_order("+1.00", verdict)
    small = dataclasses.replace(verdict, shift=0.1)
    assert "the shift is within rounding" in words_of.of_second_order("+1.00", small)


def test_story_judges_adding_where_leaving_out_does_nothing():
    """Nothing at all was said of agreement, although adding had been measured."""
    story = explanation(leave=[1e-9] * 4).story()
    assert "Measured, adding one module at a time agrees with first order at ε = 0 to a" in story
    assert "Leaving one out agrees" not in story
    story = explanation(add=[1e-9] * 4).story()
    assert "Measured, leaving one module out agrees with first order at ε = 0 to a" in story
    assert "adding one module at a time agrees" not in story


def test_story_says_which_question_first_order_answers():
    story = explanation().story()
    adding, leaving = story.split("Leaving one out agrees")
    assert "adding one module at a time agrees with first order at ε = 0 to a" in adding
    assert "correlation of 1.000 (of ranks 1.000, slope 1.00)" in adding
    assert adding.rstrip().endswith(": a good guide here.")
    assert ": not a good guide here; and with first order at ε = 1" in leaving
    adding = "adding one module (at ε = 0)"
    leaving_out = "leaving one module out (at ε = 1)"
    assert f"flags 0 as the answer to {adding} and 0 as the answer to {leaving_out}" in leaving
    names = "blocks.2.mlp.down, blocks.2.mlp.up, blocks.0.attn.q"
    flagged = explanation(end=FIRST).story()
    assert f"{adding} and 3 ({names}) as the answer to {leaving_out}" in flagged
    wrong_size = explanation(add=[0.5 * a for a in FIRST]).story()
    assert "slope 0.50): right in order, not in size. Leaving" in wrong_size


def test_story_speaks_of_redundancy_only_where_little_is_lost_one_by_one():
    assert "stand in for one another" not in explanation().story()
    little = explanation(leave=[0.1, 0.2, 0.3, 0.4]).story()
    assert "account for 12% of the shift: they stand in for one another, or the margin" in little


def test_story_of_the_curves_and_the_null():
    story = explanation().story()
    assert "the top 25% of the modules (1) alone keep, of the shift: 40% by first order" in story
    assert "20% at random" in story
    assert "Against random directions: the adapter's shift is 16 times" in story
    assert "Not measured" not in story
    assert "Not measured: whether random directions" in explanation(null=False).story()


def test_story_below_the_noise_compares_nothing():
    found = explanation([-4.0 + 1e-6 * s for s in SCALES], [2.5e-7] * 4, add=[1e-6] * 4,
                    leave=[1e-6] * 4, noise=1e-5)  # fmt: skip
    story = found.story()
    assert "shows no effect of the adapter" in story
    assert "Since the shift is within rounding, no share of it is given" in story
    for claim in ("good guide", "correlation", "of the shift:", "flips at", "flags", "keep,"):
        assert claim not in story, claim
    own = html.unescape(without_plotly(found.report()))
    assert "No single module moves the margin by more than rounding (3e-05)" in own
    assert "Which few modules carry" not in own
    assert "Pearson" not in own
    assert {"add_one", "leave_one_out", "faithfulness"}.isdisjoint(found.figures())
    assert {share for _, _, share in remainder_table(found).rows} == {"noise", ""}


def test_story_of_a_coincidence_calls_it_one():
    found = explanation([-4.0 + 8.0 * s for s in (0.005, 0.06, 0.14, 0.3, 0.6, 1.0)],
                    [2.0, 2.0, 2.0, 1.9], add=[2.0, 2.0, 2.0, 1.9])  # fmt: skip
    assert "is a coincidence, and no sign that first order holds" in found.story()


# --- tables


def test_terminal_tables_hold_every_number_and_no_markup():
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(explanation_tables(explanation(said=("[red]", " Lyon"))))
    text = console.export_text()
    console.print(explanation_tables(explanation(end=FIRST)))
    flagged = console.export_text()
    assert "[red]" in text
    assert re.search(r"blocks.0.mlp.down +\+2.00 +\+2.00 +\+3.00 +\+3.00 +\+2.00", text)
    assert "leaving out" not in re.search(r"blocks.2.mlp.down .*", text)[0]
    assert re.search(r"blocks.2.mlp.down .* leaving out", flagged)
    assert re.search(r"first order at ε = 1 +leaving one out at a time +0.999 +1.000", text)
    assert re.search(r"of modules together, .* \+4.00 +50%", text)
    assert re.search(r"ranking +top 25% keeps", text)
    assert re.search(r"random +20% ", text)


def test_every_table_of_an_explanation_holds_its_columns():
    explained = explanation(null=True)
    tables = [
        moved_table(explained, 5),
        margins_table([(1, explained), (2, explanation(fast=True))]),
        sites_table(explained, 9),
    ]
    for width in (80, 100, 160):
        assert [faults(table, shown(table, width), width) for table in tables] == [[]] * 3
