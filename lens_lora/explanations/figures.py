"""What an explanation shows: every figure of what was computed, and those of several prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lens_lora.core import drawing
from lens_lora.explanations import words
from lens_lora.explanations.explanation import Explanation, Explanations
from lens_lora.show import figures, go, text
from lens_lora.show.figures import (
    EXACT,
    INK,
    NOISE,
    curve,
    finish,
    heatmap,
    names_axis,
    value_text,
)
from lens_lora.show.text import (
    label,
    numbered,
    short_prompt,
    signed,
)


def margins_figure(explanations: Sequence[Explanation]) -> go.Figure:
    """A line for each prompt, from the base model's margin to the adapted one's."""
    accounts = list(map(words.explained_account, explanations))
    names, units = numbered([e.prompt for e in explanations]), label(accounts[0].units)
    ends = [end for a in accounts for end in (a.m0, a.m, None)]
    rows = [name for name in names for _ in range(3)]
    figure = go.Figure(curve(ends, rows, "", NOISE, showlegend=False))
    for model, values, colour in (
        ("base model", [a.m0 for a in accounts], NOISE),
        ("with the adapter", [a.m for a in accounts], EXACT),
    ):
        hover = [
            f"<b>{label(short_prompt(e.prompt))}</b><br>{label(a.doc)} against {label(a.pre)}"
            f"<br>{model}: {signed(value)} {units}"
            for e, a, value in zip(explanations, accounts, values, strict=True)
        ]
        figure.add_trace(figures.points(values, names, hover, model, color=colour, size=10))
    figure.add_vline(x=0, line={"color": INK, "width": 1.5})
    flips = sum(a.flips for a in accounts)
    below = f"from the base model to the adapted one; {flips} of {len(accounts)} prompts flip"
    titles, height = ("Margin of each prompt", below), 150 + 24 * len(accounts)
    y = figures.names_axis(names, autorange="reversed", showgrid=False).layout
    return finish(figure, titles, (f"margin, {units}", ""), height, yaxis=y)


def layers_figure(explanations: Sequence[Explanation]) -> go.Figure:
    """First order of each prompt, summed over the sites of each layer."""
    sites, units = explanations[0].first_order.sites, explanations[0].units
    layers = figures.layers_axis(sites).values
    by_layer = (e.first_order.sum("layer")[0].reindex(layers, fill_value=0.0) for e in explanations)
    sums = [values.tolist() for values in by_layer]

    def says(i: int, j: int, value: float) -> str:
        e = explanations[i]
        said = value_text(value, float(e.first_order.shift[0]), units)
        return f"<b>{label(short_prompt(e.prompt))}</b><br>layer {layers[j]}: {said}"

    titles = "First order by prompt and layer", "summed over the modules of each layer, at ε = 0"
    x = names_axis(layers, "layer", type=None)
    y = names_axis(text.numbered([e.prompt for e in explanations]), autorange="reversed")
    return heatmap(titles, sums, says, x, y, units, row_height=24)


@drawing.figures.register(Explanation)
def explanation_figures(e: Explanation) -> dict[str, go.Figure]:
    """What there is to see; nothing that compares effects within rounding."""
    a, first = words.explained_account(e), e.first_order
    figures = {
        "path": e.margin.plot(),
        "remainder": e.margin.curve.plot(),
        "second_order": e.second_order.plot_path(),
        "sites": first.plot(by="site"),
        "positions": first.plot_positions(),
    }
    compared = zip(COMPARED, e.comparisons, strict=False)
    parts: dict[str, Any] = {
        "coupling": e.coupling,
        **{name: part for name, part in compared if words.is_comparable(part, a)},
        **{f"reliability/{name}": flags for name, flags in e.reliability.items()},
        "faithfulness": e.faithfulness if a.has_shift else None,
        "null": e.null,
    }
    return figures | {name: part.plot() for name, part in parts.items() if part is not None}


COMPARED = {
    "add_one": "First order at ε = 0 as a guide to adding one module to the base model",
    "leave_one_out": "First order at ε = 0 as a guide to leaving one module out of the adapted one",
    "leave_one_out@1": "First order at ε = 1 as a guide to leaving one module out",
}


@drawing.figures.register(Explanations)
def overview_figures(explanations: Explanations) -> dict[str, go.Figure]:
    """Both pictures by name."""
    margins = explanations.each
    return {"margins": margins_figure(margins), "layers": layers_figure(margins)}
