"""The frame of the HTML report: style, explanation, and the script that follows light and dark."""

from __future__ import annotations

from string import Template

__all__ = ["HOW_TO_READ", "PAGE"]

HOW_TO_READ = """
<ul>
<li>Each adapted module l has a gate ε<sub>l</sub>: 0 is the base model, 1 the adapted one. Its
first-order part is the derivative of the margin with respect to its own gate, at the base model
(ε = 0).</li>
<li>So a module's part predicts what <b>adding that one module to the base model</b> does. It does
not say what removing it from the adapted model does: modules can stand in for one another.</li>
<li>The remainder is what the sum of all parts leaves of the exact shift. <b>One small remainder at
ε = 1 can be a coincidence</b>: look along the path, where a remainder that is small everywhere is
the sign that the parts add up. Its share at an ε is of the shift up to that ε.</li>
<li>A difference under three noise floors cannot be told from rounding; its share is not given.</li>
<li>Promoted and suppressed tokens are first-order logit shifts relative to the mean over the
vocabulary, also at ε = 0.</li>
</ul>
"""

PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ink: #1c2126; --soft: #5b646d; --paper: #ffffff; --line: #d9dee3; --card: #f5f7f9;
  --link: #1f6aa5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaee; --soft: #9da7b1; --paper: #14181c; --line: #343b42; --card: #1d2328;
    --link: #6aaee0; }
}
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 60px; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 40px 0 8px; }
.under { color: var(--soft); margin: 0 0 20px; overflow-wrap: anywhere; }
.story { background: var(--card); border-left: 4px solid #2f83c5; padding: 6px 18px;
  overflow-wrap: anywhere; }
.story p { margin: 10px 0; }
.lead { color: var(--soft); margin: 0 0 8px; }
.contents { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 16px 0; font-size: 0.92rem; }
a { color: var(--link); }
.choose select { max-width: 100%; font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 4px; padding: 4px; }
.side { display: flex; flex-wrap: wrap; gap: 8px 48px; align-items: flex-start; }
.side > * { max-width: 100%; }
h3 { font-size: 0.92rem; color: var(--soft); margin: 4px 0; }
figure { margin: 12px 0 20px; }
figcaption { font-size: 0.95rem; overflow-wrap: anywhere; }
.plot { min-width: 320px; }
.plot.wide { min-width: 600px; }
.scroll { overflow-x: auto; }
td { white-space: pre-wrap; }
table { border-collapse: collapse; font-size: 0.92rem; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; }
.tokens td:not(:first-child) { max-width: 26rem; }
.pair { white-space: nowrap; margin-right: 0.5em; }
b.token { font-weight: 400; font-family: ui-monospace, monospace; background: var(--card);
  padding: 0 3px; border-radius: 3px; }
.share { color: var(--soft); }
</style>
<script>$plotly_js</script>
</head>
<body>
<h1>$title</h1>
$content
<script>
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const paint = () => {
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
    for (const plot of document.querySelectorAll(".plotly-graph-div")) {
      Plotly.relayout(plot, {"font.color": ink});
    }
  };
  const choose = document.getElementById("choose");
  const shown = document.getElementById("shown");
  const show = () => {
    shown.querySelectorAll(".plotly-graph-div").forEach(Plotly.purge);
    shown.replaceChildren(document.getElementById(choose.value).content.cloneNode(true));
    paint();
  };
  if (choose) {
    const wanted = location.hash.slice(1);
    if ([...choose.options].some((option) => option.value === wanted)) choose.value = wanted;
    choose.addEventListener("change", () => {
      history.replaceState(null, "", "#" + choose.value);
      show();
    });
    show();
  } else {
    paint();
  }
  dark.addEventListener("change", paint);
})();
</script>
</body>
</html>
"""
)
