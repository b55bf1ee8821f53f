"""An adapter as a whole: its words, its tables and its pages.

What its files hold (`inspect`), what it changed over unrelated texts (`what_changed`), how far it
is from another, how it came about (`checkpoints`), and what a repair made of it. The words claim no
more than the numbers, and of an audit no more than its controls allow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import rich.table
from rich.console import Group
from rich.text import Text

from lens_lora import results
from lens_lora.audit.what_changed import BY, By
from lens_lora.core.results import drawing
from lens_lora.directions.spectra import AdapterSummary, Spectrum
from lens_lora.errors import ArgumentError, named, worded
from lens_lora.show import curves, go, text
from lens_lora.show.figures import LINEAR, bars, curve, heatmap, kinds_by_layer, names_axis
from lens_lora.show.page import (
    Block,
    Part,
    Section,
    answers_of,
    folded,
    made_by,
    page_html,
    warned,
)
from lens_lora.show.tables import Pairs, Row, Table, in_terminal, table_of
from lens_lora.show.text import magnitude, percent, reading_text, signed, visible

# --- What an adapter's files hold, for the terminal

_LEADING, _LISTED = 3, 5


def adapter_table(summary: AdapterSummary, config: Mapping[str, Any]) -> rich.table.Table:
    """What the adapter is, and what its files say of it."""
    table = rich.table.Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _facts(summary, config).items():
        table.add_row(name, Text(value))
    return table


def _facts(summary: AdapterSummary, config: Mapping[str, Any]) -> dict[str, str]:
    rows, count = summary.rows, summary.module_count
    scales = f"{_counted(summary.scales)}; {_rule(config)}" if summary.scales else "no factors"
    facts = {
        "adapter": summary.name,
        "base model": summary.base_model or "not named",
        "PEFT version": str(config.get("peft_version") or "not stated"),
        "modules": str(count),
        "targets": _counted(summary.targets),
        "ranks": _counted(summary.ranks) or "no factors",
        "scales": scales,
        "beside s·B·A": _counted(summary.parts) or "no biases, DoRA, embeddings or head",
        "‖ΔW‖_F in all": _total(summary),
    }
    if summary.trained_whole:
        facts["trained whole"] = _first(summary.trained_whole)
    still = {row.module for row in rows if row.has_factors and row.norm == row.bias_norm == 0}
    if still:
        facts["untrained"] = f"ΔW = 0, as before any training, in {len(still)} of {count} modules"
    if _has_biases(summary):  # they act whatever the input, and no ‖ΔW‖ shows them
        added = f"{magnitude(summary.bias_norm)}, added whatever the input, beside ΔW"
        depends = "trained biases: their change depends on the base's"
        facts["‖Δb‖ in all"] = depends if math.isnan(summary.bias_norm) else added
    if summary.model:
        facts["laid over"] = f"{summary.model}: {sum(row.site is not None for row in rows)} sites"
    if summary.unchanged:
        facts["as in the model"] = ", ".join(summary.unchanged[:_LISTED])
    if summary.missing:
        remedy = worded(
            "to make a lens, leave them out: adapter.without(…)",
            "for other commands leave them out in Python: adapter.without(…).save(folder)",
        )
        facts["model lacks"] = f"{_first(summary.missing)}; {remedy}"
    return facts


def _total(summary: AdapterSummary) -> str:
    unknown = {part for row in summary.rows if math.isnan(row.norm) for part in row.parts}
    unknown -= {"lora_bias", "trained bias"}
    if unknown:
        return f"needs the base model ({', '.join(sorted(unknown))}): --model"
    total = magnitude(summary.norm)
    if summary.model:
        total += f", {_relative(summary.relative_norm)} of ‖W‖_F of these sites"
    return total


def _rule(config: Mapping[str, Any]) -> str:
    """'s = α/r, α = 16', with the square root for rsLoRA."""
    is_patterned = config.get("rank_pattern") or config.get("alpha_pattern")
    rule = "s = α/√r (rsLoRA)" if config.get("use_rslora") else "s = α/r"
    patterns = " and by pattern" if is_patterned else ""
    return f"{rule}, α = {config.get('lora_alpha', 'not stated')}{patterns}"


def _first(modules: tuple[str, ...]) -> str:
    more = f" and {len(modules) - _LISTED} more" if len(modules) > _LISTED else ""
    return f"{', '.join(modules[:_LISTED])}{more}"


def _counted(counts: Mapping[Any, int]) -> str:
    """'q_proj × 30, v_proj × 30'."""
    names = (f"{key:.4g}" if isinstance(key, float) else str(key) for key in counts)
    return ", ".join(f"{name} × {n}" for name, n in zip(names, counts.values(), strict=True))


def _has_biases(summary: AdapterSummary) -> bool:
    return any(row.bias_norm != 0 for row in summary.rows)


def _relative(share: float) -> str:
    """A percentage of two digits: these are often small, and are compared."""
    if not math.isfinite(share):
        return "—"
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def spectra_table(summary: AdapterSummary, k: int | None = 10) -> Table:
    """The updates of largest ‖ΔW‖_F, by site where there is a model, else by module."""
    top, unit = summary.top(k), "site" if summary.model else "module"
    columns = [_spectrum(row, summary) for row in top]
    rows = [(row.site or row.module, *c.values()) for row, c in zip(top, columns, strict=True)]
    title = f"{len(top)} of {len(summary.rows)} {unit}s, by ‖ΔW‖_F"
    return Table((unit, *(columns[0] if columns else ())), rows, title=title)


def _spectrum(row: Spectrum, summary: AdapterSummary) -> dict[str, str]:
    """Column → what it holds of one update."""
    sigma = map(magnitude, row.singular_values[:_LEADING].tolist())
    leading = itertools.islice(itertools.chain(sigma, itertools.repeat("—")), _LEADING)
    return {
        "rank": str(row.rank),
        "s": f"{row.scale:.3g}",
        "‖ΔW‖_F": magnitude(row.norm),
        **({"‖ΔW‖/‖W‖": _relative(row.relative_norm)} if summary.model else {}),
        **({"‖Δb‖": magnitude(row.bias_norm)} if _has_biases(summary) else {}),
        "stable rank": magnitude(row.stable_rank),
        **dict(zip(("σ₁ = ‖ΔW‖₂", "σ₂", "σ₃"), leading, strict=True)),
    }


# --- What it changed, nothing asked: in words

_TOKENS_NAMED = 6


@drawing.story.register(results.WhatChanged)
def what_changed_story(changed: results.WhatChanged) -> str:
    """A paragraph a line: how much, which tokens, and the brief."""
    first = magnitude(changed.found.first_kl)
    size = f"{_moved(changed)} At first tokens, which are left out: {first} nats."
    paragraphs = [size, _promoted(changed), changed.brief().told, reading_text(changed.meta)]
    return "\n".join(filter(None, paragraphs))


def _moved(changed: results.WhatChanged) -> str:
    size = f"{magnitude(changed.found.mean_kl)} nats a token (KL, base to adapted)"
    moves = f"Over {changed.texts} the next-token distribution moves by {size}"
    if changed.nulls:
        times = _range(changes.scale for changes in changed.nulls)
        moved = _range(changes.mean_kl for changes in changed.nulls)
        moves += f"; null adapters, in random directions, by {moved} at {times} times its size"
    if changed.unrelated:
        others = _range(changes.mean_kl for changes in changed.unrelated)
        moves += f"; unrelated adapters: {others}"
    return f"{moves}."


def _range(values: Iterable[float]) -> str:
    """'0.1', or '0.1 to 0.3'."""
    ends = sorted(values)
    return " to ".join(dict.fromkeys(map(magnitude, (ends[0], ends[-1]))))


def _promoted(changed: results.WhatChanged) -> str:
    frame = changed.promoted(_TOKENS_NAMED)
    most = f"the first by {signed(frame['logit'].tolist()[0])} logits"
    if "null" in frame:
        most += f"; no token by more than {signed(frame['null'].tolist()[0])} under a null adapter"
    tokens = ", ".join(f"‘{visible(token)}’" for token in frame["token"])
    return f"Promoted most by mean logit: {tokens} ({most})."


# --- What it changed: pictures


def shares_figure(changed: results.WhatChanged) -> go.Figure:
    """Each site's share of the KL, layer × kind of module."""
    values = changed.shares.tolist()
    total = sum(values) or 1.0
    says = [f"{percent(value / total)} of all" for value in values]
    below = "shares of the KL along the path from base to adapted model"
    titles = "Which modules hold the divergence", below
    return kinds_by_layer(titles, changed.sites, values, says, "nats a token", "signed")


_PROMOTED_UNITS = {
    "logit": "mean shift of the logit",
    "probability": "mean shift of the probability",
    "count": "share of tokens at which it is among the 20 promoted most",
    "reading": "mean Δh on first tokens, read as logits",
}
_CONTROLS = (("null", "a null adapter", "dash"), ("unrelated", "an unrelated adapter", "dot"))


@drawing.figure.register(results.WhatChanged)
def promoted_figure(changed: results.WhatChanged, k: int = 20, by: By = "logit") -> go.Figure:
    """The tokens promoted most; lines where the largest shift under a control is."""
    frame = changed.promoted(k, by)
    values = frame[by].tolist()
    names = [f"{rank} {visible(token)}" for rank, token in frame[["rank", "token"]].to_numpy()]
    hover = [f"{text.label(name)}<br>{signed(v)}" for name, v in zip(names, values, strict=True)]
    heading = f"Promoted by {changed.found.name}, nothing asked"
    figure = bars((heading, changed.texts), names, values, hover, _PROMOTED_UNITS[by])
    figure.update_traces(showlegend=False)
    for control, described, dash in _CONTROLS:
        if control in frame:
            most = float(frame[control].tolist()[0])
            said = f"{signed(most)}, the most of any token under {described}"
            ends, name = [text.label(names[0]), text.label(names[-1])], f"most under {described}"
            figure.add_trace(curve([most] * 2, ends, name, LINEAR, [said] * 2, dash=dash))
    return figure


# --- What it changed: tables, in the terminal and on a page

_PROMOTED = {
    "logit": ("promoted by mean logit", "by logit", "mean Δlogit"),
    "probability": ("promoted by mean probability", "by probability", "mean Δp"),
    "count": ("among the 20 promoted most", "by count", "of all tokens"),
    "reading": ("Δh on the first tokens reads as", "read as tokens", "logits"),
}
_TOKENS_SHOWN, _PLACES_SHOWN, _MODULES_SHOWN = 20, 12, 20


def _promoted_table(changed: results.WhatChanged, by: By, k: int) -> Table:
    """The tokens promoted most, a line each; the controls' largest shifts in the heading."""
    frame, (title, heading, units) = changed.promoted(k, by), _PROMOTED[by]
    most = [f"{name} {signed(frame[name].tolist()[0])}" for name, *_ in _CONTROLS if name in frame]
    ends = f"; largest of any token, {', '.join(most)}" if most else ""
    ends = ends if by != "reading" else f", {list(changed.found.readings)[-1]}{ends}"
    heads = {"rank": "", "token": "token", by: units}
    return table_of(frame, heads, texts=(1,), title=title + ends, heading=heading + ends)


def _places_table(changed: results.WhatChanged, k: int) -> Table:
    """The tokens after which the next one changes most."""
    places = changed.where(k)
    is_still = places["promoted"] == ""
    hidden, places = is_still.sum(), places[~is_still].copy()
    title = f"where ({hidden} places left out: no probability rises there)" if hidden else "where"
    where = zip(places["text"], places["position"], strict=True)
    places["context"] = [text.context_text(changed.str_tokens[i], t) for i, t in where]
    for control in places.columns.intersection(["null", "unrelated"]):
        places[control] = list(map(magnitude, places[control]))
    heads = {"context": "after ⟦token⟧", "kl": "KL, nats", "promoted": "promoted there"}
    heads |= {"null": "null", "unrelated": "unrelated"}
    return table_of(places, heads, texts=(0, 2), title=title)


def _modules_table(changed: results.WhatChanged, k: int) -> Table:
    """The sites of largest share of the KL; no row where it was not split."""
    heads = {"site": "site", "module": "module", "nats": "nats a token", "share": "of all"}
    return table_of(changed.modules(k), heads, texts=(0, 1), title="modules of the KL")


def _groups(changed: results.WhatChanged) -> Table:
    """Tokens that the same texts promote."""
    groups = changed.promoted_groups()
    groups["tokens"] = [" ".join(map(visible, tokens)) for tokens in groups["tokens"]]
    heads = {"share": "of all promoted", "tokens": "tokens", "text": "most in"}
    return table_of(groups, heads, texts=(1, 2), heading="tokens that the same texts promote")


def _writers(changed: results.WhatChanged, k: int) -> Table:
    """What adds the mean Δh of the first tokens."""
    heads = {"name": "added by", "share": "of ‖Δh‖²"}
    return table_of(changed.writers(k), heads, heading="which blocks add it")


def _size_table(changed: results.WhatChanged) -> Table:
    """The adapter and each control: how much it changes."""
    summary = changed.summary()
    last = {summary.columns[-1]: "share"}  # how constant Δh is behind the last block
    heads = {"adapter": "adapter", "kind": "kind", "scale": "scale", "mean_kl": "KL, nats a token"}
    heads |= {f"largest_{by}": f"largest {by}" for by in BY}
    heads["share"] = "constant behind the last block"
    return table_of(summary.rename(columns=last), heads, texts=(0, 1))


def _claims_table(changed: results.WhatChanged) -> Table:
    """What it says of its own accord, and the runs that show it."""
    each = [{**vars(claim), "undone": claim.undone} for claim in changed.claims]
    heads = {"by": "by", "context": "after", "says": "it says", "base_says": "the base says"}
    heads |= {"base": "log p, base", "adapted": "adapted", "null": "null"}
    heads |= {"layers": "without", "undone": "undone"}
    heading = "What it says of its own accord"
    return table_of(pd.DataFrame(each), heads, texts=(0, 1, 2, 3, 7), heading=heading)


def what_changed_tables(changed: results.WhatChanged, k: int = 10) -> Group:
    """Promoted tokens, places and modules, for the terminal."""
    promoted = (_promoted_table(changed, by, k) for by in BY)
    return in_terminal(*promoted, _places_table(changed, k), _modules_table(changed, k))


@drawing.report.register(results.WhatChanged)
def what_changed_report(changed: results.WhatChanged, *, title: str | None = None) -> str:
    """A self-contained HTML page."""
    logit, probability, count, reading = (_promoted_table(changed, by, _TOKENS_SHOWN) for by in BY)
    modules, answers = _modules_table(changed, _MODULES_SHOWN), answers_of(changed.answers)
    split: list[Block] = [shares_figure(changed), modules] if modules.rows else []
    sections = [
        Section("How much", [_size_table(changed)]),
        Section("Which tokens are promoted", [(logit, probability), (count, _groups(changed))]),
        Section("What the first tokens carry", [(reading, _writers(changed, _TOKENS_SHOWN))]),
        Section("Where", [_places_table(changed, _PLACES_SHOWN)]),
        Section("Which modules", split),
    ]
    part = Part(
        subtitle=f"{made_by(changed.meta)} · {changed.texts}",
        headline=(changed.brief().verdict, _moved(changed), _promoted(changed)),
        numbers=_numbers(changed),
        top=[_claims_table(changed), *answers, promoted_figure(changed)],
        sections=folded(what_changed_story(changed), sections, "changes", changed.meta),
        warnings=warned(changed.meta),
    )
    return page_html(title or f"What did {changed.found.name} change?", [part])


def _numbers(changed: results.WhatChanged) -> Pairs:
    found, top = changed.found, changed.promoted(1).to_dict("records")[0]
    random = f"; random directions {signed(top['null'])} at most" if "null" in top else ""
    return (
        (magnitude(found.mean_kl), "nats a token, KL from the base to the adapted model"),
        (signed(top["logit"]), f"logits, “{visible(top['token'])}”, promoted most{random}"),
        (magnitude(float(found.kl[:, 1:].nan_to_num().max())), "nats where it changes most"),
        (
            percent(list(found.constant.values())[-1]),
            "of the shift behind the last block is one vector, whatever the token",
        ),
    )


# --- Two adapters


@drawing.figure.register(results.AdapterComparison)
def comparison_heatmap(comparison: results.AdapterComparison) -> go.Figure:
    """cos⟨ΔW, ΔW′⟩ of every shared site; the colours end at ±1."""
    if not comparison.sites:
        raise ArgumentError("the two adapters share no site, so there is no cosine to draw.")
    cosines, unshared = comparison.cosines.tolist(), sum(map(len, comparison.only))
    rest = f", {unshared} sites in one of them alone" if unshared else ""
    below = f"cosine over all sites {comparison.cosine:+.3f}{rest}"
    if comparison.begin_alike:
        below += "; what is read overlaps as of adapters that begin alike"
    titles, sites = (f"ΔW of {' and '.join(comparison.names)}", below), comparison.sites
    says = [f"cosine {cosine:+.3f}" for cosine in cosines]
    return kinds_by_layer(titles, sites, cosines, says, "cosine", "signed", reach=1.0)


# --- A training

_MOVES = {
    "moved": ("Which modules move when", "how far ΔW moved since the checkpoint before"),
    "effect": ("First order through the training", "Σ of each group, mean over prompts"),
    "norm": ("How large ΔW is through the training", "‖ΔW‖ of each group"),
    "read": ("How far what ΔW reads turns", "mean angle to the checkpoint before"),
    "write": ("How far what ΔW writes turns", "mean angle to the checkpoint before"),
}
_AMOUNTS = {"moved": "‖change‖", "norm": "‖ΔW‖", "read": "degrees", "write": "degrees"}


@drawing.modules.register(results.Checkpoints)
def modules_heatmap(training: results.Checkpoints, what: Any, group: Any) -> go.Figure:
    """Groups of modules by step."""
    frame = training.by_group(what, group)
    heading, below = _MOVES[what]
    says = "<b>%{y}</b>, step %{x}<br>%{z:.3g}<extra></extra>"
    x = names_axis((f"{step:g}" for step in frame.columns), "step")
    y = names_axis(frame.index, autorange="reversed" if group == "kind" else None)
    is_amount = what in _AMOUNTS
    units, scale = _AMOUNTS.get(what, training.units), "amount" if is_amount else "pushes"
    values = frame.to_numpy().tolist()
    return heatmap((f"{heading}, by {group}", below), values, says, x, y, units, scale)


@drawing.story.register(results.Checkpoints)
def checkpoints_story(training: results.Checkpoints) -> str:
    """Where each prompt flips, in steps and in strength, and where anything changes at once."""
    prompts = range(len(training.str_tokens))
    lines = [_fate(training, p) + _phases(training, f"prompt {p}", " It") for p in prompts]
    lines.append(_phases(training, "angle", "The direction of ΔW"))
    lines += [curves.too_few(training), reading_text(training.meta)]
    return "\n".join(filter(None, lines))


def _fate(training: results.Checkpoints, p: int) -> str:
    """When a prompt's readout changes sign."""
    step, end = float(training.flip_step[p]), float(training.flip_scale[-1, p])
    last = "does not flip" if math.isnan(end) else f"flips at ε = {end:.2g}"
    happened = f"changes sign at about step {step:.3g}; the last checkpoint {last}."
    if math.isnan(step) and bool(training.hidden[:, p].any()):
        rounding = "beyond rounding, which hides its sign at the base or later"
        happened = f"changes sign at no checkpoint {rounding}."
    elif math.isnan(step):
        happened = f"keeps its sign through all {len(training.steps)} checkpoints."
    return f"“{text.short_prompt(training.str_tokens[p])}”: {training.readout} {happened}"


def _phases(training: results.Checkpoints, series: str, subject: str) -> str:
    spans = [f"{a:g} and {b:g}" for a, b in training.phases.get(series, ())]
    return f"{subject} changes at once between steps {', and '.join(spans)}." if spans else ""


def checkpoints_table(training: results.Checkpoints) -> Table:
    """The readout at every checkpoint, the base model first, as step 0."""
    prompts = list(map(text.short_prompt, training.str_tokens))
    starts = zip(prompts, map(signed, training.base.tolist()), strict=True)
    rows: list[Row] = [("0", *start, "", "", "", "") for start in starts]
    series = (training.adapted, training.first_order, training.remainder)
    for (k, step), (p, prompt) in itertools.product(enumerate(training.steps), enumerate(prompts)):
        numbers = (signed(float(values[k, p])) for values in series)
        flip, angle = magnitude(float(training.flip_scale[k, p])), f"{training.angle[k]:.0f}°"
        rows.append((f"{step:g}", prompt, *numbers, flip, angle.replace("nan°", "—")))
    value = f"value, {training.units}"
    heads = ("step", "prompt", value, "first order", "remainder", "flips at ε", "angle")
    return Table(heads, rows, texts=(1,), title=f"{training.readout} through the training")


@drawing.report.register(results.Checkpoints)
def checkpoints_report(training: results.Checkpoints, *, title: str | None = None) -> str:
    """The page of a training, as a string."""
    sections = [
        Section("Which layers move when", [training.plot_modules("moved", "layer")]),
        Section("Which kinds of module move when", [training.plot_modules("moved", "kind")]),
        Section("First order by layer", [training.plot_modules("effect", "layer")]),
        Section("The numbers", [checkpoints_table(training)]),
    ]
    prompts = "; ".join(f"“{text.short_prompt(tokens)}”" for tokens in training.str_tokens)
    part = Part(
        subtitle=f"{training.readout} · {prompts}",
        headline=_training_headline(training),
        numbers=_training_numbers(training),
        top=[training.plot()],
        sections=folded(checkpoints_story(training), sections, "training", training.meta),
        warnings=warned(training.meta),
    )
    first, *_, last = training.steps
    name = f"{len(training.steps)} checkpoints, steps {first:g} to {last:g}"
    return page_html(title or name, [part])


def _training_headline(training: results.Checkpoints) -> Sequence[str]:
    """When the readout flips, whether anything changes at once, and where ΔW is in the end."""
    flips, count = training.flip_step.nan_to_num(math.inf), len(training.base)
    first = int(flips.argmin())
    several = f"{int(flips.isfinite().sum())} of {count} prompts change sign. " if count > 1 else ""
    at_once = _phases(training, f"prompt {first}", "It") or curves.too_few(training)
    effect, norm = (training.by_group(what, "layer").iloc[:, -1] for what in ("effect", "norm"))
    where = (
        f"At the last checkpoint first order is largest in {effect.abs().idxmax()} "
        f"({signed(effect[effect.abs().idxmax()])} {training.units}), and ΔW in {norm.idxmax()} "
        f"(‖ΔW‖ = {magnitude(norm.max())})."
    )
    return several + _fate(training, first), at_once or "It changes at no step at once.", where


def _training_numbers(training: results.Checkpoints) -> Pairs:
    count, first = len(training.base), int(training.flip_step.nan_to_num(math.inf).argmin())
    mean = f", mean of {count} prompts" if count > 1 else ""
    step, scale = float(training.flip_step[first]), float(training.flip_scale[-1, first])
    return (
        (signed(float(training.base.mean())), f"{training.units}, the base model{mean}"),
        (signed(float(training.adapted[-1].mean())), f"{training.units}, the last checkpoint"),
        (f"{step:.3g}" if math.isfinite(step) else "never", "step of the first change of sign"),
        (f"ε = {scale:.2g}" if math.isfinite(scale) else "—", "where the last checkpoint flips"),
    )


# --- A repair


@drawing.story.register(results.Repair)
def repair_story(repair: results.Repair) -> str:
    """Kept and left on the prompts that judge, and whether that is better than scaling."""
    return " ".join(filter(None, (*_judged(repair), reading_text(repair.meta))))


def _judged(repair: results.Repair) -> tuple[str, str, str]:
    judged = "On held-out prompts" if repair.is_held_out else "On the prompts that it was made on"
    outcome = (
        f"{judged} the repaired adapter keeps {percent(repair.kept_share)} of what was to be kept "
        f"and leaves {percent(repair.left_share)} of what was to be dropped."
    )
    if repair.verdict == "nothing":
        none = (
            f"No smaller set of {repair.of}s that was tried kept {percent(repair.keep_share)} and "
            f"left less, so the adapter is whole: ask for a smaller {named('keep_share')}, or more "
            "steps."
        )
        return outcome, none, ""
    gain = f"{repair.gain:.3g} times as much"
    beside = {
        "helps": f"The whole adapter, scaled down to keep the same, leaves {gain}.",
        "tie": "That is a tie with scaling the whole adapter down to keep the same.",
        "worse": "Scaling the whole adapter down to keep the same leaves less: the repair does not "
        "help here.",
    }[repair.verdict]
    if repair.exceeds:
        beside = f"No strength of the whole adapter up to 1 keeps as much. At 1 it leaves {gain}."
    held_out = worded("test_keep and test_drop", "--test-prompt and --test-drop")
    fair = "" if repair.is_held_out else f"Give {held_out} to judge it fairly."
    return outcome, beside, fair


def repair_table(repair: results.Repair) -> Table:
    """What stays of each question, by adapter."""
    frame = repair.to_frame()
    frame.loc[frame["held out"], "kind"] += ", held out"
    heads = {name: name for name in ("question", "kind", "adapter", "value")}
    heads["share"] = "kept or left"
    return table_of(frame, heads, texts=(0, 1, 2), title="What stays of each")


@drawing.report.register(results.Repair)
def repair_report(repair: results.Repair, *, title: str | None = None) -> str:
    """The page of a repair, as a string."""
    kept = f"{int(repair.kept.sum())} of {repair.gate_count}"
    outcome, beside, _ = _judged(repair)
    scaled = "which keeps less" if repair.exceeds else "scaled to keep this"
    sections = [Section("What stays of each", [repair_table(repair)])]
    part = Part(
        subtitle=made_by(repair.meta),
        headline=(outcome, beside, f"{kept} {repair.of}s of the adapter are kept."),
        numbers=(
            (percent(repair.kept_share), "of what was to be kept stays"),
            (percent(repair.left_share), "of what was to be dropped is left"),
            (kept, f"{repair.of}s kept"),
            (f"{repair.gain:.3g} ×", f"as much is left by the whole adapter, {scaled}"),
        ),
        top=[repair.plot()],
        sections=folded(repair_story(repair), sections, "repair", repair.meta),
        warnings=warned(repair.meta),
    )
    return page_html(title or f"What a repair left of {repair.meta.get('adapter', 'it')}", [part])
