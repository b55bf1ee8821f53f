"""Groups of sites × tokens of a response, as a heatmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from plotly.graph_objects import Figure

from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt
from lens_lora.results.grouped import GroupAttribution
from lens_lora.show.figures.parts import heatmap, token_ticks, value_text, whose
from lens_lora.show.figures.style import Cells, title
from lens_lora.show.text import label, signed, visible

__all__ = ["groups_by_token", "grouped_figure"]


@drawing.figure.register(GroupAttribution)
def grouped_figure(grouped: GroupAttribution, prompt: int | None = None) -> Figure:
    """What each group contributes to each token of one response.

    Args:
        grouped: to be drawn.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: no such prompt, or several and none named.
    """
    index = only_prompt(prompt, len(grouped.base), "tokens")
    tokens, shift = grouped.response[index], float(grouped.shift[index])
    rows = grouped.values[index, :, : len(tokens)].double().tolist()
    figure = groups_by_token(
        list(grouped.groups),
        tokens,
        rows,
        grouped.units,
        lambda name, value: f"<b>{label(name)}</b>: {value_text(value, shift, grouped.units)}",
    )
    total = signed(float(grouped.per_group[index].sum()))
    heading = f"{grouped.readout} by token, first order at ε = {grouped.at:g}"
    below = f"{total} over all groups, the shift is {signed(shift)} {grouped.units}"
    figure.update_layout(title=title(heading, f"{below} · {whose(index, grouped.str_tokens)}"))
    return figure


def groups_by_token(
    names: Sequence[str],
    response: Sequence[str],
    rows: Cells,
    units: str,
    says: Callable[[str, float], str],
) -> Figure:
    """A row for each group, a column for each token.

    Args:
        names: of the groups.
        response: the tokens.
        rows: the values of each group.
        units: of the values.
        says: of a group's name and value, the hover's first lines.
    """
    tokens = [label(visible(token)) for token in response]
    hover = [
        [
            f"{says(name, value or 0.0)}<br>{t} {token}"
            for t, (token, value) in enumerate(zip(tokens, row, strict=True))
        ]
        for name, row in zip(names, rows, strict=True)
    ]
    layers = all(name.startswith("layer ") for name in names)
    labels = [label(name.removeprefix("layer ")) for name in names]
    figure = heatmap(rows, hover, list(range(len(response))), labels, units, row_height=12)
    step = max(1, len(labels) // 15) if layers else 1
    figure.update_yaxes(
        title_text="layer" if layers else "",
        type="category",
        tickvals=list(range(0, len(labels), step)),
        ticktext=labels[::step],
    )
    figure.update_xaxes(title_text="token of the response")
    token_ticks(figure, response)
    return figure
