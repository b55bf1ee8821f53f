"""The figures of contrasts, of alignments and of intruder dimensions."""

from __future__ import annotations

from lens_lora.core import drawing, layer_order
from lens_lora.directions.alignment import Alignment
from lens_lora.directions.contrast import Contrast
from lens_lora.directions.intruders import Intruders
from lens_lora.directions.scaled_intruders import SCALED, ScaledIntruders
from lens_lora.errors import many
from lens_lora.show import figures, go
from lens_lora.show.figures import heatmap, names_axis
from lens_lora.show.text import label, percent

# A heading names at most this number of factors one by one; otherwise the first and the last.
_FACTORS_NAMED = 5


@drawing.figure.register(Contrast)
def contrast_figure(contrast: Contrast) -> go.Figure:
    """Held-out AUC and the direction's size by hook point, with the AUC of shuffled labels."""
    names = [contrast.names[i] for i in layer_order(contrast.names)]
    table = contrast.to_frame()
    shares = dict(zip(table["point"], table["share"], strict=True))
    places = [float(place) for place in range(len(names))]
    figure = go.Figure()
    for name, values, colour, dash in (
        ("held-out AUC", contrast.auc, figures.EXACT, "solid"),
        ("95 % of shuffled labels", contrast.chance, figures.INK, "dot"),
        ("‖μ₊ − μ₋‖ / ‖h‖", shares, figures.NEGATIVE, "solid"),
    ):
        numbers = [values[point] for point in names]
        hover = [f"<b>{point}</b><br>{label(name)}: {values[point]:.3f}" for point in names]
        line = figures.curve(places, numbers, name, colour, hover, dash=dash, marker={"size": 6})
        figure.add_trace(line)
    positive, negative = contrast.counts
    titles = "Contrast of two sets of texts", f"{positive} against {negative}; AUC ½ is chance"
    x = figures.ticks(places, names)
    return figures.finish(figure, titles, ("hook point", ""), 420, xaxis=x)


@drawing.figure.register(Alignment)
def alignment_figure(alignment: Alignment, index: int) -> go.Figure:
    """The shares along one direction, by layer and kind of module."""
    values = alignment.values[:, index].tolist()
    limits = alignment.quantile.tolist()
    says = [
        f"{side}s {percent(value)} of ‖ΔW‖ along it<br>99 % of random directions: below {limit:.3f}"
        for side, value, limit in zip(alignment.sides, values, limits, strict=True)
    ]
    chance = f"random directions: {alignment.expected:.3f}"
    below = f"what each writes or reads along it, of ‖ΔW‖; {chance}"
    titles = f"ΔW along {alignment.directions[index]!r}", below
    return figures.kinds_by_layer(titles, alignment.sites, values, says, "‖vᵀΔW‖/‖ΔW‖", "amount")


@drawing.figure.register(Intruders)
def intruders_figure(intruders: Intruders, index: int | None = None) -> go.Figure:
    """The number of intruders by layer and kind of module, or the overlaps of one site."""
    if index is not None:
        return _overlaps_figure(intruders, index)
    k = intruders.sigma.shape[1]
    counts = intruders.counts.tolist()
    below = f"largest |cosine| with W below {intruders.threshold:g}"
    says = [f"{count} of {k} leading directions: {below}" for count in counts]
    number = many(sum(counts), "intruder")
    titles = f"{number} among the leading {k} directions of each site", below
    return figures.kinds_by_layer(titles, intruders.sites, counts, says, "directions", "amount")


@drawing.figure.register(ScaledIntruders)
def scaled_intruders_figure(result: ScaledIntruders) -> go.Figure:
    """The KL on ordinary text over the share that is kept, for the intruders and the whole adapter.

    Each point is one factor; the smallest factor is written beside its point.
    """
    figure = go.Figure()
    looks = ((figures.EXACT, "circle", "top left"), (figures.INK, "square", "bottom right"))
    table = result.to_frame()
    for scaled, (colour, symbol, place) in zip(SCALED, looks, strict=True):
        rows = table[table["scaled"] == scaled]
        columns = [rows[column] for column in ("scale", "value", "share", "kl")]
        hover: list[str] = []
        for scale, value, share, kl in zip(*columns, strict=True):
            hover.append(
                f"<b>{scaled} times {scale:g}</b><br>{value:.3g} {label(result.units)}, "
                f"{percent(share)} kept<br>KL {kl:.3g} nats a token"
            )
        marker = {"size": 8, "symbol": symbol}
        name = f"{scaled} scaled"
        line = figures.curve(
            rows["share"].tolist(), rows["kl"].tolist(), name, colour, hover, marker=marker
        )
        smallest = f"× {result.scales[0]:g}"
        line.update(mode="lines+markers+text", text=[smallest], textposition=place)
        figure.add_trace(line)
    factors = ", ".join(f"{scale:g}" for scale in result.scales)
    if len(result.scales) > _FACTORS_NAMED:
        factors = f"{result.scales[0]:g} to {result.scales[-1]:g}"
    below = f"{many(result.count, 'intruder')}, or the whole adapter, times {factors}"
    titles = "What scaling intruders down keeps, and what it costs", below
    axes = f"share kept of the shift of {label(result.readout)}", "KL from the base, nats a token"
    return figures.finish(figure, titles, axes)


def _overlaps_figure(intruders: Intruders, index: int) -> go.Figure:
    """|cosine| of one site's leading directions of W + ΔW with those of W."""
    k = intruders.sigma.shape[1]
    x = names_axis(range(k), "direction of W")
    y = names_axis(range(k), "of W + ΔW")
    says = "W + ΔW %{y}, W %{x}<br>|cosine| %{z:.3f}<extra></extra>"
    cells = intruders.overlap[index].tolist()
    titles = intruders.sites[index].name, f"the leading {k} directions of W and of W + ΔW"
    return heatmap(titles, cells, says, x, y, "|cosine|", "amount", reach=1.0)
