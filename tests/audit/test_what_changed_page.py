"""An audit's words, tables and page: what they say, escaped, and drawn in a real browser."""

from __future__ import annotations

import by_folder
import pytest
from browser import browser, drawn
from results_by_hand import without_plotly
from rich.console import Console

from lens_lora.audit.figures import promoted_figure, shares_figure
from lens_lora.audit.page import what_changed_tables

what_changed = by_folder.made_public("audit").what_changed


@pytest.fixture(scope="module")
def page() -> str:
    return what_changed().report()


def test_words_stand_beside_their_controls():
    story = what_changed().story()
    assert "moves the next-token distribution by 1.33 nats a token" in story
    assert "As a control, its own updates moved to other modules do so by 0.13." in story
    assert (
        "Adapters trained for something else do so by 0.67." in story
        and "the mean KL is 4.00 nats" in story
    )
    assert "Promoted most by mean logit: ‘<b>x</b>’" in story
    assert "+1.00 logits; no token by more than +0.10 under a control" in story
    assert "The modules with most of the KL: " in story
    assert (
        "More likely: “ <b>Lyon</b>⏎” after “The <b>capital</b> of”, p below 0.001 → 0.37" in story
    )
    alone = what_changed(alone=True).story()
    assert "under a control" not in alone and "most of the KL" not in alone


def test_tables_and_page_are_escaped(page: str):
    text = without_plotly(page)
    assert "<b>x</b>" not in text and "&lt;b&gt;x&lt;/b&gt;" in text
    for heading in ("How much", "Which tokens are promoted", "Where", "Which modules"):
        assert f">{heading}</h2>" in text
    assert ">Which modules</h2>" not in without_plotly(what_changed(alone=True).report())
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(what_changed_tables(what_changed()))
    shown = console.export_text()
    assert (
        "(at most +0.10 under a control, " in shown
        and "a⏎b" in shown
        and "modules with most of the KL" in shown
    )


def test_figures_hold_the_numbers():
    figure = promoted_figure(what_changed(), 2)
    frame = what_changed().promoted(2)
    assert list(figure.data[0].x) == [1.0, 0.5]
    lines = [list(line.x) for line in figure.data[1:]]
    assert lines == [[frame[name][0]] * 2 for name in ("null", "unrelated")]
    assert "<b>x" not in figure.data[0].y[0]


def test_layer_0_is_at_the_bottom_of_the_map_of_shares():
    assert shares_figure(what_changed()).layout.yaxis.autorange is None


@pytest.mark.browser
@browser
def test_the_page_is_drawn(page: str, tmp_path, opened):
    dom, console = opened(page, tmp_path)
    assert console == [] and drawn(dom) == 2 and 'data-wide="false at 1200"' in dom
    dom, console = opened(page, tmp_path, phone=True)
    assert console == [] and 'data-wide="false at 390"' in dom
