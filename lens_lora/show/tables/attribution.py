"""An attribution as text, as rows of text, and for the terminal."""

from __future__ import annotations

from rich.table import Table

from lens_lora.results.attribution import Attribution
from lens_lora.show.tables.parts import Row, filled_table
from lens_lora.show.text import (
    method_text,
    percent,
    prompt_text,
    quadrature_text,
    signed,
    top_rows,
)

__all__ = [
    "PROMPT_HEADS",
    "SITES_SHOWN",
    "attribution_heading",
    "attribution_text",
    "averaged_over",
    "modules_table",
    "prompt_rows",
    "quadrature_lines",
]

SITES_SHOWN = 5
_PROMPTS_SHOWN, _PROMPT_WIDTH = 5, 48


def attribution_text(attribution: Attribution) -> str:
    """What was attributed and how, then its prompts and its sites, five of each at most.

    Args:
        attribution: to any readout, by any method.
    """
    lines = [attribution_heading(attribution), *quadrature_lines(attribution)]
    for row in prompt_rows(attribution):
        lines.append("  {}  {}: {} → {}, shift {}, Σ {}, remainder {} ({})".format(*row))
    hidden = len(attribution.base) - _PROMPTS_SHOWN
    lines += [f"  … and {hidden} more prompts"] if hidden > 0 else []
    lines.append(f"largest{averaged_over(attribution)}, with the share of the shift:")
    top = top_rows(attribution, SITES_SHOWN)
    width = max(len(site) for site, *_ in top)
    lines += [f"  {site:{width}}  {value:>7}  {share:>7}" for site, _, value, share in top]
    return "\n".join(lines)


def attribution_heading(attribution: Attribution) -> str:
    """The readout, the method, the units, and how many prompts and sites.

    Args:
        attribution: to any readout, by any method.
    """
    batch, sites = len(attribution.base), len(attribution.sites)
    by = f", by {' and '.join(attribution.by)}" if attribution.by else ""
    mode = f", by {attribution.mode} mode" if "token" in attribution.by else ""
    return (
        f"{attribution.readout}, {method_text(attribution.method, attribution.at)}, in "
        f"{attribution.units}: {batch} prompt{'s' * (batch > 1)} × {sites} sites{by}{mode}"
    )


def quadrature_lines(attribution: Attribution) -> list[str]:
    """One line on the quadrature of a path integral, none for another method.

    Args:
        attribution: to any readout, by any method.
    """
    return [quadrature_text(attribution.quadrature)] if attribution.quadrature else []


def averaged_over(attribution: Attribution) -> str:
    """', mean of 3 prompts', to follow what is shown as a mean; '' for a single prompt.

    Args:
        attribution: to any readout, by any method.
    """
    batch = len(attribution.base)
    return f", mean of {batch} prompts" if batch > 1 else ""


PROMPT_HEADS = ("", "prompt", "base", "adapted", "shift", "Σ", "remainder", "share")


def prompt_rows(attribution: Attribution) -> list[Row]:
    """The account of each prompt, of the first five at most.

    Args:
        attribution: to any readout, by any method.

    Returns:
        A cell for each of PROMPT_HEADS.
    """
    columns = ("base", "adapted", "shift", "total", "remainder")
    numbers = [
        getattr(attribution, name)[:_PROMPTS_SHOWN].cpu().double().tolist() for name in columns
    ]
    rows: list[Row] = []
    for i, values in enumerate(zip(*numbers, strict=True)):
        share = percent(values[4] / values[2]) if values[2] else "—"
        prompt = _shortened(prompt_text(attribution.str_tokens[i]))
        rows.append((str(i), prompt, *map(signed, values), share))
    return rows


def modules_table(attribution: Attribution, k: int = 10, prompt: int | None = None) -> Table:
    """The sites of largest |value|, for the terminal.

    Args:
        attribution: to any readout, by any method.
        k: how many sites.
        prompt: which prompt; None for the mean over them.
    """
    title = (
        f"largest modules, {method_text(attribution.method, attribution.at)}, in "
        f"{attribution.units}, and their share of the shift"
    )
    rows = top_rows(attribution, k, prompt)
    return filled_table(title, ("site", "module", "value", "share"), rows, texts=(0, 1))


def _shortened(text: str) -> str:
    """The end of a long prompt: that is where it is read."""
    return text if len(text) <= _PROMPT_WIDTH else "…" + text[1 - _PROMPT_WIDTH :]
