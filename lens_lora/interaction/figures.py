"""The figures of an interaction of adapters, and of modules that are left out for it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lens_lora.core import drawing
from lens_lora.errors import ArgumentError, many
from lens_lora.interaction.reconcile import Reconciled
from lens_lora.interaction.together import Together
from lens_lora.show import go
from lens_lora.show.figures import curve, finish, heatmap, names_axis, whose
from lens_lora.show.text import label, signed


@drawing.figure.register(Together)
def together_heatmap(result: Together, prompt: int | None = None) -> go.Figure:
    """A heatmap of the interaction, by groups of modules if it was split, else by adapter.

    Raises:
        ArgumentError: several pairs of adapters were split by modules.
    """
    if result.parts is None:
        return _of_adapters(result, prompt)
    if len(result.first) != 1:
        raise ArgumentError(
            f"{len(result.first)} pairs of adapters were split by modules, and one picture shows "
            "one pair",
            remedy="ask for two adapters at a time, or use .top() and .to_frame().",
        )
    values, _ = result.mean_over(prompt, result.parts[:, 0])
    # Groups in which an adapter has no module are left out.
    of_first = values.any(1).nonzero().flatten().tolist()
    of_second = values.any(0).nonzero().flatten().tolist()
    cells = values[of_first][:, of_second].tolist()
    down = [result.groups[index] for index in of_first]
    across = [result.groups[index] for index in of_second]
    below = f"modules of {result.first[0]} down, of {result.second[0]} across"
    return _heatmap(result, prompt, cells, rows=down, columns=across, below=below)


def _of_adapters(result: Together, prompt: int | None) -> go.Figure:
    """Adapter × adapter, the interaction of each pair; names of rows have each adapter's effect."""
    interaction, _ = result.mean_over(prompt, result.interaction)
    alone, _ = result.mean_over(prompt, result.alone)
    places = {name: index for index, name in enumerate(result.adapters)}
    cells: list[list[float | None]] = [[None] * len(places) for _ in places]
    for first, second, value in zip(result.first, result.second, interaction.tolist(), strict=True):
        row = places[first]
        column = places[second]
        cells[row][column] = value
        cells[column][row] = value
    down: list[str] = []
    for name, value in zip(result.adapters, alone.tolist(), strict=True):
        down.append(f"{name}, alone {signed(value)}")
    below = "what two adapters do together beyond what each does alone"
    return _heatmap(result, prompt, cells, rows=down, columns=result.adapters, below=below)


def _heatmap(
    result: Together,
    prompt: int | None,
    cells: Sequence[Sequence[float | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    below: str,
) -> go.Figure:
    """A heatmap with these names of rows and columns; `below` is the line under its heading."""
    titles = (
        f"{result.readout}: interaction of adapters",
        f"{below} · {whose(prompt, result.str_tokens)}",
    )
    says = f"<b>%{{y}} × %{{x}}</b><br>%{{z:.3g}} {label(result.units)}<extra></extra>"
    x = names_axis(columns)
    y = names_axis(rows)
    return heatmap(titles, cells, says, x, y, result.units, "signed")


@drawing.figure.register(Reconciled)
def reconciled_curves(result: Reconciled) -> go.Figure:
    """The share held of each behaviour, by the number of modules that are left out."""
    figure = go.Figure()
    colours = itertools.cycle(go.PALETTE)
    for index, (behaviour, colour) in enumerate(zip(result.behaviours, colours, strict=False)):
        says = f"{label(behaviour)}: %{{y:.2f}} with %{{x}} left out<extra></extra>"
        held = result.along[:, index].tolist()
        figure.add_trace(curve(result.sizes, held, label(behaviour), colour, says))
    left_out = many(len(result.left_out), "module")
    titles = (
        "Which behaviours hold",
        f"{left_out} left out: the share held of what each adapter does alone",
    )
    return finish(figure, titles, ("modules left out", "share held"))
