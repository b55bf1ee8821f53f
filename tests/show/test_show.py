"""Pictures, tables, words and pages say what the numbers say: results made by hand."""

from __future__ import annotations

import ast
import dataclasses
import html
import io
import json
import math
import re
from pathlib import Path

import by_folder
import pytest
import torch
from every_result import every_result
from results_by_hand import (
    EVIL,
    META,
    READOUT,
    SCALES,
    attribution,
    explanation,
    fact,
    flip_case,
    site,
    two_prompts,
    without_plotly,
)
from rich.console import Console

import lens_lora.show
from lens_lora.core import Attribution, Site
from lens_lora.errors import ArgumentError
from lens_lora.show.figures import heatmap, names_axis, tokens_axis
from lens_lora.show.page import plot
from lens_lora.show.tables import Table
from lens_lora.show.text import magnitude, percent, prompt_text, shortened, signed, visible
from lens_lora.views.curves import margin_figure, remainder_figure
from lens_lora.views.maps import position_heatmap, site_heatmap
from lens_lora.views.tables import margin_table, modules_table
from lens_lora.views.words import margin_numbers, margin_story

core = by_folder.made_public("core")
hidden = by_folder.made_public("hidden")
of_groups = core.of_groups

# --- bars of groups


def test_bars_of_layers_go_upwards_as_in_every_figure():
    """Other groups are listed from the top."""
    layers = dataclasses.replace(of_groups(), groups={"layer 0": (0, 1), "layer 2": (2, 3)})
    others = dataclasses.replace(of_groups(), groups={"mlp": (0, 2), "rest": (1, 3)})
    assert layers.plot().layout.yaxis.autorange is True
    assert others.plot().layout.yaxis.autorange == "reversed"


# --- the heatmap of sites


def test_site_heatmap_shows_one_prompt_and_leaves_missing_sites_blank():
    figure = site_heatmap(two_prompts(), prompt=0)
    trace = figure.data[0]
    assert list(trace.x) == ["q", "up", "down"]
    assert [list(row) for row in trace.z] == [
        [1.0, None, -2.0],
        [None, None, None],
        [None, 0.5, 0.25],
    ]
    assert list(trace.y) == [0, 1, 2]
    assert figure.layout.yaxis.autorange is None


def test_site_heatmap_is_centred_at_zero_and_blue_is_up():
    trace = site_heatmap(two_prompts(), prompt=0).data[0]
    assert (trace.zmin, trace.zmid, trace.zmax) == (-2.0, 0, 2.0)
    lowest = trace.colorscale[0][1]
    highest = trace.colorscale[-1][1]
    red = int(lowest[1:3], 16)
    blue = int(highest[5:7], 16)
    assert red > int(lowest[5:7], 16)
    assert blue > int(highest[1:3], 16)


def test_site_heatmap_hover_names_site_module_units_and_share():
    cell = site_heatmap(two_prompts(), prompt=0).data[0].hovertext[2][1]
    assert cell == (
        "<b>blocks.2.mlp.up</b><br>model.layers.2.up_proj<br>+0.50 logits<br>25% of the shift"
    )


def test_site_heatmap_averages_without_a_prompt_and_says_so():
    figure = site_heatmap(two_prompts())
    assert [list(row) for row in figure.data[0].z][0] == [2.0, None, -1.0]
    assert "50% of the shift" in figure.data[0].hovertext[0][0]
    title = html.unescape(figure.layout.title.text)
    assert READOUT in title
    assert "first order at ε = 0" in title
    assert "mean of 2 prompts" in title
    assert "prompt 1 of 2" in site_heatmap(two_prompts(), prompt=1).layout.title.text


def test_site_heatmap_of_one_prompt_is_no_mean():
    figure = site_heatmap(attribution([[1.0, 2.0, 3.0, 4.0]], [0.0], [1.0]))
    assert "mean" not in figure.layout.title.text


def test_embeddings_lie_below_layer_0_and_the_unembedding_above_the_last():
    outside = [Site(k, k, layer, k, "r", "w", 2) for k, layer in (("embed", -1), ("unembed", 2))]
    sites = (outside[0], site(0, "q"), outside[1])
    values = [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]
    att = attribution(values, [0.0], [1.0], by=("position",), sites=sites, tokens=(("a", "b"),))
    by_kind = site_heatmap(att)
    by_position = position_heatmap(att)
    assert [list(row) for row in by_kind.data[0].z] == [
        [3.0, None, None],
        [None, 7.0, None],
        [None] * 3,
        [None, None, 11.0],
    ]
    assert [list(row) for row in by_position.data[0].z] == [[1, 2], [3, 4], [None] * 2, [5, 6]]
    for figure in (by_kind, by_position):
        assert list(figure.data[0].y) == [-1, 0, 1, 2]
        axis = figure.layout.yaxis
        ticks = dict(zip(axis.tickvals, axis.ticktext, strict=True))
        assert ticks == {-1: "embed", 0: "0", 1: "1", 2: "unembed"}


def test_site_heatmap_of_nothing_but_zeros_has_a_scale():
    trace = site_heatmap(attribution([[0.0] * 4], [1.0], [1.0])).data[0]
    assert (trace.zmin, trace.zmax) == (-1.0, 1.0)
    assert trace.hovertext[0][0].endswith("— of the shift")


@pytest.mark.parametrize("draw", [site_heatmap, position_heatmap])
def test_missing_prompt_is_refused(draw):
    att = attribution([[[1.0]] * 4], [0.0], [1.0], by=("position",), tokens=(("a",),))
    with pytest.raises(ValueError, match="prompt 1: the result has prompts 0 to 0"):
        draw(att, 1)


# --- the heatmap of positions


def positions(**kwargs):
    values = torch.arange(2 * 4 * 3).view(2, 4, 3).float().tolist()
    rows = (("<s>", " a", " a"), ("b", "\n"))
    return attribution(values, [0.0, 0.0], [4.0, 8.0], by=("position",), tokens=rows, **kwargs)


def test_position_heatmap_sums_layers_and_leaves_padding_out():
    first, second = (position_heatmap(positions(), prompt=i) for i in (0, 1))
    assert [list(row) for row in first.data[0].z] == [
        [3.0, 5.0, 7.0],
        [None] * 3,
        [15.0, 17.0, 19.0],
    ]
    assert [list(row) for row in second.data[0].z] == [[27.0, 29.0], [None] * 2, [39.0, 41.0]]
    assert first.data[0].hovertext[0][1].startswith("<b>layer 0, position 1</b>: ·a")
    assert first.data[0].hovertext[0][1].endswith("+5.00 logits<br>125% of the shift")


def test_position_ticks_are_unique_visible_and_escaped():
    axis = position_heatmap(positions(), prompt=0).layout.xaxis
    assert list(axis.tickvals) == [0, 1, 2]
    assert list(axis.ticktext) == ["0 &lt;s&gt;", "1 ·a", "2 ·a"]
    assert list(position_heatmap(positions(), prompt=1).layout.xaxis.ticktext) == ["0 b", "1 ⏎"]


def test_long_prompts_thin_their_ticks_not_their_cells():
    tokens = tuple(f"t{i}" for i in range(150))
    att = attribution(
        torch.ones(1, 4, 150).tolist(), [0.0], [1.0], by=("position",), tokens=(tokens,)
    )
    figure = position_heatmap(att, most=None)
    assert len(figure.data[0].x) == 150
    assert list(figure.layout.xaxis.ticktext)[:2] == ["0 t0", "8 t8"]


def test_of_a_long_prompt_the_largest_positions_are_shown_and_it_says_so():
    values = torch.ones(1, 4, 150)
    values[0, 2, [7, 99]], values[0, 0, 140] = 3.0, -4.0
    tokens = tuple(f"t{i}" for i in range(150))
    att = attribution(values.tolist(), [0.0], [1.0], by=("position",), tokens=(tokens,))
    figure = position_heatmap(att, most=3)
    assert list(figure.layout.xaxis.ticktext) == ["7 t7", "99 t99", "140 t140"]
    assert "position 140</b>: t140" in figure.data[0].hovertext[0][2]
    assert "the 3 positions of 150 with the largest |value|" in figure.layout.title.text
    with pytest.raises(ArgumentError, match="most"):
        position_heatmap(att, most=0)


def test_parts_by_head_and_rank_have_a_picture_each():
    values = torch.zeros(1, 4, 3, 2)
    values[0, 0, 1, 1], values[0, 1, 2, 0] = 2.0, -1.0
    att = attribution(values.tolist(), [0.0], [1.0], by=("head", "rank"), heads=(2, 0, 0, 0))
    heads = att.plot(by="head")
    assert [list(row) for row in heads.data[0].z] == [[0.0, 2.0]]
    assert "by site and head" in heads.layout.title.text
    ranks = att.plot(by="rank")
    assert [list(row) for row in ranks.data[0].z][:2] == [[0.0, 2.0], [-1.0, 0.0]]
    assert "rank 1<br>+2.00 logits" in ranks.data[0].hovertext[0][1]
    assert "by site and head, summed over ranks" in heads.layout.title.text
    assert "summed over heads and ranks" in att.plot(by="site").layout.title.text
    with pytest.raises(ArgumentError, match="not by position"):
        att.plot(by="position")


@pytest.mark.parametrize("axis", ["position", "head", "expert", "rank", "token"])
def test_what_was_asked_for_is_drawn(axis: str):
    """Not the sum over it, which is what by='site' draws."""
    values = torch.arange(8.0).view(1, 4, 2) + 1
    more = {"str_tokens": (("x", "y"),)} if axis == "position" else {"heads": (1,) * 4}
    whole = attribution(values.sum(-1).tolist(), [0.0], [1.0])
    response = ((" a", " b"),) if axis == "token" else ()
    att = dataclasses.replace(whole, values=values, by=(axis,), response=response, **more)
    figure = att.plot()
    by_site = att.plot(by="site")
    assert figure == att.plot(by=axis)
    assert figure != by_site
    assert axis in figure.layout.title.text
    assert "summed" not in figure.layout.title.text
    assert "by layer and kind of module, summed over" in by_site.layout.title.text
    assert by_site.data[0].z == site_heatmap(whole).data[0].z


@pytest.mark.parametrize(("axis", "slots"), [("head", 3), ("expert", 1)])
def test_sites_are_drawn_where_none_has_a_head_or_an_expert(axis: str, slots: int):
    """An adapter of MLPs alone has no heads; the last slot is for sites without."""
    values = torch.zeros(1, 4, slots)
    values[..., -1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    whole = attribution(values.sum(-1).tolist(), [0.0], [1.0])
    att = dataclasses.replace(whole, values=values, by=(axis,))
    assert att.plot() == att.plot(by="site")
    assert att.plot().data[0].z == whole.plot().data[0].z
    with pytest.raises(ArgumentError, match=rf"no site .* has {axis}s; plot\(by='site'\)"):
        att.plot(by=axis)
    both = dataclasses.replace(
        att, values=values[..., None].expand(1, 4, slots, 2) / 2, by=(axis, "rank")
    )
    assert "by site and rank" in both.plot().layout.title.text


def test_positions_of_several_prompts_are_drawn_one_prompt_at_a_time():
    """They have no mean; the sites do."""
    tokens = (("x", "y"), ("z", "w"))
    att = attribution(
        torch.ones(2, 4, 2).tolist(), [0.0, 0.0], [1.0, 1.0], by=("position",), tokens=tokens
    )
    with pytest.raises(ArgumentError, match="no mean; choose one with prompt="):
        att.plot()
    assert "prompt 1 of 2" in att.plot(1).layout.title.text
    assert "mean of 2 prompts" in att.plot(by="site").layout.title.text


def test_position_heatmap_sums_the_other_axes():
    values = torch.arange(4 * 3 * 2).view(1, 4, 3, 2).float()
    tokens = (("x", "y", "z"),)
    both = attribution(values.tolist(), [0.0], [1.0], by=("position", "rank"), tokens=tokens)
    alone = attribution(values.sum(3).tolist(), [0.0], [1.0], by=("position",), tokens=tokens)
    assert position_heatmap(both).data[0].z == position_heatmap(alone).data[0].z


def test_position_heatmap_names_the_remedy():
    with pytest.raises(ValueError, match=r'first_order\(\.\.\., by="position"\)'):
        position_heatmap(two_prompts())


# --- curves


def test_remainder_figure_shows_the_curve_its_line_and_their_difference():
    margin = flip_case()
    exact, line, share = remainder_figure(margin.curve).data
    assert list(exact.x) == pytest.approx([0.0, *SCALES])
    assert list(exact.y) == pytest.approx([-4.0, -3.95, -3.5, -2.4, 0.1, 2.0, 4.0])
    assert list(line.y) == pytest.approx([-4.0, *(-4.0 + 4.0 * s for s in SCALES)])
    frame = margin.curve.to_frame()
    assert list(share.y) == pytest.approx((100 * frame["share"]).tolist())
    assert share.y[-1] == pytest.approx(50.0)
    assert share.yaxis == "y2"
    assert exact.yaxis == "y"


def test_remainder_figure_greys_what_is_noise():
    figure = remainder_figure(flip_case().curve)
    assert not figure.layout.shapes
    noisy = fact(-4.0, [1.0, 2.0, 1.5, -0.5], [-3.95, -3.5, -2.4, 0.1, 2.0, 4.0], noise=0.05)
    figure = remainder_figure(noisy.curve)
    spans = {(shape.x0, round(shape.x1, 6)) for shape in figure.layout.shapes}
    assert spans == {(0.0, 0.175)}
    colours = figure.data[2].marker.color
    assert len(set(colours[:2])) == 1
    assert len(set(colours[2:])) == 1
    assert colours[0] != colours[2]
    assert "3 noise floors" in "".join(a.text for a in figure.layout.annotations)


def test_remainder_figure_without_a_shift_has_no_share():
    still = fact(-4.0, [0.0] * 4, [-4.0] * 6)
    assert list(remainder_figure(still.curve).data[2].y) == [None] * 6


def test_margin_figure_marks_zero_and_the_flip():
    figure = margin_figure(flip_case())
    zero, flip = figure.layout.shapes
    assert (zero.y0, zero.y1) == (0, 0)
    assert (flip.x0, flip.x1) == (0.49, 0.49)
    (label,) = figure.layout.annotations
    assert label.text == "flips at ε = 0.49"
    # Off its line, and above the zero line before the flip, where the margin is below it.
    assert (label.x, label.xanchor, label.xshift) == (0.49, "right", -6)
    assert label.yanchor == "top"
    assert list(figure.data[0].y)[0] == -4.0
    without = margin_figure(fact(-4.0, [0.1] * 4, [-3.9] * 6))
    assert len(without.layout.shapes) == 1


def test_figures_can_be_read_on_light_and_dark():
    for figure in (
        site_heatmap(two_prompts()),
        remainder_figure(flip_case().curve),
        margin_figure(flip_case()),
    ):
        look = figure.layout.template.layout
        assert look.paper_bgcolor == "rgba(0,0,0,0)"
        assert 0x60 < int(look.font.color[1:3], 16) < 0x90


def test_zero_has_the_colour_of_the_page_and_what_is_not_there_is_grey():
    values, missing = site_heatmap(two_prompts()).data
    middle = next(colour for at, colour in values.colorscale if at == 0.5)
    assert float(middle.removesuffix(")").split(",")[-1]) < 0.1
    present = [[v is not None for v in row] for row in values.z]
    assert [[v is None for v in row] for row in missing.z] == present


def test_a_theme_is_put_on_afterwards():
    figure = site_heatmap(two_prompts()).update_layout(template="lens_lora.print")
    look = figure.layout.template.layout
    assert look.font.color == "#000000"
    assert look.paper_bgcolor == "#ffffff"
    assert figure.layout.font.color is None
    assert figure.layout.paper_bgcolor is None


@pytest.mark.bad_input
def test_words_that_name_no_picture_are_refused():
    att = attribution([[1.0] * 4], [0.0], [1.0])
    with pytest.raises(ArgumentError, match="by='kind'"):
        att.plot(by="kind")


def test_results_call_the_figures():
    margin = flip_case()
    assert margin.plot() == margin_figure(margin)
    assert margin.curve.plot() == remainder_figure(margin.curve)
    assert margin.attribution.plot() == site_heatmap(margin.attribution)
    assert positions().plot_positions(1) == position_heatmap(positions(), 1)
    assert margin.story() == margin_story(margin)


def test_a_best_set_is_a_map_and_several_are_a_curve():
    found = by_folder.made_public("judging").best_subset()
    curve = found.plot()
    lines = [[50.0, 50.0], [None, None], [50.0, 75.0], [50.0, 50.0]]
    assert [list(line.y) for line in curve.data] == lines
    assert [line.showlegend for line in curve.data] == [True, False, None, None]
    assert curve.data[-1].name == "held-out prompts"
    assert len(dataclasses.replace(found, held_out=()).plot().data) == 3
    assert list(curve.data[-1].x) == [25.0, 50.0]
    members = found.plot(2)
    assert "2 of 4 sites keep 75% of the shift, held out 50%" in members.layout.title.text
    inside = [v for row in members.data[0].z for v in row if v is not None]
    assert sorted(inside) == [0.0, 0.0, 1.0, 1.0]
    with pytest.raises(ArgumentError, match=r"count=3.*\(1, 2\)"):
        found.plot(3)


# --- words


def test_a_long_prompt_is_shortened_in_its_middle():
    text = " ".join(str(number) for number in range(500))
    short = shortened(text)
    assert len(short) <= 243
    assert short.startswith("0 1 2 ")
    assert short.endswith(" 498 499")
    begin, end = short.split(" … ")
    assert text.startswith(f"{begin} ")
    assert text.endswith(f" {end}")
    assert shortened("The capital of") == "The capital of"
    assert len(shortened("x" * 900)) == 243


def test_first_order_of_a_violent_adapter_says_so_wherever_it_is_shown():
    """And nothing where ‖ΔW‖ / ‖W‖ is small or unknown, nor of what is measured or complete."""
    says = "This adapter is violent: ‖ΔW‖ is 40% of ‖W‖"

    def with_norm(norm, margin=None, **fields):
        margin = margin or flip_case()
        att = dataclasses.replace(margin.attribution, relative_norm=norm, **fields)
        return dataclasses.replace(margin, attribution=att)

    violent = with_norm(0.4)
    for text in (repr(violent.attribution), violent.attribution._repr_html_(), violent.story()):
        assert says in text
    quiet = (with_norm(Attribution.VIOLENT), with_norm(math.nan), with_norm(0.4, method="path"))
    assert all("violent" not in repr(f.attribution) + f.story() for f in quiet)
    e = dataclasses.replace(explanation(), margin=with_norm(0.4, explanation().margin))
    assert says in e.story()
    assert says in e.report()
    assert "violent" not in explanation().story()


def test_story_of_a_flip():
    story = margin_story(flip_case())
    assert "On the prompt “The capital of” the base model prefers “Paris” to “Lyon”" in story
    assert "by 4.00 logits" in story
    assert "With the adapter it prefers “Lyon”, by 4.00: a shift of 8.00 towards “Lyon”" in story
    assert "flips at ε = 0.49" in story
    assert "predicts a shift of +4.00 logits, to a margin of 0.00" in story
    assert "It misses 50% of the shift at full strength (+4.00)" in story
    assert "at most 51% on the way (at ε = 0.5)" in story
    assert "do not add up" in story
    assert "blocks.0.mlp.down +2.00 (25%), blocks.2.mlp.up +1.50 (19%)" in story
    assert story.count("\n") == 2


def test_story_without_a_flip():
    margins = [-4.0 + 1.02 * s for s in SCALES]
    story = margin_story(fact(-4.0, [0.25] * 4, margins))
    assert "still prefers “Paris”, by 2.98: a shift of 1.02 towards “Lyon”" in story
    assert "flips at none of the 6 strengths that were run" in story
    assert "predicts no flip, and at ε = 1 there is none" in story
    assert "first order describes the whole path" in story
    assert "coincidence" not in story


def test_story_of_a_base_that_prefers_the_document():
    margins = [2.0 + 3.0 * s for s in SCALES]
    story = margin_story(fact(2.0, [0.75] * 4, margins))
    assert "the base model prefers “Lyon” to “Paris” by 2.00 logits" in story
    assert "still prefers “Lyon”, by 5.00: a shift of 3.00 towards “Lyon”" in story
    assert "flips at none" in story


def test_story_of_a_shift_towards_the_pretrained_fact():
    story = margin_story(fact(-1.0, [-0.5] * 4, [-1.0 - 2.0 * s for s in SCALES]))
    assert "by 3.00: a shift of 2.00 towards “Paris”" in story
    assert "blocks.0.attn.q −0.50 (25%)" in story


def test_story_below_the_noise_claims_no_effect():
    margins = [-4.0 + 1e-6 * s for s in SCALES]
    story = margin_story(fact(-4.0, [2.5e-7] * 4, margins, noise=1e-5))
    assert "below 3 noise floors (3e-05)" in story
    assert "shows no effect of the adapter" in story
    assert "too small for a run at this precision to confirm" in story
    assert "%" not in story
    assert "flip" not in story
    assert "coincidence" not in story


def test_story_of_a_base_margin_below_the_noise_prefers_neither():
    story = margin_story(fact(1e-6, [0.25] * 4, list(SCALES), noise=1e-5))
    assert "the base model prefers neither “Lyon” nor “Paris”" in story
    assert "Rounding hides whether the preference flips: rerun at a higher precision." in story
    assert story.count("flip") == 1


def test_story_of_a_remainder_below_the_noise():
    story = margin_story(fact(-4.0, [0.25] * 4, [-4.0 + s for s in SCALES], noise=1e-4))
    assert re.search(r"At full strength it is off by \S+, below 3 noise floors \(0.0003\)", story)
    assert "on the way nothing that stands out of the noise" in story


def test_story_of_a_flip_and_a_flip_back():
    story = margin_story(fact(-1.0, [2.0] * 4, [-0.9, 0.5, 2.0, 1.0, -0.2, -0.6], flip=0.07))
    assert "On the way the preference flips at ε = 0.07 and has flipped back at ε = 1" in story
    assert "it predicts a flip, and at ε = 1 there is none" in story
    assert "19 times the shift" in story


def test_story_of_several_crossings():
    story = margin_story(fact(-1.0, [0.5] * 4, [-0.9, 0.5, -0.5, 0.5, 1.0, 1.2], flip=0.06))
    assert "flips at ε = 0.06" in story
    assert "the first of 3 changes on the way" in story


def test_story_calls_agreement_at_one_point_a_coincidence():
    margins = [-4.0 + 8.0 * s for s in (0.005, 0.06, 0.14, 0.3, 0.6, 1.0)]
    story = margin_story(fact(-4.0, [2.0, 2.0, 2.0, 1.9], margins, flip=0.67))
    assert "but 76% on the way (at ε = 0.25)" in story
    assert "a coincidence" in story
    assert "describes the whole path" not in story


def test_story_of_a_missed_flip():
    story = margin_story(fact(-4.0, [0.25] * 4, [-3.9, -3.0, -2.0, 0.5, 1.0, 1.5], flip=0.45))
    assert "it misses the flip" in story


@pytest.mark.parametrize(
    ("facts", "names"),
    [
        ((" Lyon", " Paris"), ("“Lyon”", "“Paris”")),
        ((" a", "a"), ("' a'", "'a'")),
        (("\n", " b"), (r"'\n'", "' b'")),
    ],
)
def test_facts_are_named_so_that_they_can_be_told_apart(facts, names):
    numbers = margin_numbers(fact(-1.0, [0.25] * 4, [0.0] * 5 + [1.0], facts=facts))
    assert (numbers.doc, numbers.pre) == names


# --- tables


def test_repr_gives_method_account_and_top_sites():
    lines = repr(two_prompts()).splitlines()
    assert lines[0] == f"{READOUT}, first order at ε = 0, in logits: 2 prompts × 4 sites"
    assert lines[1] == (
        "  0  The capital of: −1.00 → +1.00, shift +2.00, Σ −0.25, remainder +2.25 (112%)"
    )
    assert lines[3] == "largest, mean of 2 prompts, with the share of the shift:"
    assert lines[4].split() == ["blocks.0.attn.q", "+2.00", "50%"]
    assert len(lines) == 8


def test_repr_shows_five_prompts_and_counts_the_rest():
    many = attribution([[1.0] * 4] * 7, [0.0] * 7, [1.0] * 7)
    assert "… and 2 more prompts" in repr(many)
    assert len([line for line in repr(many).splitlines() if "→" in line]) == 5
    assert "more prompts" not in repr(two_prompts())


def two_prompts_of_one_site() -> Attribution:
    whole = two_prompts()
    return dataclasses.replace(
        whole, values=whole.values[:, :1], sites=whole.sites[:1], heads=whole.heads[:1]
    )


def test_one_site_is_not_several():
    assert "2 prompts × 1 site\n" in repr(two_prompts_of_one_site())


def test_one_prompt_that_is_not_shown_is_not_several():
    two = two_prompts_of_one_site()
    six = dataclasses.replace(
        two,
        values=two.values.repeat(3, 1),
        base=two.base.repeat(3),
        adapted=two.adapted.repeat(3),
        str_tokens=two.str_tokens * 3,
    )
    assert "… and 1 more prompt\n" in repr(six)


def test_one_prompt_that_is_left_out_is_not_several():
    curves = explanation().faithfulness
    below_noise = dataclasses.replace(curves, noise_floor=curves.shift.abs())
    assert repr(below_noise).endswith("\n1 prompt has no shift above the noise: left out.")


def test_an_order_that_is_unknown_is_a_dash():
    curve = dataclasses.replace(flip_case().curve, order=torch.tensor([torch.nan]))
    assert "order —" in repr(curve)


def test_a_module_that_was_not_screened_has_no_correction():
    """Its number is first order's own, and there is no score."""
    flags = explanation().reliability["add_one"]
    correction = flags.correction.clone()
    correction[0, 1] = torch.nan
    (_, _, *marks) = dataclasses.replace(flags, correction=correction).plot().data
    hover = [text for mark in marks for text in mark.hovertext]
    assert sum("not measured" in text and "corrected" not in text for text in hover) == 1
    assert not any("nan" in text for text in hover)


def test_notebook_table_is_escaped():
    sites = (site(0, "q", "<script>alert(1)</script>"),)
    att = attribution([[1.0]], [0.0], [1.0], sites=sites, tokens=(("<b>", "<img src=x>"),))
    page = att._repr_html_()
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;img src=x&gt;" in page


def test_terminal_tables_show_the_numbers_and_no_markup_of_a_token():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(margin_table(margin_numbers(flip_case())))
    console.print(modules_table(flip_case().attribution, k=2))
    console.print(Table(("token", "logits"), [("[red]", "+2.00")]))
    text = console.export_text()
    assert re.search(r"remainder at ε = 0.75 +\+3.00 +50%", text)
    assert re.search(r"remainder at ε = 1 +\+4.00 +50%", text)
    assert re.search(r"flip scale +ε = 0.49", text)
    assert re.search(r"blocks.0.mlp.down +model.layers.0.down_proj +\+2.00 +25%", text)
    assert "blocks.2.mlp.down" not in text
    assert re.search(r"\[red\] +\+2.00", text)


@pytest.mark.parametrize("width", [80, 60])
def test_a_narrow_terminal_keeps_sites_and_numbers_whole(width: int):
    heads = ("site", "a at ε = 0", "effect of adding", "effect of leaving out", "flagged for")
    flags = "adding, leaving, parts, all and some more that do not fit"
    row = ("blocks.27.mlp.down", "+0.1234", "+0.33333", "+0.4444", flags)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(Table(heads, [row], texts=(0, 4), title="modules"))
    text = console.export_text()
    assert all(cell in text for cell in row[:4])
    assert row[4] not in text, "wide enough for the whole table: nothing was tested"


def test_margin_rows_call_noise_noise():
    numbers = margin_numbers(fact(-4.0, [0.25] * 4, [-4.0 + s for s in SCALES]))
    rows = margin_table(numbers).rows
    shares = {what: share for what, _, share in rows if what.startswith("remainder")}
    assert set(shares.values()) == {"noise"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (1.234, "+1.23"), (-0.0312, "−0.031"), (-2e-7, "−2e-07"), (math.nan, "—")],
)
def test_signed(value, text):
    assert signed(value) == text
    assert magnitude(value) == text.lstrip("+−")


@pytest.mark.parametrize(
    ("share", "text"), [(0.424, "42%"), (-0.0239, "−2.4%"), (0.0004, "0.04%"), (math.inf, "—")]
)
def test_percent(share, text):
    assert percent(share) == text


def test_tokens_and_prompts_are_visible():
    assert [visible(t) for t in (" a\n", "", "\x07")] == ["·a⏎", "∅", "\\x07"]
    assert prompt_text(("<|im_start|>", "The", " end\n")) == "The end⏎"
    assert prompt_text(("<s>",)) == "<s>"
    assert prompt_text(("The", "<s>")) == "The<s>"


# --- the report


@pytest.fixture(scope="module")
def page():
    return explanation(tokens=("a", EVIL)).report()


def test_report_loads_nothing(page):
    own = without_plotly(page)
    assert not re.search(r"<[^>]+\b(src|href)\s*=", own)
    assert not re.search(r"@import|url\(|<link|<iframe", own)
    assert not re.search(r"<script[^>]+src", page)


def test_report_inlines_plotly_once(page):
    assert len(re.findall(r"<script[^>]*>[^<]{0,200}plotly\.js v", page)) == 1


def test_report_escapes_tokens_and_names(page):
    own = without_plotly(page)
    assert "alert(1)" in own
    assert EVIL not in page
    titled = explanation().report(title=EVIL)
    assert EVIL not in titled
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in titled


def test_report_holds_story_numbers_tokens_and_provenance(page):
    own = html.unescape(without_plotly(page))
    for paragraph in explanation(tokens=("a", EVIL)).story().split("\n"):
        assert f"<p>{paragraph}</p>" in own
    for what, value, _ in margin_table(margin_numbers(explanation().margin)).rows:
        assert f">{what}<" in own
        assert f">{value}<" in own
    assert "all modules together" in own
    assert ">·b<" in own
    for value in META.values():
        assert f">{value}<" in own
    assert "adding that one module to the base model" in own
    assert "look along the path" in own


def test_report_follows_light_and_dark(page):
    assert "prefers-color-scheme: dark" in page
    assert "Plotly.relayout" in without_plotly(page)


# --- every figure


def figures_of(result):
    """Those of a result, of its first prompt where it needs one."""
    if hasattr(result, "figures"):
        return list(result.figures().values())
    if not hasattr(result, "plot"):
        return []
    try:
        return [result.plot()]
    except (ArgumentError, TypeError):
        return [result.plot(prompt=0)]


def test_no_axis_has_a_frame_s_title_and_no_legend_lies_on_a_curve():
    figures = [figure for result in every_result() for figure in figures_of(result)]
    assert len(figures) > 30
    for figure in figures:
        axes = [*figure.select_xaxes(), *figure.select_yaxes()]
        assert not {axis.title.text for axis in axes} & {"value", "index", "variable"}
        legend = figure.layout.legend
        assert not (legend.x < 1 and 0 <= legend.y < 1), figure.layout.title.text


def test_a_title_of_several_lines_makes_room_and_none_on_a_page():
    rows = ("<s>", " a"), ("<s>", *(f" word {i}" for i in range(20)))
    both = (([[1.0] * 4] * 2, [0.0] * 2, [4.0] * 2, (row, row)) for row in rows)
    figures = [site_heatmap(attribution(*numbers, tokens=pair)) for *numbers, pair in both]
    lines = [figure.layout.title.text.count("<br>") for figure in figures]
    assert lines == [1, 2]
    assert [figure.layout.margin.t for figure in figures] == [70, 85]
    shown = [json.loads(plot(figure).figure)["layout"]["margin"]["t"] for figure in figures]
    assert shown == [56, 56]


def test_a_heading_of_a_long_response_stays_within_the_picture():
    """Its beginning and what was computed are read; the middle of the response is left out.

    The caption of a page breaks into lines, and has all of it.
    """
    readout = f"log p(' Lyon{' is a city' * 40}')"
    att = dataclasses.replace(attribution([[1.0] * 4], [0.0], [4.0]), readout=readout)
    heading = html.unescape(att.plot().layout.title.text.partition("<br>")[0])
    assert len(heading) == 84
    assert heading.startswith("log p(' Lyon is a city")
    assert "…" in heading
    assert heading.endswith("'), first order at ε = 0")
    assert plot(att.plot()).caption[0] == f"{readout}, first order at ε = 0"  # of a page, whole
    plain = attribution([[1.0] * 4], [0.0], [4.0]).plot().layout.title.text
    assert "…" not in plain.partition("<br>")[0]


# --- layers


def test_show_reads_results_only():
    """`show` takes the core's door, messages, answers to guesses, and itself; it knows no tensor.

    What it takes through the door is no lens, and nothing that runs one.
    """
    allowed = ("lens_lora.core", "lens_lora.errors", "lens_lora.arguments", "lens_lora.guesses")
    runs_a_model = {"LoraLens", "Function", "Evaluations"}
    folder = Path(lens_lora.show.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules: list[str] = []
            names: set[str] = set()
            if isinstance(node, ast.ImportFrom):
                modules = [str(node.module)]
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                assert not module.startswith("torch"), path
                is_own = module.startswith("lens_lora.show")
                assert is_own or module in allowed or not module.startswith("lens_lora"), path
                assert module != "lens_lora.core" or not names & runs_a_model, path


def test_groups_by_token_are_a_heatmap():
    """Rows are groups, columns the tokens of one response; several responses must be named."""
    grouped = core.by_group()
    figure = grouped.plot(1)
    tokens = grouped.response[1]
    assert [list(row) for row in figure.data[0].z] == [[3.0], [0.0]]
    assert len(figure.data[0].y) == len(grouped.groups)
    assert len(figure.data[0].x) == len(tokens)
    assert "first order at ε" in figure.layout.title.text
    with pytest.raises(ArgumentError, match="prompt"):
        grouped.plot()
    (bars,) = of_groups().plot(1).data
    assert list(bars.x) == [0.5, 3.0]


def test_layer_0_is_at_the_bottom_of_every_map_of_layers():
    training = by_folder.made_public("two_adapters").checkpoints()
    figures = (
        hidden.constant_part().plot(),
        hidden.activation_shift().plot(1),
        hidden.rank_activations().plot(prompt=0),
        core.activations(by_position=True).plot(0),
        training.plot_modules("moved", "layer"),
        training.plot_modules("moved", "site"),
    )
    assert [figure.layout.yaxis.autorange for figure in figures] == [None] * len(figures)


@pytest.mark.parametrize(("columns", "gap"), [(64, 1), (600, 0)])
def test_a_dense_map_has_no_gaps_between_its_columns(columns: int, gap: int):
    row = [0.5] * columns
    x = tokens_axis(["t"] * columns)
    y = names_axis(["a"])
    figure = heatmap(("h", "b"), [row], "", x, y, "logits")
    assert figure.data[0].xgap == gap
