"""The page of an explanation: whole, escaped, offline; opened in a browser, light and dark."""

from __future__ import annotations

import html
import re

import pytest
from browser import browser, drawn, opened
from explained import by_hand
from results_by_hand import EVIL, without_plotly

from lens_lora.show.page.report import explanation_report

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
def test_browser_check_sees_a_broken_page(page, tmp_path):
    """The control: a plot that cannot be drawn is reported, and not counted."""
    broken = page.replace("Plotly.newPlot(", "Plotly.noSuchPlot(")
    dom, console = opened(broken, tmp_path)
    assert console and drawn(dom) < PLOTS
