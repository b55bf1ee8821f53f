"""What a sweep has computed, and the files that hold it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from lens_lora.hooked.sites import Site
from lens_lora.results.attribution import Attribution
from lens_lora.sweeps.analyses import ANALYSES
from lens_lora.sweeps.records import SweepError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["SweepResult"]


@dataclasses.dataclass(frozen=True, eq=False)
class SweepResult:
    """The files of a sweep, and counts of what is in them.

    Attributes:
        path: one row per prompt and site: id, prompt, site, module, layer, kind, and a column per
            analysis, in the units of the prompt's readout. Prompts with an error have no rows.
        prompts_path: one row per record: id, prompt, chat (whether of messages), doc, pre, tokens,
            readout, units, base g(0), adapted g(1), shift, flips (of margins), per analysis its sum
            over sites and remainder (shift − sum; not of second order, which does not stand for
            the shift), and error (null where there is none).
        records: how many records there are.
        resumed: how many of them earlier runs had finished.
        flips: how many margins change sign, beyond three noise floors.
        errors: (id, what is wrong, with its line) of each bad record.
        damaged: files of finished prompts that could not be read, and why; their prompts were run
            again.
        sites, analyses: the rows and the columns of the site table.
        readout, units: of all prompts; 'margin(doc − pre)' if each prompt has its own, and every
            unit that occurs (nats where an answer has several tokens).
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

    @property
    def done(self) -> int:
        """How many prompts have numbers."""
        return self.records - len(self.errors)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site: `pd.read_parquet(path)`."""
        return pd.read_parquet(self.path)

    def prompts(self) -> pd.DataFrame:
        """One row per record: `pd.read_parquet(prompts_path)`."""
        return pd.read_parquet(self.prompts_path)

    def attribution(self, analysis: str) -> Attribution:
        """One analysis of all prompts without an error, with its tables, sums and figures.

        Its values are in several units if `units` names several.

        Args:
            analysis: one of `analyses`.

        Raises:
            SweepError: the analysis was not run, or every prompt has an error.
        """
        if analysis not in self.analyses or not self.done:
            raise SweepError(
                f"{analysis!r} of {self.done} prompts: the sweep holds {', '.join(self.analyses)}."
            )
        column = pd.read_parquet(self.path, columns=[analysis])[analysis].to_numpy(copy=True)
        prompts = self.prompts()
        prompts = prompts[prompts["error"].isna()]
        base, adapted = (
            torch.tensor(prompts[name].tolist(), dtype=torch.float64)
            for name in ("base", "adapted")
        )
        return Attribution(
            values=torch.from_numpy(column).view(-1, len(self.sites)),
            by=(),
            sites=self.sites,
            heads=(0,) * len(self.sites),
            base=base,
            adapted=adapted,
            str_tokens=tuple((text,) for text in prompts["prompt"]),
            readout=self.readout,
            units=self.units,
            method=analysis.removesuffix("_at_1"),
            at=ANALYSES[analysis].at,
            meta=self.meta,
        )

    def plot(self, analysis: str | None = None) -> Figure:
        """Heatmap layer × kind of module of one analysis: its mean over prompts.

        Args:
            analysis: one of `analyses`; None for the first.
        """
        return self.attribution(analysis or self.analyses[0]).plot()

    def __repr__(self) -> str:
        lines = [
            f"SweepResult: {self.done} of {self.records} prompts × {len(self.sites)} sites, "
            f"{', '.join(self.analyses)} of {self.readout} in {self.units}; {self.flips} flip, "
            f"{len(self.errors)} with errors",
            f"  {self.path}",
            f"  {self.prompts_path}",
        ]
        return "\n".join(lines)
