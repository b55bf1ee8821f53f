"""Effects of real interventions on sites or groups of sites: one number per prompt and group."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lens_lora.errors import ArgumentError, LensLoraError
from lens_lora.hooked.sites import Groups, Site, indicator
from lens_lora.results.attribution import Attribution

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Effects"]

_FORMAT = "lens_lora effects 1"


@dataclasses.dataclass(frozen=True, eq=False)
class Effects:
    """What intervening on each group of sites does to a readout, exactly, in its units.

    Attributes:
        values: [batch, group]. Positive where the group raises the readout.
        groups: {name: indices into sites}; single sites carry their own name.
        sites: the adapted sites of the lens.
        base, adapted: [batch], g(0) and g(1).
        how: 'add_one', g(e_G) − g(0), or 'leave_one_out', g(1) − g(1 − e_G).
        meta: model, adapter, dtype and versions.
    """

    values: Float[Tensor, "batch group"]
    groups: Groups
    sites: tuple[Site, ...]
    base: Float[Tensor, "batch"]
    adapted: Float[Tensor, "batch"]
    str_tokens: tuple[tuple[str, ...], ...]
    readout: str
    units: str
    how: str
    meta: Mapping[str, str]

    @property
    def shift(self) -> Float[Tensor, "batch"]:
        """g(1) − g(0), exact."""
        return self.adapted - self.base

    @property
    def share(self) -> Float[Tensor, "batch group"]:
        """The effects as shares of the shift."""
        return self.values / self.shift[:, None]

    @property
    def interaction(self) -> Float[Tensor, "batch"]:
        """g(1) − g(0) − Σ effects: of the shift, what no group does on its own.

        Raises:
            ArgumentError: the groups overlap or leave sites out, so that their sum means nothing.
        """
        members = sorted(index for of in self.groups.values() for index in of)
        if members != list(range(len(self.sites))):
            raise ArgumentError(
                "the groups do not hold every site exactly once, so their sum is not to be "
                "compared with the shift; use group='site', 'layer' or 'kind' over all sites."
            )
        return self.shift - self.values.sum(1)

    @property
    def is_by_site(self) -> bool:
        """Whether the groups are the single sites, all of them."""
        return list(self.groups.values()) == [(i,) for i in range(len(self.sites))]

    def summed(self, attribution: Attribution) -> Float[Tensor, "batch group"]:
        """An attribution of the same sites, summed over each group.

        Raises:
            ArgumentError: it is of other sites.
        """
        names = [site.name for site in self.sites]
        if [site.name for site in attribution.sites] != names:
            raise ArgumentError(
                f"the attribution is of {len(attribution.sites)} sites, the effects of {len(names)}"
                "; compute both with the same lens."
            )
        rows = indicator(self.groups, len(names)).to(attribution.per_site)
        return attribution.per_site @ rows.T

    def attribution(self) -> Attribution:
        """The effects of single sites, all or some, as an attribution: heatmap, table and file.

        Raises:
            ArgumentError: the effects are of groups of several sites.
        """
        if any(len(of) > 1 for of in self.groups.values()):
            raise ArgumentError("effects of groups are no attribution to sites; use group='site'.")
        sites = tuple(self.sites[index] for (index,) in self.groups.values())
        return Attribution(
            values=self.values,
            by=(),
            sites=sites,
            heads=(0,) * len(sites),
            base=self.base,
            adapted=self.adapted,
            str_tokens=self.str_tokens,
            readout=self.readout,
            units=self.units,
            method=self.how,
            at=float(self.how == "leave_one_out"),
            meta=self.meta,
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and group: number of sites, effect, share of the shift."""
        batch, count = self.values.shape
        return pd.DataFrame(
            {
                "prompt": np.repeat(np.arange(batch), count),
                "group": list(self.groups) * batch,
                "sites": [len(of) for of in self.groups.values()] * batch,
                "effect": self.values.double().cpu().flatten().numpy(),
                "share": self.share.double().cpu().flatten().numpy(),
            }
        )

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k groups of largest |effect|; mean over prompts, or one prompt."""
        rows = slice(None) if prompt is None else slice(prompt, prompt + 1)
        values, shift = self.values[rows].double().mean(0), self.shift[rows].double().mean()
        order, names = values.abs().argsort(descending=True)[:k].tolist(), list(self.groups)
        return pd.DataFrame(
            {
                "group": [names[i] for i in order],
                "effect": [float(values[i]) for i in order],
                "share": [float(values[i] / shift) for i in order],
            }
        )

    def plot(self, prompt: int | None = None) -> Figure:
        """Heatmap layer × kind of single sites, bars of groups; mean over prompts by default."""
        if all(len(of) == 1 for of in self.groups.values()):
            return self.attribution().plot(prompt)
        from lens_lora.show.figures.effects import group_bars

        return group_bars(self, prompt)

    def save(self, path: str | Path) -> Path:
        """One safetensors file; labels, readout, prompt and versions as JSON in its header."""
        tensors = {"values": self.values, "base": self.base, "adapted": self.adapted}
        labels = {
            "groups": self.groups,
            "sites": [dataclasses.asdict(s) for s in self.sites],
            "str_tokens": self.str_tokens,
            "readout": self.readout,
            "units": self.units,
            "how": self.how,
            "meta": dict(self.meta),
        }
        path = Path(path)
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
            str(path),
            metadata={"format": _FORMAT, "labels": json.dumps(labels)},
        )
        return path

    @classmethod
    def load(cls, path: str | Path) -> Effects:
        """What `save` wrote.

        Raises:
            LensLoraError: another kind of file.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise LensLoraError(f"{path}: not a safetensors file ({error}).") from error
        if metadata.get("format") != _FORMAT:
            raise LensLoraError(
                f"{path}: its format is {metadata.get('format')!r}, expected {_FORMAT!r}; was it "
                "written by Effects.save?"
            )
        labels = json.loads(metadata["labels"])
        return cls(
            **tensors,
            groups={name: tuple(of) for name, of in labels["groups"].items()},
            sites=tuple(Site(**s) for s in labels["sites"]),
            str_tokens=tuple(tuple(row) for row in labels["str_tokens"]),
            readout=labels["readout"],
            units=labels["units"],
            how=labels["how"],
            meta=labels["meta"],
        )

    def __repr__(self) -> str:
        return f"Effects of {self.how} on {self.readout}:\n{self.top(5).to_string()}"
