"""The page of an explanation: whole, escaped, offline; opened in a browser, light and dark."""

from __future__ import annotations

import dataclasses
import functools
import html
import itertools
import re

import plotly.graph_objects as go
import pytest
from browser import Reader, browser, drawn, opened
from explained import by_hand
from results_by_hand import EVIL, SITES, attribution, without_plotly

from lens_lora.show.page import render
from lens_lora.show.page.report import explanation_report, margin_report
from lens_lora.show.text import label

# --- the page

SECTIONS = (
    "The margin's path",
    "The remainder and its parts",
    "Second order",
    "Where first order finds the shift",
    "Largest modules",
    "Tokens promoted and suppressed",
    "Where in the prompt",
    "Coupling between layers",
    "First order against measurements",
    "Reliability flags",
    "Which few modules carry the shift",
    "Against random directions",
    "How to read this",
    "Made with",
)
PLOTS = 13


@pytest.fixture(scope="module")
def page():
    return by_hand(tokens=(EVIL, " of"), said=(EVIL, " Lyon")).report()


def headings(page):
    return [html.unescape(h) for h in re.findall(r"<h2[^>]*>(.*?)</h2>", without_plotly(page))]


def test_page_has_every_section_in_order_and_a_link_to_each(page):
    assert headings(page) == list(SECTIONS)
    targets = re.findall(r'<a href="#([^"]+)">', without_plotly(page))
    assert targets == re.findall(r'<h2 id="([^"]+)">', without_plotly(page))
    assert without_plotly(page).count("Plotly.newPlot(") == PLOTS


def test_page_leaves_out_what_was_not_computed():
    missing = {"Coupling between layers", "First order against measurements",
               "Which few modules carry the shift", "Against random directions"}  # fmt: skip
    assert headings(by_hand(fast=True, null=False).report()) == [
        name for name in SECTIONS if name not in missing
    ]


def test_page_fetches_nothing(page):
    own = without_plotly(page)
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", own)
    assert not re.search(r"@import|url\(|<link|<iframe|https?://", own)
    assert len(re.findall(r"<script[^>]*>[^<]{0,200}plotly\.js v", page)) == 1


def test_page_escapes_tokens_prompts_and_titles(page):
    assert EVIL not in page and "alert(1)" in without_plotly(page)
    assert EVIL not in explanation_report([by_hand()], title=EVIL)
    assert EVIL not in explanation_report([by_hand(tokens=(EVIL, "x")), by_hand()])


def test_page_tells_the_story(page):
    own = html.unescape(without_plotly(page))
    for paragraph in by_hand(tokens=(EVIL, " of"), said=(EVIL, " Lyon")).story().split("\n"):
        assert f"<p>{paragraph}</p>" in own


def test_page_of_several_prompts_has_one_choice_each():
    page = explanation_report([by_hand(), by_hand(tokens=("<s>", " in"))])
    own = html.unescape(without_plotly(page))
    assert re.findall(r'<template id="(prompt-\d)">', own) == ["prompt-1", "prompt-2"]
    assert re.findall(r'<option value="(prompt-\d)">([^<]*)<', own) == [
        ("prompt-1", "1.  of — “Lyon” against “Paris”"),
        ("prompt-2", "2.  in — “Lyon” against “Paris”"),
    ]
    ids = re.findall(r'<div id="(p\d-plot-\d+)"', own)
    assert len(ids) == len(set(ids)) == 2 * PLOTS
    with pytest.raises(ValueError, match="no explanation to report"):
        explanation_report([])


# --- hostile names

HOSTILE = (
    "<script>console.error('ran')</script>",
    "\"onload=console.error('ran')//",
    "'><img/src='x'/onerror=console.error('ran')>",
    "</style></script></template></select><svg/onload=console.error('ran')>",
    "{{7*7}}{%raw%}{#x#}",
    "&lt;b&gt;&amp;nbsp;",
    "<!--",
    "\u202eesrever\u2066",
    "\x1b[31m\x00",
)
HARMLESS = "harmless"


def shown(text):
    """How a page writes it: what cannot be seen is spelt out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def named(*texts):
    """An explanation in which all that has a name is called so, in turn."""
    name = itertools.cycle(texts).__next__
    sites = tuple(
        dataclasses.replace(site, name=f"{name()}{i}", module=f"{name()}{i}")
        for i, site in enumerate(SITES)
    )
    e = by_hand(
        tokens=("<s>", name()),
        said=(name(), name()),
        strings=(name(), " b", "c"),
        sites=sites,
        meta={"adapter": name(), **{f"key {i}": text for i, text in enumerate(texts)}},
    )
    margin = dataclasses.replace(e.margin, doc=(f"{name()}1",), pre=(f"{name()}2",))
    return dataclasses.replace(e, margin=margin)


def page_of_two(text):
    return explanation_report([named(text), by_hand(fast=True, null=False)], title=text)


def page_of_a_margin(text):
    e = named(text)
    split = dataclasses.replace(e.margin.attribution, readout=text)
    margin = dataclasses.replace(e.margin, attribution=split)
    return margin_report(margin, logit_shift=e.shift, positions=split, title=text)


CASES = [
    *((page_of_a_margin, text) for text in HOSTILE),
    *((page_of_two, text) for text in HOSTILE[::3]),
]


@functools.cache
def harmless(page_of):
    read = Reader(without_plotly(page_of(HARMLESS)))
    assert sum(HARMLESS in text for text in read.texts) > 10
    return read


def differs(page_of, text):
    """Whether a name changes more of a page than the places where it stands."""
    page, plain = Reader(without_plotly(page_of(text))), harmless(page_of)
    texts = [t.replace(HARMLESS, shown(text)) for t in plain.texts]
    return page.elements != plain.elements or page.texts != texts


@pytest.mark.parametrize(("page_of", "text"), CASES)
def test_a_hostile_name_is_written_out_and_changes_nothing_else(page_of, text):
    assert not differs(page_of, text)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_hostile_name_changes_nothing_else_in_a_notebook(text):
    sites = tuple(dataclasses.replace(site, module=f"{text}{site.layer}") for site in SITES)
    table = Reader(attribution([[1.0] * 4], [0.0], [4.0], sites=sites)._repr_html_())
    plain = Reader(attribution([[1.0] * 4], [0.0], [4.0])._repr_html_())
    assert table.elements == plain.elements
    assert {f"{shown(text)}{site.layer}" for site in SITES} <= set(table.texts)


@pytest.mark.parametrize(
    ("setting", "text"), [({"autoescape": False}, HOSTILE[0]), ({"finalize": None}, HOSTILE[-2])]
)
def test_the_check_of_hostile_names_sees_a_careless_page(setting, text, monkeypatch):
    """The control."""
    harmless(page_of_a_margin)
    careless = render._templates().overlay(**setting)
    monkeypatch.setattr(render, "_templates", lambda: careless)
    assert differs(page_of_a_margin, text)


# --- the page in a browser


@browser
def test_browser_draws_every_plot_without_an_error(page, tmp_path):
    dom, console = opened(page, tmp_path)
    assert console == [] and drawn(dom) == PLOTS
    assert 'data-wide="false"' in dom and 'data-ink="rgb(28, 33, 38)"' in dom
    assert 'data-text="rgb(28, 33, 38)' in dom


@browser
def test_browser_shows_the_chosen_prompt_in_dark(tmp_path):
    page = explanation_report([by_hand(), by_hand(tokens=("<s>", " in"))])
    dom, console = opened(page, tmp_path, fragment="#prompt-2", dark=True)
    assert console == [] and drawn(dom) == PLOTS
    assert "On the prompt “ in”" in dom and "On the prompt “ of”" not in dom
    assert 'data-wide="false"' in dom
    assert 'data-ink="rgb(230, 234, 238)"' in dom and 'data-text="rgb(230, 234, 238)' in dom


@browser
def test_page_is_no_wider_than_a_phone(page, tmp_path):
    dom, console = opened(page, tmp_path, phone=True)
    assert console == [] and 'data-wide="false at 390"' in dom
    wide = page.replace(".scroll { overflow-x: auto; }", "")
    assert 'data-wide="true at 390"' in opened(wide, tmp_path, phone=True)[0]


@browser
def test_browser_runs_no_name_and_drops_none(tmp_path):
    titled = "".join(HOSTILE)
    dom, console = opened(explanation_report([named(*HOSTILE)], title=titled), tmp_path)
    assert console == [] and drawn(dom) == PLOTS
    texts = Reader(dom).texts
    assert {shown(titled), *map(shown, HOSTILE)} <= set(texts)


PLOTLYS_OWN = ("$x$ costs $5", "%{x} of %{y}", "<b>bold</b>", 'it\'s "so"', "&quot;")


@browser
@pytest.mark.parametrize("written", [label, html.escape])
def test_a_figure_writes_what_plotly_would_read_as_marks(written, tmp_path):
    """In the control `&quot;` stays, and plotly asks for MathJax to typeset what $ encloses."""
    names = [written(text) for text in PLOTLYS_OWN]
    figure = go.Figure(go.Bar(x=[1.0] * len(names), y=names, orientation="h"))
    figure.update_xaxes(title_text="x")
    dom, console = opened(figure.to_html(include_mathjax=False), tmp_path)
    texts = Reader(dom).texts
    assert (console == []) == (set(PLOTLYS_OWN) <= set(texts)) == (written is label)
    assert any("$" in name or "%{" in name for name in names) == (written is not label)


@browser
def test_browser_check_sees_a_name_that_runs(tmp_path, monkeypatch):
    """The control."""
    careless = render._templates().overlay(autoescape=False)
    monkeypatch.setattr(render, "_templates", lambda: careless)
    _, console = opened(page_of_a_margin(HOSTILE[0]), tmp_path)
    assert any("ran" in line for line in console)


@browser
def test_browser_check_sees_a_broken_page(page, tmp_path):
    """The control: a plot that cannot be drawn is reported, and not counted."""
    broken = page.replace("Plotly.newPlot(", "Plotly.noSuchPlot(")
    dom, console = opened(broken, tmp_path)
    assert console and drawn(dom) < PLOTS
