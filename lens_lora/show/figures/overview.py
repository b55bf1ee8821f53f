"""Several explained prompts side by side: their margins, and where first order finds the shifts."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from lens_lora.analyses.explain_all import Explanations
from lens_lora.analyses.explain_margin import Explanation
from lens_lora.results import drawing
from lens_lora.show.figures.layers import layers_of
from lens_lora.show.figures.parts import heatmap
from lens_lora.show.figures.style import EXACT, NOISE, Cells, style, title
from lens_lora.show.figures.theme import INK
from lens_lora.show.text import label, percent, short_prompt, signed
from lens_lora.show.words.explanation import explained_account

__all__ = ["layers_figure", "margins_figure", "overview_figures"]

_LABEL = 18
_ROW = 24


@drawing.figures.register(Explanations)
def overview_figures(found: Explanations) -> dict[str, go.Figure]:
    """Both pictures by name.

    Args:
        found: at least one explanation.
    """
    return {"margins": margins_figure(found.each), "layers": layers_figure(found.each)}


def margins_figure(each: Sequence[Explanation]) -> go.Figure:
    """A line for each prompt, from the base model's margin to the adapted one's.

    Args:
        each: explanations whose margins have the same units.
    """
    accounts, names = [explained_account(e) for e in each], _names(each)
    figure = go.Figure()
    line: list[float | None] = []
    for a in accounts:
        line += [a.m0, a.m, None]
    rows = [name for name in names for _ in range(3)]
    figure.add_scatter(
        x=line, y=rows, mode="lines", line={"color": NOISE, "width": 2}, hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    for name, values, colour in (
        ("base model", [a.m0 for a in accounts], NOISE),
        ("with the adapter", [a.m for a in accounts], EXACT),
    ):
        hover = [
            f"<b>{label(short_prompt(e.prompt))}</b><br>{label(a.doc)} against {label(a.pre)}"
            f"<br>{name}: {signed(value)} {label(a.units)}"
            for e, a, value in zip(each, accounts, values, strict=True)
        ]
        figure.add_scatter(
            x=values, y=names, mode="markers", marker={"color": colour, "size": 10}, name=name,
            hovertext=hover, hoverinfo="text",
        )  # fmt: skip
    style(figure, height=150 + _ROW * len(each))
    figure.add_vline(x=0, line={"color": INK, "width": 1.5})
    units = accounts[0].units
    flips = sum(a.flips for a in accounts)
    below = f"from the base model to the adapted one; {flips} of {len(each)} prompts flip"
    figure.update_layout(title=title("Margin of each prompt", below))
    figure.update_xaxes(title_text=f"margin, {label(units)}")
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    return figure


def layers_figure(each: Sequence[Explanation]) -> go.Figure:
    """First order of each prompt, summed over the sites of each layer.

    Args:
        each: explanations by one lens, whose margins have the same units.
    """
    sites, names = each[0].first_order.sites, _names(each)
    layers = layers_of(sites)
    z: Cells = []
    hover: list[list[str]] = []
    for e in each:
        values, shift = e.first_order.per_site[0].tolist(), float(e.first_order.shift[0])
        row = [
            sum(v for v, site in zip(values, sites, strict=True) if site.layer == layer)
            for layer in layers
        ]
        z.append(list(row))
        hover.append(
            [
                f"<b>{label(short_prompt(e.prompt))}</b><br>layer {layer}: {signed(value)} "
                f"{label(e.units)}<br>{percent(value / shift) if shift else '—'} of the shift"
                for layer, value in zip(layers, row, strict=True)
            ]
        )
    figure = heatmap(z, hover, list(layers), names, each[0].units, row_height=_ROW)
    below = "summed over the modules of each layer, at ε = 0"
    figure.update_layout(title=title("First order by prompt and layer", below))
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def _names(each: Sequence[Explanation]) -> list[str]:
    """A number and the end of each prompt, short enough to stand beside a picture."""
    return [label(f"{n}. {_end(short_prompt(e.prompt))}") for n, e in enumerate(each, start=1)]


def _end(text: str) -> str:
    if len(text) <= _LABEL:
        return text
    end = text[-_LABEL:]
    return f"…{end.partition(' ')[2] or end}"
