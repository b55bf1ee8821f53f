"""What a comparison, flags, a null test, a ranking and the best sets show."""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Sequence

from lens_lora.core import drawing, only_prompt, prompt_rows
from lens_lora.judging.best_subset import BestSubset
from lens_lora.judging.compare import Comparison
from lens_lora.judging.faithfulness import Faithfulness
from lens_lora.judging.null_test import NullTest
from lens_lora.judging.reliability import Reliability
from lens_lora.show import figures, go
from lens_lora.show.figures import BELOW, EXACT, INK, KINDS, LINEAR, NOISE, curve, finish, whose
from lens_lora.show.text import key_text, label, magnitude, percent, short_prompt, signed

# --- Over sizes of a set: kept and dropped, the best sets

_LOOKS = {
    **{"weight_norm": ("dash", "square"), "update_norm": ("dot", "diamond")},
    "random": ("dashdot", "x"),
}
_SOLID = ("solid", "circle")
_KEPT = "%{y:.3g}% of the shift<extra></extra>"


@drawing.figure.register(Faithfulness)
def faithfulness_figure(curves: Faithfulness, prompt: int | None = None) -> go.Figure:
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


@drawing.figure.register(BestSubset)
def best_subset_figure(subset: BestSubset, count: int | None = None) -> go.Figure:
    """One set as a map of the sites; several sizes as a curve of what they keep."""
    if count is not None or len(subset.counts) == 1:
        return members_figure(subset, subset.row(count))
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


def members_figure(subset: BestSubset, row: int) -> go.Figure:
    """Which sites, or heads, are in one of the best sets."""
    members, kept = subset.members[row].tolist(), percent(float(subset.kept[row]))
    heading = f"{subset.counts[row]} of {len(subset.names)} {subset.over} keep {kept} of the shift"
    if subset.held_out:
        heading += f", held out {percent(float(subset.kept_held_out[row]))}"
    below = f"the best set found, {subset.readout} · {whose(None, subset.str_tokens)}"
    says = ["in the set" if is_member else "not in the set" for is_member in members]
    values = list(map(float, members))
    places = subset.sites if subset.over == "sites" else list(map(_of_head, subset.names))
    figure = figures.kinds_by_layer((heading, below), places, values, says, "", "amount", reach=1.0)
    return figure.update_traces(showscale=False)


def _of_head(name: str) -> types.SimpleNamespace:
    """'blocks.3.attn.hook_z[5]' as if it were a site."""
    _, layer, rest = name.split(".", 2)
    return types.SimpleNamespace(name=name, module="z of one head", layer=int(layer), kind=rest)


# --- Number by number: measured effects, corrections, random directions

_SYMBOLS = ("circle", "diamond", "square")
_MARGIN = 0.05


@drawing.figure.register(Comparison)
def comparison_scatter(comparison: Comparison, prompt: int | None = None) -> go.Figure:
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


def _agreement(comparison: Comparison, prompt: int | None) -> str:
    """The statistics of the prompt, or their mean over prompts; '—' where there is none."""
    shown = []
    for name in ("pearson", "spearman", "slope"):
        values = comparison.per_prompt[name]
        value = comparison.mean(name) if prompt is None else float(values[prompt])
        shown.append(f"{name.title()} {f'{value:.3f}' if math.isfinite(value) else '—'}")
    is_mean = prompt is None and len(comparison.pearson) > 1
    return ", ".join(shown) + (", each the mean over prompts" if is_mean else "")


_QUESTIONS = {"add_one": "adding one site", "leave_one_out": "leaving one site out"}


@drawing.figure.register(Reliability)
def reliability_figure(flags: Reliability, prompt: int | None = None) -> go.Figure:
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


def _flag_text(flags: Reliability, prompt: int, site: int, a: float, mended: float) -> str:
    units, name = label(flags.units), label(flags.attribution.sites[site].name)
    text, score = f"<b>{name}</b><br>first order {signed(a)} {units}", flags.score[prompt, site]
    if bool(score.isnan()):
        return f"{text}<br>not measured: too small to matter"
    text += f"<br>corrected {signed(mended)} {units}<br>score {float(score):.2f}"
    if flags.fixed is None or not bool(flags.flagged[prompt, site]):
        return text
    return f"{text}<br>measured {signed(float(flags.fixed[prompt, site]))} {units}"


@drawing.figure.register(NullTest)
def null_figure(test: NullTest, prompt: int | None = None) -> go.Figure:
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
