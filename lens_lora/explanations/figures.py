"""The figures of an explanation, of whatever was computed, and those of several prompts."""

from __future__ import annotations

from collections.abc import Sequence

from lens_lora.core import drawing
from lens_lora.explanations import words
from lens_lora.explanations.explanation import (
    Explanation,
    Explanations,
    ReadoutExplanation,
    SiteExplanation,
)
from lens_lora.show import figures, go
from lens_lora.show.figures import EXACT, INK, NOISE, curve, finish, heatmap, names_axis, value_text
from lens_lora.show.text import label, numbered, short_prompt, signed
from lens_lora.views.words import MarginNumbers, ReadoutNumbers

# The headings of comparisons on a page, by name, in the order of `Explanation.comparisons`.
COMPARED = {
    "add_one": "First order at ε = 0 as a guide to adding one module to the base model",
    "leave_one_out": "First order at ε = 0 as a guide to leaving one module out of the adapted one",
    "leave_one_out@1": "First order at ε = 1 as a guide to leaving one module out",
}


@drawing.figures.register(Explanation)
def explanation_figures(e: Explanation) -> dict[str, go.Figure]:
    """The figures by name; effects that are all within rounding are not compared."""
    drawn = {"path": e.margin.plot(), "remainder": e.margin.curve.plot()}
    return drawn | _by_site_figures(e, words.explained_numbers(e))


@drawing.figures.register(ReadoutExplanation)
def readout_figures(e: ReadoutExplanation) -> dict[str, go.Figure]:
    """The figures by name: of the only prompt, or those that have a mean over prompts."""
    drawn = {"remainder": e.curve.plot()}
    if any(e.by_head.heads):
        drawn["heads"] = e.by_head.plot(by="head")
    drawn["ranks"] = e.by_rank.plot(by="rank")
    if len(e.prompts) == 1:
        return drawn | _by_site_figures(e, words.readout_numbers(e))
    drawn["sites"] = e.first_order.plot(by="site")
    for name, comparison in zip(COMPARED, e.comparisons, strict=False):
        drawn[name] = comparison.plot()
    if e.faithfulness is not None and not bool(e.faithfulness.keep.isnan().all()):
        drawn["faithfulness"] = e.faithfulness.plot()
    return drawn


def _by_site_figures(e: SiteExplanation, numbers: ReadoutNumbers) -> dict[str, go.Figure]:
    """The figures of one prompt that need no two answers."""
    first = e.first_order
    drawn = {
        "second_order": e.second_order.plot_path(),
        "sites": first.plot(by="site"),
        "positions": first.plot_positions(),
    }
    if e.coupling is not None:
        drawn["coupling"] = e.coupling.plot()
    for name, comparison in zip(COMPARED, e.comparisons, strict=False):
        if words.is_comparable(comparison, numbers):
            drawn[name] = comparison.plot()
    for name, flags in e.reliability.items():
        drawn[f"reliability/{name}"] = flags.plot()
    if e.faithfulness is not None and numbers.has_shift:
        drawn["faithfulness"] = e.faithfulness.plot()
    if e.null is not None:
        drawn["null"] = e.null.plot()
    return drawn


@drawing.figures.register(Explanations)
def overview_figures(explanations: Explanations) -> dict[str, go.Figure]:
    """The figures of several prompts by name."""
    margins = explanations.each
    return {"margins": margins_figure(margins), "layers": layers_figure(margins)}


def margins_figure(explanations: Sequence[Explanation]) -> go.Figure:
    """A line for each prompt, from the base model's margin to the adapted one's."""
    all_numbers = [words.explained_numbers(e) for e in explanations]
    names = numbered([e.prompt for e in explanations])
    units = label(all_numbers[0].units)
    ends: list[float | None] = []
    rows: list[str] = []
    for name, numbers in zip(names, all_numbers, strict=True):
        # None ends the line.
        ends += [numbers.m0, numbers.m, None]
        rows += [name, name, name]
    figure = go.Figure(curve(ends, rows, "", NOISE, showlegend=False))
    for model, margins, colour in (
        ("base model", [numbers.m0 for numbers in all_numbers], NOISE),
        ("with the adapter", [numbers.m for numbers in all_numbers], EXACT),
    ):
        hover: list[str] = []
        for e, numbers, margin in zip(explanations, all_numbers, margins, strict=True):
            hover.append(f"{_asked_text(e, numbers)}<br>{model}: {signed(margin)} {units}")
        figure.add_trace(figures.points(margins, names, hover, model, color=colour, size=10))
    figure.add_vline(x=0, line={"color": INK, "width": 1.5})
    flips = sum(numbers.flips for numbers in all_numbers)
    below = f"from the base model to the adapted one; {flips} of {len(all_numbers)} prompts flip"
    height = 150 + 24 * len(all_numbers)
    y = names_axis(names, autorange="reversed", showgrid=False).layout
    titles = ("Margin of each prompt", below)
    return finish(figure, titles, (f"margin, {units}", ""), height, yaxis=y)


def _asked_text(e: Explanation, numbers: MarginNumbers) -> str:
    """The prompt, and the two answers, for a hover."""
    answers = f"{label(numbers.doc)} against {label(numbers.pre)}"
    return f"<b>{label(short_prompt(e.prompt))}</b><br>{answers}"


def layers_figure(explanations: Sequence[Explanation]) -> go.Figure:
    """First order of each prompt, summed over the sites of each layer."""
    units = explanations[0].units
    layers = figures.layers_axis(explanations[0].first_order.sites).values
    sums: list[list[float]] = []
    for e in explanations:
        by_layer = e.first_order.sum("layer")[0]
        sums.append(by_layer.reindex(layers, fill_value=0.0).tolist())

    def hover(i: int, j: int, value: float) -> str:
        e = explanations[i]
        said = value_text(value, float(e.first_order.shift[0]), units)
        return f"<b>{label(short_prompt(e.prompt))}</b><br>layer {layers[j]}: {said}"

    titles = ("First order by prompt and layer", "summed over the modules of each layer, at ε = 0")
    x = names_axis(layers, "layer", type=None)
    y = names_axis(numbered([e.prompt for e in explanations]), autorange="reversed")
    return heatmap(titles, sums, hover, x, y, units, row_height=24)
