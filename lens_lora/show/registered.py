"""All that `core/results/drawing.py` dispatches to, imported so that it is registered; and reprs.

In a terminal a result says: its class, what was read and in which units, its sizes, its plain
fields; then its story, its summary, its largest entries, or its table. In a notebook, the same
text; an attribution has tables. Importing `lens_lora.show` loads neither plotly nor analyses.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape

import lens_lora.explanations.page  # noqa: F401  # pyright: ignore[reportUnusedImport]
from lens_lora import results
from lens_lora.core import SIGMAS, Paged, Ranked, Result, TokenView, only_prompt
from lens_lora.core.results import drawing
from lens_lora.directions.spectra import AdapterSummary
from lens_lora.errors import LensLoraError, many
from lens_lora.show import maps, page, words
from lens_lora.show.tables import SITES_SHOWN, attribution_heading, modules_table, prompts_table
from lens_lora.show.text import key_text, percent, signed

# --- An attribution


@drawing.html.register(results.Attribution)
def attribution_html(attribution: results.Attribution) -> str:
    """What `attribution_text` says, as tables."""
    heading, *notes = attribution_heading(attribution)
    tables = prompts_table(attribution), modules_table(attribution, SITES_SHOWN)
    return page.rendered("attribution", heading=heading, notes=notes, tables=tables)


@drawing.tokens.register(results.Attribution)
def token_view(attribution: results.Attribution, prompt: int | None = None) -> TokenView:
    """What each token of a prompt contributes, through all sites: blue up, red down.

    circuitsvis writes tokens into the page as HTML, so they are escaped first; its script is
    written into the page, and nothing is fetched.
    """
    maps.require_positions(attribution)
    index = only_prompt(prompt, len(attribution.base), "positions")
    try:
        from circuitsvis import tokens as circuitsvis_tokens  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise LensLoraError(
            "token_view draws with circuitsvis, which is not installed; pip install circuitsvis, "
            "or use attribution.plot_positions(), which needs nothing more."
        ) from error
    tokens = attribution.str_tokens[index]
    others = [axis for axis, name in enumerate(attribution.by, start=1) if name != "position"]
    values = attribution.values[index].cpu().double().nansum([0, *others])[: len(tokens)].tolist()
    reach = max(map(abs, values), default=0.0) or 1.0
    escaped = [str(escape(token)) for token in tokens]
    ends: Any = {"min_value": -reach, "max_value": reach}
    drawn: Any = circuitsvis_tokens.colored_tokens(escaped, values, **ends)
    # The div is written as if it closed itself, which HTML does not know: it would swallow the
    # rest of the page.
    picture = drawn.local_src.replace("/>", "></div>", 1)
    caption = (
        f"{attribution.readout}, {key_text(attribution.key)}: each token through all sites, "
        f"{signed(sum(values))} {attribution.units} in all. Blue pushes up, red down."
    )
    html = page.rendered("captioned", caption=caption, picture=Markup(picture))
    return TokenView(tokens, tuple(values), html)


# --- Every other result

_SIZES = {"str_tokens": "prompt", "steps": "checkpoint", "sites": "site", "groups": "group"}


@drawing.text.register(Result)
def result_text(result: Result) -> str:
    """The heading, and below it what the class says."""
    stated = [
        f"{name}={value!r}"
        for name in getattr(result, "__dataclass_fields__", ())
        if name not in ("readout", "units")
        and isinstance(value := getattr(result, name), str | int | float)
    ]
    lengths = {noun: getattr(result, name, ()) for name, noun in _SIZES.items()}
    lengths["scale"] = getattr(result, "scales", ())
    lengths = {noun: values for noun, values in lengths.items() if values is not None}
    sizes = [many(len(values), noun) for noun, values in lengths.items() if len(values)]
    parts = (getattr(result, name, None) for name in ("attribution", "first_order"))
    read: Any = next((part for part in (result, *parts) if hasattr(part, "readout")), result)
    about = f" of {read.readout}" if hasattr(read, "readout") else ""
    about += f", in {read.units}" if hasattr(read, "units") else ""
    origin = getattr(read, "meta", {}).get("prompts", "")
    detail = "; ".join(filter(None, (" × ".join(sizes), ", ".join(stated), origin)))
    return f"{type(result).__name__}{about}: {detail}".rstrip() + f"\n{_body(result)}"


@drawing.text.register(AdapterSummary)
def _summary_text(summary: AdapterSummary) -> str:
    over = f" over {summary.model}" if summary.model else ""
    return f"AdapterSummary({summary.name!r}{over}: {many(summary.module_count, 'module')})"


@drawing.html.register(Result)
def result_html(result: Result) -> str:
    """The same in a notebook."""
    return page.rendered("plain", lines=drawing.text(result).split("\n"))


def _body(result: Any) -> str:
    match result:
        case results.Repair():
            frame = result.to_frame().drop(columns="base").round(4).to_string()
            kept = f"{int(result.kept.sum())} of {result.gate_count} {result.of}s kept"
            return f"{kept}. {result.story()}\n{frame}"
        case results.KLShares():
            ends = [f"  prompt {i}: {text}" for i, text in enumerate(result.verdict)]
            return "\n".join([result.top(5).to_string(), *ends])
        case results.NullTest():
            return "\n".join(f"  prompt {i}: {text}" for i, text in enumerate(result.verdict))
        case results.Remainder() | results.SecondOrder():
            frame = result.to_frame().assign(verdict=list(map(str, result.verdict)))
            is_second = isinstance(result, results.SecondOrder)
            return f"{_DIAGNOSTIC if is_second else ''}{frame.to_string()}"
        case results.RemainderCurve():
            orders = (f"{order:.2f}".replace("nan", "—") for order in result.order.tolist())
            return f"order {', '.join(orders)}"
        case results.Coupling():
            pairs = f"strongest pairs, mean over prompts:\n{result.top(5).to_string()}"
            return result.shares().to_string() + f"\n{pairs}" * (len(result.groups) > 1)
        case results.Comparison():
            return _comparison(result)
        case results.Faithfulness():
            noisy = int((result.shift.abs() <= SIGMAS * result.noise_floor).sum())
            have = f"{many(noisy, 'prompt')} {'has' if noisy == 1 else 'have'}"
            note = f"\n{have} no shift above the noise: left out." if noisy else ""
            return result.summary().rename(index=key_text).to_string() + note
        case results.AdapterComparison():
            pairs = zip(result.only, result.names, strict=True)
            alone = [f"{len(sites)} in {name!r} alone" for sites, name in pairs]
            shared = many(len(result.sites), "site")
            note = f"\n{result.note}" if result.note else ""
            return f"{shared} in both, {', '.join(alone)}\n{result.summary().to_string()}{note}"
        case results.ActivationEffects() | results.FeatureShift():
            # Positions have no mean over prompts.
            prompt = 0 if result.by_position and len(result.base) > 1 else None
            shown = "" if prompt is None else f"prompt 0 of {len(result.base)}:\n"
            return f"{shown}{result.top(5, prompt).to_string()}{_within_rounding(result)}"
        case results.ConstantPart():
            return (
                f"held out, {percent(result.total_share)} of Σ‖δ‖² is constant, and the constants "
                f"alone keep {words.kept_by_constants(result)}\n"
                f"{result.top(5).to_string()}"
            )
        case results.Checkpoints():
            flips = ", ".join(f"{step:.3g}" for step in result.flip_step.tolist())
            steps = flips.replace("nan", "never")
            return f"flips at step {steps}\n{result.to_frame().to_string()}"
        case Paged():
            return drawing.story(result)
        case results.Intruders():
            found, every = int(result.counts.sum()), int((result.nearest >= 0).sum())
            of_sites = many(len(result.sites), "site")
            return f"{found} intruders among {every} leading directions of {of_sites}"
        case results.RemovalCost():
            tokens, texts = int(result.counts.sum()), many(len(result.counts), "text")
            return (
                f"costs the base {result.cost:+.3g} nats a token on {texts} ({tokens} tokens), "
                f"KL {result.mean_kl:.3g}"
            )
        case results.Reliability():
            counts = ", ".join(map(str, result.flagged.sum(1).tolist()))
            return f"{counts} of {many(result.flagged.shape[1], 'site')} flagged"
        case results.Activations():
            tokens = many(sum(map(len, result.str_tokens)), "token")
            ranks = ", ".join(map(str, dict.fromkeys(result.ranks)))
            return f"{tokens} ({_left_out(result)}), rank {ranks}"
        case results.ActivationShift():
            points = many(len(result.names), "hook point")
            return f"{points}, means over {int(result.distinct.sum())} tokens ({_left_out(result)})"
        case results.LogitShift():
            part = "each site" if result.sites else "all sites together"
            prompts, tokens = many(len(result.values), "prompt"), many(len(result.tokens), "token")
            return f"{prompts}, {tokens}, {part}"
        case results.Components():
            return many(len(result.z_norm), "prompt")
        case Ranked() | results.FeatureWrites() | results.Alignment() | results.Patchscope():
            return f"{result.top(k=5).to_string()}{_within_rounding(result)}"
        case _:
            return result.to_frame().to_string()


_DIAGNOSTIC = "a diagnostic of curvature at ε = 0, not a correction at ε = 1\n"


def _within_rounding(result: Any) -> str:
    """How many effects cannot be told from rounding; nothing where all can, or it is unknown."""
    if getattr(result, "noise_floor", None) is None or not hasattr(result, "values"):
        return ""
    sizes = result.values.flatten(1).abs()
    floor = SIGMAS * result.noise_floor[:, None].to(sizes)
    small, every = int((sizes <= floor).sum()), int((~sizes.isnan()).sum())
    note = "effects are within three noise floors: rounding may be all of them."
    return f"\n{small} of {every} {note}" if small else ""


def _left_out(result: results.Activations | results.ActivationShift) -> str:
    """What means and examples leave out."""
    sinks, repeated = many(int(result.sinks.sum()), "sink"), result.repeated
    return f"{sinks}, {repeated} after the same tokens as earlier" if repeated else sinks


def _comparison(comparison: results.Comparison) -> str:
    head = " against ".join(map(key_text, (comparison.attribution_name, comparison.effects_name)))
    if comparison.made_on:
        head += f"; made on {many(len(comparison.made_on), 'other prompt')}"
    summary = comparison.summary()
    table = summary.to_string()
    if len(comparison.attribution) == 1:
        table = f"{summary['mean'].to_string()}\none prompt: no interval."
    clear, every = comparison.beyond_noise, comparison.effects.numel()
    small = every - round(float(clear.nan_to_num(1.0).mean()) * every)
    note = f"\n{small} of {every} effects are within three noise floors: their sign, and their"
    note += " order in a rank correlation, may be rounding."
    return f"{head}\n{table}{note if small else ''}"
