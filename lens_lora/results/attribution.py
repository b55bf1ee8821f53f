"""Attributions: one number per prompt and site (and position, head, rank), frozen and labelled.

A result carries its own check: the exact shift g(1) − g(0) stands beside the values, and what they
leave of it is the property `remainder`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lens_lora.errors import ArgumentError, LensLoraError
from lens_lora.hooked.sites import Site

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from lens_lora.show.figures.tokens import TokenView

__all__ = ["Attribution", "Quadrature"]

_FORMAT = "lens_lora attribution 1"


@dataclasses.dataclass(frozen=True)
class Quadrature:
    """How a path integral was taken, and whether it met what was asked.

    Attributes:
        nodes: Gauss–Legendre nodes of the last rule.
        tol: the completeness asked for, as a share of the shift.
        error: the largest completeness error reached over prompts, as a share of its shift.
        site_change: the largest change of any site's value from the rule of half the nodes to the
            last, as a share of its prompt's shift: completeness does not bound a site's error.
        met: whether error ≤ tol.
        note: what stands in the way of tol, where something does.
    """

    nodes: int
    tol: float
    error: float
    site_change: float
    met: bool
    note: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Attribution:
    """What each site contributes to a readout, in the readout's units.

    Attributes:
        values: [batch, site, *by]. Slots that do not exist (padding, ranks beyond a site's own)
            hold zero, and tables leave them out. On the head axis the last slot is for sites
            outside attention.
        by: the axes after site, in the order position, head, rank.
        sites: one per entry of the site axis.
        heads: how many heads each site has (0 outside attention).
        base, adapted: [batch], the readout at g(0) and g(1), exact.
        str_tokens: each prompt's tokens.
        readout, units: what was read.
        method, at: 'first_order', and the gate value at which it was taken.
        meta: model, adapter, dtype and versions.
        quadrature: of a path integral, how it was taken.
    """

    values: Float[Tensor, "batch site *by"]
    by: tuple[str, ...]
    sites: tuple[Site, ...]
    heads: tuple[int, ...]
    base: Float[Tensor, "batch"]
    adapted: Float[Tensor, "batch"]
    str_tokens: tuple[tuple[str, ...], ...]
    readout: str
    units: str
    method: str
    at: float
    meta: Mapping[str, str]
    quadrature: Quadrature | None = None

    @property
    def shift(self) -> Float[Tensor, "batch"]:
        """g(1) − g(0), exact."""
        return self.adapted - self.base

    @property
    def per_site(self) -> Float[Tensor, "batch site"]:
        """The values summed over everything but prompt and site."""
        return self.values.flatten(2).sum(2) if self.by else self.values

    @property
    def total(self) -> Float[Tensor, "batch"]:
        """Σ_l a_l."""
        return self.per_site.sum(1)

    @property
    def remainder(self) -> Float[Tensor, "batch"]:
        """R_y = g(1) − g(0) − Σ_l a_l (note, §4)."""
        return self.shift - self.total

    @property
    def nodes(self) -> int:
        """Quadrature nodes of a path integral; 1 for a derivative at one point."""
        return 1 if self.quadrature is None else self.quadrature.nodes

    @property
    def completeness_error(self) -> Float[Tensor, "batch"]:
        """|g(1) − g(0) − Σ_l c_l|: zero for an exact path integral."""
        return self.remainder.abs()

    def sum(self, group: Literal["site", "layer", "kind"]) -> pd.DataFrame:
        """Values summed by site, layer or kind of module: one row a group, one column a prompt."""
        labels = {
            "site": [s.name for s in self.sites],
            "layer": [s.layer for s in self.sites],
            "kind": [s.kind for s in self.sites],
        }
        if group not in labels:
            raise ArgumentError(f"group {group!r}: expected 'site', 'layer' or 'kind'.")
        frame = pd.DataFrame(self.per_site.T.double().cpu().numpy(), index=labels[group])
        summed = cast(pd.DataFrame, frame.groupby(level=0, sort=False).sum())
        return summed.rename_axis(index=group, columns="prompt")

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k sites of largest |value|, with their share of the shift.

        Args:
            prompt: an index; without it, the mean over prompts.
        """
        rows = slice(None) if prompt is None else slice(prompt, prompt + 1)
        values, shift = self.per_site[rows].double().mean(0), self.shift[rows].double().mean()
        order = values.abs().argsort(descending=True)[:k].tolist()
        return pd.DataFrame(
            {
                "site": [self.sites[i].name for i in order],
                "module": [self.sites[i].module for i in order],
                "layer": [self.sites[i].layer for i in order],
                "kind": [self.sites[i].kind for i in order],
                "value": [float(values[i]) for i in order],
                "share": [float(values[i] / shift) for i in order],
            }
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site and existing part: labels, token, value, share of the shift."""
        index = self._existing().nonzero()
        columns: dict[str, Any] = {"prompt": index[:, 0].tolist()}
        sites = [self.sites[i] for i in index[:, 1].tolist()]
        for field in ("name", "module", "layer", "kind"):
            columns["site" if field == "name" else field] = [getattr(s, field) for s in sites]
        for axis, name in enumerate(self.by, start=2):
            columns[name] = index[:, axis].tolist()
        if "position" in self.by:
            where = zip(columns["prompt"], columns["position"], strict=True)
            columns["token"] = [self.str_tokens[p][i] for p, i in where]
        if "head" in self.by:
            none = self.values.shape[2 + self.by.index("head")] - 1
            columns["head"] = [pd.NA if h == none else h for h in columns["head"]]
        values = self.values.cpu()[tuple(index.T)].double()
        columns["value"] = values.tolist()
        columns["share"] = (values / self.shift.double().cpu()[index[:, 0]]).tolist()
        frame = pd.DataFrame(columns)
        return frame.astype({"head": "Int64"}) if "head" in self.by else frame

    def _existing(self) -> Tensor:
        """[batch, site, *by] bool: slots that a prompt or site really has."""
        exists = torch.ones(self.values.shape, dtype=torch.bool)
        for axis, name in enumerate(self.by, start=2):
            size = self.values.shape[axis]
            shape = [1] * self.values.ndim
            shape[axis] = size
            slots = torch.arange(size)
            if name == "position":
                lengths = torch.tensor([len(t) for t in self.str_tokens])
                mask, shape[0] = slots < lengths[:, None], len(lengths)
            elif name == "rank":
                ranks = torch.tensor([s.rank for s in self.sites])
                mask, shape[1] = slots < ranks[:, None], len(ranks)
            else:
                heads = torch.tensor(self.heads)
                outside = (heads[:, None] == 0) & (slots == size - 1)
                mask, shape[1] = (slots < heads[:, None]) | outside, len(heads)
            exists &= mask.view(shape)
        return exists | (self.values.cpu() != 0)

    def plot(self, prompt: int | None = None) -> Figure:
        """Heatmap layer × kind of module, hover naming each site; mean over prompts by default."""
        from lens_lora.show.figures.attribution import site_heatmap

        return site_heatmap(self, prompt)

    def plot_positions(self, prompt: int = 0) -> Figure:
        """Heatmap layer × position over the prompt's tokens; needs by=('position', …)."""
        from lens_lora.show.figures.attribution import position_heatmap

        return position_heatmap(self, prompt)

    def token_view(self, prompt: int = 0) -> TokenView:
        """The prompt's tokens coloured by what each contributes, drawn by circuitsvis.

        Raises:
            ArgumentError: the attribution was not split by position, or has no such prompt.
            LensLoraError: circuitsvis is not installed.
        """
        from lens_lora.show.figures.tokens import token_view

        return token_view(self, prompt)

    def save(self, path: str | Path) -> Path:
        """One safetensors file; labels, readout, prompt and versions as JSON in its header."""
        tensors = {"values": self.values, "base": self.base, "adapted": self.adapted}
        labels = {
            "by": self.by,
            "sites": [dataclasses.asdict(s) for s in self.sites],
            "heads": self.heads,
            "str_tokens": self.str_tokens,
            "readout": self.readout,
            "units": self.units,
            "method": self.method,
            "at": self.at,
            "meta": dict(self.meta),
            "quadrature": self.quadrature and dataclasses.asdict(self.quadrature),
        }
        path = Path(path)
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
            str(path),
            metadata={"format": _FORMAT, "labels": json.dumps(labels)},
        )
        return path

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
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
                "written by Attribution.save?"
            )
        labels = json.loads(metadata["labels"])
        quadrature = labels.get("quadrature")
        return cls(
            **tensors,
            by=tuple(labels["by"]),
            sites=tuple(Site(**s) for s in labels["sites"]),
            heads=tuple(labels["heads"]),
            str_tokens=tuple(tuple(row) for row in labels["str_tokens"]),
            readout=labels["readout"],
            units=labels["units"],
            method=labels["method"],
            at=labels["at"],
            meta=labels["meta"],
            quadrature=quadrature and Quadrature(**quadrature),
        )

    def __repr__(self) -> str:
        from lens_lora.show.tables.attribution import attribution_text

        return attribution_text(self)

    def _repr_html_(self) -> str:
        from lens_lora.show.page.notebook import attribution_html

        return attribution_html(self)
