"""The tables of an attribution and of a fact margin."""

from __future__ import annotations

from lens_lora.core import Attribution, Point, drawing
from lens_lora.errors import many
from lens_lora.show import text
from lens_lora.show.tables import Row, Table, table_of
from lens_lora.views.attribution_words import caution_text, quadrature_text, top_sites
from lens_lora.views.words import MarginNumbers, ReadoutNumbers

# --- An attribution

SITES_SHOWN = 5
# How many prompts the representation of a result shows, in a terminal and in a notebook.
PROMPTS_SHOWN = 5
_PROMPT_WIDTH = 48  # characters


@drawing.text.register(Attribution)
def attribution_text(attribution: Attribution) -> str:
    """Write the heading, then at most five prompts and at most five sites."""
    lines = attribution_heading(attribution)
    for row in prompts_table(attribution).rows:
        lines.append("  {}  {}: {} → {}, shift {}, Σ {}, remainder {} ({})".format(*row))
    hidden = len(attribution.base) - PROMPTS_SHOWN
    if hidden > 0:
        lines.append(f"  … and {many(hidden, 'more prompt')}")
    lines.append(f"largest{averaged_over(attribution)}, with the share of the shift:")
    largest = top_sites(attribution, SITES_SHOWN)
    width = max(len(top.site) for top in largest)
    lines += [f"  {top.site:{width}}  {top.value:>7}  {top.share:>7}" for top in largest]
    return "\n".join(lines)


def attribution_heading(attribution: Attribution) -> list[str]:
    """The readout, method and sizes in one line; then notes on quadrature and reliability."""
    prompts = many(len(attribution.base), "prompt")
    sites = many(len(attribution.sites), "site")
    by = f", by {' and '.join(attribution.by)}" if attribution.by else ""
    mode = f", by {attribution.mode} mode" if "token" in attribution.by else ""
    heading = (
        f"{attribution.readout}, {text.key_text(attribution.key)}, in {attribution.units}: "
        f"{prompts} × {sites}{by}{mode}"
    )
    if read := attribution.meta.get("prompts"):
        heading += f" ({read})"
    notes: list[str] = []
    if attribution.quadrature is not None:
        notes.append(quadrature_text(attribution.quadrature))
    notes.append(caution_text(attribution))
    return [heading, *filter(None, notes)]


def averaged_over(attribution: Attribution) -> str:
    """', mean of 3 prompts', to follow what is shown as a mean; '' for a single prompt."""
    batch = len(attribution.base)
    return f", mean of {batch} prompts" if batch > 1 else ""


def prompts_table(attribution: Attribution, most: int = PROMPTS_SHOWN) -> Table:
    """A row for each of the first prompts."""
    shift = attribution.shift.cpu().double()
    total = attribution.total.cpu().double()
    remainder = attribution.remainder.cpu().double()
    shares = remainder / shift
    rows: list[Row] = []
    for i in range(min(len(shift), most)):
        prompt = text.prompt_text(attribution.str_tokens[i])
        if len(prompt) > _PROMPT_WIDTH:
            # The readout is at the end of the prompt.
            prompt = f"…{prompt[1 - _PROMPT_WIDTH :]}"
        row = (
            str(i),
            prompt,
            text.signed(float(attribution.base[i])),
            text.signed(float(attribution.adapted[i])),
            text.signed(float(shift[i])),
            text.signed(float(total[i])),
            text.signed(float(remainder[i])),
            text.percent(float(shares[i])),
        )
        rows.append(row)
    heads = ("", "prompt", "base", "adapted", "shift", "Σ", "remainder", "share")
    return Table(heads, rows, texts=(0, 1))


def modules_table(result: Attribution, k: int = 10, prompt: int | None = None) -> Table:
    """The sites of largest |value|."""
    site = "site" if prompt is not None else f"site{averaged_over(result)}"
    title = f"largest modules, {text.key_text(result.key)}, in {result.units}"
    heads = {"site": site, "module": "module", "value": "value", "share": "of the shift"}
    return table_of(result.top(k, prompt), heads, texts=(0, 1), title=title)


# --- A fact margin


def margin_table(numbers: MarginNumbers) -> Table:
    """Write, row by row, what lies between the base model's margin m₀ and the adapted model's m."""
    rows: list[Row] = [("m₀, base model", text.signed(numbers.m0), ""), *_first_order_rows(numbers)]
    flip = "none" if numbers.flip_scale is None else f"ε = {numbers.flip_scale:.3g}"
    rows.append(("m, adapted model", text.signed(numbers.m), ""))
    rows.append(("flip scale", flip, ""))
    rows += roundings(numbers)
    heads = ("", f"value, {numbers.units}", "share of the shift")
    terms = "two logits" if numbers.units == "logits" else "two answers' log p"
    return Table(
        heads, rows, title=f"margin {numbers.doc} − {numbers.pre}, a difference of {terms}"
    )


def readout_table(numbers: ReadoutNumbers, readout: str) -> Table:
    """Write, row by row, what lies between the base model's value and the adapted model's.

    Args:
        numbers: those of one prompt.
        readout: its label.
    """
    rows: list[Row] = [
        ("base model", text.signed(numbers.m0), ""),
        *_first_order_rows(numbers),
        ("adapted model", text.signed(numbers.m), ""),
        ("shift", text.signed(numbers.shift), ""),
        *roundings(numbers),
    ]
    heads = ("", f"value, {numbers.units}", "share of the shift")
    return Table(heads, rows, title=readout)


def _first_order_rows(numbers: ReadoutNumbers) -> list[Row]:
    """First order, and what it leaves on the way and at ε = 1."""
    rows: list[Row] = [
        (
            "first order at ε = 0",
            text.signed(numbers.first_order),
            numbers.share(numbers.first_order),
        )
    ]
    for step in _steps_near_quarters(numbers):
        share = "noise" if step.share is None else text.percent(step.share)
        rows.append((f"remainder at ε = {step.scale:.3g}", text.signed(step.remainder), share))
    return rows


def _steps_near_quarters(numbers: ReadoutNumbers) -> list[Point]:
    """The strengths that were run nearest to ¼, ½, ¾ and 1, each once."""
    steps: list[Point] = []
    for quarter in (0.25, 0.5, 0.75, 1.0):
        nearest = min(numbers.steps, key=lambda step: abs(step.scale - quarter))
        if nearest not in steps:
            steps.append(nearest)
    return steps


def roundings(numbers: ReadoutNumbers) -> tuple[Row, Row]:
    """Two rows: how much of a shift, and of a remainder, rounding alone can make."""
    of_shift = ("what rounding can make of a shift (3σ)", text.magnitude(numbers.floor), "")
    of_remainder = ("  of a remainder", text.magnitude(numbers.remainder_floor), "")
    return of_shift, of_remainder
