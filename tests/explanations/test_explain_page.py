"""The page of an explanation: whole, escaped, offline; opened in a browser, light and dark."""

from __future__ import annotations

import base64
import dataclasses
import functools
import gzip
import html
import html.parser
import io
import itertools
import re

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from browser import browser, drawn
from results_by_hand import (
    EVIL,
    SCALES,
    SITES,
    attribution,
    explanation,
    without_plotly,
)

import lens_lora as ll
from lens_lora.explanations.page import explanation_report
from lens_lora.explanations.tables import moved_table, site_moves
from lens_lora.explanations.words import headline
from lens_lora.show import page as render
from lens_lora.show.text import label

# --- the page

SECTIONS = (
    "The whole story in words",
    "The margin in numbers",
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
OVERVIEW = 2


class Reader(html.parser.HTMLParser):
    """The elements of a page with the names of their attributes, and its texts but for scripts'."""

    def __init__(self, page):
        super().__init__()
        self.elements = []
        self.texts = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, *(name for name, _ in attrs)))

    def handle_comment(self, data):
        self.elements.append(("comment",))

    def handle_data(self, data):
        if self.cdata_elem is None and data.strip():
            self.texts.append(data)


@pytest.fixture(scope="module")
def page():
    return explanation(tokens=(EVIL, " of"), said=(EVIL, " Lyon")).report()


def headings(page):
    return [html.unescape(h) for h in re.findall(r"<h2[^>]*>(.*?)</h2>", without_plotly(page))]


def test_page_has_every_section_in_order_folded_below_its_headline(page):
    own = without_plotly(page)
    assert headings(page) == list(SECTIONS)
    assert own.count("<details id=") == len(SECTIONS)
    assert "<details open" not in own
    assert own.count("data-figure=") == PLOTS
    top = own.partition("<details")[0]
    assert top.count("data-figure=") == 1
    assert top.count("<span>") == 3
    assert top.count("<dd>") == 4


def test_page_leaves_out_what_was_not_computed():
    missing = {"Coupling between layers", "First order against measurements",
               "Reliability flags", "Which few modules carry the shift",
               "Against random directions"}  # fmt: skip
    assert headings(explanation(fast=True, null=False).report()) == [
        name for name in SECTIONS if name not in missing
    ]


def test_page_fetches_nothing(page):
    own = without_plotly(page)
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", own)
    assert not re.search(r"@import|url\(|<link|<iframe|https?://", own)
    assert len(re.findall(r"<script[^>]*>[^<]{0,200}plotly\.js v", page)) == 1


@pytest.mark.slow
def test_page_escapes_tokens_prompts_and_titles(page):
    assert EVIL not in page
    assert "alert(1)" in without_plotly(page)
    assert EVIL not in explanation_report([explanation()], title=EVIL)
    assert EVIL not in explanation_report([explanation(tokens=(EVIL, "x")), explanation()])


def test_page_tells_the_story(page):
    own = html.unescape(without_plotly(page))
    for paragraph in explanation(tokens=(EVIL, " of"), said=(EVIL, " Lyon")).story().split("\n"):
        assert f"<p>{paragraph}</p>" in own


@pytest.mark.slow
def test_page_of_several_prompts_begins_with_all_of_them():
    page = explanation_report([explanation(), explanation(tokens=("<s>", " in"))])
    own = html.unescape(without_plotly(page))
    assert re.findall(r'<details class="prompt" id="(prompt-\d)">', own) == ["prompt-1", "prompt-2"]
    assert re.findall(r'<a href="#(prompt-\d)">([^<]*)<', own) == [
        ("prompt-1", "1. of"),
        ("prompt-2", "2. in"),
    ]
    top = own.partition("<details")[0]
    assert top.count("data-figure=") == OVERVIEW
    assert "“Lyon” − “Paris”" in top
    ids = re.findall(r' id="([^"]+)"', own)
    assert len(ids) == len(set(ids)) == 2 * (1 + len(SECTIONS))
    with pytest.raises(ValueError, match="no explanation to report"):
        explanation_report([])


@pytest.mark.slow
def test_plotly_is_there_once_and_sixteen_prompts_weigh_little():
    one = explanation()
    page = explanation_report([one] * 16)
    assert page.count("plotly.js v") == without_plotly(page).count("plotly.js v") + 1
    assert len(without_plotly(page)) - len(without_plotly(one.report())) < 2_000_000


def unpacked(text):
    return gzip.decompress(base64.b64decode(text)).decode()


def test_the_numbers_to_be_saved_are_the_frame_s(page):
    own = without_plotly(page)
    ((name, packed),) = re.findall(r'data-name="([^"]+)" data-csv="([^"]+)"', own)
    assert name == "modules-1.csv"
    saved = pd.read_csv(io.StringIO(unpacked(packed)))
    frame = explanation(tokens=(EVIL, " of"), said=(EVIL, " Lyon")).to_frame()
    pd.testing.assert_frame_equal(saved, frame, check_dtype=False)


def test_the_headline_is_three_sentences_of_the_numbers():
    sentences, numbers = headline(explanation())
    assert sentences[0] == (
        "The base model prefers “Paris” to “Lyon” by 4.00 logits. With the adapter it prefers "
        "“Lyon”, by 4.00: a shift of 8.00 towards “Lyon”."
    )
    assert "first-order parts sum to 50% of the shift: they do not add up" in sentences[1]
    assert sentences[2].startswith("Largest first-order parts of 4 modules")
    assert [value for value, _ in numbers] == ["−4.00", "+4.00", "ε = 0.49", "50%"]
    assert all(sentence in explanation().story() for sentence in sentences[1:2])


def test_the_headline_compares_nothing_within_rounding():
    noise = explanation([-4.0 + 1e-6 * s for s in SCALES], [2.5e-7] * 4, noise=1e-5)
    sentences, numbers = headline(noise)
    assert "cannot be told from rounding" in sentences[0]
    assert "%" not in "".join(sentences)
    assert numbers[3][0] == "noise"
    sentences, numbers = headline(explanation([-3.9, -3.5, -3.0, -2.5, -2.0, -1.0]))
    assert "With the adapter it still prefers “Paris”, by 1.00" in sentences[0]
    assert numbers[2][0] == "ε = 0.49"


def test_tokens_are_ordered_by_probability_and_rare_ones_left_out():
    e = explanation(strings=("a", "b", "rare"))
    rare = torch.tensor([[0.1, 0.9, 1e-9], [0.9, 0.1, 5e-5]])
    e = dataclasses.replace(e, probabilities=rare)
    assert moved_table(e, 5).rows == [
        ("a", "10%", "90%", "+80 points", "+3.00"),
        ("b", "90%", "10%", "−80 points", "−1.00"),
    ]
    assert [row[0] for row in moved_table(explanation(strings=("a", "b", "c")), 5).rows] == [
        "a",
        "c",
        "b",
    ]
    shift = dataclasses.replace(e.module_shift, values=torch.tensor([[[1.0, 0.0, 50.0]]]))
    ((_, up, down),) = site_moves(dataclasses.replace(e, module_shift=shift), 5)
    assert [token for token, _ in up] == ["a"]
    assert [token for token, _ in down] == ["b"]
    assert up[0][1].startswith("+9.0 points")


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
    e = explanation(
        tokens=("<s>", name()),
        said=(name(), name()),
        strings=(name(), " b", "c"),
        sites=sites,
        meta={"adapter": name(), **{f"key {i}": text for i, text in enumerate(texts)}},
    )
    margin = dataclasses.replace(e.margin, doc=(f"{name()}1",), pre=(f"{name()}2",))
    said = name()
    answers = ll.results.SideBySide("asked", said, said)
    return dataclasses.replace(e, margin=margin, answers=answers)


def page_of_two(text):
    return explanation_report([named(text), explanation(fast=True, null=False)], title=text)


def page_of_a_margin(text):
    e = named(text)
    split = dataclasses.replace(e.margin.attribution, readout=text)
    margin = dataclasses.replace(e.margin, attribution=split)
    fast = dataclasses.replace(e, margin=margin, add_one=None, leave_one_out=None)
    return explanation_report([fast], title=text)


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
    page = Reader(without_plotly(page_of(text)))
    plain = harmless(page_of)
    texts = [unquoted(t.replace(HARMLESS, shown(text))) for t in plain.texts]
    return page.elements != plain.elements or list(map(unquoted, page.texts)) != texts


def unquoted(text):
    """Without the prompt at the end of a caption, which is cut where it is long."""
    return re.sub(r"(^| · )“[^”]*”$", "", text)


@pytest.mark.sample(2)
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


@pytest.mark.sample(1)
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


@pytest.mark.browser
@browser
def test_browser_draws_every_plot_without_an_error(page, tmp_path, opened):
    dom, console = opened(page, tmp_path)
    assert console == []
    assert drawn(dom) == PLOTS
    assert 'data-wide="false at 1200"' in dom
    assert 'data-ink="rgb(28, 33, 38)"' in dom
    assert 'data-text="rgb(28, 33, 38)' in dom


@pytest.mark.browser
@browser
def test_browser_draws_what_is_folded_once_it_is_unfolded(page, tmp_path, opened):
    """One picture at first; of several prompts the overview, and the prompt that a link names."""
    assert drawn(opened(page, tmp_path, unfolded=False)[0]) == 1
    several = explanation_report([explanation(), explanation(tokens=("<s>", " in"))])
    assert drawn(opened(several, tmp_path, unfolded=False)[0]) == OVERVIEW
    dom, console = opened(several, tmp_path, fragment="#prompt-2", unfolded=False)
    assert console == []
    assert drawn(dom) == OVERVIEW + 1
    assert re.findall(r'<details class="prompt" id="(prompt-\d)" open', dom) == ["prompt-2"]


@pytest.mark.browser
@browser
def test_browser_draws_every_prompt_in_dark(tmp_path, opened):
    page = explanation_report([explanation(), explanation(tokens=("<s>", " in"))])
    dom, console = opened(page, tmp_path, dark=True)
    assert console == []
    assert drawn(dom) == OVERVIEW + 2 * PLOTS
    assert 'data-wide="false at 1200"' in dom
    assert 'data-ink="rgb(230, 234, 238)"' in dom
    assert 'data-text="rgb(230, 234, 238)' in dom


SAVE = """<script>HTMLAnchorElement.prototype.click = async function () {
  const body = await (await fetch(this.href)).text();
  document.body.append(`[${this.download}: ${body.replace(/\\s+/g, " ").slice(0, 60)}]`);
};
addEventListener("load", () => setTimeout(() => {
  for (const name of ["[data-save=svg]", "[data-save=png]", "[data-csv]"]) {
    document.querySelector(name).click();
  }
}, 2000));</script></body>"""


@pytest.mark.browser
@browser
def test_browser_saves_pictures_and_numbers(page, tmp_path, opened):
    dom, console = opened(page.replace("</body>", SAVE), tmp_path, unfolded=False)
    assert console == []
    name = "margin-lyon-paris-along-ε"
    assert re.search(rf"\[{name}.svg: &lt;svg class=\"main-svg\" xmlns=", dom)
    assert re.search(rf"\[{name}.png: \S?PNG", dom)
    assert "[modules-1.csv: site,module,layer,kind,first_order,first_order_at_1" in dom


@pytest.mark.browser
@browser
def test_page_is_no_wider_than_a_phone(page, tmp_path, opened):
    """Nor is any table on it: a row becomes a card, or its words wrap."""
    dom, console = opened(page, tmp_path, phone=True)
    assert console == []
    assert 'data-wide="false at 390"' in dom
    wide = page.replace("(max-width: 600px)", "(max-width: 1px)")
    assert 'data-wide="true at 390"' in opened(wide, tmp_path, phone=True)[0]


@pytest.mark.browser
@browser
def test_browser_runs_no_name_and_drops_none(tmp_path, opened):
    titled = "".join(HOSTILE)
    dom, console = opened(explanation_report([named(*HOSTILE)], title=titled), tmp_path)
    assert console == []
    assert drawn(dom) == PLOTS
    texts = Reader(dom).texts
    assert {shown(titled), *map(shown, HOSTILE)} <= set(texts)


PLOTLYS_OWN = ("$x$ costs $5", "%{x} of %{y}", "<b>bold</b>", 'it\'s "so"', "&quot;")


@pytest.mark.parametrize("text", PLOTLYS_OWN)
def test_a_label_holds_no_mark_that_plotly_reads(text: str):
    """Plotly reads entities, and then finds neither a tag, nor TeX, nor a variable."""
    written = label(text)
    assert html.unescape(written) == text
    assert not any(mark in written for mark in ("$", "%{", "<", '"'))


@browser
@pytest.mark.parametrize("written", [label, html.escape])
def test_a_figure_writes_what_plotly_would_read_as_marks(written, tmp_path, opened):
    """In the control `&quot;` stays, and plotly asks for MathJax to typeset what $ encloses."""
    names = [written(text) for text in PLOTLYS_OWN]
    figure = go.Figure(go.Bar(x=[1.0] * len(names), y=names, orientation="h"))
    figure.update_xaxes(title_text="x")
    dom, console = opened(figure.to_html(include_mathjax=False), tmp_path)
    texts = Reader(dom).texts
    assert (console == []) == (set(PLOTLYS_OWN) <= set(texts)) == (written is label)
    assert any("$" in name or "%{" in name for name in names) == (written is not label)


@pytest.mark.browser
@browser
def test_browser_check_sees_a_name_that_runs(tmp_path, monkeypatch, opened):
    """The control."""
    careless = render._templates().overlay(autoescape=False)
    monkeypatch.setattr(render, "_templates", lambda: careless)
    _, console = opened(page_of_a_margin(HOSTILE[0]), tmp_path)
    assert any("ran" in line for line in console)


@pytest.mark.browser
@browser
def test_browser_check_sees_a_broken_page(page, tmp_path, opened):
    """The control: a plot that cannot be drawn is reported, and not counted."""
    broken = page.replace("Plotly.newPlot(", "Plotly.noSuchPlot(")
    dom, console = opened(broken, tmp_path)
    assert console
    assert drawn(dom) < PLOTS
