"""What a result says of itself: in a terminal, and in a notebook.

Each function is what `repr` gives of results of its type; of one without its own, the table.
"""

from __future__ import annotations

from lens_lora.analyses.compare import Comparison
from lens_lora.analyses.compare_adapters import AdapterComparison
from lens_lora.analyses.components import Components
from lens_lora.analyses.coupling import Coupling
from lens_lora.analyses.explain_all import Explanations
from lens_lora.analyses.explain_margin import Explanation
from lens_lora.analyses.explain_response import ResponseExplanation
from lens_lora.analyses.faithfulness import Faithfulness
from lens_lora.analyses.feature_shift import FeatureShift
from lens_lora.analyses.feature_writes import FeatureWrites
from lens_lora.analyses.logit_shift import LogitShift
from lens_lora.analyses.margin import FactMargin
from lens_lora.analyses.null_test import NullTest
from lens_lora.analyses.reliability import Reliability
from lens_lora.analyses.remainder import Remainder
from lens_lora.analyses.remainder_curve import RemainderCurve
from lens_lora.analyses.repair import Repair
from lens_lora.analyses.second_order import SecondOrder
from lens_lora.analyses.spectra import AdapterSummary
from lens_lora.results import drawing
from lens_lora.results.activation_effects import ActivationEffects
from lens_lora.results.activation_shift import ActivationShift
from lens_lora.results.activations import Activations
from lens_lora.results.attribution import Attribution
from lens_lora.results.checkpoints import Checkpoints
from lens_lora.results.constant_part import ConstantPart
from lens_lora.results.effects import Effects
from lens_lora.results.grouped import GroupAttribution
from lens_lora.results.measured import SIGMAS, Result
from lens_lora.results.what_changed import WhatChanged
from lens_lora.show.page.notebook import attribution_html
from lens_lora.show.page.render import plain_text
from lens_lora.show.tables.attribution import attribution_text
from lens_lora.show.text import key_text, many, method_text, percent

drawing.text.register(Attribution)(attribution_text)
drawing.html.register(Attribution)(attribution_html)


@drawing.text.register(Result)
def _result(result: Result) -> str:
    return f"{type(result).__name__}:\n{result.to_frame().to_string()}"


@drawing.html.register(Result)
def _result_html(result: Result) -> str:
    return plain_text(drawing.text(result))


@drawing.text.register(Effects)
def _effects(effects: Effects) -> str:
    each = "" if effects.of == "site" else f", each {effects.of}"
    by = {
        "mean": f", δ replaced by its mean over {many(effects.texts, 'text')} (no first tokens)",
        "resample": f", δ replaced by another text's, of {effects.texts} (aligned at the end)",
    }.get(effects.replace, "")
    head = f"Effects of {effects.how} on {effects.readout}{each}{by}"
    return f"{head}:\n{effects.top(5).to_string()}{_within_rounding(effects)}"


@drawing.text.register(GroupAttribution)
def _group_attribution(found: GroupAttribution) -> str:
    return (
        f"{found.readout}, {method_text(found.method, found.at)}, in {found.units}: "
        f"{many(len(found.base), 'prompt')} × {many(len(found.groups), 'group')}, by token, by "
        f"{found.mode} mode:\n"
        f"{found.top(5).to_string()}"
    )


@drawing.text.register(ActivationEffects)
def _activation_effects(effects: ActivationEffects) -> str:
    prompt, of = _first(effects.by_position, len(effects.base))
    return (
        f"ActivationEffects {effects.direction} on {effects.readout}{of}:\n"
        f"{effects.top(5, prompt).to_string()}{_within_rounding(effects)}"
    )


def _within_rounding(effects: Effects | ActivationEffects) -> str:
    """How many effects cannot be told from rounding; nothing where all can, or it is unknown."""
    if effects.noise_floor is None:
        return ""
    sizes = effects.values.flatten(1).abs()
    floor = SIGMAS * effects.noise_floor[:, None].to(sizes)
    small, every = int((sizes <= floor).sum()), int((~sizes.isnan()).sum())
    if not small:
        return ""
    return (
        f"\n{small} of {every} effects are within three noise floors: rounding may be all of them."
    )


@drawing.text.register(Activations)
def _activations(found: Activations) -> str:
    tokens, ends = sum(map(len, found.str_tokens)), {min(found.ranks), max(found.ranks)}
    ranks = " to ".join(map(str, sorted(ends)))
    return (
        f"Activations in gauge {found.gauge!r} at {found.at}: "
        f"{many(len(found.str_tokens), 'prompt')}, {many(tokens, 'token')} "
        f"({many(int(found.sinks.sum()), 'sink')}), {many(len(found.sites), 'site')} of rank "
        f"{ranks}; see top(site), mean() and plot()"
    )


@drawing.text.register(ActivationShift)
def _activation_shift(found: ActivationShift) -> str:
    return (
        f"ActivationShift at {found.at}: {many(len(found.str_tokens), 'text')}, "
        f"{many(len(found.names), 'hook point')}, means over "
        f"{many(int(found.counted.sum()), 'token')} ({many(int(found.sinks.sum()), 'sink')}); "
        "see mean(), logit_lens(), cosine() and plot()"
    )


@drawing.text.register(ConstantPart)
def _constant_part(found: ConstantPart) -> str:
    return (
        f"ConstantPart over {many(len(found.base), 'text')}, held out: "
        f"{percent(found.total_share)} of Σ‖δ‖² is constant, and the constants alone keep "
        f"{percent(found.kept)} of {found.readout}\n{found.top(5).to_string()}"
    )


@drawing.text.register(Coupling)
def _coupling(coupling: Coupling) -> str:
    return (
        f"Coupling of {coupling.readout} between {many(len(coupling.groups), 'group')} at "
        f"ε = {coupling.at:g}, in {coupling.units}:\n{coupling.shares().to_string()}\n"
        f"strongest pairs, mean over prompts:\n{coupling.top(5).to_string()}"
    )


@drawing.text.register(Comparison)
def _comparison(comparison: Comparison) -> str:
    batch, count = comparison.attribution.shape
    head = (
        f"Comparison of {key_text(comparison.attribution_name)} with "
        f"{key_text(comparison.effects_name)} on {comparison.readout}: {many(batch, 'prompt')} × "
        f"{many(count, 'group')}, top k = {comparison.k}{_made_on(comparison.made_on)}"
    )
    note = _hidden_effects(comparison)
    if batch == 1:
        mean = comparison.summary()["mean"].to_string()
        return f"{head}\n{mean}\none prompt: no interval.{note}"
    return f"{head}\n{comparison.summary().to_string()}{note}"


def _hidden_effects(comparison: Comparison) -> str:
    clear, every = comparison.beyond_noise, comparison.effects.numel()
    small = every - round(float(clear.nan_to_num(1.0).mean()) * every)
    if not small:
        return ""
    return (
        f"\n{small} of {every} effects are within three noise floors: their sign, and their order "
        "in a rank correlation, may be rounding."
    )


def _made_on(prompts: tuple[tuple[str, ...], ...]) -> str:
    return f"; made on {many(len(prompts), 'other prompt')}" if prompts else ""


@drawing.text.register(Faithfulness)
def _faithfulness(found: Faithfulness) -> str:
    noisy = int((found.shift.abs() <= SIGMAS * found.noise_floor).sum())
    note = f"\n{noisy} prompts have no shift above the noise and are left out." if noisy else ""
    summary = found.summary().rename(index=key_text)
    return (
        f"Faithfulness on {found.readout}: {many(len(found.base), 'prompt')} × "
        f"{many(len(found.sites), 'site')}, shares of the shift\n{summary.to_string()}{note}"
    )


@drawing.text.register(Components)
def _components(found: Components) -> str:
    return f"Components({many(len(found.z_norm), 'prompt')} × {many(len(found.sites), 'site')})"


@drawing.text.register(LogitShift)
def _logit_shift(shift: LogitShift) -> str:
    where = many(len(shift.sites), "site") if shift.sites else "all sites together"
    prompts, tokens = many(len(shift.values), "prompt"), many(len(shift.tokens), "token")
    return f"LogitShift({prompts}, {where}, {tokens})"


@drawing.text.register(FeatureShift)
def _feature_shift(shift: FeatureShift) -> str:
    prompt, of = _first(shift.by_position, len(shift.base))
    where = "each position" if shift.by_position else f"position {shift.positions}"
    return (
        f"FeatureShift of {many(shift.base.shape[1], 'feature')} ({shift.features}) at "
        f"{shift.name}, {where}, {shift.units}{of}:\n{shift.top(5, prompt).to_string()}"
    )


@drawing.text.register(FeatureWrites)
def _feature_writes(writes: FeatureWrites) -> str:
    return (
        f"FeatureWrites of {many(len(writes.sites), 'site')} to "
        f"{many(writes.values.shape[2], 'feature')} ({writes.features}), position "
        f"{writes.positions}, {writes.units}:\n"
        f"{writes.top(k=5).to_string()}"
    )


@drawing.text.register(NullTest)
def _null_test(test: NullTest) -> str:
    lines = [f"  prompt {i}: {text}" for i, text in enumerate(test.verdict)]
    return "\n".join([f"NullTest of {test.readout}, {many(test.draws, 'draw')}:", *lines])


@drawing.text.register(Reliability)
def _reliability(found: Reliability) -> str:
    counts = ", ".join(map(str, found.flagged.sum(1).tolist()))
    return (
        f"Reliability of {found.readout}, first order as the answer to {found.how}: {counts} of "
        f"{many(found.flagged.shape[1], 'site')} flagged (score under {found.threshold:g})"
    )


@drawing.text.register(Remainder)
def _remainder(found: Remainder) -> str:
    frame = found.to_frame().assign(verdict=[str(verdict) for verdict in found.verdict])
    return f"Remainder of {found.readout}:\n{frame.to_string()}"


@drawing.text.register(RemainderCurve)
def _remainder_curve(curve: RemainderCurve) -> str:
    orders = ", ".join(f"{o:.2f}" for o in curve.order.tolist())
    return (
        f"RemainderCurve of {curve.readout} at {many(len(curve.scales), 'scale')}, order {orders}"
    )


@drawing.text.register(SecondOrder)
def _second_order(second: SecondOrder) -> str:
    first = second.first_order
    frame = second.to_frame().assign(verdict=[str(verdict) for verdict in second.verdict])
    return (
        f"SecondOrder of {first.readout}, in {first.units} (a diagnostic of curvature at ε = 0, "
        f"not a correction at ε = 1):\n{frame.to_string()}"
    )


@drawing.text.register(FactMargin)
def _fact_margin(margin: FactMargin) -> str:
    return f"{margin.attribution.readout}\n{margin.to_frame().to_string()}"


@drawing.text.register(AdapterComparison)
def _adapter_comparison(found: AdapterComparison) -> str:
    pairs = zip(found.only, found.names, strict=True)
    only = [f"{len(sites)} in {name} alone" for sites, name in pairs]
    return (
        f"AdapterComparison of {found.names[0]!r} and {found.names[1]!r}: "
        f"{many(len(found.sites), 'site')} in both, {', '.join(only)}; "
        f"{many(found.draws, 'null draw')} of the second\n"
        f"{found.summary().to_string()}"
    )


@drawing.text.register(Checkpoints)
def _checkpoints(found: Checkpoints) -> str:
    steps = found.flip_step.tolist()
    flips = ", ".join(f"{step:.3g}" if step == step else "never" for step in steps)
    return (
        f"Checkpoints of {found.readout}: {many(len(found.steps), 'checkpoint')}, "
        f"{many(len(found.base), 'prompt')}, {many(len(found.sites), 'site')}; flips at step "
        f"{flips}\n{found.to_frame().to_string()}"
    )


@drawing.text.register(Repair)
def _repair(found: Repair) -> str:
    frame = found.to_frame().drop(columns="base").round(4)
    return (
        f"Repair: {int(found.kept.sum())} of {found.gate_count} {found.of}s kept\n{found.story()}\n"
        f"{frame.to_string()}"
    )


@drawing.text.register(Explanation)
def _explanation(explanation: Explanation) -> str:
    readout, units = explanation.first_order.readout, explanation.units
    return f"Explanation of {readout}, in {units}:\n{explanation.story()}"


@drawing.text.register(Explanations)
def _explanations(found: Explanations) -> str:
    return f"Explanations of {many(len(found), 'prompt')}:\n{found.story()}"


@drawing.text.register(ResponseExplanation)
def _response_explanation(explanation: ResponseExplanation) -> str:
    return f"ResponseExplanation:\n{explanation.story()}"


@drawing.text.register(AdapterSummary)
def _adapter_summary(summary: AdapterSummary) -> str:
    over = f" over {summary.model}" if summary.model else ""
    return f"AdapterSummary({summary.name!r}{over}: {summary.module_count} modules)"


@drawing.text.register(WhatChanged)
def _what_changed(found: WhatChanged) -> str:
    return f"WhatChanged:\n{found.story()}"


def _first(by_position: bool, batch: int) -> tuple[int | None, str]:
    """Positions have no mean over prompts: the first prompt, and words that say so."""
    return (0, f", prompt 0 of {batch}") if by_position and batch > 1 else (None, "")
