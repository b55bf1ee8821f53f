"""A page in a real headless browser: what it draws, and what its console says.

A test with `browser` is skipped where no browser is found. The variable LENS_LORA_BROWSER may say
that there must be one ("required"), so that it fails instead, or that none is wanted ("none").
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil

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
MEASURE = r"""addEventListener("load", () => {
  const began = performance.now();
  const measure = (height) => {
    const boxes = [document.documentElement, ...document.querySelectorAll(".scroll")];
    const wide = String(boxes.some((box) => box.scrollWidth > box.clientWidth + 1));
    const shown = (element) => !element.closest("details:not([open])");
    const words = [...document.querySelectorAll("p, dt, dd, h2, h3, mark, button, td")];
    const faint = words.filter((word) => shown(word) && contrast(word) < 4.5);
    const maps = plots().filter((plot) => plot.querySelector(".heatmaplayer .hm"));
    const titled = maps.filter((map) => map.querySelector(".xtitle, .ytitle")).length;
    Object.assign(document.body.dataset, {wide: wide + " at " + innerWidth, titled, height,
      ink: getComputedStyle(document.body).color,
      text: document.querySelector(".xtitle")?.style.fill,
      faint: faint.map((word) => word.textContent).join("; ")});
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
})"""

DOM = """for (const part of document.querySelectorAll("script, template")) part.remove();
document.documentElement.outerHTML"""


@contextlib.contextmanager
def opening():
    """Opens pages in one browser, each in a tab of its own: the fixture `opened`."""
    assert BROWSER, f"LENS_LORA_BROWSER=required, and none of {NAMES} is on the PATH"
    import choreographer  # which the oldest dependencies are tested without

    chromium = choreographer.Browser(BROWSER)

    def opened(page, folder, *, fragment="", dark=False, phone=False, unfolded=True):
        """The DOM after scripts have run, without them, and what the console said.

        Its body's data say whether anything is wider than it should be, in a window of what width,
        how high the page is before it is unfolded, which words are faint (a contrast below 4.5),
        and how many maps have titles on their axes.
        """
        path = folder / "page.html"
        path.write_text(page, encoding="utf-8")
        measure = MEASURE.replace("%s", str(unfolded).lower())
        width = 390 if phone else 1200
        visit = _visit(chromium, f"{path.as_uri()}{fragment}", measure, dark, width)
        return loop.run_until_complete(asyncio.wait_for(visit, 240))

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(chromium.open())
        try:
            yield opened
        finally:
            loop.run_until_complete(chromium.close())


async def _visit(chromium, address, measure, dark, width):
    """Until 20 seconds of the page's own clock have passed, which stands while it computes."""
    tab = await chromium.create_tab("about:blank")
    said = []
    loaded = set()

    async def send(command, **arguments):
        answer = await tab.send_command(command, arguments)
        assert "error" not in answer, (command, answer)
        return answer["result"]

    async def hear(event):
        said.append(str(event["params"]))

    async def live(event):
        if event["params"]["name"] == "load":
            loaded.add(event["params"]["loaderId"])

    for event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
        tab.subscribe(event, hear)
    tab.subscribe("Page.lifecycleEvent", live)
    for domain in ("Runtime", "Log", "Page"):
        await send(f"{domain}.enable")
    await send("Page.setLifecycleEventsEnabled", enabled=True)
    await send("Page.addScriptToEvaluateOnNewDocument", source=measure)
    colours = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    await send("Emulation.setEmulatedMedia", features=[colours])
    window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    await send("Emulation.setDeviceMetricsOverride", **window)
    page = (await send("Page.navigate", url=address))["loaderId"]
    while page not in loaded:  # before, the clock would be that of the blank page
        await asyncio.sleep(0.01)
    passed = tab.subscribe_once("Emulation.virtualTimeBudgetExpired")
    clock = {"policy": "pauseIfNetworkFetchesPending", "budget": 20000}
    await send("Emulation.setVirtualTimePolicy", **clock)
    await passed
    dom = await send("Runtime.evaluate", expression=DOM)
    await tab.close()
    return dom["result"]["value"], said


def drawn(dom):
    """How many plots hold a drawing."""
    plots = dom.split("js-plotly-plot")[1:]
    return sum('class="main-svg"' in plot for plot in plots)
