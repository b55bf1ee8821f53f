"""What a result says of itself: in a terminal, and in a notebook.

In a terminal: its class, what was read and in which units, its sizes, its plain fields; below it
what its class registers as `drawing.body`, which is its story, its summary, its largest entries, or
else its table. In a notebook the same text; an attribution has tables. Nothing here loads plotly.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape

from lens_lora import results
from lens_lora.core import SIGMAS, Paged, Ranked, Result, TokenView, only_prompt
from lens_lora.core.results import drawing
from lens_lora.errors import LensLoraError, many
from lens_lora.show import maps, page
from lens_lora.show.tables import SITES_SHOWN, attribution_heading, modules_table, prompts_table
from lens_lora.show.text import key_text, signed

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
    return f"{type(result).__name__}{about}: {detail}".rstrip() + f"\n{drawing.body(result)}"


@drawing.html.register(Result)
def result_html(result: Result) -> str:
    """The same in a notebook."""
    return page.rendered("plain", lines=drawing.text(result).split("\n"))


@drawing.body.register(Result)
def _table(result: Any) -> str:
    return result.to_frame().to_string()


@drawing.body.register(Paged)
def _story(result: Paged) -> str:
    return drawing.story(result)


@drawing.body.register(Ranked)
def _largest(result: Any) -> str:
    return f"{result.top(k=5).to_string()}{_within_rounding(result)}"


@drawing.body.register(results.ActivationEffects)
def _largest_of_a_prompt(result: Any) -> str:
    # Positions have no mean over prompts.
    prompt = 0 if result.by_position and len(result.base) > 1 else None
    shown = "" if prompt is None else f"prompt 0 of {len(result.base)}:\n"
    return f"{shown}{result.top(5, prompt).to_string()}{_within_rounding(result)}"


@drawing.body.register(results.Components)
def _components(components: results.Components) -> str:
    return many(len(components.z_norm), "prompt")


@drawing.body.register(results.Remainder)
def _remainder(remainder: results.Remainder) -> str:
    return remainder.to_frame().assign(verdict=list(map(str, remainder.verdict))).to_string()


@drawing.body.register(results.RemainderCurve)
def _order(curve: results.RemainderCurve) -> str:
    orders = (f"{order:.2f}".replace("nan", "—") for order in curve.order.tolist())
    return f"order {', '.join(orders)}"


def _within_rounding(result: Any) -> str:
    """How many effects cannot be told from rounding; nothing where all can, or it is unknown."""
    if getattr(result, "noise_floor", None) is None or not hasattr(result, "values"):
        return ""
    sizes = result.values.flatten(1).abs()
    floor = SIGMAS * result.noise_floor[:, None].to(sizes)
    small, every = int((sizes <= floor).sum()), int((~sizes.isnan()).sum())
    note = "effects are within three noise floors: rounding may be all of them."
    return f"\n{small} of {every} {note}" if small else ""
