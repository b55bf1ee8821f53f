"""The figures of a comparison, of flags, a null test, the curves of rankings and the best sets."""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lens_lora.core import Site, drawing
from lens_lora.judging.best_subset import BestSubset
from lens_lora.judging.compare import Comparison
from lens_lora.judging.faithfulness import Faithfulness
from lens_lora.judging.null_test import NullTest
from lens_lora.judging.rankings import RANDOM, UPDATE_NORM, WEIGHT_NORM
from lens_lora.judging.reliability import Reliability
from lens_lora.show import figures, go
from lens_lora.show.figures import BELOW, EXACT, INK, KINDS, LINEAR, NOISE, curve, finish, whose
from lens_lora.show.text import key_text, label, magnitude, percent, short_prompt, signed

# --- Over sizes of a set: kept and dropped, the best sets

# The dash and the symbol of each baseline, whose curve is grey, and those of all other rankings.
_BASELINES = {
    WEIGHT_NORM: ("dash", "square"),
    UPDATE_NORM: ("dot", "diamond"),
    RANDOM: ("dashdot", "x"),
}
_SOLID = ("solid", "circle")
_KEPT = "%{y:.3g}% of the shift<extra></extra>"


@drawing.figure.register(Faithfulness)
def faithfulness_figure(curves: Faithfulness, prompt: int | None = None) -> go.Figure:
    """Keep-top-k on the left (high is good), drop-top-k on the right (low is good)."""
    figure = go.make_subplots(
        1,
        2,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=("top kept, the others off", "top dropped, the others on"),
    )
    for line in _kept_or_dropped(curves, curves.keep, curves.area_keep, prompt):
        figure.add_trace(line, row=1, col=1)
    for line in _kept_or_dropped(curves, curves.drop, curves.area_drop, prompt):
        figure.add_trace(line.update(showlegend=False), row=1, col=2)
    for level in (0, 100):
        figure.add_hline(y=level, line={"color": INK, "width": 1})
    figure.update_annotations(font={"size": 13})
    figure.update_xaxes(range=[-2, 102])
    heading = "What the top of each ranking carries, by real interventions"
    below = f"share of the shift of {curves.readout} · {whose(prompt, curves.str_tokens)}"
    axes = ("sites, %", "share of the shift, %")
    finish(figure, (heading, below), axes, 460, margin={"t": 100}, legend=figures.BESIDE)
    return figure.update_yaxes(title_text=None, col=2)


def _kept_or_dropped(
    curves: Faithfulness,
    shares: Float[Tensor, "method batch fraction"],
    areas: Float[Tensor, "method batch"],
    prompt: int | None,
) -> Iterator[go.Scatter]:
    """A curve for each ranking, of one prompt or the mean over prompts."""
    rows = curves.prompt_rows(prompt)
    percents = [100 * fraction for fraction in curves.fractions.tolist()]
    counts = [f"{count} of {len(curves.sites)} sites" for count in curves.counts]
    colours = iter(figures.PALETTE * len(curves.names))
    by_ranking = shares[:, rows].nanmean(1).tolist()
    area_of = areas[:, rows].nanmean(1).tolist()
    for name, of_shift, area in zip(curves.names, by_ranking, area_of, strict=True):
        dash, symbol = _BASELINES.get(name, _SOLID)
        shown = label(key_text(name))
        if name in _BASELINES:
            colour = NOISE
            width = 1.6
        else:
            colour = next(colours)
            width = 2.4
        line = curve(
            percents,
            _percentages(of_shift),
            shown,
            colour,
            f"<b>{shown}</b>, area {area:.2f}<br>%{{hovertext}}: {_KEPT}",
            width=width,
            dash=dash,
            marker={"size": 6, "symbol": symbol},
            hovertext=counts,
        )
        yield line.update(legendgroup=name, showlegend=True)


def _percentages(shares: Sequence[float]) -> list[float | None]:
    """The shares in percent, with a gap for NaN."""
    return [None if math.isnan(share) else 100 * share for share in shares]


@drawing.figure.register(BestSubset)
def best_subset_figure(subset: BestSubset, count: int | None = None) -> go.Figure:
    """One set as a map of the sites; several sizes as a curve of what they keep."""
    if count is not None or len(subset.counts) == 1:
        return members_figure(subset, subset.row(count))
    return _kept_by_size(subset)


def _kept_by_size(subset: BestSubset) -> go.Figure:
    """A curve of what the best set of each size keeps, of all prompts and of those held out."""
    figure = go.Figure()
    sizes = (100 * subset.fractions).tolist()
    has_several = len(subset.str_tokens) > 1
    name = "kept"
    if has_several:
        figure.add_traces(_each_prompt(subset, sizes))
        name = "together"
    texts: list[str] = []
    for count, start in zip(subset.counts, subset.found_by, strict=True):
        texts.append(f"{count} {subset.over}, found by {start}")
    kept = curve(
        sizes,
        _percentages(subset.kept.tolist()),
        name,
        EXACT,
        f"%{{hovertext}}: {_KEPT}",
        width=2.5,
        marker={},
    )
    figure.add_trace(kept.update(hovertext=texts))
    if subset.held_out:
        shares = _percentages(subset.kept_held_out.tolist())
        hover = f"held out: {_KEPT}"
        figure.add_trace(curve(sizes, shares, "held-out prompts", LINEAR, hover, marker={}))
    figure.add_hline(y=100, line={"color": NOISE, "width": 1})
    heading = f"What the best sets of {len(subset.names)} {subset.over} keep of the shift"
    below = f"the best found, {subset.readout} · {whose(None, subset.str_tokens)}"
    axes = f"size of the set, % of the {subset.over}", "kept, % of the shift"
    xaxis = {"rangemode": "tozero"}
    return finish(figure, (heading, below), axes, showlegend=has_several, xaxis=xaxis)


def _each_prompt(subset: BestSubset, sizes: Sequence[float]) -> list[go.Scatter]:
    """A line for each prompt, of what the sets keep of its shift.

    The legend has one line for all of them.
    """
    lines: list[go.Scatter] = []
    for tokens, shares in zip(subset.str_tokens, subset.kept_by_prompt.T.tolist(), strict=True):
        hover = f"“{label(short_prompt(tokens))}”<br>%{{x:.3g}}% of the {subset.over}: {_KEPT}"
        line = curve(sizes, _percentages(shares), "each prompt", NOISE, hover, width=1)
        lines.append(line.update(legendgroup="each", showlegend=not lines))
    return lines


def members_figure(subset: BestSubset, row: int) -> go.Figure:
    """A map of the sites, or heads, that are in one of the best sets."""
    members = subset.members[row].tolist()
    kept = percent(float(subset.kept[row]))
    heading = f"{subset.counts[row]} of {len(subset.names)} {subset.over} keep {kept} of the shift"
    if subset.held_out:
        heading += f", held out {percent(float(subset.kept_held_out[row]))}"
    below = f"the best set found, {subset.readout} · {whose(None, subset.str_tokens)}"
    says: list[str] = []
    for is_member in members:
        says.append("in the set" if is_member else "not in the set")
    values = [float(is_member) for is_member in members]
    places = subset.sites
    if subset.over == "heads":
        places = [_of_head(name) for name in subset.names]
    figure = figures.kinds_by_layer((heading, below), places, values, says, "", "amount", reach=1.0)
    return figure.update_traces(showscale=False)


def _of_head(name: str) -> types.SimpleNamespace:
    """A head, such as 'blocks.3.attn.hook_z[5]', as if it were a site."""
    _, layer, rest = name.split(".", 2)
    return types.SimpleNamespace(name=name, module="z of one head", layer=int(layer), kind=rest)


# --- Number by number: measured effects, corrections, random directions

_SYMBOLS = ("circle", "diamond", "square")
# How far the identity line, and the axis of flags, go beyond the points, as a share of the range.
_BEYOND_POINTS = 0.05
_BEYOND_FLAGS = 0.08


@drawing.figure.register(Comparison)
def comparison_scatter(comparison: Comparison, prompt: int | None = None) -> go.Figure:
    """Effect (y) against attribution (x); hover names each site or group."""
    rows = comparison.prompt_rows(prompt)
    units = label(comparison.units)
    x = comparison.attribution[rows].mean(0).tolist()
    y = comparison.effects[rows].mean(0).tolist()
    attribution = key_text(comparison.attribution_name)
    across = label(attribution)
    upwards = label(key_text(comparison.effects_name))
    hover: list[str] = []
    for name, a, e in zip(comparison.labels, x, y, strict=True):
        lines = [
            f"<b>{label(name)}</b>",
            f"{signed(a)} {units}, {across}",
            f"{signed(e)} {units}, {upwards}",
        ]
        hover.append("<br>".join(lines))
    ends = _with_room([*x, *y], _BEYOND_POINTS)
    identity = curve(ends, ends, "identity", INK, width=1.5, dash="dash")
    looks = _looks_of_kinds(comparison.kinds)
    marks = figures.grouped_points(x, y, hover, comparison.kinds, looks, counts=False)
    figure = go.Figure([identity, *marks])
    prompts = whose(prompt, comparison.str_tokens)
    below = f"{comparison.readout} · {_agreement(comparison, prompt)} · {prompts}"
    titles = f"Measured effects against {attribution}", below
    axes = f"{across}, {units}", f"{upwards}, {units}"
    return finish(figure, titles, axes, 520, legend=figures.BESIDE)


def _looks_of_kinds(kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a symbol for each kind of module, groups of several kinds first."""

    def place(kind: str) -> int:
        return KINDS.index(kind) if kind in KINDS else -1

    ordered = sorted(set(kinds), key=place)
    marks = itertools.product(_SYMBOLS, figures.PALETTE)
    looks: dict[str, dict[str, Any]] = {}
    for kind, (symbol, colour) in zip(ordered, marks, strict=False):
        looks[kind] = {"color": colour, "symbol": symbol, "size": 7, "opacity": 0.75}
    return looks


def _with_room(values: Sequence[float], share: float) -> list[float]:
    """From below the least value to above the largest."""
    low = min(values, default=-1.0)
    high = max(values, default=1.0)
    room = share * (high - low or 1.0)
    return [low - room, high + room]


def _agreement(comparison: Comparison, prompt: int | None) -> str:
    """The statistics of the prompt, or their mean over prompts; '—' where there is none."""
    shown: list[str] = []
    for name in ("pearson", "spearman", "slope"):
        if prompt is None:
            value = comparison.mean(name)
        else:
            value = float(comparison.per_prompt[name][prompt])
        text = f"{value:.3f}" if math.isfinite(value) else "—"
        shown.append(f"{name.title()} {text}")
    statistics = ", ".join(shown)
    is_mean = prompt is None and len(comparison.pearson) > 1
    return f"{statistics}, each the mean over prompts" if is_mean else statistics


_FLAGGED = "flagged"
_KEPT_AS_IT_IS = "kept, or not material"
_QUESTIONS = {"add_one": "adding one site", "leave_one_out": "leaving one site out"}


@drawing.figure.register(Reliability)
def reliability_figure(flags: Reliability, prompt: int | None = None) -> go.Figure:
    """First order a_l (x) against a_l + correction (y), with a band where the two agree.

    In the band a + correction is from threshold · a to a / threshold. Material sites outside it are
    flagged.
    """
    index = flags.only_prompt(prompt, "flags")
    units = label(flags.units)
    x = flags.attribution.per_site[index].cpu().double().tolist()
    y = flags.corrected[index].cpu().double().tolist()
    hover = [_flag_text(flags, index, i, x[i], y[i]) for i in range(len(x))]
    is_flagged = flags.flagged[index].tolist()
    groups = [_FLAGGED if flag else _KEPT_AS_IT_IS for flag in is_flagged]
    looks = {
        _KEPT_AS_IT_IS: {"color": EXACT, "symbol": "circle", "size": 7, "opacity": 0.85},
        _FLAGGED: {"color": LINEAR, "symbol": "diamond", "size": 7, "opacity": 0.85},
    }
    reach = max(map(abs, x), default=0.0) or 1.0
    band, middle = _band(reach, flags.threshold)
    figure = go.Figure([band, middle, *figures.grouped_points(x, y, hover, groups, looks)])
    heading = f"{flags.readout}: first order against {_QUESTIONS[flags.how]}"
    titles = heading, f"which to trust · {whose(index, flags.attribution.str_tokens)}"
    axes = f"a at ε = {flags.attribution.at:g}, {units}", f"a + correction, {units}"
    yaxis = {"range": _with_room(x + y, _BEYOND_FLAGS)}
    finish(figure, titles, axes, 460, legend=BELOW, yaxis=yaxis)
    return figure.update_xaxes(zeroline=True).update_yaxes(zeroline=True)


def _band(reach: float, threshold: float) -> tuple[go.Scatter, go.Scatter]:
    """Two wedges of scores above the threshold, and the line without a correction."""
    inner = reach * threshold
    outer = reach / threshold
    ends = [-reach, 0.0, reach]
    wedges = curve(
        ends + ends[::-1],
        [-inner, 0.0, outer, inner, 0.0, -outer],
        f"score ≥ {threshold:g}",
        INK,
        width=0,
        fill="toself",
        fillcolor="rgba(128,128,128,0.15)",
    )
    return wedges, curve(ends, ends, "no correction", INK, width=1, dash="dot")


def _flag_text(flags: Reliability, prompt: int, site: int, a: float, corrected: float) -> str:
    """The hover text of a site: its first order, and what was measured of it."""
    units = label(flags.units)
    lines = [
        f"<b>{label(flags.attribution.sites[site].name)}</b>",
        f"first order {signed(a)} {units}",
    ]
    score = float(flags.score[prompt, site])
    if math.isnan(score):
        return "<br>".join([*lines, "not measured: too small to matter"])
    lines += [f"corrected {signed(corrected)} {units}", f"score {score:.2f}"]
    if flags.fixed is not None and bool(flags.flagged[prompt, site]):
        lines.append(f"measured {signed(float(flags.fixed[prompt, site]))} {units}")
    return "<br>".join(lines)


@drawing.figure.register(NullTest)
def null_figure(test: NullTest, prompt: int | None = None) -> go.Figure:
    """|a_l| of every site against the largest |a′_l| of the draws, on a logarithmic scale."""
    index = test.only_prompt(prompt, "null tests")
    sites = test.observed.sites
    units = label(test.units)
    values = test.observed.per_site[index].cpu().double().tolist()
    largest = test.null[:, index].abs().amax(0).cpu().double().tolist()
    z_of_sites = test.z[index].tolist()
    hover: list[str] = []
    for site, value, most, z in zip(sites, values, largest, z_of_sites, strict=True):
        lines = [
            f"<b>{label(site.name)}</b>",
            f"{signed(value)} {units}",
            f"largest of the draws {magnitude(most)}",
            f"z = {signed(z)}",
        ]
        hover.append("<br>".join(lines))
    order = list(range(len(sites)))
    draws = go.Bar(
        x=order,
        y=largest,
        width=1,
        name=f"largest of {test.draws} random adapters",
        marker={"color": "rgba(128,128,128,0.35)", "line": {"width": 0}},
        hoverinfo="skip",
    )
    sizes = [abs(value) for value in values]
    groups: list[str] = []
    for size, most in zip(sizes, largest, strict=True):
        groups.append("stands out" if size > most else "within")
    looks = {"stands out": {"color": EXACT, "size": 6}, "within": {"color": LINEAR, "size": 6}}
    figure = go.Figure([draws, *figures.grouped_points(order, sizes, hover, groups, looks)])
    heading = "First order of each site against random directions"
    by_chance = f"{test.readout}: {percent(1 / (1 + test.draws))} stand out by chance"
    titles = heading, f"{by_chance} · {whose(index, test.observed.str_tokens)}"
    axes = "layer, and within it the order of the forward pass", f"|a|, {units}"
    finish(figure, titles, axes, bargap=0, legend=BELOW, xaxis=_layer_ticks(sites))
    return figure.update_yaxes(type="log", exponentformat="power", dtick=1)


def _layer_ticks(sites: Sequence[Site]) -> dict[str, Any]:
    """Ticks with the numbers of every few layers, each at the layer's first site."""
    firsts: dict[int, int] = {}
    for index, site in enumerate(sites):
        if site.layer >= 0:
            firsts.setdefault(site.layer, index)
    shown = figures.every_few(sorted(firsts))
    return figures.ticks((firsts[layer] for layer in shown), map(str, shown))
