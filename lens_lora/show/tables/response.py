"""A response's explanation as rows of text, for the page and the terminal."""

from __future__ import annotations

from rich.console import Group

from lens_lora.analyses.explain_response import ResponseExplanation
from lens_lora.show.tables.parts import Row, filled_table
from lens_lora.show.text import magnitude, percent, signed, visible

__all__ = [
    "TOKEN_HEADS",
    "module_heads",
    "changed",
    "module_rows",
    "moved_by",
    "response_tables",
    "token_rows",
]

TOKEN_HEADS: Row = (
    *("t", "token", "KL, nats", "of all", "log p, base", "adapted", "rank, base", "adapted"),
)
_CHANGED = 3
_MODULES = 4
Pairs = list[tuple[str, str]]


def token_rows(e: ResponseExplanation, k: int) -> list[Row]:
    """The tokens whose distribution moved most.

    Args:
        e: the explanation.
        k: how many.
    """
    shifts, kl = e.shifts, e.shifts.kl[0, 0]
    total = float(kl.nansum()) or 1.0
    return [
        (
            str(t),
            visible(e.response[t]),
            magnitude(float(kl[t])),
            percent(float(kl[t]) / total),
            *(f"{float(end[0, t]):.2f}".replace("-", "−") for end in shifts.log_p),
            *(str(int(end[0, t]) + 1) for end in shifts.rank),
        )
        for t in kl.argsort(descending=True)[:k].tolist()
    ]


def changed(e: ResponseExplanation, k: int) -> list[tuple[str, Pairs, Pairs]]:
    """What is promoted and suppressed where the distribution moved most.

    Args:
        e: the explanation.
        k: how many tokens.

    Returns:
        (token, (what is promoted there, change of its probability), the same of suppressed).
    """
    shifts = e.shifts
    return [
        (
            f"{t} {visible(e.response[t])}",
            _changes(e, shifts.promoted_ids[0, t].tolist(), shifts.promoted[0, t].tolist()),
            _changes(e, shifts.suppressed_ids[0, t].tolist(), shifts.suppressed[0, t].tolist()),
        )
        for t in shifts.kl[0, 0].argsort(descending=True)[:k].tolist()
    ]


def _changes(e: ResponseExplanation, ids: list[int], changes: list[float]) -> Pairs:
    pairs = zip(ids[:_CHANGED], changes[:_CHANGED], strict=True)
    return [(visible(e.shifts.strings[str(i)]), signed(change)) for i, change in pairs]


def module_heads(e: ResponseExplanation) -> Row:
    """The headings of `module_rows`.

    Args:
        e: the explanation.
    """
    along = () if e.path is None else ("path integral, nats", "of the divergence")
    return ("site", "module", *along, "first order at ε = 1, nats")


def module_rows(e: ResponseExplanation, k: int) -> list[Row]:
    """The modules that hold most of the divergence.

    Args:
        e: the explanation.
        k: how many.
    """
    ranked = e.modules if e.path is None else e.path
    values, first = ranked.per_site[0], e.modules.per_site[0]
    shift = float(ranked.shift[0])
    rows: list[Row] = []
    for i in values.abs().argsort(descending=True)[:k].tolist():
        site = ranked.sites[i]
        share = percent(float(values[i]) / shift) if shift else "—"
        along = () if e.path is None else (signed(float(values[i])), share)
        rows.append((site.name, site.module, *along, signed(float(first[i]))))
    return rows


def moved_by(e: ResponseExplanation, k: int = _MODULES) -> list[tuple[str, Pairs, Pairs]]:
    """Of the tokens that changed most: the modules that raise them, and those that lower them.

    Args:
        e: the explanation.
        k: how many of each.

    Returns:
        (token, (site, nats) of each that raises it, the same of those that lower it).
    """
    return [
        (
            f"{t} {visible(e.response[t])}",
            _extremes(e, values, k, largest=True),
            _extremes(e, values, k, largest=False),
        )
        for t, values in zip(e.moved_tokens, e.moved.tolist(), strict=True)
    ]


def _extremes(e: ResponseExplanation, values: list[float], k: int, *, largest: bool) -> Pairs:
    pairs = sorted(zip(values, e.modules.sites, strict=True), key=lambda p: p[0], reverse=largest)
    return [(site.name, signed(v)) for v, site in pairs[:k] if (v > 0) == largest and v]


def response_tables(e: ResponseExplanation, k: int = 10) -> Group:
    """The tokens that changed most and the modules of the divergence, for the terminal.

    Args:
        e: the explanation.
        k: how many rows of each.
    """
    tokens = token_rows(e, k)
    return Group(
        filled_table("tokens that changed most", TOKEN_HEADS, tokens, texts=(1,)),
        filled_table("modules of the divergence", module_heads(e), module_rows(e, k), texts=(0, 1)),
    )
