"""The figure and the text of a user's own result class, which are read off its axes and labels."""

from __future__ import annotations

from lens_lora.core import SIGMAS, Labelled, drawing, tables
from lens_lora.errors import many
from lens_lora.show import figures, go
from lens_lora.show.figures import names_axis, value_text, whose
from lens_lora.show.text import label, visible

_MOST_BARS = 20


@drawing.figure.register(Labelled)
def figure(result: Labelled, prompt: int | None = None) -> go.AnyFigure:
    """Draw `picture`, which the class may override with any figure of Plotly."""
    return result.picture(prompt)


@drawing.labelled.register(Labelled)
def entries_figure(result: Labelled, prompt: int | None = None) -> go.Figure:
    """Draw sites by layer and kind of module, two axes as a heatmap, and the rest as bars."""
    axes = result.entry_axes
    if "position" in axes:
        prompt = result.only_prompt(prompt, "positions")
    if axes == ("site",):
        return _of_sites(result, prompt)
    if len(axes) == 2:
        return _of_two_axes(result, prompt)
    return _bars(result, prompt)


def _titles(result: Labelled, below: str, prompt: int | None) -> figures.Pair:
    heading = f"{type(result).__name__} of {result.readout}"
    return heading, f"{below} · {whose(prompt, result.str_tokens)}"


def _of_sites(result: Labelled, prompt: int | None) -> go.Figure:
    _, values, shift, _ = result.entries(prompt)
    says = [value_text(value, float(shift), result.units) for value in values.tolist()]
    titles = _titles(result, "by layer and kind of module", prompt)
    return figures.kinds_by_layer(titles, result.sites, values.tolist(), says, result.units)


def _of_two_axes(result: Labelled, prompt: int | None) -> go.Figure:
    values, shift = result.mean_over(prompt, vars(result)["values"])
    first_axis, second_axis = result.entry_axes
    down = _axis(result, first_axis, prompt)
    across = _axis(result, second_axis, prompt)
    rows = _names(result, first_axis)
    columns = _names(result, second_axis)
    # A prompt that is shorter than the longest one has fewer positions than the tensor.
    z = values[: len(down.values), : len(across.values)].tolist()

    def says(i: int, j: int, value: float | None) -> str:
        place = f"<b>{label(rows[i])}</b>, <b>{label(columns[j])}</b>"
        return f"{place}<br>{value_text(value, float(shift), result.units)}"

    below = " by ".join(result.entry_axes)
    return figures.heatmap(_titles(result, below, prompt), z, says, across, down, result.units)


def _axis(result: Labelled, axis: str, prompt: int | None) -> figures.Axis:
    if axis == "position":
        return figures.tokens_axis(result.str_tokens[prompt or 0], title=axis)
    return names_axis(_names(result, axis), axis)


def _names(result: Labelled, axis: str) -> list[str]:
    """One name for each place on an axis."""
    labels = result.labels_of(axis)
    if axis == "site":
        return [str(site) for site in labels["site"]]
    names: list[str] = []
    for labels_of_place in zip(*labels.values(), strict=True):
        names.append(", ".join(str(each) for each in labels_of_place))
    return names


def _bars(result: Labelled, prompt: int | None) -> go.Figure:
    labels, values, shift, _ = result.entries(prompt)
    order = tables.largest(values, _MOST_BARS)
    numbers = values[order].tolist()
    columns = [name for name in labels if name not in ("module", "layer", "kind")]
    names: list[str] = []
    hover: list[str] = []
    for entry, number in zip(order, numbers, strict=True):
        name = ", ".join(visible(str(labels[column][entry])) for column in columns)
        names.append(name)
        said = value_text(number, float(shift), result.units)
        hover.append(f"<b>{label(name)}</b><br>{said}")

    thing = "value"
    if len(result.entry_axes) == 1:
        thing = result.entry_axes[0]
    below = many(len(values), thing)
    if len(order) < len(values):
        below = f"the {len(order)} largest of {below}"
    return figures.bars(_titles(result, below, prompt), names, numbers, hover, result.units)


@drawing.text.register(Labelled)
def text(result: Labelled) -> str:
    """Write its readout and its sizes, then its own words and its largest entries."""
    prompts = len(result.base)
    counts = [many(prompts, "prompt")]
    for axis, size in zip(result.entry_axes, vars(result)["values"].shape[1:], strict=True):
        counts.append(many(size, axis))
    sizes = " × ".join(counts)
    lines = [f"{type(result).__name__} of {result.readout}, in {result.units}: {sizes}"]

    # Positions have no mean over prompts.
    shown = None
    if "position" in result.entry_axes and prompts > 1:
        shown = 0
    lines.append(result.words(shown))
    if shown is not None:
        lines.append(f"prompt 0 of {prompts}:")
    lines.append(result.top(5, shown).to_string())
    lines.append(_within_rounding(result))
    return "\n".join(filter(None, lines))


def _within_rounding(result: Labelled) -> str:
    """Say how many values cannot be told from rounding; '' if all can, or if it is unknown."""
    floor = vars(result).get("noise_floor")
    if floor is None:
        return ""
    values = vars(result)["values"].flatten(1)
    small = int((values.abs() <= SIGMAS * floor.to(values)[:, None]).sum())
    if not small:
        return ""
    every = int((~values.isnan()).sum())
    return f"{small} of {every} values are within three noise floors: rounding may be all of them."
