"""One self-contained HTML page about a fact margin: story, numbers, figures, tokens, provenance.

Plotly's script is inlined once, so that the page works offline; tokens and names are escaped.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING

from plotly.offline import get_plotlyjs

from lens_lora.show.account import Account, account_of
from lens_lora.show.figures import position_heatmap, remainder_figure, site_heatmap
from lens_lora.show.page import HOW_TO_READ, PAGE
from lens_lora.show.tables import html_table, margin_rows, token_rows
from lens_lora.show.text import top_rows
from lens_lora.show.words import margin_story

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from lens_lora.attribution import Attribution
    from lens_lora.calculus.logit_shift import LogitShift
    from lens_lora.calculus.margin import FactMargin

__all__ = ["margin_report"]

_MODULES, _TOKENS, _SITES, _SITE_TOKENS = 20, 10, 5, 6


def margin_report(
    fact_margin: FactMargin,
    *,
    logit_shift: LogitShift | None = None,
    positions: Attribution | None = None,
    prompt: int = 0,
    title: str | None = None,
) -> str:
    """The page, as a string.

    Args:
        logit_shift: adds the tokens promoted and suppressed; by site too with by_site=True.
        positions: an attribution of the same prompts with by='position'; adds the map of layers
            and tokens.
        title: by default the two facts.

    Raises:
        ValueError: no such prompt, or `positions` not split by position.
    """
    account, attribution = account_of(fact_margin, prompt), fact_margin.attribution
    parts = [
        _section("The numbers", _numbers(fact_margin, prompt)),
        _section("Where first order finds the shift", _plot(site_heatmap(attribution, prompt))),
        _section("Largest modules", _modules(attribution, prompt)),
        _section(
            "What first order leaves, along the path",
            _plot(remainder_figure(fact_margin.curve, prompt)),
        ),
    ]
    if positions is not None:
        figure = position_heatmap(positions, prompt)
        parts.append(_section("Where in the prompt", _plot(figure)))
    if logit_shift is not None:
        tokens = _tokens(logit_shift, attribution, prompt)
        parts.append(_section("Tokens promoted and suppressed, to first order", tokens))
    parts.append(_section("How to read this", HOW_TO_READ))
    parts.append(_section("Made with", _provenance(attribution.meta)))
    return PAGE.substitute(
        title=html.escape(title or f"{account.doc} against {account.pre}"),
        subtitle=html.escape(_subtitle(account, attribution)),
        story="".join(
            f"<p>{html.escape(text)}</p>" for text in margin_story(fact_margin, prompt).split("\n")
        ),
        sections="\n".join(parts),
        plotly_js=get_plotlyjs(),
    )


def _subtitle(account: Account, attribution: Attribution) -> str:
    made = " over ".join(attribution.meta[k] for k in ("adapter", "model") if k in attribution.meta)
    return " · ".join(filter(None, (attribution.readout, f"“{account.prompt}”", made)))


def _section(heading: str, body: str) -> str:
    return f'<h2>{html.escape(heading)}</h2>\n<div class="scroll">{body}</div>'


def _plot(figure: Figure) -> str:
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config={"responsive": True, "displaylogo": False},
        default_width="100%",
    )


def _numbers(fact_margin: FactMargin, prompt: int) -> str:
    account = account_of(fact_margin, prompt)
    heads = ("", f"value, {account.units}", "share of the shift")
    return html_table(heads, margin_rows(account), text_columns=(0,))


def _modules(attribution: Attribution, prompt: int) -> str:
    heads = ("site", "module", f"first order, {attribution.units}", "share of the shift")
    return html_table(heads, top_rows(attribution, _MODULES, prompt))


def _tokens(shift: LogitShift, attribution: Attribution, prompt: int) -> str:
    """All sites together, then the sites of largest first-order value one by one."""
    rows = [("all modules together", *_token_cells(shift, None, prompt, _TOKENS))]
    if shift.sites:
        names = attribution.top(_SITES, prompt)["site"]
        rows += [(name, *_token_cells(shift, name, prompt, _SITE_TOKENS)) for name in names]
    body = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{up}</td><td>{down}</td></tr>"
        for name, up, down in rows
    )
    heads = "".join(f"<th align=left>{head}</th>" for head in ("site", "promoted", "suppressed"))
    return f'<table class="tokens"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def _token_cells(shift: LogitShift, site: str | None, prompt: int, k: int) -> tuple[str, str]:
    up, down = shift.promoted(site, k, prompt), shift.suppressed(site, k, prompt)
    return _token_cell(up), _token_cell(down)


def _token_cell(tokens: pd.DataFrame) -> str:
    return " ".join(
        f'<span class="pair"><b class="token">{html.escape(token)}</b> '
        f'<span class="share">{value}</span></span>'
        for token, value in token_rows(tokens)
    )


def _provenance(meta: Mapping[str, str]) -> str:
    rows = [(key.replace("_", " "), str(value)) for key, value in meta.items() if value]
    return html_table(("what", "value"), rows)
