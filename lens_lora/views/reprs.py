"""The text of a result in a terminal, and its HTML in a notebook.

1. A terminal shows a heading: the result's class, its readout and units, its sizes, and its fields
   that are words or numbers.
2. The body that the class registers as `drawing.body` stands below the heading: its story, its
   summary, its largest entries, or else its table.
3. A notebook shows the same text; for an attribution it shows tables.

Nothing here loads plotly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from lens_lora.core import (
    SIGMAS,
    ActivationEffects,
    Attribution,
    Components,
    Paged,
    Ranked,
    Remainder,
    RemainderCurve,
    Result,
    drawing,
)
from lens_lora.errors import LensLoraError, many
from lens_lora.show import page
from lens_lora.show.compose import part_with_readout
from lens_lora.show.text import key_text, signed
from lens_lora.views import maps
from lens_lora.views.tables import (
    PROMPTS_SHOWN,
    SITES_SHOWN,
    attribution_heading,
    modules_table,
    prompts_table,
)

# --- An attribution


@drawing.html.register(Attribution)
def attribution_html(attribution: Attribution) -> str:
    """Write the numbers of `attribution_text` as tables."""
    heading, *notes = attribution_heading(attribution)
    prompts = len(attribution.base)
    if prompts > PROMPTS_SHOWN:
        notes.append(f"Of the {prompts} prompts the first {PROMPTS_SHOWN} are shown.")
    tables = (prompts_table(attribution), modules_table(attribution, SITES_SHOWN))
    return page.rendered("attribution", heading=heading, notes=notes, tables=tables)


@drawing.tokens.register(Attribution)
def token_view(attribution: Attribution, prompt: int | None = None) -> drawing.TokenView:
    """Colour each token of a prompt by what it contributes through all sites: blue up, red down.

    circuitsvis writes tokens into the page as HTML, so they are escaped first. Its script is part
    of the page, and nothing is fetched.
    """
    maps.require_positions(attribution)
    index = attribution.only_prompt(prompt, "positions")
    tokens = attribution.str_tokens[index]
    other_axes = [axis for axis, name in enumerate(attribution.by, start=1) if name != "position"]
    by_position = attribution.values[index].cpu().double().nansum([0, *other_axes])
    values = by_position[: len(tokens)].tolist()
    caption = (
        f"{attribution.readout}, {key_text(attribution.key)}: each token through all sites, "
        f"{signed(sum(values))} {attribution.units} in all. Blue pushes up, red down."
    )
    picture = Markup(_coloured_tokens(tokens, values))
    html = page.rendered("captioned", caption=caption, picture=picture)
    return drawing.TokenView(tokens, tuple(values), html)


def _coloured_tokens(tokens: Sequence[str], values: list[float]) -> str:
    """The HTML of circuitsvis, with a scale of colours that is symmetric about zero."""
    try:
        from circuitsvis import tokens as circuitsvis_tokens  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise LensLoraError(
            "token_view draws with circuitsvis, which is not installed",
            remedy="pip install circuitsvis, or use attribution.plot_positions(), which needs "
            "nothing more.",
        ) from error
    reach = max((abs(value) for value in values), default=0.0) or 1.0
    escaped = [str(escape(token)) for token in tokens]
    drawn: Any = circuitsvis_tokens.colored_tokens(
        escaped, values, min_value=-reach, max_value=reach
    )
    # circuitsvis ends its div with "/>", which HTML reads as an opening tag: the div would swallow
    # the rest of the page.
    return drawn.local_src.replace("/>", "></div>", 1)


# --- Every other result

# The fields whose entries a heading counts, with the name of one entry.
_COUNTED = {
    "str_tokens": "prompt",
    "steps": "checkpoint",
    "sites": "site",
    "groups": "group",
    "scales": "scale",
}


@drawing.text.register(Result)
def result_text(result: Result) -> str:
    """Write the heading, and below it the body that is registered for the class."""
    read = part_with_readout(result)
    heading = type(result).__name__
    if hasattr(read, "readout"):
        heading += f" of {read.readout}"
    if hasattr(read, "units"):
        heading += f", in {read.units}"
    meta = getattr(read, "meta", {})
    how_prompts_were_read = ", ".join(
        meta[key] for key in ("prompts", "responses") if meta.get(key)
    )
    details = (_sizes_text(result), _fields_text(result), how_prompts_were_read)
    heading = f"{heading}: {'; '.join(filter(None, details))}".rstrip()
    return f"{heading}\n{drawing.body(result)}"


def _sizes_text(result: Any) -> str:
    """'3 prompts × 12 sites'."""
    sizes: list[str] = []
    for name, thing in _COUNTED.items():
        entries = getattr(result, name, None)
        if entries is not None and len(entries):
            sizes.append(many(len(entries), thing))
    return " × ".join(sizes)


def _fields_text(result: Any) -> str:
    """'at=1.0, method='path'': the fields whose values are words or numbers."""
    stated: list[str] = []
    for name in getattr(result, "__dataclass_fields__", ()):
        value = getattr(result, name)
        if name not in ("readout", "units") and isinstance(value, str | int | float):
            stated.append(f"{name}={value!r}")
    return ", ".join(stated)


@drawing.html.register(Result)
def result_html(result: Result) -> str:
    """Write the text of a terminal, for a notebook."""
    return page.rendered("plain", lines=drawing.text(result).split("\n"))


@drawing.body.register(Result)
def _table(result: Any) -> str:
    return result.to_frame().to_string()


@drawing.body.register(Paged)
def _story(result: Paged) -> str:
    return drawing.story(result)


@drawing.body.register(Ranked)
def _largest(result: Any) -> str:
    return f"{_in_short(result.top(k=5))}{_within_rounding(result)}"


@drawing.body.register(ActivationEffects)
def _largest_of_a_prompt(result: Any) -> str:
    prompts = len(result.base)
    if not result.by_position or prompts == 1:
        return _largest(result)
    # Positions have no mean over prompts.
    shown = _in_short(result.top(5, prompt=0))
    return f"prompt 0 of {prompts}:\n{shown}{_within_rounding(result)}"


def _in_short(top: pd.DataFrame) -> str:
    """A table for the terminal: a site's name says where it is, so its module is left out."""
    if "writer" in top:
        top = top.drop(columns="site", errors="ignore")
    if "module" in top:
        top = top.drop(columns=["module", "layer", "kind"])
    return top.to_string()


@drawing.body.register(Components)
def _components(components: Components) -> str:
    return many(len(components.z_norm), "prompt")


@drawing.body.register(Remainder)
def _remainder(remainder: Remainder) -> str:
    verdicts = [str(verdict) for verdict in remainder.verdict]
    return remainder.to_frame().assign(verdict=verdicts).to_string()


@drawing.body.register(RemainderCurve)
def _order(curve: RemainderCurve) -> str:
    orders: list[str] = []
    for order in curve.order.tolist():
        orders.append("—" if math.isnan(order) else f"{order:.2f}")
    return f"order {', '.join(orders)}"


def _within_rounding(result: Any) -> str:
    """Say how many effects cannot be told from rounding; '' if all can, or if it is unknown."""
    if getattr(result, "noise_floor", None) is None or not hasattr(result, "values"):
        return ""
    sizes = result.values.flatten(1).abs()
    floor = SIGMAS * result.noise_floor[:, None].to(sizes)
    small = int((sizes <= floor).sum())
    if not small:
        return ""
    every = int((~sizes.isnan()).sum())
    note = "effects are within three noise floors: rounding may be all of them."
    return f"\n{small} of {every} {note}"
