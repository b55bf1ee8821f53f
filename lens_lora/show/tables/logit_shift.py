"""Tokens that an adapter promotes and suppresses, as rows of text and for the terminal."""

from __future__ import annotations

import pandas as pd
from rich.table import Table

from lens_lora.analyses.logit_shift import LogitShift
from lens_lora.show.tables.parts import filled_table
from lens_lora.show.text import signed, visible

__all__ = ["token_rows", "tokens_table"]


def token_rows(tokens: pd.DataFrame) -> list[tuple[str, str]]:
    """Tokens and their shifts as text.

    Args:
        tokens: what `promoted` or `suppressed` returns.

    Returns:
        (token, shift).
    """
    return list(zip(map(visible, tokens["token"]), map(signed, tokens["shift"]), strict=True))


def tokens_table(shift: LogitShift, k: int = 10, prompt: int = 0, site: str | None = None) -> Table:
    """The tokens promoted and suppressed most, for the terminal.

    Args:
        shift: first-order shifts of the logits.
        k: how many tokens of each.
        prompt: which prompt.
        site: the site that moves them; None for all modules together.
    """
    columns = [shift.promoted(site, k, prompt), shift.suppressed(site, k, prompt)]
    rows = [(*up, *down) for up, down in zip(*map(token_rows, columns), strict=True)]
    title = f"first-order logit shift, {site or 'all modules'}"
    return filled_table(title, ("promoted", "logits", "suppressed", "logits"), rows, texts=(0, 2))
