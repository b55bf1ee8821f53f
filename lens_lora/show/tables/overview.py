"""Several explained prompts, a row each."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lens_lora.analyses.explain_margin import Explanation
from lens_lora.analyses.explain_response import ResponseExplanation
from lens_lora.show.tables.parts import Row
from lens_lora.show.text import magnitude, percent, short_prompt, signed
from lens_lora.show.words.explanation import explained_account
from lens_lora.show.words.headline import largest_module
from lens_lora.show.words.response import named

__all__ = [
    "MARGIN_HEADS",
    "RESPONSE_HEADS",
    "margin_overview",
    "margins_frame",
    "response_overview",
]

MARGIN_HEADS: Row = (
    *("prompt", "answers", "base", "adapted", "shift", "of it first order", "flips at ε"),
    "largest first-order part",
)
RESPONSE_HEADS: Row = ("prompt", "tokens", "KL, nats", "most at", "its share", "shift of log p")

Numbered = Sequence[tuple[int, Explanation]]


def margin_overview(each: Numbered) -> list[Row]:
    """What happened to each margin.

    Args:
        each: (number on the page, explanation).

    Returns:
        A cell for each of MARGIN_HEADS.
    """
    rows: list[Row] = []
    for number, e in each:
        a = explained_account(e)
        rows.append(
            (
                f"{number}. {short_prompt(e.prompt)}",
                f"{a.doc} − {a.pre}",
                signed(a.m0),
                signed(a.m),
                signed(a.shift),
                "noise" if a.is_noise(a.shift) else percent(a.first_order / a.shift),
                "—" if a.flip_scale is None else f"{a.flip_scale:.2g}",
                largest_module(e),
            )
        )
    return rows


def margins_frame(each: Numbered) -> pd.DataFrame:
    """The same as numbers.

    Args:
        each: (number on the page, explanation).
    """
    return pd.DataFrame(
        {
            "prompt": number,
            "text": short_prompt(e.prompt),
            "doc": e.margin.doc[0],
            "pre": e.margin.pre[0],
            "units": e.units,
            "base": a.m0,
            "adapted": a.m,
            "first_order": a.first_order,
            "flip_scale": a.flip_scale,
        }
        for number, e in each
        for a in (explained_account(e),)
    )


def response_overview(each: Sequence[tuple[int, ResponseExplanation]]) -> list[Row]:
    """What happened to each response.

    Args:
        each: (number on the page, explanation).

    Returns:
        A cell for each of RESPONSE_HEADS.
    """
    rows: list[Row] = []
    for number, e in each:
        kl, t = e.shifts.kl[0, 0], e.moved_tokens[0]
        total = float(kl.nansum())
        rows.append(
            (
                f"{number}. {short_prompt(e.prompt)}",
                str(len(e.response)),
                magnitude(total),
                named(e, t),
                percent(float(kl[t]) / total) if total else "—",
                signed(float(e.shifts.total[0])),
            )
        )
    return rows
