"""Results as HTML for a notebook."""

from __future__ import annotations

from lens_lora.results.attribution import Attribution
from lens_lora.show.page.parts import Table
from lens_lora.show.page.render import notebook_html
from lens_lora.show.tables.attribution import (
    PROMPT_HEADS,
    SITES_SHOWN,
    attribution_heading,
    averaged_over,
    prompt_rows,
    quadrature_lines,
)
from lens_lora.show.text import top_rows

__all__ = ["attribution_html"]


def attribution_html(attribution: Attribution) -> str:
    """What `attribution_text` says, as tables.

    Args:
        attribution: to any readout, by any method.
    """
    heads = ("site" + averaged_over(attribution), "module", "value", "share")
    return notebook_html(
        attribution_heading(attribution),
        quadrature_lines(attribution),
        (
            Table(PROMPT_HEADS, prompt_rows(attribution), texts=(0, 1)),
            Table(heads, top_rows(attribution, SITES_SHOWN), texts=(0, 1)),
        ),
    )
