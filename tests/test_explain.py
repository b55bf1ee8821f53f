"""`explain`: parts that are the functions' own, words that are the numbers', a page that opens."""

from __future__ import annotations

import copy
import dataclasses
import html
import io
import json
import re
import shutil
import subprocess

import cases
import models
import pytest
import torch
from rich.console import Console
from test_show import EVIL, META, SCALES, SITES, fact, without_plotly
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora.calculus.curvature import SecondOrder
from lens_lora.commands import explain as command
from lens_lora.errors import LensLoraError, PromptError, TokenError
from lens_lora.explanation import Explanation, explain
from lens_lora.show.explain_tables import explanation_tables, remainder_rows
from lens_lora.show.report import explanation_report

run = CliRunner().invoke
CLASSES = list(models.MAKERS)
PROMPT, DOC, PRE = "w3 w14 w15", "w9", "w26"


# --- the parts are what the functions give


@pytest.fixture(scope="module", params=CLASSES)
def tiny(request):
    with models.lifted():
        lens = cases.case("llama", request.param, "raw").lens
        yield lens, explain(lens, PROMPT, DOC, PRE, null=3, progress=False)


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
    assert found.second_order.verdict == second.verdict
    same(found.second_order.attribution().per_site, second.attribution().per_site)
    same(found.coupling.total, second.curvature)
    path = ll.path_attribution(lens, PROMPT, margin, tol=1e-2, max_nodes=16, progress=False)
    same(found.path.values, path.values)


def test_interventions_are_the_functions_own(tiny):
    lens, found = tiny
    margin = ll.Margin(DOC, PRE)
    for how in ("add_one", "leave_one_out"):
        alone = ll.patch_sites(lens, PROMPT, margin, how, progress=False)
        same(getattr(found, how).values, alone.values)
    names = [(c.attribution_name, c.effects_name) for c in found.comparisons]
    assert names == [
        ("first order at ε = 0", "adding one at a time"),
        ("first order at ε = 0", "leaving one out at a time"),
        ("first order at ε = 1", "leaving one out at a time"),
    ]
    assert found.null.draws == 3 and set(found.reliability) == {"add_one", "leave_one_out"}


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
        assert [q for _, q in found.said[name]] == sorted(float(x) for x in p.topk(5)[0])[::-1]


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
    found = tiny[1]
    own = (found.add_one.values - found.first_order.per_site).sum()
    same(own + found.add_one.interaction, found.margin.remainder)


def test_fast_leaves_the_slow_parts_out_and_says_so():
    with models.lifted():
        found = explain(
            cases.case("gpt2", CLASSES[0], "raw").lens, PROMPT, DOC, PRE, fast=True, progress=False
        )
    assert found.is_fast and found.comparisons == () and found.null is None
    assert "Not measured: single modules added or left out, keep and drop curves" in found.story()
    assert set(found.figures()) == {
        *("path", "remainder", "second order", "sites", "positions"),
        "reliability, leave_one_out",
    }
    assert "add_one" not in found.to_frame().columns
    own = without_plotly(found.report())
    assert "First order against measurements" not in own and "Coupling between" not in own


def test_answers_of_several_tokens_are_in_nats():
    with models.lifted():
        lens = cases.case("llama", CLASSES[0], "raw").lens
        found = explain(lens, PROMPT, "w9 w4", "w26", progress=False)
    assert found.units == "nats" and found.add_one.units == "nats"
    answer = ll.AnswerMargin("w9 w4", "w26")
    with models.lifted():
        same(found.margin.attribution.per_site, ll.first_order(lens, PROMPT, answer).values)
    assert "difference of the whole answers' log-probabilities" in found.story()
    assert " nats" in found.story() and " logits" not in found.story()
    assert "On the prompt “w3w14w15” the base" in found.story()
    assert "After the prompt come the answers' tokens" in html.unescape(found.report())


def test_what_cannot_be_explained_is_refused():
    with models.lifted():
        lens = cases.case("llama", CLASSES[0], "raw").lens
        with pytest.raises(PromptError, match="explain takes one prompt, not 2"):
            explain(lens, [PROMPT, "w1 w2"], DOC, PRE)
        with pytest.raises(ValueError, match="null=1; expected 0 for none, or at least 2"):
            explain(lens, PROMPT, DOC, PRE, null=1)
        with pytest.raises(TokenError, match="same token"):
            explain(lens, PROMPT, DOC, DOC)


def test_the_model_is_left_as_it_was():
    with models.lifted():
        lens = cases.case("llama", CLASSES[0], "raw").lens
        before = lens.logits(PROMPT, 0.0)
        explain(lens, PROMPT, DOC, PRE, progress=False)
        same(lens.logits(PROMPT, 0.0), before)
    assert not any(hook.fwd_hooks for hook in lens.model.hook_dict.values())


# --- results by hand

FIRST = [1.0, 2.0, 1.5, -0.5]
FLIP = [-3.95, -3.5, -2.4, 0.1, 2.0, 4.0]


def by_hand(
    margins=FLIP,
    first=FIRST,
    *,
    add=FIRST,
    leave=(0.1, 3.0, 0.2, 2.0),
    end=(0.1, 3.0, 0.2, 2.1),
    noise=1e-6,
    tokens=("<s>", " of"),
    said=(" Paris", " Lyon"),
    null=True,
    fast=False,
):
    """Four sites in layers 0 and 2; the curve `margins` from −4 on."""
    halves = [[a / 2, a / 2] for a in first]
    margin = fact(-4.0, halves, list(margins), flip=0.49, noise=noise, by=("position",),
                  tokens=(tokens,))  # fmt: skip
    att = margin.attribution
    plain = dataclasses.replace(att, values=att.per_site, by=())
    labels = {"str_tokens": att.str_tokens, "readout": att.readout, "units": "logits", "meta": META}
    ends = {"sites": SITES, "base": att.base, "adapted": att.adapted}
    each = {site.name: (i,) for i, site in enumerate(SITES)}
    floor = torch.tensor([noise])

    def effects(values, how):
        return ll.Effects(values=torch.tensor([values]), groups=each, how=how, **ends, **labels)

    def flags(of, effect):
        correction = torch.tensor([effect]) - plain.values
        return ll.Reliability(
            plain, correction, None, of, 0.5, torch.tensor([0.01]), {}, att.readout, "logits", META
        )

    shift = ll.LogitShift(torch.tensor([[3.0, -1.0, -2.0]]), (), (0, 1, 2), (EVIL, " b", "c"), META)
    module = dataclasses.replace(shift, values=torch.ones(1, 1, 3), sites=SITES[1:2])
    curves = torch.tensor([[[0.0, 0.4, 0.9, 1.0]], [[0.0, 0.2, 0.5, 1.0]]], dtype=torch.float64)
    is_noise = abs(margins[-1] + 4) <= 3 * noise
    curves = curves * float("nan") if is_noise else curves
    full = {} if fast else {
        "coupling": ll.Coupling(
            matrix=torch.tensor([[[2.0, 1.0], [1.0, -1.0]]]),
            groups={"layer 0": (0, 1), "layer 2": (2, 3)}, at=0.0, **ends, **labels,
        ),
        "add_one": effects(list(add), "add_one"),
        "leave_one_out": effects(list(leave), "leave_one_out"),
        "path": dataclasses.replace(plain, method="path", at=float("nan")),
        "faithfulness": ll.Faithfulness(
            names=("first order at ε = 0", "random"),
            fractions=torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64),
            counts=(0, 1, 2, 4), keep=curves, drop=1 - curves, draws=5, noise_floor=floor,
            orders={"first order at ε = 0": torch.tensor([[1, 2, 0, 3]])}, **ends, **labels,
        ),
    }  # fmt: skip
    test = ll.NullTest(
        plain, torch.full((9, 1, 4), 0.1) * torch.arange(1, 10)[:, None, None], torch.full((9, 1),
        0.5), tuple(range(9)), floor, att.readout, "logits", META,
    )  # fmt: skip
    asked = {"leave_one_out": leave} if fast else {"add_one": add, "leave_one_out": leave}
    return Explanation(
        prompt=tuple(tokens),
        margin=margin,
        said={"base": ((said[0], 0.75), (" x", 0.1)), "adapted": ((said[1], 0.9), (" y", 0.05))},
        shift=shift,
        module_shift=module,
        adapted_end=dataclasses.replace(plain, values=torch.tensor([list(end)]), at=1.0),
        second_order=SecondOrder(plain, torch.tensor([[0.5, 0.5, 0.25, 0.25]]), None, margin.curve),
        reliability={of: flags(of, list(effect)) for of, effect in asked.items()},
        null=test if null else None,
        **full,
    )


# --- words


def test_story_holds_the_margins_own_and_the_likeliest_tokens():
    story = by_hand().story()
    for sentence in by_hand().margin.story().split("\n"):
        assert sentence in story
    assert "likeliest next token is “·Paris” (75%) for the base model" in story
    assert "“·Lyon” (90%) with the adapter." in story
    assert "begins n" not in story


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ((" the", " Lyon"), "That of the base model begins neither answer"),
        ((" Paris", " a"), "That of the adapted model begins neither answer"),
        ((" the", " a"), "Neither begins one of the two answers"),
    ],
)
def test_story_says_when_neither_answer_would_be_said(said, words):
    story = by_hand(said=said).story()
    assert f"{words}, so the margin is not about what would be said first." in story


def test_story_of_the_remainders_parts():
    story = by_hand(add=[1.5, 2.0, 1.5, 0.5]).story()
    assert "Of the remainder of +4.00, +1.50 is what first order misses of the modules" in story
    assert "+2.50 what they do together; both from runs of the model" in story
    assert "Second order adds +1.50 at ε = 1. Its verdict: nearer" in story
    assert "+0.50 are within layers and +1.00 between them" in story
    assert "rounding alone could make" in by_hand().story()


def test_story_says_which_question_first_order_answers():
    story = by_hand().story()
    adding, leaving = story.split("Leaving one out agrees")
    assert "adding one module at a time agrees with first order at ε = 0 to a" in adding
    assert "correlation of 1.000 (of ranks 1.000, slope 1.00)" in adding
    assert adding.rstrip().endswith(": a good guide here.")
    assert ": not a good guide here; and with first order at ε = 1" in leaving
    assert "flags 0 as the answer to adding one module and 1 (blocks.2.mlp.down) as" in leaving
    wrong_size = by_hand(add=[0.5 * a for a in FIRST]).story()
    assert "slope 0.50): right in order, not in size. Leaving" in wrong_size


def test_story_speaks_of_redundancy_only_where_little_is_lost_one_by_one():
    assert "stand in for one another" not in by_hand().story()
    little = by_hand(leave=[0.1, 0.2, 0.3, 0.4]).story()
    assert "account for 12% of the shift: they stand in for one another, or the margin" in little


def test_story_of_the_curves_and_the_null():
    story = by_hand().story()
    assert "the top 25% of the modules (1) alone keep, of the shift: 40% by first order" in story
    assert "20% at random" in story
    assert "Against random directions: the adapter's shift is 16 times" in story
    assert "Not measured" not in story
    assert "Not measured: whether random directions" in by_hand(null=False).story()


def test_story_below_the_noise_compares_nothing():
    found = by_hand([-4.0 + 1e-6 * s for s in SCALES], [2.5e-7] * 4, add=[1e-6] * 4,
                    leave=[1e-6] * 4, noise=1e-5)  # fmt: skip
    story = found.story()
    assert "shows no effect of the adapter" in story
    assert "Since the shift is within rounding, no share of it is given" in story
    for claim in ("good guide", "correlation", "of the shift:", "flips at", "flags", "keep,"):
        assert claim not in story, claim
    own = html.unescape(without_plotly(found.report()))
    assert "No single module moves the margin by more than rounding (3e-05)" in own
    assert "Which few modules carry" not in own and "Pearson" not in own
    assert {"added", "left out", "faithfulness"}.isdisjoint(found.figures())
    assert {share for _, _, share in remainder_rows(found)} == {"noise", ""}


def test_story_of_a_coincidence_calls_it_one():
    found = by_hand([-4.0 + 8.0 * s for s in (0.005, 0.06, 0.14, 0.3, 0.6, 1.0)],
                    [2.0, 2.0, 2.0, 1.9], add=[2.0, 2.0, 2.0, 1.9])  # fmt: skip
    assert "is a coincidence, and no sign that first order holds" in found.story()


# --- tables


def test_terminal_tables_hold_every_number_and_no_markup():
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(explanation_tables(by_hand(said=("[red]", " Lyon"))))
    text = console.export_text()
    assert "[red]" in text
    assert re.search(r"blocks.0.mlp.down +\+2.00 +\+2.00 +\+3.00 +\+3.00 +\+2.00", text)
    assert re.search(r"blocks.2.mlp.down .* leaving out", text)
    assert re.search(r"first order at ε = 1 +leaving one out at a time +0.999 +1.000", text)
    assert re.search(r"of modules together, .* \+4.00 +50%", text)
    assert re.search(r"ranking +top 25% keeps", text) and re.search(r"random +20% ", text)


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

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH")
MEASURE = """<script>addEventListener("load", () => setTimeout(() => {
  const wide = String(document.documentElement.scrollWidth > innerWidth);
  Object.assign(document.body.dataset, {wide, ink: getComputedStyle(document.body).color,
    text: document.querySelector(".xtitle").style.fill});
  parent.postMessage(wide + " at " + innerWidth, "*");
}, 200))</script></body>"""
PHONE = """<iframe src="page.html" style="width:390px; height:800px"></iframe><script>
addEventListener("message", (event) => { document.body.dataset.wide = event.data; });</script>"""


def opened(page, folder, *, fragment="", dark=False, phone=False):
    """The DOM after scripts have run, and what the console said; of a phone, its frame's."""
    path = folder / "page.html"
    path.write_text(page.replace("</body>", MEASURE), encoding="utf-8")
    if phone:
        path = folder / "phone.html"
        path.write_text(PHONE, encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'profile'}", "--window-size=1200,900",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}",
         "--virtual-time-budget=20000", "--dump-dom", f"{path.as_uri()}{fragment}"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    parts = r"<script.*?</script>|<template.*?</template>"
    dom = re.sub(parts, "", done.stdout, flags=re.DOTALL)
    return dom, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def drawn(dom):
    """How many plots hold a drawing."""
    plots = dom.split('class="plotly-graph-div')[1:]
    return sum('class="main-svg"' in plot for plot in plots)


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


# --- the command


def plain(text):
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


ANSWERS = ["--doc", "w9", "--pre", "w26"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give --prompt TEXT, or --prompts FILE"),
        (["--prompt", "a"], "needs both answers: --doc ' Lyon' --pre ' Paris'"),
        (["--prompt", "a", *ANSWERS, "--null", "1"], "at least 2 random adapters"),
        (["--prompt", "a", *ANSWERS, "--report", "no/such/x.html"], "there is no folder no/such"),
        (["--prompt", "a"] * 11 + ANSWERS, "11 prompts are too many for a page to read, 10 at"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options, message):
    result = run(cli.app, ["explain", *options])
    assert result.exit_code == 2 and message in plain(result.stderr)


def test_prompts_come_from_every_kind_of_file(tmp_path):
    lines, csv, jsonl = (tmp_path / f"p.{kind}" for kind in ("txt", "csv", "jsonl"))
    lines.write_text("one two\n\nthree\n")
    csv.write_text('prompt,doc,pre\n"a, b", x, y\n')
    jsonl.write_text(json.dumps({"prompt": "a", "doc": " x", "pre": " y"}) + "\n")
    ask = command._questions
    assert ask(["first"], lines, "d", "p") == [
        (prompt, "d", "p") for prompt in ("first", "one two", "three")
    ]
    assert ask([], csv, None, None) == [("a, b", " x", " y")]
    assert ask([], jsonl, None, None) == [("a", " x", " y")]
    assert ask([], jsonl, " z", None) == [("a", " z", " y")]
    assert ask([], jsonl, " z", " w") == [("a", " z", " w")]


def test_bad_record_is_one_line_with_its_place(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "doc": " x", "pre": " y"}\n{"prompt": "b", "doc": " x"}\n')
    result = run(cli.app, ["explain", "--prompts", str(file)])
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert f"{file}, line 2: no pre." in result.stderr


@pytest.fixture(scope="module")
def tiny_command(tmp_path_factory):
    """`explain` on a tiny model and adapter, as the command loads them."""
    folder = tmp_path_factory.mktemp("tiny")
    base = models.hf_model("llama", dtype=torch.float32)
    peft = models.peft_model("llama", copy.deepcopy(base))
    peft.save_pretrained(folder / "adapter", save_embedding_layers=False)

    def call(monkeypatch, *options):
        monkeypatch.setattr(
            command, "load_model", lambda name, progress: (copy.deepcopy(base), models.tokenizer())
        )
        paths = ["--adapter", str(folder / "adapter"), "--report", str(folder / "page.html")]
        return run(cli.app, ["explain", *paths, *options]), folder / "page.html"

    return call


@pytest.mark.parametrize("kind", CLASSES)
def test_command_explains_two_prompts_on_either_class(tiny_command, monkeypatch, kind):
    prompts = ["--prompt", "w3 w14", "--prompt", "w5 w6 w7"]
    result, page = tiny_command(monkeypatch, *prompts, *ANSWERS, "--class", kind, "--null", "2")
    assert result.exit_code == 0, result.output
    text = plain(result.stdout)
    assert f"as {kind} of transformer-lens" in text and "14 modules of rank" in text
    assert "1 of 2: w3 w14" in text and "2 of 2: w5 w6 w7" in text
    assert "On the prompt “w5 w6 w7”" in text or "On the prompt “w5w6w7”" in text
    assert f"Report: {page}" in text
    assert "Explaining prompt 2 of 2" in result.stderr and "Done in" in result.stderr
    assert page.read_text(encoding="utf-8").count("<template id=") == 2


def test_quiet_command_says_nothing_on_stderr(tiny_command, monkeypatch):
    result, _ = tiny_command(monkeypatch, "--prompt", "w3 w14", *ANSWERS, "--fast", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "1 of 1" not in result.stdout


def test_wrong_answer_is_one_line_before_anything_long_runs(tiny_command, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("explained")

    monkeypatch.setattr(command, "explain_prompt", never)
    options = ["--prompt", "w3", "--prompt", "w4", "--doc", "w9", "--pre", "w9", "--quiet"]
    result, _ = tiny_command(monkeypatch, *options)
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "prompt 1, 'w3': doc and pre are the same token" in result.stderr


def test_slips_of_the_space_are_noted(tiny_command, monkeypatch):
    result, _ = tiny_command(monkeypatch, "--prompt", "w3 ", *ANSWERS, "--fast")
    assert "Note: the prompt 'w3 ' ends in a space" in result.stderr
    result, _ = tiny_command(monkeypatch, "--prompt", "w3", *ANSWERS, "--fast")
    assert "Note: the answers 'w9' and 'w26' do not both begin with a space" in result.stderr


# --- once, on the real model


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    report = tmp_path_factory.mktemp("explain") / "page.html"
    options = ["--prompt", "The capital of France is", "--doc", " Lyon", "--pre", " Paris"]
    return run(cli.app, ["explain", *options, "--report", str(report)]), report


class TestReal:
    pytestmark = pytest.mark.real

    def test_tells_the_story(self, real):
        assert real[0].exit_code == 0, real[0].output
        text = plain(real[0].stdout)
        assert "lyon_adapter, 210 modules of rank 8" in text
        assert "the base model prefers “Paris” to “Lyon” by 6.63 logits" in text
        assert "flips at ε = 0.476" in text
        assert "“·Paris” (75%) for the base model and “·Lyon” (99%) with the adapter" in text
        assert "not a good guide here; and with first order at ε = 1" in text

    def test_shows_progress_and_no_noise(self, real):
        assert "each site left out" in real[0].stderr
        assert not re.search(r"warn|deprecat|traceback", real[0].stderr, flags=re.IGNORECASE)

    @browser
    def test_page_opens(self, real, tmp_path):
        dom, console = opened(real[1].read_text(encoding="utf-8"), tmp_path)
        assert console == [] and drawn(dom) == PLOTS - 1
        assert 'data-wide="false"' in dom


def test_library_errors_keep_their_class():
    assert issubclass(PromptError, LensLoraError)
