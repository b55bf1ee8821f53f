"""Results as curves and points: along ε, over sizes, over a training; edges as a graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from lens_lora import results
from lens_lora.arguments import whole
from lens_lora.core import SIGMAS, only_prompt, prompt_rows
from lens_lora.core.results import drawing
from lens_lora.show import figures, go, maps
from lens_lora.show.figures import BELOW, EXACT, INK, KINDS, LINEAR, NOISE, curve, finish, whose
from lens_lora.show.text import key_text, label, magnitude, percent, short_prompt, signed

# --- Along ε: a readout, a fact margin, first and second order

_EPSILON = "ε, strength of the adapter"
_HIGHEST_SHARE = 300.0  # % of the shift: a share above this would flatten the others


@drawing.figure.register(results.RemainderCurve)
def remainder_figure(path: results.RemainderCurve, prompt: int | None = None) -> go.Figure:
    """The readout and its first-order line along ε, and |R(ε)| as a share of the shift.

    Where |R| is under three noise floors of its own it is greyed: its share is one of rounding.
    """
    index = only_prompt(prompt, len(path.base), "curves along ε")
    steps, units = path.points[index], label(path.units)
    scales = [step.scale for step in steps]
    is_noise = [abs(step.remainder) <= SIGMAS * step.remainder_floor for step in steps]
    shares = [100 * abs(s.remainder / s.shift) if s.shift else None for s in steps]
    clear = [s for s, noise in zip(shares, is_noise, strict=True) if s is not None and not noise]
    largest = max(clear, default=1.0)
    said = "ε = %{x:.3g}<br>%{y:.3g}% of the shift<br>%{hovertext}<extra></extra>"
    texts = [
        f"R = {signed(step.remainder)} {units}{', below the noise' if noise else ''}"
        for step, noise in zip(steps, is_noise, strict=True)
    ]
    marker = {"size": 6, "color": [NOISE if noise else LINEAR for noise in is_noise]}
    remainders = curve(scales, shares, "|R| / |shift|", LINEAR, said, marker=marker)
    remainders.update(hovertext=texts, showlegend=False)
    figure = go.make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    figure.add_traces([*_exact_and_line(path, index), remainders], rows=[1, 1, 2], cols=[1, 1, 1])
    for low, high in _runs(scales, is_noise):
        figure.add_vrect(x0=low, x1=high, fillcolor=NOISE, opacity=0.25, line_width=0)
    if any(is_noise):
        figure.add_annotation(
            text=f"grey: |R| under {SIGMAS:g} noise floors",
            **{"x": 1, "y": 0, "xref": "paper", "yref": "paper", "yanchor": "bottom"},
            **{"xanchor": "right", "showarrow": False, "font": {"size": 11}},
        )
    cut = ", cut" if largest > _HIGHEST_SHARE else ""
    top = max(min(1.12 * largest, _HIGHEST_SHARE), 1.0)
    heading = f"{path.readout} along ε, and what first order leaves"
    finish(figure, (heading, whose(index, path.str_tokens)), ("", units), 520)
    figure.update_xaxes(title_text=_EPSILON, row=2)
    return figure.update_yaxes(title_text=f"|R| / |shift|, %{cut}", range=[0, top], row=2)


def _exact_and_line(path: results.RemainderCurve, index: int) -> list[go.Scatter]:
    """g(ε), exact, from the base model on, and the line g(0) + ε Σ a_l."""
    base, slope = float(path.base[index]), float(path.slope[index])
    scales, units = [0.0, *path.scales.cpu().double().tolist()], label(path.units)
    exact = [base, *path.values[index].cpu().double().tolist()]
    line = [base + scale * slope for scale in scales]
    hover, name = _along("exact", units), "first order at ε = 0"
    return [
        curve(scales, exact, "exact", EXACT, hover, width=2.5, marker={"size": 5}),
        curve(scales, line, name, LINEAR, _along("first order", units), dash="dash"),
    ]


def _along(name: str, units: str) -> str:
    return f"ε = %{{x:.3g}}<br>%{{y:.4g}} {units}, {name}<extra></extra>"


def _runs(scales: Sequence[float], marked: Sequence[bool]) -> list[tuple[float, float]]:
    """Marked stretches of the axis, each reaching half way to its unmarked neighbours."""
    edges = [0.0, *((a + b) / 2 for a, b in zip(scales, scales[1:], strict=False)), scales[-1]]
    groups = itertools.groupby(range(len(marked)), marked.__getitem__)
    runs = [[*group] for is_marked, group in groups if is_marked]
    return [(edges[run[0]], edges[run[-1] + 1]) for run in runs]


_ROOM_FOR_THE_LABEL = 0.25  # of the axis, which is as wide as the words beside the flip


@drawing.figure.register(results.FactMargin)
def margin_figure(fact_margin: results.FactMargin, prompt: int | None = None) -> go.Figure:
    """The margin along ε, its first-order line, the zero line and the flip."""
    path = fact_margin.curve
    index = only_prompt(prompt, len(path.base), "curves along ε")
    figure = go.Figure(_exact_and_line(path, index))
    figure.add_hline(y=0, line={"color": INK, "width": 1.5})
    flip = float(fact_margin.flip_scale[index])
    if math.isfinite(flip):
        # Where the margin is not: before the flip it has its base's sign, after it the other.
        side = "left" if flip > _ROOM_FOR_THE_LABEL else "right"
        height = "top" if (float(path.base[index]) < 0) == (side == "left") else "bottom"
        said = {"text": f"flips at ε = {flip:.3g}", "font": {"color": figures.FLIP}}
        said |= {"xshift": 6 if side == "right" else -6}
        line, place = {"color": figures.FLIP, "width": 1.5, "dash": "dot"}, f"{height} {side}"
        figure.add_vline(x=flip, line=line, annotation=said, annotation_position=place)
    below = f"from the base model to the adapted · {whose(index, path.str_tokens)}"
    axes = _EPSILON, f"margin, {label(path.units)}"
    return finish(figure, (f"{path.readout} along ε", below), axes, 380)


@drawing.path.register(results.SecondOrder)
def second_order_figure(second: results.SecondOrder, prompt: int | None = None) -> go.Figure:
    """The exact shift along ε, first order's line and second order's parabola."""
    index = only_prompt(prompt, len(second.shift), "curves along ε")
    path = second.curve
    scales, units = [0.0, *path.scales.cpu().double().tolist()], label(path.units)
    figure = go.Figure()
    for name, values, colour, width, dash in (
        ("exact", path.shift, EXACT, 2.5, "solid"),
        ("first order", path.first_order, LINEAR, 2, "dash"),
        ("second order", second.predicted_at(path.scales), figures.FLIP, 2, "dot"),
    ):
        shifts, hover = [0.0, *values[index].tolist()], _along(name, units)
        figure.add_trace(curve(scales, shifts, name, colour, hover, width=width, dash=dash))
    figure.add_hline(y=0, line={"color": INK, "width": 1})
    below = f"{second.verdict[index]} · {whose(index, path.str_tokens)}"
    titles = f"{path.readout}: first and second order along ε", below
    return finish(figure, titles, (_EPSILON, f"shift, {units}"))


# --- Over sizes of a set: kept and dropped, the best sets, a repair

_LOOKS = {
    **{"weight_norm": ("dash", "square"), "update_norm": ("dot", "diamond")},
    "random": ("dashdot", "x"),
}
_SOLID = ("solid", "circle")
_KEPT = "%{y:.3g}% of the shift<extra></extra>"


@drawing.figure.register(results.Faithfulness)
def faithfulness_figure(curves: results.Faithfulness, prompt: int | None = None) -> go.Figure:
    """Keep-top-k on the left (high is good), drop-top-k on the right (low is good)."""
    rows, sites = prompt_rows(prompt, len(curves.base)), len(curves.sites)
    above = ("top kept, the others off", "top dropped, the others on")
    figure = go.make_subplots(
        1, 2, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=above
    )
    numbers = [f"{count} of {sites} sites" for count in curves.counts]
    rankings = iter(figures.PALETTE * len(curves.names))
    colours = {name: NOISE if name in _LOOKS else next(rankings) for name in curves.names}
    fractions = [100 * f for f in curves.fractions.tolist()]
    for column, side in enumerate(("keep", "drop"), start=1):
        kept = getattr(curves, side)[:, rows].nanmean(1)
        areas = getattr(curves, f"area_{side}")[:, rows].nanmean(1).tolist()
        for name, shares, area in zip(curves.names, kept.tolist(), areas, strict=True):
            shown, (dash, symbol) = label(key_text(name)), _LOOKS.get(name, _SOLID)
            said = f"<b>{shown}</b>, area {area:.2f}<br>%{{hovertext}}: {_KEPT}"
            marker, width = {"size": 6, "symbol": symbol}, 1.6 if name in _LOOKS else 2.4
            drawn = fractions, _percentages(shares), shown, colours[name], said
            line = curve(*drawn, width=width, dash=dash, marker=marker, hovertext=numbers)
            line.update(legendgroup=name, showlegend=column == 1)
            figure.add_trace(line, row=1, col=column)
    for level in (0, 100):
        figure.add_hline(y=level, line={"color": INK, "width": 1})
    figure.update_annotations(font={"size": 13})
    figure.update_xaxes(range=[-2, 102])
    below = f"share of the shift of {curves.readout} · {whose(prompt, curves.str_tokens)}"
    titles = "What the top of each ranking carries, by real interventions", below
    axes, margin = ("sites, %", "share of the shift, %"), {"t": 100}
    finish(figure, titles, axes, 460, margin=margin, legend=figures.BESIDE)
    return figure.update_yaxes(title_text=None, col=2)


def _percentages(shares: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(share) else 100 * share for share in shares]


@drawing.figure.register(results.BestSubset)
def best_subset_figure(subset: results.BestSubset, count: int | None = None) -> go.Figure:
    """One set as a map of the sites; several sizes as a curve of what they keep."""
    if count is not None or len(subset.counts) == 1:
        return maps.members_figure(subset, subset.row(count))
    sizes, figure = (100 * subset.fractions).tolist(), go.Figure()
    several = len(subset.str_tokens) > 1
    by_prompt = zip(subset.str_tokens, subset.kept_by_prompt.T.tolist(), strict=True)
    for number, (tokens, shares) in enumerate(by_prompt if several else ()):
        said = f"“{label(short_prompt(tokens))}”<br>%{{x:.3g}}% of the {subset.over}: {_KEPT}"
        line = curve(sizes, _percentages(shares), "each prompt", NOISE, said, width=1)
        figure.add_trace(line.update(legendgroup="each", showlegend=number == 0))
    sets = zip(subset.counts, subset.found_by, strict=True)
    texts = [f"{size} {subset.over}, found by {method}" for size, method in sets]
    kept, name = _percentages(subset.kept.tolist()), "together" if several else "kept"
    together = curve(sizes, kept, name, EXACT, f"%{{hovertext}}: {_KEPT}", width=2.5, marker={})
    figure.add_trace(together.update(hovertext=texts))
    if subset.held_out:
        shares, said = _percentages(subset.kept_held_out.tolist()), f"held out: {_KEPT}"
        figure.add_trace(curve(sizes, shares, "held-out prompts", LINEAR, said, marker={}))
    figure.add_hline(y=100, line={"color": NOISE, "width": 1})
    heading = f"What the best sets of {len(subset.names)} {subset.over} keep of the shift"
    titles = heading, f"the best found, {subset.readout} · {whose(None, subset.str_tokens)}"
    axes = f"size of the set, % of the {subset.over}", "kept, % of the shift"
    return finish(figure, titles, axes, showlegend=several, xaxis={"rangemode": "tozero"})


# --- Number by number: measured effects, corrections, random directions

_SYMBOLS = ("circle", "diamond", "square")
_MARGIN = 0.05


@drawing.figure.register(results.Comparison)
def comparison_scatter(comparison: results.Comparison, prompt: int | None = None) -> go.Figure:
    """Effect (y) against attribution (x); hover names each site or group."""
    rows, units = prompt_rows(prompt, len(comparison.pearson)), label(comparison.units)
    x = comparison.attribution[rows].mean(0).tolist()
    y = comparison.effects[rows].mean(0).tolist()
    attribution, effects = map(key_text, (comparison.attribution_name, comparison.effects_name))
    across, upwards = label(attribution), label(effects)
    hover = [
        f"<b>{label(name)}</b><br>{signed(a)} {units}, {across}<br>{signed(e)} {units}, {upwards}"
        for name, a, e in zip(comparison.labels, x, y, strict=True)
    ]
    kinds = sorted(set(comparison.kinds), key=lambda k: KINDS.index(k) if k in KINDS else -1)
    colours = itertools.product(_SYMBOLS, figures.PALETTE)
    look, pairs = {"size": 7, "opacity": 0.75}, zip(kinds, colours, strict=False)
    looks = {kind: {"color": colour, "symbol": mark, **look} for kind, (mark, colour) in pairs}
    ends = _with_room([*x, *y], _MARGIN)
    identity = curve(ends, ends, "identity", INK, width=1.5, dash="dash")
    marks = figures.grouped_points(x, y, hover, comparison.kinds, looks, counts=False)
    figure = go.Figure([identity, *marks])
    prompts = whose(prompt, comparison.str_tokens)
    below = f"{comparison.readout} · {_agreement(comparison, prompt)} · {prompts}"
    titles = f"Measured effects against {attribution}", below
    axes = f"{across}, {units}", f"{upwards}, {units}"
    return finish(figure, titles, axes, 520, legend=figures.BESIDE)


def _with_room(values: Sequence[float], share: float) -> list[float]:
    """From below the least value to above the largest."""
    low, high = min(values, default=-1.0), max(values, default=1.0)
    room = share * (high - low or 1.0)
    return [low - room, high + room]


def _agreement(comparison: results.Comparison, prompt: int | None) -> str:
    """The statistics of the prompt, or their mean over prompts; '—' where there is none."""
    shown = []
    for name in ("pearson", "spearman", "slope"):
        values = comparison.per_prompt[name]
        value = comparison.mean(name) if prompt is None else float(values[prompt])
        shown.append(f"{name.title()} {f'{value:.3f}' if math.isfinite(value) else '—'}")
    is_mean = prompt is None and len(comparison.pearson) > 1
    return ", ".join(shown) + (", each the mean over prompts" if is_mean else "")


_QUESTIONS = {"add_one": "adding one site", "leave_one_out": "leaving one site out"}


@drawing.figure.register(results.Reliability)
def reliability_figure(flags: results.Reliability, prompt: int | None = None) -> go.Figure:
    """a_l (x) against a_l + correction (y); flagged are material ones off the band.

    The band is where a + correction is from threshold · a to a / threshold.
    """
    index = only_prompt(prompt, len(flags.flagged), "flags")
    x = flags.attribution.per_site[index].cpu().double().tolist()
    y = flags.corrected[index].cpu().double().tolist()
    is_flagged, units = flags.flagged[index].tolist(), label(flags.units)
    reach, threshold = max(map(abs, x), default=0.0) or 1.0, flags.threshold
    ends, inner, outer = [-reach, 0.0, reach], reach * threshold, reach / threshold
    wedge = [-inner, 0.0, outer, inner, 0.0, -outer]
    band = {"fill": "toself", "fillcolor": "rgba(128,128,128,0.15)"}
    groups = ["flagged" if flag else "kept, or not material" for flag in is_flagged]
    hover = [_flag_text(flags, index, i, x[i], y[i]) for i in range(len(x))]
    look = {"size": 7, "opacity": 0.85}
    looks = {
        "kept, or not material": {"color": EXACT, "symbol": "circle", **look},
        "flagged": {"color": LINEAR, "symbol": "diamond", **look},
    }
    wide = curve(ends + ends[::-1], wedge, f"score ≥ {threshold:g}", INK, width=0, **band)
    middle = curve(ends, ends, "no correction", INK, width=1, dash="dot")
    figure = go.Figure([wide, middle, *figures.grouped_points(x, y, hover, groups, looks)])
    heading = f"{flags.readout}: first order against {_QUESTIONS[flags.how]}"
    titles = heading, f"which to trust · {whose(index, flags.attribution.str_tokens)}"
    axes = f"a at ε = {flags.attribution.at:g}, {units}", f"a + correction, {units}"
    finish(figure, titles, axes, 460, legend=BELOW, yaxis={"range": _with_room(x + y, 0.08)})
    return figure.update_xaxes(zeroline=True).update_yaxes(zeroline=True)


def _flag_text(flags: results.Reliability, prompt: int, site: int, a: float, mended: float) -> str:
    units, name = label(flags.units), label(flags.attribution.sites[site].name)
    text, score = f"<b>{name}</b><br>first order {signed(a)} {units}", flags.score[prompt, site]
    if bool(score.isnan()):
        return f"{text}<br>not measured: too small to matter"
    text += f"<br>corrected {signed(mended)} {units}<br>score {float(score):.2f}"
    if flags.fixed is None or not bool(flags.flagged[prompt, site]):
        return text
    return f"{text}<br>measured {signed(float(flags.fixed[prompt, site]))} {units}"


@drawing.figure.register(results.NullTest)
def null_figure(test: results.NullTest, prompt: int | None = None) -> go.Figure:
    """|a_l| of every site against the largest |a′_l| of the draws, on a logarithmic scale."""
    index = only_prompt(prompt, len(test.noise_floor), "null tests")
    sites, units = test.observed.sites, label(test.units)
    values = test.observed.per_site[index].cpu().double().tolist()
    largest = test.null[:, index].abs().amax(0).cpu().double().tolist()
    hover = [
        f"<b>{label(site.name)}</b><br>{signed(value)} {units}<br>largest of the draws "
        f"{magnitude(most)}<br>z = {signed(float(z))}"
        for site, value, most, z in zip(sites, values, largest, test.z[index], strict=True)
    ]
    order, sizes = list(range(len(sites))), list(map(abs, values))
    look = {"color": "rgba(128,128,128,0.35)", "line": {"width": 0}}
    name = f"largest of {test.draws} random adapters"
    draws = go.Bar(x=order, y=largest, width=1, name=name, marker=look, hoverinfo="skip")
    is_out = (size > most for size, most in zip(sizes, largest, strict=True))
    groups = ["stands out" if out else "within" for out in is_out]
    looks = {"stands out": {"color": EXACT, "size": 6}, "within": {"color": LINEAR, "size": 6}}
    figure = go.Figure([draws, *figures.grouped_points(order, sizes, hover, groups, looks)])
    starts = {site.layer: i for i, site in reversed(list(enumerate(sites))) if site.layer >= 0}
    shown = figures.every_few(sorted(starts))
    heading = "First order of each site against random directions"
    by_chance = f"{test.readout}: {percent(1 / (1 + test.draws))} stand out by chance"
    titles = heading, f"{by_chance} · {whose(index, test.observed.str_tokens)}"
    axes = "layer, and within it the order of the forward pass", f"|a|, {units}"
    layers = figures.ticks((starts[layer] for layer in shown), map(str, shown))
    finish(figure, titles, axes, bargap=0, legend=BELOW, xaxis=layers)
    return figure.update_yaxes(type="log", exponentformat="power", dtick=1)


# --- Edges, as a graph from layer to layer

_READS = ("attention reads", "logits", "MLP reads")
_LATER, _WRITES = 0.5, 0.25  # where in its layer an MLP reads, and how far on a branch writes
_WIDEST, _BENDS = 7.0, 16


@drawing.graph.register(results.Edges)
def edges_graph(edges: results.Edges, k: int, prompt: int | None = None) -> go.Figure:
    """The strongest edges, from the lane of the writer's kind to that of the reader's branch."""
    rows = edges.top(whole("k", k, 1), prompt).values.tolist()
    starts = [_writer_place(edges, writer) for writer, *_ in rows]
    ends = [_reader_place(edges, reader) for _, reader, *_ in rows]
    kinds = sorted({kind for _, kind in starts}, key=lambda kind: (*KINDS, kind).index(kind))
    above = [kind for kind in kinds if kind in KINDS[: KINDS.index("ln2")]]
    lanes = [*above, *_READS, *(kind for kind in kinds if kind not in above)][::-1]
    largest, total = (f(map(abs, edges.entries(prompt).values.tolist())) for f in (max, sum))
    figure, steps = go.Figure(), [step / _BENDS for step in range(_BENDS + 1)]
    for (writer, reader, value, _), (x, lane), (end, to) in zip(rows, starts, ends, strict=True):
        y, rise = lanes.index(lane), lanes.index(to) - lanes.index(lane)
        said = figures.value_text(value, float(edges.mean_over(prompt, edges.base)[1]), edges.units)
        xs, ys = [x + (end - x) * t for t in steps], [y + rise * t * t * (3 - 2 * t) for t in steps]
        colour = EXACT if value >= 0 else figures.NEGATIVE
        width = _WIDEST * abs(value) / (largest or 1.0)
        hover = [f"<b>{label(writer)} → {label(reader)}</b><br>{said}"] * len(steps)
        figure.add_trace(curve(xs, ys, "", colour, hover, width=max(1.0, width), opacity=0.6))
    for places, symbol in ((starts, "circle"), (ends, "square")):
        xs, ys = [x for x, _ in places], [lanes.index(lane) for _, lane in places]
        figure.add_trace(figures.points(xs, ys, None, "", color=INK, size=7, symbol=symbol))
    shown = sum(abs(value) for *_, value, _ in rows) / (total or 1.0)
    below = f"the strongest {len(rows)}, {percent(shown)} of Σ|edge|; blue pushes up, red down"
    heading = f"{edges.readout}, {key_text(edges.key)}"
    titles = heading, f"{below} · {whose(prompt, edges.str_tokens)}"
    y = figures.ticks(range(len(lanes)), lanes)
    return finish(figure, titles, ("layer", ""), 480, showlegend=False, yaxis=y)


def _writer_place(edges: results.Edges, writer: str) -> tuple[float, str]:
    """How far on in the pass, and the lane."""
    sites = [edges.sites[i] for i in edges.groups[writer]]
    kinds, is_later = {site.kind for site in sites}, sites[0].kind in KINDS[KINDS.index("ln2") :]
    kind = kinds.pop() if len(kinds) == 1 else "several kinds"
    return sites[0].layer + _LATER * is_later + _WRITES, kind


def _reader_place(edges: results.Edges, reader: str) -> tuple[float, str]:
    if reader == _READS[1]:
        return float(edges.readers[-2].split(".")[1]) + 4 * _LATER, reader
    _, layer, branch, *_ = reader.split(".")
    is_later = "mlp" in branch or "moe" in branch
    return int(layer) + _LATER * is_later, _READS[2 * is_later]
