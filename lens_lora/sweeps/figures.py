"""The figures of a sweep: its prompts as bars, and the spread of a file of activations."""

from __future__ import annotations

from typing import Any

from lens_lora.arguments import whole, word
from lens_lora.core import drawing
from lens_lora.errors import SweepError
from lens_lora.show import go
from lens_lora.show.figures import bars
from lens_lora.show.spread import spread_figure
from lens_lora.show.text import beginning_of, label, signed
from lens_lora.sweeps.activations_file import ActivationsFile
from lens_lora.sweeps.result import SweepResult

_PROMPT_WIDTH = 60  # characters of a prompt beside its bar


@drawing.figure.register(SweepResult)
def prompts_figure(swept: SweepResult, column: str = "shift", k: int = 40) -> go.Figure:
    """A bar for each record without an error, the largest number on top."""
    count = whole("k", k, 1)
    frame = swept.prompts()
    numeric = [str(name) for name in frame.select_dtypes("number") if name not in ("id", "tokens")]
    word("column", column, numeric)
    good = frame[frame["error"].isna() & frame[column].notna()]
    if not len(good):
        raise _no_number(swept, column)
    numbers: Any = good[column]
    largest = numbers.abs().nlargest(count).index
    rows: Any = good.loc[largest].sort_values(column, ascending=False)
    names: list[str] = []
    hover: list[str] = []
    for row in rows.to_dict("records"):
        prompt = " ".join(str(row["prompt"]).split())
        names.append(f"{row['id']}: {beginning_of(prompt, _PROMPT_WIDTH)}")
        hover.append(f"{label(prompt)}<br>{signed(row[column])} {label(str(row['units']))}")
    below = f"{len(good)} prompts"
    if len(rows) < len(good):
        below = f"the {len(rows)} of {len(good)} prompts of largest magnitude"
    units = ", ".join(sorted(set(rows["units"])))
    titles = (f"{column} of {swept.readout} by prompt", below)
    return bars(titles, names, rows[column].tolist(), hover, units)


def _no_number(swept: SweepResult, column: str) -> SweepError:
    """The error for a column without a number, with the reason."""
    if not swept.done:
        return SweepError(
            f"there is no {column} to draw: every record has an error; result.errors lists them."
        )
    return SweepError(
        f"there is no {column} to draw: no record has one. result.prompts() is the table."
    )


@drawing.figure.register(ActivationsFile)
def activations_file_figure(file: ActivationsFile, site: str | None = None) -> go.Figure:
    """A box for each direction: how its activation is spread over the tokens of all texts."""
    return spread_figure(file.spread(site), f"{file.texts} texts", site, file.gauge)
