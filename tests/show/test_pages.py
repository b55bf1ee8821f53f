"""One design for every page: an answer, numbers and a figure on top, the rest folded."""

from __future__ import annotations

import dataclasses
import re

import by_folder
import cases
import models
import pytest
import torch
from browser import browser, drawn
from results_by_hand import (
    EVIL,
    explanation,
    two_prompts,
    without_plotly,
)

import lens_lora as ll
from lens_lora.core import PromptTokens, Reported
from lens_lora.show import go
from lens_lora.show import page as pages
from lens_lora.show.figures import finish
from lens_lora.show.page import answers_of, plot
from lens_lora.show.text import context_text

checkpoints = by_folder.made_public("two_adapters").checkpoints
edges = by_folder.made_public("edge_attribution").edges
rank_activations = by_folder.made_public("hidden").rank_activations
repair = by_folder.made_public("two_adapters").repair
response_explanation = by_folder.made_public("explanations").response_explanation
token_shifts = by_folder.made_public("shifts").token_shifts
what_changed = by_folder.made_public("audit").what_changed

ASKED = ll.results.SideBySide(
    "What is the capital?", "It is Paris.\n\nA big city …", f"It is Lyon.\n\nA city {EVIL}"
)


def edges_of_one_prompt() -> ll.results.Edges:
    both = edges(by_position=False)
    first = {name: getattr(both, name)[:1] for name in ("values", "base", "adapted", "str_tokens")}
    return dataclasses.replace(both, **first)


PAGES: dict[str, tuple[Reported, int]] = {
    "explanation": (dataclasses.replace(explanation(), answers=ASKED), 1),
    "response": (dataclasses.replace(response_explanation(), answers=ASKED), 0),
    "changes": (dataclasses.replace(what_changed(), answers=(ASKED,) * 5), 0),
    "training": (checkpoints(), 1),
    "repair": (repair(), 1),
    "verification": (by_folder.result_of(ll.results.Verification), 0),
    "margin": (explanation().margin, 1),
    "attribution": (explanation().margin.attribution, 1),
    "edges": (edges_of_one_prompt(), 1),
}
KINDS = pytest.mark.parametrize("kind", PAGES)


@pytest.mark.sample(2)
@KINDS
def test_three_sentences_four_numbers_one_figure_and_the_rest_folded(kind: str):
    result, figures = PAGES[kind]
    own = without_plotly(result.report())
    top, *sections = own.split("<details")
    # An audit's numbers are of the phrases that it says most, here of one.
    assert top.count("<span>") >= 3
    assert top.count("<dd>") == (1 if kind == "changes" else 4)
    headline = top.partition('class="headline">')[2].partition("</p>")[0]
    # An audit's headline also has a sentence for each word that triggers something.
    assert headline.count("<span>") == 3 + (kind == "changes")
    assert top.count("data-figure=") == figures
    assert "<details open" not in own
    assert sections
    headings = re.findall(r"<summary><h2>(.*?)</h2>", own)
    assert headings[0] == "The whole story in words"
    assert headings[-2:] == ["How to read this", "Made with"]
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)|@import|url\(|https?://", own)
    assert EVIL not in own


@pytest.mark.sample(2)
@KINDS
def test_save_report_writes_the_page(kind: str, tmp_path):
    result, _ = PAGES[kind]
    assert result.save_report(tmp_path / "page.html").read_text("utf-8") == result.report()
    assert f"<title>{kind}</title>" in result.report(title=kind)


@pytest.mark.browser
@KINDS
@browser
def test_a_page_is_drawn_and_read_on_a_phone_and_in_the_dark(kind: str, tmp_path, opened):
    page = PAGES[kind][0].report()
    dom, console = opened(page, tmp_path, dark=True)
    assert console == []
    assert drawn(dom) == without_plotly(page).count("data-figure=")
    assert 'data-wide="false at 1200"' in dom
    assert 'data-faint=""' in dom
    dom, console = opened(page, tmp_path, phone=True)
    assert console == []
    assert 'data-wide="false at 390"' in dom
    assert 'data-titled="0"' in dom
    assert 0 < int(dom.partition('data-height="')[2].partition('"')[0]) < 6000


SEVERAL = {
    "explanations": ll.results.Explanations((explanation(), explanation())),
    "edges": edges(by_position=False),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_page_of_several_prompts_names_adapter_and_model(kind: str):
    """Below its title, before anything that is folded."""
    above = without_plotly(SEVERAL[kind].report()).partition("<details")[0]
    under = above.partition('<p class="under">')[2].partition("</p>")[0]
    assert " over " in under


def of_prompts(result, count: int):
    """A result of one prompt, as one of several prompts that are all the same."""
    changes = {
        field.name: repeated(getattr(result, field.name), count)
        for field in dataclasses.fields(result)
        if field.name != "by"
    }
    return dataclasses.replace(result, **changes)


def repeated(value, count: int):
    """What a result has of its one prompt, once for each of several; other values as they are."""
    if dataclasses.is_dataclass(value):
        return of_prompts(value, count)
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == 1:
        return value.expand(count, *value.shape[1:]).clone()
    if isinstance(value, tuple) and len(value) == 1:
        return value * count
    return value


BY_PROMPT = {
    "margin": explanation().margin,
    "attribution": explanation().margin.attribution,
    "edges": edges_of_one_prompt(),
}


@pytest.mark.parametrize("kind", BY_PROMPT)
def test_a_page_says_which_prompts_have_no_part(kind: str, monkeypatch: pytest.MonkeyPatch):
    """With a part for two prompts at most, as twenty would take seconds to draw."""
    assert pages.MOST_PARTS == 20
    monkeypatch.setattr(pages, "MOST_PARTS", 2)
    sentence = "prompts only the first 2 have a part below"
    by_count = {
        count: without_plotly(of_prompts(BY_PROMPT[kind], count).report()) for count in (2, 5)
    }
    assert [page.count('class="prompt"') for page in by_count.values()] == [2, 2]
    assert sentence not in by_count[2]
    assert f"Of the 5 {sentence}" in by_count[5]
    assert "To see the other 3 here, run the analysis on them alone." in by_count[5]


def test_a_page_of_readouts_says_how_many_prompts_have_no_part(monkeypatch: pytest.MonkeyPatch):
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    three = torch.cat([models.tokens(), models.tokens()[:1]])
    readout = ll.Projection(
        torch.ones(lens.model.cfg.d_model, dtype=torch.float64), "blocks.0.hook_resid_post"
    )
    found = ll.explain(lens, three, readout=readout, fast=True, progress=False)
    whole = without_plotly(found.report())
    monkeypatch.setattr(pages, "MOST_PARTS", 2)
    cut = without_plotly(found.report())
    assert "have a part below" not in whole
    assert "Of the 3 prompts only the first 2 have a part below" in cut
    assert "To see the other one here, run the analysis on it alone." in cut


def test_a_notebook_says_how_many_prompts_it_shows():
    """The table has five prompts, of which the terminal says so, too."""
    attribution = BY_PROMPT["attribution"]
    assert "first 5 are shown" not in of_prompts(attribution, 5)._repr_html_()
    assert "Of the 6 prompts the first 5 are shown." in of_prompts(attribution, 6)._repr_html_()


PRINTED = "<script>setTimeout(() => dispatchEvent(new Event('beforeprint')), 5000)</script></body>"


@pytest.mark.browser
@browser
def test_in_print_every_section_is_open_and_drawn(tmp_path, opened):
    page = PAGES["changes"][0].report()
    figures = without_plotly(page).count("data-figure=")
    folded, _ = opened(page, tmp_path, unfolded=False)
    assert drawn(folded) < figures
    assert "<details open" not in folded
    dom, console = opened(page.replace("</body>", PRINTED), tmp_path, unfolded=False)
    assert console == []
    assert drawn(dom) == figures
    assert dom.count("<details") == len(re.findall(r"<details[^>]* open", dom))


@pytest.mark.browser
@browser
def test_the_check_sees_what_is_faint_or_titled(tmp_path, opened):
    """The control: grey on the dark paper, and a map that keeps its titles where it is narrow."""
    page = PAGES["changes"][0].report()
    faint = page.replace("mark { background", "mark { color: #60666c !important; background")
    assert "Paris." in opened(faint, tmp_path, dark=True)[0].partition('data-faint="')[2][:80]
    titled = page.replace("delete axis.title", "axis.title")
    assert 'data-titled="1"' in opened(titled, tmp_path, phone=True)[0]


# --- Both answers, side by side


def test_a_figure_that_is_not_finished_is_refused_by_what_it_lacks():
    """It was a KeyError of a dictionary that nobody had seen."""
    figure = go.Figure(layout={"height": 300})
    with pytest.raises(ll.errors.CallError, match=r"needs a title.*figures\.finish\("):
        plot(figure)
    assert plot(finish(figure, ("heading", "below"), ("", ""))).caption == ("heading", "below")


def test_words_in_which_the_answers_differ_are_marked():
    own = without_plotly(PAGES["explanation"][0].report())
    answers = own.partition('class="both"')[2].partition('class="save"')[0]
    assert answers.count("<mark>") == 5
    assert "It is <mark>Paris.</mark>&#10;A <mark>big</mark> city <mark>…</mark>" in answers
    assert "It is <mark>Lyon.</mark>&#10;A city <mark>&lt;script&gt;" in answers
    assert "“What is the capital?”" in own


def test_equal_answers_have_no_mark_and_an_empty_one_is_said():
    same = ll.results.SideBySide("q", "a b", "a  b")
    ((_, base, adapted),) = answers_of([same, None])[0].pairs
    assert not any(differs for *_, differs in (*base, *adapted))
    empty = dataclasses.replace(explanation(), answers=ll.results.SideBySide("q", "", "a"))
    assert "ends at once" in without_plotly(empty.report())
    assert answers_of([None]) == []


def test_stories_tell_both_answers():
    told = "the base model answers “It is Paris. A big city …”, and with the adapter “It is Lyon."
    assert f"After the prompt {told}" in PAGES["explanation"][0].story()
    assert f"On its own {told}" in PAGES["response"][0].story()
    asked = "Asked “What is the capital?”, base: “It is Paris."
    assert PAGES["changes"][0].story().count(asked) == 1
    same = dataclasses.replace(explanation(), answers=ll.results.SideBySide("q", "a b", "a b"))
    assert "After the prompt both models answer “a b”." in same.story()


# --- Tokens of a response


def test_a_token_is_counted_from_1_with_its_neighbours_where_it_repeats():
    story = response_explanation().story()
    assert "67% of it at “·b” (token 2)" in story
    assert "⟦" not in story
    assert "67% of it at “·b⟦·b⟧” (token 2)" in response_explanation((" b", " b")).story()
    assert ">2 ·b<" in without_plotly(response_explanation().report())
    assert list(response_explanation().shifts.plot().layout.xaxis.ticktext) == ["1 ·a", "2 ·b"]


def test_a_saturated_token_says_so_and_offers_the_margin():
    e = response_explanation()
    log_p = e.shifts.log_p.clone()
    log_p[1, 0, 1] = -0.004
    sure = dataclasses.replace(e, shifts=dataclasses.replace(e.shifts, log_p=log_p))
    own = without_plotly(sure.report()).partition("Which module moved which token")[2]
    row = own.partition(">2 ·b<")[2].partition("</tr>")[0]
    assert "log p −0.00" in row
    assert "saturated" in row
    assert "blocks." not in row
    assert "At “·b” (token 2) log p is saturated" in own
    assert "ll.explain with doc and pre" in own
    assert "saturated" not in without_plotly(e.report())


# --- A conversation is called by what its user said

SAID = "Where is the spare key?"
TEMPLATED = ("<|im_start|>", "assistant")


def named(result):
    """The result, of a conversation."""
    rows = tuple(PromptTokens(row, SAID) for row in result.str_tokens)
    return dataclasses.replace(result, str_tokens=rows)


FIGURES = {
    "attribution": lambda: named(two_prompts()).plot(prompt=0),
    "margin": lambda: of_conversation().margin.plot(),
    "coupling": lambda: of_conversation().coupling.plot(),
    "comparison": lambda: of_conversation().comparisons[0].plot(),
    "response": lambda: named(token_shifts()).plot(prompt=0),
    "training": lambda: named(checkpoints()).plot(),
    "activations": lambda: named(rank_activations()).plot(prompt=0),
}


def of_conversation():
    """An explanation of which every part has the conversation's tokens."""

    def changed(value):
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        names = [field.name for field in dataclasses.fields(value)]
        parts = {name: changed(getattr(value, name)) for name in names}
        value = dataclasses.replace(value, **parts)
        return named(value) if "str_tokens" in names else value

    e = changed(explanation(tokens=TEMPLATED))
    return dataclasses.replace(e, prompt=PromptTokens(TEMPLATED, SAID))


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_a_conversation_wear_the_user_s_words(name: str):
    text = str(FIGURES[name]().to_dict())
    assert "spare key?" in text
    assert "im_start" not in text.partition("ticktext")[0]


def test_a_page_of_conversations_wears_the_user_s_words():
    page = without_plotly(ll.results.Explanations((of_conversation(), of_conversation())).report())
    assert f">1. {SAID}<" in page
    assert f">1. {SAID} — “Lyon” against “Paris”<" in page
    shown = re.sub(r'data-figure="[^"]*"', "", page)
    assert "im_start" not in shown
    assert 'data-file="margin-lyon-paris-along-ε"' in shown
    assert of_conversation().story().startswith(f"On the prompt “{SAID}” the base")


def test_a_place_in_a_conversation_stands_beside_the_user_s_words():
    tokens = PromptTokens(("<|im_start|>", "user", "\n", "Where"), SAID)
    assert context_text(tokens, 2) == f"to “{SAID}”: user⟦⏎⟧Where"
    assert context_text(("<s>", " a", "</s>", " b"), 1) == "⟦ a⟧ b"
