"""The result of a sweep: its two files, and counts of what is in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from lens_lora.core import Attribution, Site, drawing
from lens_lora.errors import SweepError, many
from lens_lora.runs.store import Unchanged
from lens_lora.sweeps.analyses import ANALYSES
from lens_lora.sweeps.rows import RowStore, read


@dataclasses.dataclass(frozen=True, eq=False)
class SweepResult:
    """The files of a sweep, and counts of what is in them.

    Attributes:
        path: one row per prompt and site: id, prompt, site, module, layer, kind, and a column per
            analysis, in the units of the prompt's readout. Prompts with an error have no rows.
        prompts_path: one row per record: id, prompt, chat (whether of messages), doc, pre, tokens,
            readout, units, base g(0), adapted g(1), shift, flips (of margins), per analysis its sum
            over sites and remainder (shift − sum; none for second order, which alone is no
            estimate of the shift), and error (null where there is none).
        records: how many records there are.
        resumed: how many of them earlier runs had finished.
        flips: how many margins change sign, beyond three noise floors.
        errors: (id, what is wrong, with its line) of each bad record.
        damaged: files of finished prompts that could not be read, and why; their prompts ran again.
        sites, analyses: the rows and the columns of the site table.
        readout, units: the readout of all prompts and its units. It is 'margin(doc − pre)' if each
            prompt has its own, with every unit that occurs (nats where an answer has several
            tokens).
        meta: model, adapter, dtype and versions.
    """

    path: Path
    prompts_path: Path
    records: int
    resumed: int
    flips: int
    errors: tuple[tuple[int | str, str], ...]
    damaged: tuple[str, ...]
    sites: tuple[Site, ...]
    analyses: tuple[str, ...]
    readout: str
    units: str
    meta: Mapping[str, str]
    _sites_file: Unchanged = dataclasses.field(init=False, repr=False)
    _prompts_file: Unchanged = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sites_file", Unchanged(self.path))
        object.__setattr__(self, "_prompts_file", Unchanged(self.prompts_path))

    @property
    def done(self) -> int:
        """How many prompts have numbers."""
        return self.records - len(self.errors)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site: `pd.read_parquet(path)`."""
        return pd.read_parquet(self._sites_file.path)

    def prompts(self) -> pd.DataFrame:
        """One row per record: `pd.read_parquet(prompts_path)`."""
        return pd.read_parquet(self._prompts_file.path)

    def plot_prompts(self, column: str = "shift", k: int = 40) -> drawing.Figure:
        """A bar for each record: one column of `prompts`, the largest number on top.

        Args:
            column: a column of numbers, such as 'shift', 'base', 'adapted' or
                'first_order_remainder'.
            k: how many records are shown, those of largest magnitude.

        Raises:
            ArgumentError: there is no such column of numbers, or k is below 1.
            SweepError: no record has a number in this column.
        """
        return drawing.figure(self, column, k)

    def attribution(self, analysis: str) -> Attribution:
        """One analysis of all prompts without an error, with its tables, sums and figures.

        Its values are in several units if `units` names several.

        Args:
            analysis: one of `analyses`.

        Raises:
            SweepError: the analysis was not run, or every prompt has an error.
        """
        if analysis not in self.analyses:
            raise SweepError(f"no {analysis!r}: the sweep holds {', '.join(self.analyses)}.")
        if not self.done:
            raise SweepError(
                f"no {analysis!r}: every record has an error; result.errors lists them."
            )
        column = pd.read_parquet(self._sites_file.path, columns=[analysis])[analysis]
        values = torch.from_numpy(column.to_numpy(copy=True))
        every = self.prompts()
        good = every[every["error"].isna()]
        return Attribution(
            values=values.view(-1, len(self.sites)),
            by=(),
            sites=self.sites,
            heads=(0,) * len(self.sites),
            base=torch.tensor(good["base"].tolist(), dtype=torch.float64),
            adapted=torch.tensor(good["adapted"].tolist(), dtype=torch.float64),
            str_tokens=tuple((text,) for text in good["prompt"]),
            readout=self.readout,
            units=self.units,
            method=analysis.removesuffix("_at_1"),
            at=ANALYSES[analysis].at,
            meta=self.meta,
        )

    def plot(self, analysis: str | None = None) -> drawing.Figure:
        """Heatmap layer × kind of module of one analysis: its mean over prompts.

        Args:
            analysis: one of `analyses`; None for the first.

        Raises:
            SweepError: as `attribution`.
        """
        return self.attribution(analysis or self.analyses[0]).plot()

    def __repr__(self) -> str:
        prompts = "prompts"
        if self.resumed:
            prompts += f" ({self.resumed} before this run)"
        outcome = "no errors"
        if len(self.errors):
            outcome = many(len(self.errors), "error")
        if "margin" in self.readout:
            flips = "1 prompt flips" if self.flips == 1 else f"{self.flips} prompts flip"
            outcome = f"{flips}, {outcome}"
        model = f"{self.meta['adapter']} over {self.meta['model']} as {self.meta['model_class']}"
        if self.meta.get("strings"):
            model += f", prompts {self.meta['strings']}"
        lines = [
            f"SweepResult: {self.done} of {self.records} {prompts} × {len(self.sites)} sites",
            f"  {', '.join(self.analyses)} of {self.readout} in {self.units or 'no units'}",
            f"  {outcome}",
            f"  {model}",
            f"One row per prompt and site: {self.path}",
            f"One row per prompt: {self.prompts_path}",
        ]
        return "\n".join(lines)


class AskedReadout(NamedTuple):
    """The name and the units of the sweep's readout; None for margins of answers.

    Attributes:
        label: its name.
        units: the units of its values.
    """

    label: str | None
    units: str | None


def result_of(
    store: RowStore,
    sites: Sequence[Site],
    meta: Mapping[str, str],
    analyses: tuple[str, ...],
    resumed: int,
    asked: AskedReadout,
) -> SweepResult:
    """The result of a sweep, once its files are written.

    Args:
        store: the files.
        sites, meta, analyses, resumed: as in `SweepResult`.
        asked: the sweep's readout.
    """
    rows = read(store.prompts_path).to_pylist()
    good = [row for row in rows if row["error"] is None]
    label, units = _label_and_units(good, asked)
    return SweepResult(
        path=store.path,
        prompts_path=store.prompts_path,
        records=len(rows),
        resumed=resumed,
        flips=sum(row["flips"] is True for row in good),
        errors=tuple((row["id"], row["error"]) for row in rows if row["error"] is not None),
        damaged=tuple(f"{path}: {reason}" for path, reason in store.damaged.items()),
        sites=tuple(sites),
        analyses=analyses,
        readout=label,
        units=units,
        meta=meta,
    )


def _label_and_units(good: Sequence[Mapping[str, Any]], asked: AskedReadout) -> tuple[str, str]:
    """The label and the units of what was read of all good prompts.

    The sweep's readout has its name and units also if no prompt could be read.
    """
    labels = {row["readout"] for row in good}
    units = {row["units"] for row in good}
    if asked.units is not None and not units:
        units = {asked.units}
    all_units = " and ".join(sorted(units))
    if len(labels) == 1:
        return labels.pop(), all_units
    label = "margin(doc − pre)" if asked.label is None else asked.label
    return label, all_units
