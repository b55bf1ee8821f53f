"""Results as text, as notebook HTML, and as tables for the terminal."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lens_lora.show.text import (
    magnitude,
    method_text,
    percent,
    prompt_text,
    quadrature_text,
    signed,
    top_rows,
    visible,
)
from lens_lora.show.words.account import Account, account_of

if TYPE_CHECKING:
    import pandas as pd

    from lens_lora.analyses.logit_shift import LogitShift
    from lens_lora.analyses.margin import FactMargin
    from lens_lora.results.attribution import Attribution

__all__ = [
    "attribution_html",
    "attribution_text",
    "margin_rows",
    "margin_table",
    "modules_table",
    "tokens_table",
]

_PROMPTS, _SITES, _PROMPT_WIDTH = 5, 5, 48


def attribution_text(attribution: Attribution) -> str:
    """What was attributed how, each prompt's account (five at most), and the five largest sites."""
    lines = [_what(attribution), *_how_well(attribution)]
    for row in _prompt_rows(attribution):
        lines.append("  {}  {}: {} → {}, shift {}, Σ {}, remainder {} ({})".format(*row))
    if hidden := len(attribution.base) - _PROMPTS:
        lines += [f"  … and {hidden} more prompts"] if hidden > 0 else []
    lines.append(f"largest{_averaged(attribution)}, with the share of the shift:")
    top = top_rows(attribution, _SITES)
    width = max(len(site) for site, *_ in top)
    for site, _, value, share in top:
        lines.append(f"  {site:{width}}  {value:>7}  {share:>7}")
    return "\n".join(lines)


def attribution_html(attribution: Attribution) -> str:
    """The same for a notebook, escaped."""
    heads = ("", "prompt", "base", "adapted", "shift", "Σ", "remainder", "share")
    sites = top_rows(attribution, _SITES)
    quality = "".join(f"<p>{html.escape(line)}</p>" for line in _how_well(attribution))
    return (
        f"<div><p><b>{html.escape(_what(attribution))}</b></p>{quality}"
        f"{html_table(heads, _prompt_rows(attribution))}"
        f"{html_table(('site' + _averaged(attribution), 'module', 'value', 'share'), sites)}</div>"
    )


def html_table(
    heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], text_columns: tuple[int, ...] = (0, 1)
) -> str:
    """An HTML table with every cell escaped, its numbers to the right."""

    def cells(tag: str, row: tuple[str, ...]) -> str:
        sides = ("left" if i in text_columns else "right" for i in range(len(row)))
        return "".join(
            f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>'
            for side, cell in zip(sides, row, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', heads)}</tr></thead><tbody>{body}</tbody></table>"


def margin_rows(account: Account) -> list[tuple[str, str, str]]:
    """The margin's account as (what, value, share of the shift), from m₀ to m."""
    rows = [
        ("m₀, base model", signed(account.m0), ""),
        ("first order at ε = 0", signed(account.first_order), _share(account, account.first_order)),
    ]
    for step in account.quarters:
        share = "noise" if step.share is None else percent(step.share)
        rows.append((f"remainder at ε = {step.scale:.3g}", signed(step.remainder), share))
    flip = "none" if account.flip_scale is None else f"ε = {account.flip_scale:.3g}"
    return [
        *rows,
        ("m, adapted model", signed(account.m), ""),
        ("flip scale", flip, ""),
        ("three noise floors", magnitude(account.floor), ""),
    ]


def margin_table(fact_margin: FactMargin, prompt: int = 0) -> Table:
    """The margin's account for the terminal."""
    account = account_of(fact_margin, prompt)
    table = _table(f"{fact_margin.attribution.readout}, in {account.units}")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("share of the shift", justify="right")
    for row in margin_rows(account):
        table.add_row(*map(Text, row))
    return table


def modules_table(attribution: Attribution, k: int = 10, prompt: int | None = None) -> Table:
    """The k sites of largest |value|, for the terminal."""
    table = _table(
        f"largest modules, {method_text(attribution.method, attribution.at)}, in "
        f"{attribution.units}, and their share of the shift"
    )
    table.add_column("site")
    table.add_column("module")
    table.add_column("value", justify="right")
    table.add_column("share", justify="right")
    for row in top_rows(attribution, k, prompt):
        table.add_row(*map(Text, row))
    return table


def tokens_table(shift: LogitShift, k: int = 10, prompt: int = 0, site: str | None = None) -> Table:
    """Tokens promoted and suppressed most by a site, or by all, for the terminal."""
    table = _table(f"first-order logit shift, {site or 'all modules'}")
    for name in ("promoted", "suppressed"):
        table.add_column(name)
        table.add_column("logits", justify="right")
    columns = [shift.promoted(site, k, prompt), shift.suppressed(site, k, prompt)]
    for up, down in zip(*map(token_rows, columns), strict=True):
        table.add_row(*map(Text, (*up, *down)))
    return table


def token_rows(tokens: pd.DataFrame) -> list[tuple[str, str]]:
    """(token, shift) of a frame of promoted or suppressed tokens."""
    return list(zip(map(visible, tokens["token"]), map(signed, tokens["shift"]), strict=True))


def _table(title: str) -> Table:
    return Table(
        title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )


def _share(account: Account, value: float) -> str:
    return "noise" if account.is_noise(account.shift) else percent(value / account.shift)


def _what(attribution: Attribution) -> str:
    batch, sites = len(attribution.base), len(attribution.sites)
    by = f", by {' and '.join(attribution.by)}" if attribution.by else ""
    return (
        f"{attribution.readout}, {method_text(attribution.method, attribution.at)}, in "
        f"{attribution.units}: {batch} prompt{'s' * (batch > 1)} × {sites} sites{by}"
    )


def _how_well(attribution: Attribution) -> list[str]:
    """One line on a path integral's quadrature."""
    return [quadrature_text(attribution.quadrature)] if attribution.quadrature else []


def _averaged(attribution: Attribution) -> str:
    batch = len(attribution.base)
    return f", mean of {batch} prompts" if batch > 1 else ""


def _prompt_rows(attribution: Attribution) -> list[tuple[str, ...]]:
    columns = ("base", "adapted", "shift", "total", "remainder")
    numbers = [getattr(attribution, name)[:_PROMPTS].double().tolist() for name in columns]
    rows = []
    for i, values in enumerate(zip(*numbers, strict=True)):
        share = percent(values[4] / values[2]) if values[2] else "—"
        prompt = _shortened(prompt_text(attribution.str_tokens[i]))
        rows.append((str(i), prompt, *map(signed, values), share))
    return rows


def _shortened(text: str) -> str:
    """The end of a long prompt: that is where it is read."""
    return text if len(text) <= _PROMPT_WIDTH else "…" + text[1 - _PROMPT_WIDTH :]
