"""A response's page in a real browser: drawn, hovered, in light, dark and on a phone."""

from __future__ import annotations

import by_folder
import pytest
from browser import browser, drawn

from lens_lora.shifts.figures import laid_out

response_explanation = by_folder.made_public("explanations").response_explanation

PLOTS = 3
TOKENS = ("<b>x</b>", "a\nb")
POINT = """<script>addEventListener("load", () => {
  const token = document.querySelectorAll(".said [data-note]")[%d];
  token.dispatchEvent(new MouseEvent("%s", {bubbles: true}));
  document.querySelector(".said").dispatchEvent(
    new KeyboardEvent("keydown", {key: "%s", bubbles: true}));
})</script></body>"""


@pytest.fixture(scope="module")
def page() -> str:
    return response_explanation(TOKENS).report()


def note(dom: str) -> str:
    return dom.partition('<p class="note" aria-live="polite">')[2].partition("</p>")[0]


@pytest.mark.browser
@browser
def test_every_plot_is_drawn_and_the_token_that_changed_most_is_chosen(page, tmp_path, opened):
    dom, console = opened(page, tmp_path)
    assert console == []
    assert drawn(dom) == PLOTS
    assert 'data-wide="false at 1200"' in dom
    assert 'data-ink="rgb(28, 33, 38)"' in dom
    assert note(dom).startswith("2 a⏎b\nKL 2.00 and back 1.50 nats\n")
    assert "<b>x</b></span>" not in dom
    assert "&lt;b&gt;x&lt;/b&gt;</span>" in dom


@pytest.mark.browser
@browser
@pytest.mark.parametrize(
    ("index", "event", "key", "shown"),
    [
        (0, "mouseover", "Enter", "1 &lt;b&gt;x"),
        (0, "click", "ArrowRight", "2 a⏎b"),
        (1, "click", "ArrowLeft", "1 &lt;b&gt;x"),
        (1, "click", "ArrowRight", "2 a⏎b"),
    ],
)
def test_a_token_pointed_at_shows_its_numbers(page, tmp_path, index, event, key, shown, opened):
    """By mouse, by touch, and by arrow keys, which stop at the ends."""
    pointed = page.replace("</body>", POINT % (index, event, key))
    dom, console = opened(pointed, tmp_path)
    assert console == []
    assert note(dom).startswith(shown)
    assert dom.count('class="chosen"') == 1


@pytest.mark.browser
@browser
def test_it_is_no_wider_than_a_phone_and_dark_where_wanted(page, tmp_path, opened):
    dom, console = opened(page, tmp_path, phone=True)
    assert console == []
    assert 'data-wide="false at 390"' in dom
    dom, console = opened(page, tmp_path, dark=True)
    assert console == []
    assert 'data-ink="rgb(230, 234, 238)"' in dom


def test_a_still_picture_keeps_every_token_in_its_place():
    """Lines are broken at tokens and after line breaks; wide characters take two columns."""
    placed = laid_out(("ab", " cd", "e\nf", "東", "x" * 9), columns=8)
    assert placed == [
        (0, 0, 0, "ab"), (1, 0, 2, " cd"), (2, 0, 5, "e⏎"), (2, 1, 0, "f"), (3, 1, 1, "東"),
        (4, 1, 3, "xxxx"), (4, 2, 0, "xxxx"), (4, 2, 4, "x"),
    ]  # fmt: skip
    figure = response_explanation().shifts.plot_text()
    assert len(figure.layout.shapes) == 2
    shades = [shape.fillcolor for shape in figure.layout.shapes]
    assert shades[1] == "rgba(176,79,196,0.750)"
    assert shades[0] < shades[1]
