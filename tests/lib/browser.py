"""A page in a real headless browser: what it draws, and what its console says.

A test with `browser` is skipped where no browser is found. The variable LENS_LORA_BROWSER may say
that there must be one ("required"), so that it fails instead, or that none is wanted ("none").
"""

from __future__ import annotations

import html.parser
import os
import re
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
WANTED = os.environ.get("LENS_LORA_BROWSER")

browser = pytest.mark.skipif(
    WANTED == "none" or (BROWSER is None and WANTED != "required"),
    reason="LENS_LORA_BROWSER=none, or no Chromium on the PATH (apt-get install chromium)",
)

# Once every picture that is not folded away is drawn, or after ten seconds: the height as it is
# folded, and, with all unfolded, the rest.
MEASURE = r"""<script>addEventListener("load", () => {
  const began = performance.now();
  const measure = (height) => {
    const boxes = [document.documentElement, ...document.querySelectorAll(".scroll")];
    const wide = String(boxes.some((box) => box.scrollWidth > box.clientWidth + 1));
    const shown = (element) => !element.closest("details:not([open])");
    const words = [...document.querySelectorAll("p, dt, dd, h2, h3, mark, button, td")];
    const faint = words.filter((word) => shown(word) && contrast(word) < 4.5);
    const maps = plots().filter((plot) => plot.querySelector(".heatmaplayer .hm"));
    const titled = maps.filter((map) => map.querySelector(".xtitle, .ytitle")).length;
    Object.assign(document.body.dataset, {wide, ink: getComputedStyle(document.body).color,
      text: document.querySelector(".xtitle")?.style.fill, titled, height,
      faint: faint.map((word) => word.textContent).join("; ")});
    parent.postMessage({wide: wide + " at " + innerWidth, titled, height}, "*");
  };
  const plots = () => [...document.querySelectorAll(".plot")];
  const numbers = (colour) => colour.match(/[\d.]+/g).map(Number);
  const light = (rgb) => {
    const linear = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = rgb.map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  // As WCAG 2 has it: of the text's colour to all backgrounds below it.
  const contrast = (element) => {
    let paper = [255, 255, 255];
    const grounds = [];
    for (let at = element; at; at = at.parentElement) grounds.unshift(getComputedStyle(at));
    for (const {backgroundColor} of grounds) {
      const [r, g, b, alpha = 1] = numbers(backgroundColor);
      paper = [r, g, b].map((c, i) => alpha * c + (1 - alpha) * paper[i]);
    }
    const ends = [light(numbers(getComputedStyle(element).color)), light(paper)];
    return (Math.max(...ends) + 0.05) / (Math.min(...ends) + 0.05);
  };
  const wait = (then) => {
    const drawn = plots().every((plot) => plot.querySelector(".main-svg")
      || plot.closest("details:not([open])"));
    setTimeout(drawn || performance.now() - began > 10000 ? then : () => wait(then), 200);
  };
  wait(() => {
    const height = document.documentElement.scrollHeight;
    for (const part of document.querySelectorAll("details")) part.open ||= %s;
    wait(() => measure(height));
  });
})</script></body>"""
PHONE = """<iframe src="page.html" style="width:390px; height:800px"></iframe><script>
addEventListener("message", ({data}) => Object.assign(document.body.dataset, data));</script>"""


def opened(page, folder, *, fragment="", dark=False, phone=False, unfolded=True):
    """The DOM after scripts have run, and what the console said; of a phone, its frame's.

    Its body's data say whether anything is wider than it should be, how high the page is before it
    is unfolded, which words are faint (a contrast below 4.5), and how many maps have titles on
    their axes.
    """
    assert BROWSER, f"LENS_LORA_BROWSER=required, and none of {NAMES} is on the PATH"
    path = folder / "page.html"
    path.write_text(
        page.replace("</body>", MEASURE.replace("%s", str(unfolded).lower())), encoding="utf-8"
    )
    if phone:
        path = folder / "phone.html"
        path.write_text(PHONE, encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--enable-logging=stderr",
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
    plots = dom.split("js-plotly-plot")[1:]
    return sum('class="main-svg"' in plot for plot in plots)


class Reader(html.parser.HTMLParser):
    """The elements of a page with the names of their attributes, and its texts but for scripts'."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, *(name for name, _ in attrs)))

    def handle_comment(self, data):
        self.elements.append(("comment",))

    def handle_data(self, data):
        if self.cdata_elem is None and data.strip():
            self.texts.append(data)
