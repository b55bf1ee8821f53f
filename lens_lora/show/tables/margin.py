"""A fact margin's account, as rows of text and for the terminal."""

from __future__ import annotations

from rich.table import Table

from lens_lora.analyses.margin import FactMargin
from lens_lora.show.tables.parts import Row, filled_table
from lens_lora.show.text import magnitude, percent, signed
from lens_lora.show.words.account import Account, account_of

__all__ = ["margin_heads", "margin_rows", "margin_table"]


def margin_heads(account: Account) -> Row:
    """The headings of `margin_rows` on a page, where no title names the units.

    Args:
        account: of one prompt.
    """
    return ("", f"value, {account.units}", "share of the shift")


def margin_rows(account: Account) -> list[Row]:
    """What there is between the base model's margin m₀ and the adapted model's m.

    Args:
        account: of one prompt.

    Returns:
        (what, value, share of the shift).
    """
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
        ("what rounding can make of a shift (3σ)", magnitude(account.floor), ""),
        ("  of a remainder", magnitude(account.remainder_floor), ""),
    ]


def margin_table(fact_margin: FactMargin, prompt: int = 0) -> Table:
    """A fact margin's account for the terminal.

    Args:
        fact_margin: of one or several prompts.
        prompt: which of them.

    Raises:
        ArgumentError: no such prompt.
    """
    account = account_of(fact_margin, prompt)
    title = f"{fact_margin.attribution.readout}, in {account.units}"
    return filled_table(title, ("", "value", "share of the shift"), margin_rows(account))


def _share(account: Account, value: float) -> str:
    return "noise" if account.is_noise(account.shift) else percent(value / account.shift)
